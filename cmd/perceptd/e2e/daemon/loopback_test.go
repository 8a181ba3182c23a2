package daemon

import (
	"bufio"
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
	"perceptd/cmd/perceptd/e2e/harness"
)

// askTCP asks for a token as App Service's clients do, with that secret, and returns the status and the body.
func askTCP(t *testing.T, address, secret string) (int, string, error) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	fmt.Fprintf(conn,
		"GET %s?api-version=2019-08-01&resource=%s HTTP/1.1\r\nHost: %s\r\nX-IDENTITY-HEADER: %s\r\nConnection: "+
			"close\r\n\r\n",
		api.PathAppServiceToken, harness.VaultURI, address, secret)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// The real azidentity gets its tokens with nothing but the variables that perceptctl env prints, each caller its own,
// and no secret is printed anywhere else.
func TestLoopbackServesUnmodifiedSDKs(t *testing.T) {
	t.Parallel()
	at := harness.FreeAddress(t)
	d := harness.LaunchDaemon(t, harness.WithLoopback(harness.SimulatedFor("vision"), at))
	mine := d.Env(t)
	vision := d.Env(t, "--module", "vision")
	for _, row := range []struct {
		environment []string
		client      string
	}{{mine, ""}, {vision, "00000000-0000-0000-0000-000000000001"}} {
		tokens, err := sdk(harness.OverTCP, row.environment, harness.VaultURI)
		if err != nil {
			t.Fatal(err)
		}
		if id, _ := harness.Claims(t, tokens[0])["appid"].(string); row.client != "" && id != row.client {
			t.Errorf("the token is %s's, want %s", id, row.client)
		}
	}
	printed := d.Text()
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"grants"}, {"doctor"}, {"whoami"}} {
		out, _ := d.Tool(t, args...) // doctor finds fault with this device
		printed += out
	}
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", d.Cmd.Process.Pid))
	must(t, err)
	must(t, d.Cmd.Process.Signal(syscall.SIGQUIT))
	<-d.Ended
	printed += d.Text() + string(arguments)
	for _, variables := range [][]string{mine, vision} {
		if secret := harness.ValueOf(variables, "IDENTITY_HEADER"); len(secret) != 64 ||
			strings.Contains(printed, secret) {
			t.Errorf("a secret of %d digits was printed", len(secret))
		}
	}
	if !strings.Contains(printed, at+", callers are known by a header secret") ||
		!strings.Contains(printed, "header secret handed out") {
		t.Error("status or audit do not tell of it: this test sees less than it should")
	}
}

// Opened, moved and closed as the configuration says; a wrong one changes nothing.
func TestLoopbackReloads(t *testing.T) {
	t.Parallel()
	first, second := harness.FreeAddress(t), harness.FreeAddress(t)
	plain := harness.SimulatedFor("vision")
	d := harness.LaunchDaemon(t, plain)
	if _, err := d.Tool(t, "env"); err == nil ||
		!strings.Contains(err.Error(), `address = "127.0.0.1:40380" in [loopback]`) {
		t.Errorf("without a listener: %v", err)
	}
	if d.Status(t).Loopback != nil {
		t.Error("the status tells of a listener")
	}
	steps := []struct {
		config, open, closed, said string
		status                     int
	}{
		{harness.WithLoopback(plain, first), first, "", "loopback listener on " + first, 200},
		{harness.WithLoopback(plain, second), second, first, "loopback listener on " + second + ", was on " + first,
			200},
		{harness.WithLoopback(plain, "0.0.0.0:1"), second, first, "loopback.address is", 422},
		{plain + "\n# as before\n" + fmt.Sprintf("[loopback]\naddress = %q\n", second), second, first, "", 200},
		{plain, "", second, "no loopback listener any more, was " + second, 200},
	}
	secret := ""
	for i, step := range steps {
		if status, body := d.Reload(t, step.config); status != step.status || !strings.Contains(body, step.said) {
			t.Errorf("step %d: %d %s", i, status, body)
		}
		if step.open != "" {
			if secret == "" {
				secret = harness.ValueOf(d.Env(t, "--module", "vision"), "IDENTITY_HEADER")
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
	d := harness.LaunchDaemon(t, harness.WithLoopback(harness.SimulatedFor("vision"), at))
	if status, _, err := d.Get(d.Token(), harness.VaultToken); status != 200 {
		t.Errorf("the socket: %d %v", status, err)
	}
	s := d.Status(t)
	if s.Loopback == nil || s.Loopback.Open || len(s.Trouble) != 1 ||
		!strings.Contains(s.Trouble[0], "the loopback listener is not open") {
		t.Errorf("%+v %v", s.Loopback, s.Trouble)
	}
	if out, err := d.Tool(t, "status"); err == nil || !strings.Contains(out, "address already in use") ||
		!strings.Contains(out, at+", not open") {
		t.Errorf("%s %v", out, err)
	}
	must(t, taken.Close())
	harness.Until(t, "the port", d.Ended, func() bool { return d.Status(t).Loopback.Open })
	if trouble := d.Status(t).Trouble; len(trouble) != 0 {
		t.Errorf("%v", trouble)
	}
	if status, body, err := askTCP(t, at,
		harness.ValueOf(d.Env(t, "--module", "vision"), "IDENTITY_HEADER")); status != 200 {
		t.Errorf("%d %s %v", status, body, err)
	}
}

// Secrets outlive a restart, and are others when their root was spoilt, which is told.
func TestLoopbackSecretsAreKept(t *testing.T) {
	t.Parallel()
	at := harness.FreeAddress(t)
	d := harness.LaunchDaemon(t, harness.WithLoopback(harness.SimulatedFor("vision"), at))
	before := harness.ValueOf(d.Env(t, "--module", "vision"), "IDENTITY_HEADER")
	d.Stop(t)
	d.Again(t)
	if status, body, err := askTCP(t, at, before); status != 200 {
		t.Errorf("after a restart: %d %s %v", status, body, err)
	}
	d.Stop(t)
	must(t, os.WriteFile(filepath.Join(d.StateDir(), "loopback-secret"), []byte("spoilt"), 0o600))
	d.Again(t)
	if status, _, err := askTCP(t, at, before); status != 401 {
		t.Errorf("after its root was spoilt: %d %v", status, err)
	}
	if !strings.Contains(d.Text(), "it has 6 bytes, not 32") {
		t.Error("the log does not say that the secrets are new")
	}
	if after := harness.ValueOf(d.Env(t, "--module", "vision"), "IDENTITY_HEADER"); after == before {
		t.Error("the secret is the same")
	}
}

// Without a place to keep the root in, secrets last as long as the daemon, and that is trouble.
func TestLoopbackSecretsWithoutAPlace(t *testing.T) {
	t.Parallel()
	at := harness.FreeAddress(t)
	d := harness.NewDaemon(t, harness.WithLoopback(harness.SimulatedFor("vision"), at))
	must(t, os.WriteFile(d.StateDir(), nil, 0o600))
	d.Again(t)
	// The secret is taken: nobody gets a token where it is not known what is denied.
	if status, body, err := askTCP(t, at, harness.ValueOf(d.Env(t, "--module", "vision"),
		"IDENTITY_HEADER")); status != 503 || !strings.Contains(body, string(api.CodeDenyRulesLost)) {
		t.Errorf("%d %s %v", status, body, err)
	}
	if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble,
		"header secrets of the loopback listener are others after the next start") {
		t.Errorf("%s", trouble)
	}
}

// An administrator who is not root is told no secret: it would be a token to him.
func TestLoopbackSecretsAreForRoot(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: the administrator is another user")
	}
	d := harness.LaunchDaemon(t, harness.WithLoopback(harness.SimulatedFor("vision"), harness.FreeAddress(t)))
	for _, dir := range []string{d.Dir, filepath.Dir(harness.Binary(t, "perceptctl"))} {
		must(t, os.Chmod(dir, 0o755))
	}
	must(t, os.Chown(d.Admin(), 0, 65533))
	d.AwaitReady(t)
	asAdministrator := func(args ...string) (int, string) {
		c := exec.Command(harness.Binary(t, "perceptctl"), append([]string{"--socket", d.Token()}, args...)...)
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
	at := harness.FreeAddress(t)
	d := harness.LaunchDaemon(t, harness.WithLoopback(harness.SimulatedFor("vision")+fmt.Sprintf(`
[[grant]]
caller = { uid = %d }
identity = "vision"
resources = [%q]
`, other, harness.VaultURI), at))
	secretOf := func(args ...string) string { return harness.ValueOf(d.Env(t, args...), "IDENTITY_HEADER") }
	asOther := func(secret string) (string, error) {
		c := exec.Command("curl", "-sS", "--noproxy", "*", "-H", "@-",
			fmt.Sprintf("http://%s%s?api-version=2019-08-01&resource=%s", at, api.PathAppServiceToken,
				harness.VaultURI))
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
		if err != nil || !strings.Contains(out, row.want) ||
			strings.Contains(out, "access_token") != (row.want == `"access_token"`) {
			t.Errorf("%s: %s %v", row.name, out, err)
		}
	}
	if status, body, err := askTCP(t, at, secretOf("--user", "65534")); status != 403 ||
		!strings.Contains(body, "sent its header secret: uid 0 did") {
		t.Errorf("root with another's: %d %s %v", status, body, err)
	}
	if !strings.Contains(d.Text(), "uid 65534 by header secret, peer uid 65534") {
		t.Error("the audit does not tell by what the caller was known")
	}
}

// The secret that header secrets are made of is kept in the state folder, also where the command line does not name it.
func TestLoopbackSecretInTheChosenStateFolder(t *testing.T) {
	t.Parallel()
	d := harness.NewDaemon(t, harness.WithLoopback(harness.SimulatedFor(), harness.FreeAddress(t)))
	state := d.Dir + "-state"
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	d.Process = harness.Launch(t, []string{"STATE_DIRECTORY="}, "perceptd",
		"--config", d.Config, "--runtime-dir", d.Dir)
	d.AwaitHealth(t)
	if info, err := os.Stat(filepath.Join(state, "loopback-secret")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: %q", info, err, d.Status(t).Trouble)
	}
}
