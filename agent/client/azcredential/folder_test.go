package azcredential

import (
	"os"
	"testing"
)

// shortFolder makes a folder for a test's sockets, whose paths may have 107 bytes: TMPDIR, where t.TempDir is, may be
// longer than that.
func shortFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "percept")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}
