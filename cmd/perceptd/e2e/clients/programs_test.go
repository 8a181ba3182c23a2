//go:build clients

package clients

import (
	"bufio"
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// answer is what a client has in hand.
type answer struct {
	Token string `json:"token"`
	Error string `json:"error"`
}

// program is a client as modules use it.
type program struct {
	name, slug  string
	environment []string
	stays       []string // a command that is told resources on its standard input; or
	script      string   // of a shell, which is run for each resource, its argument
	read        func(out []byte) answer
	imds        bool // it knows the instance metadata service's address and nothing else
	cached      bool // it keeps a token and does not ask again
	retries     int  // the most requests that it makes for one token
	chains      bool // of several credentials, of which the managed identity is one

	engine *harness.Engine // nil: it runs in a network namespace of its own, not in a container
}

const (
	python   = "/usr/bin/python3"
	library  = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
	curlHere = `curl -sS -H "X-IDENTITY-HEADER: $IDENTITY_HEADER" -G "$IDENTITY_ENDPOINT" -d api-version=2019-08-01 \
	--data-urlencode "resource=$1" ${CLIENT_ID:+-d client_id=$CLIENT_ID}`
	azHere = `az account get-access-token --only-show-errors --resource "$1"`
)

// programs returns the clients that can be had here.
func programs(t *testing.T) []program {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	data, err := filepath.Abs("testdata")
	must(t, err)
	modules, err := filepath.Abs("../../../../bin/clients/node_modules")
	must(t, err)
	if _, err := os.Stat(modules); err != nil {
		t.Fatalf("%v: make test-clients installs it", err)
	}
	node := []string{"NODE_PATH=" + modules}
	all := []program{
		{name: "Go azidentity, ManagedIdentityCredential", slug: "go", stays: []string{self},
			environment: []string{goVariable + "=managed"}},
		{name: "Go azidentity, DefaultAzureCredential", slug: "go-default", stays: []string{self},
			environment: []string{goVariable + "=default"}, chains: true},
		{name: "Node @azure/identity, ManagedIdentityCredential", slug: "node", environment: node,
			stays: []string{"node", filepath.Join(data, "client.js"), "managed"}},
		{name: "Node @azure/identity, DefaultAzureCredential", slug: "node-default", environment: node, chains: true,
			stays: []string{"node", filepath.Join(data, "client.js"), "default"}},
		{name: "Python azure-identity, ManagedIdentityCredential", slug: "python",
			stays: []string{python, filepath.Join(data, "client.py"), "managed"}},
		{name: "Python azure-identity, DefaultAzureCredential", slug: "python-default", chains: true,
			stays: []string{python, filepath.Join(data, "client.py"), "default"}},
	}
	for i := range all {
		all[i].cached, all[i].retries = true, 4
		if all[i].slug == "node-default" {
			all[i].retries = 6
		}
	}
	return append(all,
		program{name: "curl", slug: "curl", script: curlHere, read: readCurl, retries: 1},
		program{name: "Azure CLI", slug: "az", script: azHere, read: readAzure, retries: 13, imds: true})
}

func readCurl(out []byte) answer {
	var body struct {
		Token       string `json:"access_token"`
		Description string `json:"error_description"`
	}
	if err := json.Unmarshal(out, &body); err != nil {
		return answer{Error: fmt.Sprintf("%v: %s", err, out)}
	}
	return answer{body.Token, body.Description}
}

func readAzure(out []byte) answer {
	var body struct{ AccessToken string }
	if err := json.Unmarshal(out, &body); err != nil {
		return answer{Error: string(out)}
	}
	return answer{Token: body.AccessToken}
}

// counter stands before a daemon's socket and counts what clients ask, by resource.
type counter struct {
	socket string

	mu    sync.Mutex // protects what follows
	calls map[string]int
	first map[string]time.Time
}

func newCounter(t *testing.T, d *harness.Daemon) *counter {
	t.Helper()
	c := &counter{socket: filepath.Join(d.Dir, "counter.sock"), calls: make(map[string]int),
		first: make(map[string]time.Time)}
	transport := harness.Over(t, d.Token()).Transport
	proxy := &httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host = "http", "daemon" // the Host header stays the client's
	}}
	l, err := net.Listen("unix", c.socket)
	must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.count(r.URL.Query().Get("resource"))
		proxy.ServeHTTP(w, r)
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-ended
	})
	return c
}

func (c *counter) count(resource string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[resource] == 0 {
		c.first[resource] = time.Now()
	}
	c.calls[resource]++
}

// of returns the calls for a resource so far, and when the first one came.
func (c *counter) of(resource string) (int, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[resource], c.first[resource]
}

// asker is a client that runs in a network namespace of its own.
type asker struct {
	program
	t        *testing.T
	clientID string
	socket   string
	home     string
	more     []string // environment
	said     *bufio.Reader
	stdin    io.Writer
}

// start makes a client ready, as system-assigned identity or with a client ID.
func (p program) start(t *testing.T, socket, clientID string, more ...string) *asker {
	t.Helper()
	a := &asker{program: p, t: t, clientID: clientID, socket: socket, home: t.TempDir(), more: more}
	if p.imds {
		a.login()
	}
	if p.stays == nil {
		return a
	}
	command := p.stays
	if strings.HasPrefix(p.slug, "go") && len(more) > 0 { // by the back end's clock
		command = []string{p.stays[0], "-test.run=^TestAzidentityByAFastClock$"}
	}
	if clientID != "" && !p.chains && !strings.HasPrefix(p.slug, "go") {
		command = append(command[:len(command):len(command)], clientID)
	}
	c := a.command(command)
	in, err := c.StdinPipe()
	must(t, err)
	out, err := c.StdoutPipe()
	must(t, err)
	var trouble bytes.Buffer
	c.Stderr = &trouble
	must(t, c.Start())
	t.Cleanup(func() {
		_ = in.Close() // which ends it
		_ = c.Wait()
		if t.Failed() {
			t.Logf("%s said %s", p.name, trouble.String())
		}
	})
	a.stdin, a.said = in, bufio.NewReader(out)
	a.line()
	return a
}

// command is one of the client's in a container or a namespace of its own.
func (a *asker) command(command []string) *exec.Cmd {
	a.t.Helper()
	if a.engine != nil {
		return a.contained(command)
	}
	self, err := os.Executable()
	must(a.t, err)
	box := a.socket
	if !a.imds {
		box = "closed"
		command = append([]string{harness.Binary(a.t, "perceptctl"), "exec", "--socket", a.socket, "--"}, command...)
	}
	c := exec.Command(self, command...)
	c.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=" + a.home, boxVariable + "=" +
		box,
		"AZURE_CORE_COLLECT_TELEMETRY=0", "CLIENT_ID=" + a.clientID}, append(a.environment, a.more...)...)
	if a.clientID != "" && a.chains {
		c.Env = append(c.Env, "AZURE_CLIENT_ID="+a.clientID)
	}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return c
}

// contained is a command of the client's in a container of its name, which has no network.
func (a *asker) contained(command []string) *exec.Cmd {
	a.t.Helper()
	mounts := []string{a.socket + ":/run/percept:ro", harness.Binary(a.t, "perceptctl") + ":/perceptctl:ro",
		"/usr:/usr:ro"}
	for _, folder := range []string{"testdata", "../../../../bin/clients/node_modules"} {
		folder, err := filepath.Abs(folder)
		must(a.t, err)
		mounts = append(mounts, folder+":"+folder+":ro")
	}
	self, err := os.Executable()
	must(a.t, err)
	mounts = append(mounts, self+":"+self+":ro")
	args := []string{"run", "--rm", "-i", "--network", "none", "--name", a.slug, "--entrypoint", "/perceptctl"}
	args = append(args, a.engine.Limits()...)
	for _, mount := range mounts {
		args = append(args, "-v", mount)
	}
	for _, variable := range append([]string{"PATH=/usr/bin:/bin", "CLIENT_ID=" + a.clientID},
		append(a.environment, a.more...)...) {
		args = append(args, "-e", variable)
	}
	cli := a.engine.CLI
	args = append(append(cli[1:len(cli):len(cli)], args...), "base:1", "exec", "--")
	return exec.Command(cli[0], append(args, command...)...)
}

// login has Azure CLI log in, which finds a cloud whose Resource Manager knows no subscriptions.
func (a *asker) login() {
	a.t.Helper()
	server := httptest.NewTLSServer(nil) // which has the certificate that standInARM has
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	server.Close()
	folder := filepath.Join(a.home, ".azure")
	must(a.t, os.Mkdir(folder, 0o700))
	for name, text := range map[string]string{
		"config": "[cloud]\nname = Simulated\n",
		"clouds.config": "[Simulated]\nendpoint_resource_manager = https://" + armAddress + "\n" +
			"endpoint_active_directory = https://login.microsoftonline.com\nendpoint_active_directory_resource_id = " +
			armURI + "\n",
		"ca.pem": string(ca),
	} {
		must(a.t, os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600))
	}
	a.more = append(a.more, "REQUESTS_CA_BUNDLE="+filepath.Join(folder, "ca.pem"))
	login := []string{"az", "login", "--identity", "--allow-no-subscriptions", "--only-show-errors"}
	if a.clientID != "" {
		login = append(login, "--username", a.clientID)
	}
	if out, err := a.command(login).CombinedOutput(); err != nil {
		a.t.Fatalf("az login: %v: %s", err, out)
	}
}

// ask gets a token for a resource.
func (a *asker) ask(resource string) answer {
	a.t.Helper()
	if a.stays != nil {
		if _, err := fmt.Fprintln(a.stdin, resource); err != nil {
			a.t.Fatalf("%s: %v", a.name, err)
		}
		return a.line()
	}
	command := []string{"sh", "-c", a.script, "sh", resource}
	if a.imds && os.Getenv("CLIENTS_DOCS") == "" { // Azure CLI goes on for minutes
		command = append([]string{"timeout", "45"}, command...)
	}
	c := a.command(command)
	out, _ := c.CombinedOutput() // what it printed tells
	return a.read(out)
}

func (a *asker) line() answer {
	a.t.Helper()
	line, err := a.said.ReadBytes('\n')
	if err != nil {
		a.t.Fatalf("%s: %v", a.name, err)
	}
	var said answer
	if err := json.Unmarshal(line, &said); err != nil {
		a.t.Fatalf("%s said %s: %v", a.name, strings.TrimSpace(string(line)), err)
	}
	return said
}
