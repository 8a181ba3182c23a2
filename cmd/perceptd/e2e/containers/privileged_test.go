//go:build containers

package containers

import (
	"path/filepath"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// fittingRuntime is runc for privileged containers where root itself has not every capability, as in a virtual machine:
// it takes those away from a container that its starter has not.
const fittingRuntime = `#!/bin/sh
for a in "$@"; do [ "$last" = --bundle ] && bundle=$a; last=$a; done
if [ -n "$bundle" ]; then
	python3 - "$bundle/config.json" <<'END'
import json, sys
names = """chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service net_broadcast
net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource
sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend
audit_read perfmon bpf checkpoint_restore""".split()
bounding = [int(l.split()[1], 16) for l in open("/proc/self/status") if l.startswith("CapBnd")][0]
has = {"CAP_" + name.upper() for bit, name in enumerate(names) if bounding >> bit & 1}
with open(sys.argv[1]) as f: config = json.load(f)
for kind, given in config["process"].get("capabilities", {}).items():
    config["process"]["capabilities"][kind] = [c for c in given if c in has]
with open(sys.argv[1], "w") as f: json.dump(config, f)
END
fi
exec runc "$@"
`

// TestContainersPrivileged: what a container gets that its starter has made root of the device in all but name. On the
// token sockets it is the container that the engine says it is, and never root; on admin.sock, which asks for no more
// than what a file asks for, it is root.
func TestContainersPrivileged(t *testing.T) {
	runtime := filepath.Join(t.TempDir(), "runtime")
	harness.Must(t, harness.WriteProgram(runtime, []byte(fittingRuntime)))
	e := harness.StartDocker(t, "--add-runtime=fitting="+runtime)
	image := e.Image("probe:1", "one")
	e.Image("probe:2", "two") // which no grant is for
	d := harness.LaunchDaemon(t, twoModules(e.Socket, image))
	privileged := []string{"--rm", "--runtime", "fitting", "--privileged"}
	whole := []string{"-v", d.Dir + ":/run/percept"}
	run := func(options []string, image string, perceptctl ...string) (string, error) {
		args := append(append([]string{"run"}, privileged...), options...)
		return e.Run(append(append(args, image), perceptctl...)...)
	}
	at := func(socket string, what ...string) []string {
		return append([]string{"--socket", "/run/percept/" + socket}, what...)
	}
	for _, row := range []struct {
		name    string
		options []string
		image   string
		socket  string
		has     string // the identity that it gets a token of; empty: none, and
		says    string // why
	}{
		{"its own module's folder", append(d.Mount("vision"), "--network", "none", "--name", "vision"), "probe:1",
			"token.sock", "vision", ""},
		{"another module's folder", append(d.Mount("speech"), "--network", "none", "--name", "vision"), "probe:1",
			"token.sock", "", "the module's is named speech"},
		{"all of it, as everybody", append(whole, "--network", "host", "--name", "vision"), "probe:2", "token.sock", "",
			"no [[grant]] lets container vision"},
		{"all of it, by its image", append(whole, "--network", "host"), "probe:1", "token.sock", "vision", ""},
		{"all of it, another module's socket", append(whole, "--network", "host", "--name", "vision"), "probe:1",
			"modules/speech/token.sock", "", "the module's is named speech"},
		{"all of it, another's name", append(whole, "--network", "host", "--name", "speech"), "probe:2",
			"modules/speech/token.sock", "speech", ""},
		{"all of it, the socket of a module that needs no container", append(whole, "--network", "host"), "probe:2",
			"modules/open/token.sock", "device", ""},
		{"the host's processes", append(whole, "--network", "host", "--pid", "host"), "probe:1", "token.sock", "",
			"--pid host"},
		{"the host's processes, its own module", append(d.Mount("vision"), "--network", "host", "--pid", "host",
			"--name", "vision"), "probe:1", "token.sock", "", "--pid host"},
		{"the host's cgroups, users and ipc", append(whole, "--network", "host", "--cgroupns", "host", "--userns",
			"host", "--ipc", "host"), "probe:2", "token.sock", "", "no [[grant]] lets container"},
	} {
		out, err := run(row.options, row.image, at(row.socket, askVault()...)...)
		switch {
		case row.has != "" && (err != nil || harness.IdentityOf(out) != row.has):
			t.Errorf("%s: %v %s, want a token of %s", row.name, err, out, row.has)
		case row.has == "" && (harness.ExitStatus(err) != deniedExit || strings.Contains(out, "eyJ")):
			t.Errorf("%s: %v %s, want a denial", row.name, err, out)
		case row.has == "":
			if out, _ = run(row.options, row.image, at(row.socket, "whoami")...); !strings.Contains(out, row.says) &&
				!strings.Contains(row.says, "[[grant]]") {
				t.Errorf("%s: whoami says %s, want %q", row.name, out, row.says)
			}
		}
	}
	out, err := run(append(whole, "--network", "host"), "probe:2", "--socket", "/run/percept/"+api.AdminSocketName,
		"status")
	if err != nil || !strings.Contains(out, "SIMULATED") {
		t.Errorf("root in a privileged container, on the admin socket: %v %s", err, out)
	}
	// Without the folder there is nothing to talk to, whatever else it may.
	out, err = run([]string{"--network", "host"}, "probe:1", "--socket", d.Token(), "whoami")
	if harness.ExitStatus(err) != 3 {
		t.Errorf("nothing mounted: %v %s", err, out)
	}
}
