package daemon

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// extraGrant is what a user would like to have in the configuration.
const extraGrant = "[[grant]]\ncaller = { uid = 4711 }\nidentity = \"device\"\nresources = " +
	"[\"https://vault.azure.net\"]\n"

// What a user puts in an open config.d is never in force, and the status says whose fault the refusal is.
func TestOpenConfiguration(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor())
	extra := filepath.Join(filepath.Dir(d.Config), "config.d")
	path := filepath.Join(extra, "mine.toml")
	if err := errors.Join(os.Mkdir(extra, 0o700), os.Chmod(extra, 0o777), os.WriteFile(path, []byte(extraGrant), 0o600),
		os.Chmod(path, 0o644)); err != nil {
		t.Fatal(err)
	}
	if status, body := d.Reload(t, harness.SimulatedFor()); status == 200 ||
		!strings.Contains(body, "config.d: mode 0777 lets others change who gets tokens") {
		t.Errorf("%d %s", status, body)
	}
	if _, err := os.Stat(path); err != nil || strings.Contains(strings.Join(d.Status(t).Config.Files, " "),
		"mine.toml") {
		t.Errorf("in force: %v %v", d.Status(t).Config.Files, err)
	}
	check := exec.Command(harness.Binary(t, "perceptd"), "--check", "--config", d.Config)
	said, _ := check.CombinedOutput()
	if status := check.ProcessState.ExitCode(); status != harness.ExitFailed ||
		!strings.Contains(string(said), "config.d: mode 0777") {
		t.Errorf("--check: %d %s", status, said)
	}
	if os.Getuid() != 0 {
		return // only root can give a folder to a group that it is not in
	}
	if err := errors.Join(os.Chown(extra, 0, 4712), os.Chmod(extra, 0o775)); err != nil {
		t.Fatal(err)
	}
	if status, body := d.Reload(t, harness.SimulatedFor()); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	warning := extra + ": mode 0775 lets group 4712 change who gets tokens"
	if status, body := d.Reload(t, harness.SimulatedFor()); status != 200 ||
		!strings.Contains(body, `"warnings":["`+warning) {
		t.Errorf("%d %s", status, body)
	}
	if trouble := strings.Join(d.Status(t).Trouble, "\n"); !strings.Contains(trouble, warning) ||
		!strings.Contains(d.Text(), warning) {
		t.Errorf("trouble %q", trouble)
	}
	d.Rewrite(t, harness.SimulatedFor()+strings.Replace(extraGrant, "uid = 4711", "gid = 4712", 1))
	if status, body, _ := d.Ask(d.Admin(), "POST", "/v1/reload", ""); status == 200 ||
		!strings.Contains(body, "the caller of the grant for gid 4712 is in it") {
		t.Errorf("the group of a caller may write: %d %s", status, body)
	}
	// What stood in the earlier configuration's warnings is now the fault, and is told once.
	if trouble := d.Status(t).Trouble; len(trouble) != 1 ||
		!strings.Contains(trouble[0], "the last reload changed nothing") {
		t.Errorf("trouble %q", trouble)
	}
}

// A key in a folder where others could put theirs is none, which costs nobody a token.
func TestOpenFolderOfTheKey(t *testing.T) {
	t.Parallel()
	d := harness.NewDaemon(t, harness.SimulatedFor())
	open := filepath.Join(d.Dir, "open")
	key := filepath.Join(open, "cache-key")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o777),
		os.WriteFile(key, bytes.Repeat([]byte("k"), 32), 0o600)); err != nil {
		t.Fatal(err)
	}
	d.Process = harness.Launch(t, nil, "perceptd", append(d.Arguments(), "--cache-key", key)...)
	d.AwaitHealth(t)
	if trouble := d.Status(t).Trouble; len(trouble) != 1 ||
		!strings.Contains(trouble[0], open+": mode 0777 lets others change the key of the kept tokens") {
		t.Errorf("trouble %q", trouble)
	}
	if status, _, err := d.Get(d.Token(), harness.VaultToken); err != nil || status != 200 {
		t.Errorf("%d %v", status, err)
	}
}

// withService runs perceptd on a device that has the service's user.
func withService(t *testing.T, args ...string) (said string, status int) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the device gets another /etc/passwd")
	}
	text, err := os.ReadFile("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	text = append([]byte("percept:x:4711:4712::/:/bin/false\n"), text...)
	passwd := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(passwd, text, 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("/bin/sh", append([]string{"-c", `mount --bind "$0" /etc/passwd && exec "$@"`, passwd,
		harness.Binary(t, "perceptd")}, args...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, _ := c.CombinedOutput()
	return string(out), c.ProcessState.ExitCode()
}

// Root's --check finds what the daemon will find, which is another user, and says for whom it looked.
func TestCheckIsForTheService(t *testing.T) {
	t.Parallel()
	config := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig, "config.d/10.toml": ""})
	const by = "user percept, whom perceptd.service runs as"
	if said, status := withService(t, "--check", "--config", config); status != 0 ||
		!strings.Contains(said, "checked for "+by+"\n") {
		t.Errorf("as it should be: %d %s", status, said)
	}
	extra := filepath.Join(filepath.Dir(config), "config.d")
	if err := os.Chmod(extra, 0o775); err != nil {
		t.Fatal(err)
	}
	if said, status := withService(t, "--check", "--config", config); status != 0 ||
		!strings.Contains(said, "warning: "+extra+": mode 0775 lets group root ") {
		t.Errorf("open to root's group: %d %s", status, said)
	}
	if err := os.Chown(extra, 0, 4712); err != nil {
		t.Fatal(err)
	}
	if said, status := withService(t, "--check", "--config", config); status != harness.ExitFailed ||
		!strings.Contains(said, "and the service's user percept is in it: chmod g-w "+extra) {
		t.Errorf("open to the service's group: %d %s", status, said)
	}
	if err := errors.Join(os.Chmod(extra, 0o755), os.Chmod(config, 0o600)); err != nil {
		t.Fatal(err)
	}
	said, status := withService(t, "--check", "--config", config)
	if status != harness.ExitFailed ||
		!strings.HasPrefix(said, "perceptd: the configuration is not usable by "+by+":\n") ||
		!strings.Contains(said, "chmod 644 "+config+"\n") {
		t.Errorf("root's alone: %d %s", status, said)
	}
}

// A daemon that may not read its configuration says what lets it.
func TestUnreadableConfiguration(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: another user is to read")
	}
	if err := os.Chmod(filepath.Dir(harness.Binary(t, "perceptd")), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		file, folder os.FileMode
		says         string
	}{{0o600, 0o755, "cannot read it (owner root, group root, mode 0600): chmod 644 "}, {0o644, 0o700,
		"cannot look into it (owner root, group root, mode 0700): chmod 755 "}} {
		config := harness.WriteConfig(t, map[string]string{"config.toml": harness.GoodConfig})
		if err := errors.Join(os.Chmod(config, row.file), os.Chmod(filepath.Dir(config), row.folder)); err != nil {
			t.Fatal(err)
		}
		c := exec.Command(harness.Binary(t, "perceptd"), "--check", "--config", config)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, _ := c.CombinedOutput()
		if c.ProcessState.ExitCode() != harness.ExitFailed ||
			!strings.Contains(string(out), row.says+filepath.Dir(config)) {
			t.Errorf("%s", out)
		}
	}
}
