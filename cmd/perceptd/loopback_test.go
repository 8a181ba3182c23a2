package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// withLoopback adds a loopback listener to a configuration.
func withLoopback(config, address string) string {
	return fmt.Sprintf("%s\n[loopback]\naddress = %q\n", config, address)
}

// freeAddress returns an address that nobody listens on now.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

// env runs perceptctl env and returns the variables.
func (d *daemonProcess) env(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := d.tool(t, append([]string{"env", "--format", "json"}, args...)...)
	must(t, err)
	var told struct{ Set map[string]string }
	must(t, json.Unmarshal([]byte(out), &told))
	var all []string
	for name, value := range told.Set {
		all = append(all, name+"="+value)
	}
	return all
}

// tool runs perceptctl and returns its standard output.
func (d *daemonProcess) tool(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := exec.Command(binary(t, "perceptctl"), append([]string{"--socket", d.token()}, args...)...)
	var said strings.Builder
	c.Stderr = &said
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, &said)
	}
	return string(out), err
}

func valueOf(variables []string, name string) string {
	for _, v := range variables {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

// askTCP asks for a token as App Service's clients do, with that secret, and returns the status and the body.
func askTCP(t *testing.T, address, secret string) (int, string, error) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET %s?api-version=2019-08-01&resource=%s HTTP/1.1\r\nHost: %s\r\nX-IDENTITY-HEADER: %s\r\nConnection: close\r\n\r\n",
		api.PathAppServiceToken, perceptdtest.VaultURI, address, secret)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// The real azidentity gets its tokens with nothing but the variables that perceptctl env prints, each caller its own, and
// no secret is printed anywhere else.
func TestLoopbackServesUnmodifiedSDKs(t *testing.T) {
	t.Parallel()
	at := freeAddress(t)
	d := launchDaemon(t, withLoopback(simulatedFor("vision"), at))
	mine := d.env(t)
	vision := d.env(t, "--module", "vision")
	for _, row := range []struct {
		environment []string
		client      string
	}{{mine, ""}, {vision, "00000000-0000-0000-0000-000000000001"}} {
		tokens, err := sdk(overTCP, row.environment, perceptdtest.VaultURI)
		if err != nil {
			t.Fatal(err)
		}
		if id, _ := claims(t, tokens[0])["appid"].(string); row.client != "" && id != row.client {
			t.Errorf("the token is %s's, want %s", id, row.client)
		}
	}
	printed := d.text()
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"grants"}, {"doctor"}, {"whoami"}} {
		out, _ := d.tool(t, args...) // doctor finds fault with this device
		printed += out
	}
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", d.cmd.Process.Pid))
	must(t, err)
	must(t, d.cmd.Process.Signal(syscall.SIGQUIT))
	<-d.ended
	printed += d.text() + string(arguments)
	for _, variables := range [][]string{mine, vision} {
		if secret := valueOf(variables, "IDENTITY_HEADER"); len(secret) != 64 || strings.Contains(printed, secret) {
			t.Errorf("a secret of %d digits was printed", len(secret))
		}
	}
	if !strings.Contains(printed, at+", callers are known by a header secret") || !strings.Contains(printed, "header secret handed out") {
		t.Error("status or audit do not tell of it: this test sees less than it should")
	}
}

// Opened, moved and closed as the configuration says; a wrong one changes nothing.
func TestLoopbackReloads(t *testing.T) {
	t.Parallel()
	first, second := freeAddress(t), freeAddress(t)
	plain := simulatedFor("vision")
	d := launchDaemon(t, plain)
	if _, err := d.tool(t, "env"); err == nil || !strings.Contains(err.Error(), `address = "127.0.0.1:40380" in [loopback]`) {
		t.Errorf("without a listener: %v", err)
	}
	if d.status(t).Loopback != nil {
		t.Error("the status tells of a listener")
	}
	steps := []struct {
		config, open, closed, said string
		status                     int
	}{
		{withLoopback(plain, first), first, "", "loopback listener on " + first, 200},
		{withLoopback(plain, second), second, first, "loopback listener on " + second + ", was on " + first, 200},
		{withLoopback(plain, "0.0.0.0:1"), second, first, "loopback.address is", 422},
		{plain + "\n# as before\n" + fmt.Sprintf("[loopback]\naddress = %q\n", second), second, first, "", 200},
		{plain, "", second, "no loopback listener any more, was " + second, 200},
	}
	secret := ""
	for i, step := range steps {
		if status, body := d.reload(t, step.config); status != step.status || !strings.Contains(body, step.said) {
			t.Errorf("step %d: %d %s", i, status, body)
		}
		if step.open != "" {
			if secret == "" {
				secret = valueOf(d.env(t, "--module", "vision"), "IDENTITY_HEADER")
			}
			if status, body, err := askTCP(t, step.open, secret); status != 200 {
				t.Errorf("step %d: %d %s %v", i, status, body, err)
			}
		}
		if step.closed != "" {
			if status, _, err := askTCP(t, step.closed, secret); err == nil {
				t.Errorf("step %d: %s still answers, %d", i, step.closed, status)
			}
		}
	}
}

// A port that is taken stops nothing else, is told of, and is tried until it is free.
func TestLoopbackPortIsTaken(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	at := taken.Addr().String()
	d := launchDaemon(t, withLoopback(simulatedFor("vision"), at))
	if status, _, err := d.get(d.token(), vaultToken); status != 200 {
		t.Errorf("the socket: %d %v", status, err)
	}
	s := d.status(t)
	if s.Loopback == nil || s.Loopback.Open || len(s.Trouble) != 1 || !strings.Contains(s.Trouble[0], "the loopback listener is not open") {
		t.Errorf("%+v %v", s.Loopback, s.Trouble)
	}
	if out, err := d.tool(t, "status"); err == nil || !strings.Contains(out, "address already in use") || !strings.Contains(out, at+", not open") {
		t.Errorf("%s %v", out, err)
	}
	must(t, taken.Close())
	until(t, "the port", d.ended, func() bool { return d.status(t).Loopback.Open })
	if trouble := d.status(t).Trouble; len(trouble) != 0 {
		t.Errorf("%v", trouble)
	}
	if status, body, err := askTCP(t, at, valueOf(d.env(t, "--module", "vision"), "IDENTITY_HEADER")); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
}

// Secrets outlive a restart, and are others when their root was spoilt, which is told.
func TestLoopbackSecretsAreKept(t *testing.T) {
	t.Parallel()
	at := freeAddress(t)
	d := launchDaemon(t, withLoopback(simulatedFor("vision"), at))
	before := valueOf(d.env(t, "--module", "vision"), "IDENTITY_HEADER")
	d.stop(t)
	d.again(t)
	if status, body, err := askTCP(t, at, before); status != 200 {
		t.Errorf("after a restart: %d %s %v", status, body, err)
	}
	d.stop(t)
	must(t, os.WriteFile(filepath.Join(d.state(), "loopback-secret"), []byte("spoilt"), 0o600))
	d.again(t)
	if status, _, err := askTCP(t, at, before); status != 401 {
		t.Errorf("after its root was spoilt: %d %v", status, err)
	}
	if !strings.Contains(d.text(), "it has 6 bytes, not 32") {
		t.Error("the log does not say that the secrets are new")
	}
	if after := valueOf(d.env(t, "--module", "vision"), "IDENTITY_HEADER"); after == before {
		t.Error("the secret is the same")
	}
}

// Without a place to keep the root in, secrets last as long as the daemon, and that is trouble.
func TestLoopbackSecretsWithoutAPlace(t *testing.T) {
	t.Parallel()
	at := freeAddress(t)
	d := newFolder(t, withLoopback(simulatedFor("vision"), at))
	must(t, os.WriteFile(d.state(), nil, 0o600))
	d.again(t)
	if status, body, err := askTCP(t, at, valueOf(d.env(t, "--module", "vision"), "IDENTITY_HEADER")); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
	if trouble := strings.Join(d.status(t).Trouble, "\n"); !strings.Contains(trouble, "header secrets of the loopback listener are others after the next start") {
		t.Errorf("%s", trouble)
	}
}

// An administrator who is not root is told no secret: it would be a token to him.
func TestLoopbackSecretsAreForRoot(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: the administrator is another user")
	}
	d := launchDaemon(t, withLoopback(simulatedFor("vision"), freeAddress(t)))
	for _, dir := range []string{d.dir, filepath.Dir(binary(t, "perceptctl"))} {
		must(t, os.Chmod(dir, 0o755))
	}
	must(t, os.Chown(d.admin(), 0, 65533))
	asAdministrator := func(args ...string) (int, string) {
		c := exec.Command(binary(t, "perceptctl"), append([]string{"--socket", d.token()}, args...)...)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65533}}
		out, _ := c.CombinedOutput()
		return c.ProcessState.ExitCode(), string(out)
	}
	if status, out := asAdministrator("status"); status != 0 {
		t.Errorf("status: %d %s", status, out)
	}
	for _, args := range [][]string{{"env", "--module", "vision"}, {"env"}} {
		if status, out := asAdministrator(args...); status != 4 || strings.Contains(out, "IDENTITY_HEADER") {
			t.Errorf("%v: %d %s", args, status, out)
		}
	}
}

// Another user of this device gets nothing: without a secret, with one that is not his own, or by taking a user's.
func TestLoopbackOtherUser(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: the child is another user")
	}
	const other = 65534
	at := freeAddress(t)
	d := launchDaemon(t, withLoopback(simulatedFor("vision")+fmt.Sprintf(`
[[grant]]
caller = { uid = %d }
identity = "vision"
resources = [%q]
`, other, perceptdtest.VaultURI), at))
	secretOf := func(args ...string) string { return valueOf(d.env(t, args...), "IDENTITY_HEADER") }
	asOther := func(secret string) (string, error) {
		c := exec.Command("curl", "-sS", "--noproxy", "*", "-H", "@-", fmt.Sprintf("http://%s%s?api-version=2019-08-01&resource=%s", at, api.PathAppServiceToken, perceptdtest.VaultURI))
		if secret != "" {
			c.Stdin = strings.NewReader("X-IDENTITY-HEADER: " + secret + "\n")
		}
		c.Env = []string{"PATH=" + os.Getenv("PATH")}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: other, Gid: other}}
		out, err := c.Output()
		return string(out), err
	}
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("needs curl")
	}
	for _, row := range []struct{ name, secret, want string }{
		{"without a secret", "", "must be there once"},
		{"with a guess", strings.Repeat("0", 64), "has no grant's secret"},
		{"with root's", secretOf(), "sent its header secret: uid 65534 did"},
		{"with his own", secretOf("--user", "65534"), `"access_token"`},
	} {
		out, err := asOther(row.secret)
		if err != nil || !strings.Contains(out, row.want) || strings.Contains(out, "access_token") != (row.want == `"access_token"`) {
			t.Errorf("%s: %s %v", row.name, out, err)
		}
	}
	if status, body, err := askTCP(t, at, secretOf("--user", "65534")); status != 403 || !strings.Contains(body, "sent its header secret: uid 0 did") {
		t.Errorf("root with another's: %d %s %v", status, body, err)
	}
	if !strings.Contains(d.text(), "uid 65534 by header secret, peer uid 65534") {
		t.Error("the audit does not tell by what the caller was known")
	}
}
