package harness

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
)

// Daemon is a running perceptd with its folder.
type Daemon struct {
	*Process
	Dir, Config string
}

// LaunchDaemon starts a daemon in a folder of its own, and returns when it serves.
func LaunchDaemon(t testing.TB, config string, environment ...string) *Daemon {
	t.Helper()
	d := NewDaemon(t, config)
	d.Process = Launch(t, environment, "perceptd", d.Arguments()...)
	d.AwaitHealth(t)
	return d
}

// NewDaemon makes the folders of a daemon that is not started yet.
func NewDaemon(t testing.TB, config string) *Daemon {
	t.Helper()
	return &Daemon{Dir: ShortFolder(t), Config: WriteConfig(t, map[string]string{"config.toml": config})}
}

// Arguments are those of its command line.
func (d *Daemon) Arguments() []string {
	return []string{"--config", d.Config, "--runtime-dir", d.Dir, "--state-dir", filepath.Join(d.Dir, "state"),
		"--cache-key", d.KeyFile(), "--log-level", "debug"}
}

// AwaitHealth waits until the daemon serves.
func (d *Daemon) AwaitHealth(t testing.TB) {
	t.Helper()
	d.awaitOK(t, "the daemon", api.PathHealth)
}

// AwaitReady waits until the daemon has the tokens that are to be prefetched: before that, status says so and fails.
func (d *Daemon) AwaitReady(t testing.TB) {
	t.Helper()
	d.awaitOK(t, "the daemon to be ready", api.PathReady)
}

func (d *Daemon) awaitOK(t testing.TB, what, path string) {
	t.Helper()
	Until(t, what, d.Ended, func() bool {
		status, _, err := d.Get(d.Admin(), path)
		return err == nil && status == 200
	})
}

// Rewrite replaces the configuration file.
func (d *Daemon) Rewrite(t testing.TB, config string) {
	t.Helper()
	if err := os.WriteFile(d.Config, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Reload replaces the configuration file and has it read.
func (d *Daemon) Reload(t testing.TB, config string) (status int, body string) {
	t.Helper()
	d.Rewrite(t, config)
	status, body, err := d.Ask(d.Admin(), "POST", api.PathReload, "")
	if err != nil {
		t.Fatal(err)
	}
	return status, body
}

// KeyFile is where the daemon looks for the key of its sealed tokens.
func (d *Daemon) KeyFile() string { return filepath.Join(d.Dir, "cache-key") }

// Token is the socket of local services.
func (d *Daemon) Token() string { return filepath.Join(d.Dir, api.TokenSocketName) }

// Admin is the socket of technicians.
func (d *Daemon) Admin() string { return filepath.Join(d.Dir, api.AdminSocketName) }

// Module is the socket of a module.
func (d *Daemon) Module(name string) string {
	return filepath.Join(d.Dir, api.ModulesDirName, name, api.TokenSocketName)
}

// StateDir is where the daemon keeps its state.
func (d *Daemon) StateDir() string { return filepath.Join(d.Dir, "state") }

// SealedFile is where it keeps its tokens.
func (d *Daemon) SealedFile() string { return filepath.Join(d.StateDir(), "tokens.sealed") }

// RecordFile is where it keeps the policy changes.
func (d *Daemon) RecordFile() string { return filepath.Join(d.StateDir(), "policy-changes.json") }

// Get asks on a socket in a connection of its own.
func (d *Daemon) Get(socket, path string) (status int, body string, err error) {
	return d.Ask(socket, "GET", path, "")
}

// Ask sends a request on a socket in a connection of its own, and returns the answer.
func (d *Daemon) Ask(socket, method, path, body string) (int, string, error) {
	response, text, err := d.Exchange(socket, method, path, body)
	if err != nil {
		return 0, "", err
	}
	return response.StatusCode, text, nil
}

// Exchange is Ask, for whoever wants to see the answer's header too.
func (d *Daemon) Exchange(socket, method, path, body string) (*http.Response, string, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	// What every client is promised: an answer within 10 seconds, whatever the back end does.
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, "", err
	}
	fmt.Fprintf(conn,
		"%s %s HTTP/1.1\r\nHost: localhost\r\nMetadata: true\r\nX-IDENTITY-HEADER: x\r\nConnection: close\r\n"+
			"Content-Length: %d\r\n\r\n%s", method, path, len(body), body)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response, string(text), err
}

// Status returns what the daemon tells technicians.
func (d *Daemon) Status(t testing.TB) api.Status {
	t.Helper()
	_, body, err := d.Get(d.Admin(), api.PathStatus)
	if err != nil {
		t.Fatal(err)
	}
	var s api.Status
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return s
}

// GiveKey writes a key that is the same byte over and over.
func (d *Daemon) GiveKey(t *testing.T, path string, b byte) {
	t.Helper()
	if err := os.WriteFile(path, []byte(strings.Repeat(string(b), 32)), 0o400); err != nil {
		t.Fatal(err)
	}
}

// Again starts the daemon once more, in the folder that it had.
func (d *Daemon) Again(t *testing.T, environment ...string) {
	t.Helper()
	d.Process = Launch(t, environment, "perceptd", d.Arguments()...)
	d.AwaitHealth(t)
}

// Held returns what the daemon holds of its only token.
func (d *Daemon) Held(t *testing.T) api.TokenStatus {
	t.Helper()
	var tokens []api.TokenStatus
	Until(t, "the token", d.Ended, func() bool {
		tokens = d.Status(t).Tokens
		return len(tokens) == 1 && tokens[0].ExpiresIn > 0
	})
	return tokens[0]
}

// MustBeSame checks that the token is the one from before, and that the back end was not asked.
func (d *Daemon) MustBeSame(t *testing.T, when string, before api.TokenStatus) {
	t.Helper()
	if now := d.Held(t); now.SHA256 != before.SHA256 || now.Fetches != 0 || now.Unconfirmed {
		t.Errorf("%s: token %s after %d fetches, was %s", when, now.SHA256, now.Fetches, before.SHA256)
	}
	if status, _, err := d.Get(d.Token(), VaultToken); status != 200 {
		t.Errorf("%s: %d %v", when, status, err)
	}
}

// Restart starts a daemon again on what another one left.
func (d *Daemon) Restart(t testing.TB, environment ...string) *Daemon {
	t.Helper()
	again := &Daemon{Dir: d.Dir, Config: d.Config}
	again.Process = Launch(t, environment, "perceptd", again.Arguments()...)
	again.AwaitHealth(t)
	return again
}

// RecordChange notes a policy change.
func RecordChange(t testing.TB, d *Daemon, body string) api.PolicyChange {
	t.Helper()
	status, answer, err := d.Ask(d.Admin(), "POST", api.PathPolicyChanges, body)
	var noted api.PolicyChange
	if err != nil || status != 200 || json.Unmarshal([]byte(answer), &noted) != nil {
		t.Fatalf("%d %s %v", status, answer, err)
	}
	return noted
}

// Env runs perceptctl env and returns the variables.
func (d *Daemon) Env(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := d.Tool(t, append([]string{"env", "--format", "json"}, args...)...)
	Must(t, err)
	var told struct{ Set map[string]string }
	Must(t, json.Unmarshal([]byte(out), &told))
	var all []string
	for name, value := range told.Set {
		all = append(all, name+"="+value)
	}
	return all
}

// Tool runs perceptctl and returns its standard output.
func (d *Daemon) Tool(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := exec.Command(Binary(t, "perceptctl"), append([]string{"--socket", d.Token()}, args...)...)
	var said strings.Builder
	c.Stderr = &said
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, &said)
	}
	return string(out), err
}

// Over returns a client that asks on a socket and waits as long as it takes.
func Over(t testing.TB, socket string) *http.Client {
	t.Helper()
	var dialer net.Dialer
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", socket)
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: dial}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// Claims returns what a token says of itself.
func Claims(t testing.TB, token string) map[string]any {
	t.Helper()
	parts := strings.Split(strings.TrimSpace(token), ".")
	if len(parts) != 3 {
		t.Fatalf("no JWT of three parts: %d", len(parts))
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	return c
}
