package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"perceptd/agent/api"
)

// ShortFolder makes a folder for a test's sockets, whose paths may have 107 bytes: TMPDIR, where t.TempDir is,
// may be longer than that, and closed to other users.
func ShortFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "percept")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}

// VaultURI is the resource that most tests ask for.
const VaultURI = "https://vault.azure.net"

// SimulatedIdentities is a configuration by which the embedded simulated back end gives tokens to nobody yet.
const SimulatedIdentities = `[source]
kind = "simulated"

[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = "00000000-0000-0000-0000-000000000001"
`

// GoodConfig is a configuration without a fault.
const GoodConfig = SimulatedIdentities + `
[[grant]]
caller = { uid = 4711 }
identity = "device"
resources = ["https://vault.azure.net"]
prefetch = true
`

// WriteConfig puts files into a new folder and returns the path of config.toml in it.
func WriteConfig(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := ShortFolder(t)
	if err := os.Chmod(dir, 0o755); err != nil { // other users may read it
		t.Fatal(err)
	}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Chmod(filepath.Dir(path), 0o755)); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o644), os.Chmod(path, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "config.toml")
}

// SimulatedFor lets this user and the named modules have tokens of the embedded simulated back end.
func SimulatedFor(modules ...string) string {
	text := SimulatedIdentities + fmt.Sprintf(`
[[grant]]
caller = { uid = %d }
identity = "device"
resources = ["https://vault.azure.net"]
prefetch = true
`, os.Getuid())
	for _, module := range modules {
		text += fmt.Sprintf("\n[[module]]\nname = %q\nrequire = \"socket\"\n\n"+
			"[[grant]]\ncaller = { module = %q }\nidentity = \"vision\"\nresources = [%q]\n", module, module, VaultURI)
	}
	return text
}

// VaultToken asks for a token of it in our own form.
const VaultToken = api.PathToken + "?resource=" + VaultURI

// WithLoopback adds a loopback listener to a configuration.
func WithLoopback(config, address string) string {
	return fmt.Sprintf("%s\n[loopback]\naddress = %q\n", config, address)
}

// FreeAddress returns an address on which whoever a test starts may listen. It stays this test's until the test's end:
// a socket is bound to it and never listens, so that the kernel gives the port to nobody else, and yet lets whoever
// names it have it, as Go's listeners do with SO_REUSEADDR.
func FreeAddress(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	Must(t, err)
	t.Cleanup(func() { _ = syscall.Close(fd) })
	Must(t, syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1))
	Must(t, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	bound, err := syscall.Getsockname(fd)
	Must(t, err)
	return fmt.Sprintf("127.0.0.1:%d", bound.(*syscall.SockaddrInet4).Port)
}
