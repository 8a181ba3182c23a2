//go:build system

package systemd_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// TestSystemCacheKey makes the key of the kept tokens as an administrator does, and looks whether the daemon gets it:
// in the clear where systemd has no sealed credentials, sealed by the host's key, and by TPMs that are replaced, come
// late, lock themselves, run out of sessions and hang.
func TestSystemCacheKey(t *testing.T) {
	for _, row := range []struct{ release, packages string }{
		{"bullseye", ""},
		{"bookworm", "libtss2-esys-3.0.2-0,libtss2-rc0,libtss2-tcti-swtpm0"},
		{"trixie", "libtss2-esys-3.0.2-0t64,libtss2-rc0t64,libtss2-tcti-swtpm0t64"},
	} {
		t.Run(row.release, func(t *testing.T) {
			tpm := &tpm{states: t.TempDir(), folder: t.TempDir()}
			m := boot(t, kind{release: row.release, packages: row.packages,
				args: []string{"--bind=" + tpm.folder + ":/run/tpmx"}})
			install(t, m)
			m.write(t, "/etc/systemd/system/perceptd.service.d/key-seen.conf",
				"[Service]\nNoExecPaths=\nExecStartPre=/bin/sh -c '"+keySeen+"'\n")
			m.write(t, "/etc/systemd/system/perceptd-cache-key.service.d/tpm.conf",
				"[Service]\nEnvironment="+tpmVariable+"\n")
			m.must(t, "systemctl", "daemon-reload")
			m.must(t, "systemctl", "enable", "--now", "perceptd.service")
			t.Run("none", func(t *testing.T) {
				m.serves(t, "none")
				if out, err := m.run(t, "perceptctl", "cache-key", "show"); exitOf(err) != 5 {
					t.Errorf("%v %s", err, out)
				}
			})
			if row.packages == "" {
				testKeyInTheClear(t, m)
				return
			}
			testKeyOfTheHost(t, m)
			testUpgrade(t, m)
			testKeyOfTheTPM(t, m, tpm)
		})
	}
}

const (
	tpmVariable = "SYSTEMD_TPM2_DEVICE=swtpm:path=/run/tpmx/sock"

	// keySeen notes, as the service and in its sandbox, which key can be read.
	keySeen = `for f in /run/percept-cache-key/key /etc/percept/cache-key none; do [ ! -r $$f ] || break; done; echo ` +
		`$$f >/var/lib/percept/key-seen`
)

const (
	openedKey = "/run/percept-cache-key/key"
	clearKey  = "/etc/percept/cache-key"
	sealedKey = "/etc/percept/cache-key.cred"
)

func testKeyInTheClear(t *testing.T, m *machine) {
	t.Run("in the clear", func(t *testing.T) {
		wants(t, m.must(t, "perceptctl", "cache-key", "make"), clearKey+", a file in the clear")
		wants(t, m.must(t, "stat", "-c", "%a %U:%G %s", clearKey), "640 root:percept 32")
		m.must(t, "systemctl", "restart", "perceptd-cache-key", "perceptd") // as it says
		m.serves(t, clearKey)
		m.isNotFor(t, "edge", clearKey)
		m.must(t, "perceptctl", "cache-key", "show")
	})
	testUpgrade(t, m)
	t.Run("on another device", func(t *testing.T) {
		wants(t, m.must(t, "stat", "-c", "%a %U:%G", "/run/percept-cache-key/device"), "440 root:percept")
		m.must(t, "perceptctl", "policy-changed", "https://vault.azure.net", "--effect", "granted")
		m.reboot(t, "systemctl", "reboot")
		m.serves(t, clearKey)
		wants(t, m.must(t, "perceptctl", "status", "--json"), `"fetches": 0`)
		bound := regexp.MustCompile(`"bound_to": *"([a-z-]+)"`).FindStringSubmatch(m.must(t, "perceptctl", "status",
			"--json"))
		if len(bound) == 0 || bound[1] != "machine-id" {
			t.Skipf("a container can be another device only where it is bound to its machine-id, and it is to %q",
				bound)
		}
		m.write(t, "/etc/machine-id", "3f1c7b2a995d4c55a0e1c7f5b2a99d0a\n")
		m.reboot(t, "systemctl", "reboot")
		m.serves(t, clearKey)
		if status := m.must(t, "perceptctl", "status", "--json"); strings.Contains(status, `"fetches": 0`) ||
			!strings.Contains(status, `"effect": "granted"`) {
			t.Errorf("tokens of another device, or no policy change:\n%s", status)
		}
	})
}

func testKeyOfTheHost(t *testing.T, m *machine) {
	t.Run("by the host's key", func(t *testing.T) {
		wants(t, m.must(t, "perceptctl", "cache-key", "make", "--with", "host"),
			sealedKey+", sealed by this host's key")
		wants(t, m.must(t, "stat", "-c", "%a %U:%G", sealedKey), "600 root:root")
		m.must(t, "systemctl", "restart", "perceptd-cache-key", "perceptd")
		m.serves(t, openedKey)
		wants(t, m.must(t, "stat", "-c", "%a %U:%G %s", openedKey), "440 root:percept 32")
		m.isNotFor(t, "edge", openedKey)
		wants(t, m.must(t, "perceptctl", "cache-key", "show"), "opened    yes")
		key := m.must(t, "cat", openedKey)
		if sealed := m.must(t, "base64", "-d", sealedKey); strings.Contains(sealed, key) {
			t.Error("the key is in the clear on the disk")
		}
		m.reboot(t, "systemctl", "reboot")
		m.serves(t, openedKey)
		if m.must(t, "cat", openedKey) != key {
			t.Error("another key after a reboot")
		}
	})
}

// testUpgrade goes over a version that had neither the socket of the clock nor root tell what the device is known by,
// and is active all the same.
func testUpgrade(t *testing.T, m *machine) {
	t.Run("over an earlier version", func(t *testing.T) {
		m.must(t, "systemctl", "stop", "perceptd", "perceptd-clock.socket")
		m.must(t, "rm", "/run/percept-cache-key/device")
		next, over := unpack(t, m)
		m.must(t, "sh", "-ec", next)

		m.must(t, "systemctl", "restart", "perceptd") // alone, as versions before have printed it
		show, err := m.run(t, "perceptctl", "cache-key", "show")
		if exitOf(err) != 5 {
			t.Errorf("perceptd knows nothing that only root can read, and show says nothing of it: %v %s", err, show)
		}
		wants(t, show, "next      "+over)
		wants(t, strings.Join(strings.Fields(m.doctor(t)), " "), "next: "+over)

		m.must(t, "sh", "-ec", over)
		wants(t, m.must(t, "systemctl", "is-active", "perceptd", "perceptd.socket", "perceptd-admin.socket",
			"perceptd-clock.socket"), strings.Repeat("active\n", 4))
		wants(t, m.must(t, "stat", "-c", "%a %U:%G", "/run/percept-cache-key/device"), "440 root:percept")
		if show := m.must(t, "perceptctl", "cache-key", "show"); strings.Contains(show, "next") {
			t.Errorf("something is left to do: %s", show)
		}
	})
}

func testKeyOfTheTPM(t *testing.T, m *machine, tpm *tpm) {
	remake := func(t *testing.T, state string) {
		tpm.power(t, state)
		wants(t, m.must(t, "env", tpmVariable, "perceptctl", "cache-key", "make", "--with", "tpm2", "--replace"),
			sealedKey+", sealed by the TPM")
		tpm.power(t, state)
		m.must(t, "systemctl", "restart", "perceptd-cache-key", "perceptd")
		m.serves(t, openedKey)
		wants(t, m.must(t, "perceptctl", "cache-key", "show"), "opened    yes")
	}
	// without is what there is when the key cannot be opened: everything else, and what to do.
	without := func(t *testing.T) {
		m.serves(t, "none")
		if state, _ := m.run(t, "systemctl", "is-active", "perceptd-cache-key"); state != "failed\n" {
			t.Errorf("perceptd-cache-key is %s", state)
		}
		out, err := m.run(t, "perceptctl", "cache-key", "show")
		if exitOf(err) != 5 {
			t.Errorf("show: %v", err)
		}
		wants(t, strings.Join(strings.Fields(out), " "), "opened no: the TPM does not know the key",
			"next perceptctl cache-key make --replace")
		wants(t, strings.Join(strings.Fields(m.doctor(t)), " "),
			"FAIL key of kept tokens: the TPM does not know the key", "next: perceptctl cache-key make --replace")
	}
	t.Run("by a TPM", func(t *testing.T) {
		remake(t, "first")
		tpm.power(t, "first")
		m.reboot(t, "systemctl", "reboot")
		m.serves(t, openedKey)
		wants(t, m.must(t, "perceptctl", "status", "--json"), `"fetches": 0`)
	})
	t.Run("which is replaced", func(t *testing.T) {
		tpm.power(t, "second")
		m.reboot(t, "systemctl", "reboot")
		without(t)
		out, err := m.run(t, "perceptctl", "status")
		if exitOf(err) != 5 {
			t.Errorf("the status is in no trouble: %v", err)
		}
		wants(t, strings.Join(strings.Fields(out), " "),
			"was not opened: systemctl status perceptd-cache-key tells why",
			"perceptctl cache-key show says what to do")
		wants(t, m.must(t, "systemctl", "show", "perceptd", "-p", "StatusText"),
			"trouble: the tokens that were kept cannot be read now: the key to seal them with, "+sealedKey)
		if status, _ := m.run(t, "perceptctl", "status", "--json"); strings.Contains(status, `"fetches": 0`) {
			t.Errorf("tokens were not fetched anew:\n%s", status)
		}
		status, _ := m.run(t, "systemctl", "status", "--no-pager", "--full", "perceptd-cache-key")
		wants(t, status,
			"the key in "+sealedKey+" cannot be opened, and tokens are not kept over a reboot: ",
			"the TPM does not know the key",
			"hint: perceptctl cache-key make --replace")
		t.Log("\n" + status)
	})
	t.Run("and made anew", func(t *testing.T) { remake(t, "second") })
	t.Run("which is gone", func(t *testing.T) {
		tpm.off(t)
		m.must(t, "systemctl", "restart", "perceptd")
		m.serves(t, openedKey) // from before: a restart of perceptd asks no TPM
		m.reboot(t, "systemctl", "reboot")
		m.waits(t, "the TPM is not there")
		t.Run("and comes late", func(t *testing.T) {
			tpm.power(t, "second")
			m.takesKeyLate(t)
		})
	})
	t.Run("which is locked out", func(t *testing.T) {
		for range 3 { // each loss of power after a use of the key counts as a guess
			m.must(t, "systemctl", "restart", "perceptd-cache-key")
			tpm.off(t)
			tpm.power(t, "second")
		}
		m.reboot(t, "systemctl", "reboot")
		m.waits(t, "the TPM is locked out")
		if guesses := tpm.guesses(t); guesses != 3 {
			t.Errorf("%d guesses are counted, and 3 made it lock", guesses)
		}
		t.Run("and unlocks", func(t *testing.T) {
			tpm.unlock(t)
			m.takesKeyLate(t)
			if guesses := tpm.guesses(t); guesses != 0 {
				t.Errorf("tries to open the key count as guesses: %d", guesses)
			}
		})
	})
	t.Run("which is out of sessions", func(t *testing.T) {
		tpm.power(t, "second")
		tpm.takeSessions(t)
		m.reboot(t, "systemctl", "reboot")
		m.waits(t, "the TPM is out of sessions or memory")
		t.Run("and has some again", func(t *testing.T) {
			tpm.power(t, "second")
			m.takesKeyLate(t)
		})
	})
	t.Run("which hangs", func(t *testing.T) {
		tpm.power(t, "second")
		tpm.signal(t, syscall.SIGSTOP) // it takes commands and never answers
		m.reboot(t, "systemctl", "reboot")
		m.waits(t, "the TPM does not answer")
		t.Run("and goes on", func(t *testing.T) {
			tpm.signal(t, syscall.SIGCONT)
			m.takesKeyLate(t)
		})
	})
}

// waits checks that the service serves while its key is not open yet, and that each place says why, and to wait.
func (m *machine) waits(t *testing.T, why string) {
	t.Helper()
	m.serves(t, "none")
	wants(t, m.must(t, "systemctl", "show", "perceptd-cache-key", "-p", "ActiveState,SubState,StatusText"),
		"ActiveState=active", "SubState=running", "StatusText="+why)
	show, err := m.run(t, "perceptctl", "cache-key", "show")
	if exitOf(err) != 5 || strings.Contains(show, "replace") {
		t.Errorf("show: %v\n%s", err, show)
	}
	wants(t, strings.Join(strings.Fields(show), " "), "opened not yet: "+why, "next wait: ")
	status, err := m.run(t, "perceptctl", "status")
	if exitOf(err) != 5 || strings.Contains(status, "replace") {
		t.Errorf("status: %v\n%s", err, status)
	}
	for _, said := range []string{status, m.doctor(t)} {
		wants(t, strings.Join(strings.Fields(said), " "), "is not open yet: "+why,
			"wait: perceptd-cache-key tries it again")
	}
	t.Log("\n" + show)
}

// takesKeyLate waits until the daemon that runs has opened what it kept, with a key that came by itself.
func (m *machine) takesKeyLate(t *testing.T) {
	t.Helper()
	before := m.pid(t)
	m.until(t, "the key to be opened", func() bool {
		state, _ := m.run(t, "systemctl", "show", "perceptd-cache-key", "-p", "SubState,StatusText")
		return strings.Contains(state, "SubState=exited") && strings.Contains(state, "the key is open")
	})
	m.until(t, "perceptd to take the key", func() bool {
		status, _ := m.run(t, "perceptctl", "status")
		return strings.Contains(strings.Join(strings.Fields(status), " "), "kept over a restart and a reboot")
	})
	wants(t, m.must(t, "journalctl", "-b", "-u", "perceptd", "-o", "cat", "--no-pager"),
		"tokens that were kept were read after all")
	if after := m.pid(t); after != before {
		t.Errorf("main process %s, was %s", after, before)
	}
	wants(t, m.must(t, "perceptctl", "cache-key", "show"), "opened    yes")
}

// serves checks that the service serves, and which key it could read when it started.
func (m *machine) serves(t *testing.T, key string) {
	t.Helper()
	m.until(t, "perceptd", func() bool {
		state, _ := m.run(t, "systemctl", "is-active", "perceptd")
		return state == "active\n"
	})
	if out, err := m.as(t, "edge", "perceptctl", "token", "--resource", askVault, "--short"); err != nil {
		t.Errorf("no token: %v %s", err, out)
	}
	kept := map[bool]string{true: "kept over a restart and a reboot",
		false: "kept over a restart, not over a reboot"}[key != "none"]
	out, _ := m.run(t, "perceptctl", "status") // in trouble when a key was made and cannot be opened
	wants(t, strings.Join(strings.Fields(out), " "), kept)
	if seen := strings.TrimSpace(m.must(t, "cat", "/var/lib/percept/key-seen")); seen != key {
		t.Errorf("the service can read %s, want %s", seen, key)
	}
}

func (m *machine) isNotFor(t *testing.T, user, path string) {
	t.Helper()
	if out, err := m.as(t, user, "cat", path); err == nil {
		t.Errorf("%s can read %s: %d bytes", user, path, len(out))
	}
}

// tpm is an emulated TPM, which the container reaches by a socket in a folder.
type tpm struct {
	states, folder string
	running        *exec.Cmd
}

// power turns the TPM off, in order, and on. Another state is another TPM.
func (p *tpm) power(t *testing.T, state string) {
	t.Helper()
	if p.running != nil {
		p.shutDown(t)
	}
	p.off(t)
	folder := filepath.Join(p.states, state)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(p.folder, "sock")
	p.running = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+folder, "--flags",
		"not-need-init,startup-clear",
		"--server", "type=unixio,path="+socket, "--ctrl", "type=unixio,path="+socket+".ctrl")
	if err := p.running.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.off(t) })
	new(machine).until(t, "the TPM", func() bool { // which may be another user's, as a device of the group tss is
		return os.Chmod(socket, 0o660) == nil && os.Chmod(socket+".ctrl", 0o660) == nil &&
			os.Chown(socket, 900, 900) == nil && os.Chown(socket+".ctrl", 900, 900) == nil
	})
}

// shutDown says to the TPM what a kernel says before it ends. A TPM that loses its power without takes that for an
// attempt to guess, and locks itself after a few.
func (p *tpm) shutDown(t *testing.T) {
	t.Helper()
	p.command(t, 0x8001, "00000145"+"0000") // TPM2_Shutdown, TPM_SU_CLEAR
}

// unlock ends a lockout, as time does.
func (p *tpm) unlock(t *testing.T) {
	t.Helper()
	const lockReset = "00000139" // TPM2_DictionaryAttackLockReset
	p.command(t, 0x8002, lockReset+"4000000a"+"00000009"+"40000009"+"0000"+"00"+"0000")
}

// guesses returns how many attempts to guess the TPM counts.
func (p *tpm) guesses(t *testing.T) uint32 {
	t.Helper()
	const lockoutCounter = "0000020e"
	answer := p.command(t, 0x8001, "0000017a"+"00000006"+lockoutCounter+"00000001") // TPM2_GetCapability
	return binary.BigEndian.Uint32(answer[len(answer)-4:])
}

// takeSessions leaves no session to others: an emulated TPM has three, and no resource manager before it.
func (p *tpm) takeSessions(t *testing.T) {
	t.Helper()
	for range 3 {
		p.command(t, 0x8001, "00000176"+"40000007"+"40000007"+"0020"+strings.Repeat("00", 32)+"0000"+"01"+"0010"+
			"000b") // TPM2_StartAuthSession, of a policy
	}
}

// command gives the TPM a command, which is its tag and the code and what follows it in hexadecimal, and returns the
// answer.
func (p *tpm) command(t *testing.T, tag uint16, text string) []byte {
	t.Helper()
	body, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	connection, err := net.Dial("unix", filepath.Join(p.folder, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	message := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, tag), uint32(6+len(body)))
	answer := make([]byte, 4096)
	n := 0
	if _, err = connection.Write(append(message, body...)); err == nil {
		n, err = connection.Read(answer)
	}
	if err != nil || n < 10 || !bytes.Equal(answer[6:10], make([]byte, 4)) {
		t.Fatalf("the TPM does not do %s: %v, %x", text, err, answer[:n])
	}
	return answer[:n]
}

func (p *tpm) off(t *testing.T) {
	t.Helper()
	if p.running == nil {
		return
	}
	if err := p.running.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = p.running.Wait() // killed
	p.running = nil
	for _, name := range []string{"sock", "sock.ctrl"} {
		_ = os.Remove(filepath.Join(p.folder, name))
	}
}

func (p *tpm) signal(t *testing.T, signal syscall.Signal) {
	t.Helper()
	if err := p.running.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
}
