//go:build clients

package clients

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// inContainers are programs that find App Service's endpoint, as modules in containers of that name.
func inContainers(t *testing.T) (all []program) {
	t.Helper()
	for _, p := range programs(t) {
		if !p.imds {
			all = append(all, p)
		}
	}
	return all
}

// modulesConfig grants each module one resource, every second one as a user-assigned identity.
func modulesConfig(engine string, modules []string) string {
	text := fmt.Sprintf("[source]\nkind = \"simulated\"\n\n[callers]\nengine = %q\n\n"+
		"[[identity]]\nname = \"device\"\ndefault = true\n\n[[identity]]\nname = \"vision\"\nclient_id = %q\n", engine,
		visionID)
	for i, module := range modules {
		text += fmt.Sprintf("\n[[grant]]\ncaller = { module = %q }\nidentity = %q\nresources = [%q]\n",
			module, identityAt(i), moduleResource(module))
	}
	return text
}

func identityAt(i int) string { return []string{"device", "vision"}[i%2] }

func moduleResource(module string) string { return "https://" + module + ".example.net" }

// importBase makes an image with nothing in it but places for this machine's /usr, which the clients are in.
func importBase(e *harness.Engine) {
	e.T.Helper()
	root := e.T.TempDir()
	for _, folder := range []string{"app", "etc", "root", "run/percept", "tmp", "usr"} {
		must(e.T, os.MkdirAll(filepath.Join(root, folder), 0o755))
	}
	for _, folder := range []string{"bin", "lib", "lib64", "sbin"} {
		must(e.T, os.Symlink("usr/"+folder, filepath.Join(root, folder)))
	}
	archive, err := exec.Command("tar", "-C", root, "-c", ".").Output()
	must(e.T, err)
	load := exec.Command(e.CLI[0], append(e.CLI[1:len(e.CLI):len(e.CLI)], "import", "-", "base:1")...)
	load.Stdin = bytes.NewReader(archive)
	if out, err := load.CombinedOutput(); err != nil {
		e.T.Fatalf("%v: %s", err, out)
	}
}

// awaitGranted waits until the daemon's log tells of a first token of that identity for a module in its container. It
// may come a moment after the token.
func awaitGranted(t *testing.T, d *harness.Daemon, module, identity string) {
	t.Helper()
	all := []string{"token granted for the first time", fmt.Sprintf(`"module": %q`, module), `"container": `,
		fmt.Sprintf(`"identity": %q`, identity)}
	harness.Until(t, "the log to have "+strings.Join(all, ", "), d.Ended, func() bool {
		for line := range strings.Lines(d.Text()) {
			if !slices.ContainsFunc(all, func(part string) bool { return !strings.Contains(line, part) }) {
				return true
			}
		}
		return false
	})
}

// TestClientsInContainers has each client, unmodified, run under perceptctl exec in a container without a network.
func TestClientsInContainers(t *testing.T) {
	t.Run("Docker", func(t *testing.T) { testClientsIn(t, harness.StartDocker(t)) })
	t.Run("Podman", func(t *testing.T) { testClientsIn(t, harness.StartPodman(t)) })
}

func testClientsIn(t *testing.T, e *harness.Engine) {
	importBase(e)
	all := inContainers(t)
	var modules []string
	for _, p := range all {
		modules = append(modules, p.slug)
	}
	d := harness.LaunchDaemon(t, modulesConfig(e.Socket, modules))
	for i, p := range all {
		t.Run(p.slug, func(t *testing.T) {
			p.engine = e
			a := p.start(t, filepath.Dir(d.Module(p.slug)), "")
			got := a.ask(moduleResource(p.slug))
			if got.Token == "" {
				t.Fatal(got.Error)
			}
			want := map[string]string{"device": deviceID, "vision": visionID}[identityAt(i)]
			if c := harness.Claims(t, got.Token); c["appid"] != want {
				t.Errorf("a token of %v", c["appid"])
			}
			awaitGranted(t, d, p.slug, identityAt(i))
			if got := a.ask(moduleResource("another")); got.Token != "" ||
				!strings.Contains(got.Error, "no [[grant]]") {
				t.Errorf("what was not granted: %v", got)
			}
		})
	}
}

// sample is a program of docs/modules, as it is in its container.
type sample struct {
	folder string
	files  []string // of the program, in /app
	more   []string // mounts
}

// TestClientsSamples starts each sample of docs/modules in a container with its own create options, without a network.
func TestClientsSamples(t *testing.T) {
	docs, err := filepath.Abs("../../../../docs/modules")
	must(t, err)
	nodeModules, err := filepath.Abs("../../../../bin/clients/node_modules")
	must(t, err)
	goModule := filepath.Join(t.TempDir(), "module")
	build := exec.Command("go", "build", "-o", goModule, ".")
	build.Dir, build.Env = filepath.Join(docs, "go"), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	samples := []sample{
		{"python", []string{filepath.Join(docs, "python/app.py")}, nil},
		{"node", []string{filepath.Join(docs, "node/app.js")}, []string{nodeModules + ":/app/node_modules:ro"}},
		{"go", []string{goModule}, nil},
		{"shell", []string{filepath.Join(docs, "shell/app.sh")}, nil},
	}
	var modules []string
	for _, s := range samples {
		modules = append(modules, s.folder)
	}
	e := harness.StartDocker(t)
	importBase(e)
	d := harness.LaunchDaemon(t, modulesConfig(e.Socket, modules))
	for i, s := range samples {
		t.Run(s.folder, func(t *testing.T) {
			s.agrees(t, docs)
			status, out := runSample(t, e, d, s, docs, moduleResource(s.folder))
			want := "a token for " + moduleResource(s.folder) + ", to be used for 35 minutes"
			if status != 0 || !strings.Contains(out, want) {
				t.Errorf("exit status %d: %s", status, out)
			}
			awaitGranted(t, d, s.folder, identityAt(i))
			status, out = runSample(t, e, d, s, docs, moduleResource("another"))
			if status != 1 || !strings.Contains(out, "no token for") || !strings.Contains(out, "no [[grant]]") {
				t.Errorf("what was not granted: exit status %d: %s", status, out)
			}
			t.Log(out)
		})
	}
}

// createOptions are IoT Edge's, which are those of Docker's API.
type createOptions struct {
	Image, Entrypoint, Cmd, Env any
	HostConfig                  struct {
		Binds       []string
		NetworkMode string
	}
}

func readOptions(t *testing.T, file string) (o createOptions) {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	must(t, json.Unmarshal(text, &o))
	return o
}

// agrees looks for the create options' command in the container file, and for all of the sample's files in its page.
func (s sample) agrees(t *testing.T, docs string) {
	t.Helper()
	command, err := json.Marshal(readOptions(t, filepath.Join(docs, s.folder, "create-options.json")).Cmd)
	must(t, err)
	page, err := os.ReadFile(filepath.Join(docs, s.folder+".md"))
	must(t, err)
	for _, name := range []string{"Containerfile", "create-options.json", "app.py", "app.js", "main.go", "app.sh"} {
		text, err := os.ReadFile(filepath.Join(docs, s.folder, name))
		if err != nil { // of another language
			continue
		}
		if !bytes.Contains(page, text) {
			t.Errorf("%s.md shows another %s", s.folder, name)
		}
		packed := strings.ReplaceAll(string(text), `", "`, `","`)
		if name == "Containerfile" && !strings.Contains(packed, "CMD "+string(command)) {
			t.Errorf("%s/Containerfile has another command than the create options: %s", s.folder, command)
		}
	}
}

// runSample creates a container through the engine's API as IoT Edge does, and returns its exit status and output.
func runSample(t *testing.T, e *harness.Engine, d *harness.Daemon, s sample, docs, resource string) (int, string) {
	t.Helper()
	o := readOptions(t, filepath.Join(docs, s.folder, "create-options.json"))
	o.Image, o.Env, o.HostConfig.NetworkMode = "base:1", []string{"RESOURCE=" + resource, "PATH=/usr/bin:/bin"}, "none"
	here := strings.NewReplacer("/run/percept/modules/vision:", filepath.Dir(d.Module(s.folder))+":",
		"/usr/bin/perceptctl:", harness.Binary(t, "perceptctl")+":")
	for i, bind := range o.HostConfig.Binds {
		o.HostConfig.Binds[i] = here.Replace(bind)
	}
	o.HostConfig.Binds = append(append(o.HostConfig.Binds, "/usr:/usr:ro"), s.more...)
	for _, file := range s.files {
		o.HostConfig.Binds = append(o.HostConfig.Binds, file+":/app/"+filepath.Base(file)+":ro")
	}
	body, err := json.Marshal(o)
	must(t, err)
	const create = "http://engine/containers/create?name="
	response, err := harness.Over(t, e.Socket).Post(create+s.folder, "application/json", bytes.NewReader(body))
	must(t, err)
	defer response.Body.Close()
	if response.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(response.Body)
		t.Fatalf("%s: %s", response.Status, text)
	}
	attach := append(e.CLI[1:len(e.CLI):len(e.CLI)], "start", "-a", s.folder)
	out, err := exec.Command(e.CLI[0], attach...).CombinedOutput()
	e.Must("rm", "-f", s.folder)
	return harness.ExitStatus(err), string(out)
}
