// Package perceptdtest is what tests of perceptd share.
package perceptdtest

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
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

// GoodConfig is a configuration without a fault.
const GoodConfig = `[source]
kind = "simulated"

[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = "00000000-0000-0000-0000-000000000001"

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
