package simulator

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func keysIn(t *testing.T, dir string) int {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func TestKeyFilesEnd(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		k, err := openKeyStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer k.close()
		path, err := k.issue(0)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(arcKeyLife - time.Nanosecond)
		synctest.Wait()
		if keysIn(t, dir) != 1 {
			t.Error("the key file went before its time")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if keysIn(t, dir) != 0 || k.redeem(string(text)) {
			t.Error("the key outlived its time")
		}
	})
}

func TestKeyFilesAreBounded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	k, err := openKeyStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	first, err := k.issue(0)
	if err != nil {
		t.Fatal(err)
	}
	for range maxPendingKeys {
		if _, err := k.issue(0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(first); keysIn(t, dir) != maxPendingKeys || !os.IsNotExist(err) {
		t.Errorf("%d key files; the oldest: %v", keysIn(t, dir), err)
	}
	k.close()
	k.close()
	if keysIn(t, dir) != 0 {
		t.Error("key files are left")
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("a directory that was there before is gone: %v", err)
	}
	if _, err := k.issue(0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a key after close: %v", err)
	}
}

func TestKeyDirectoryWithOthersFilesStays(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "b")
	k, err := openKeyStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.close()
	if keysIn(t, dir) != 1 {
		t.Error("somebody else's file is gone")
	}
}

func TestKeyFaults(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	k, err := openKeyStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	var outside []string
	for _, c := range []struct {
		kind FaultKind
		ok   func(path string, info os.FileInfo) bool
	}{
		{FaultKeyOutside, func(path string, info os.FileInfo) bool {
			outside = append(outside, path)
			return filepath.Dir(path) != dir && info.Mode().IsRegular()
		}},
		{FaultKeySymlink, func(path string, info os.FileInfo) bool {
			target, err := os.Readlink(path)
			outside = append(outside, target)
			return err == nil && filepath.Dir(target) != dir
		}},
		{FaultKeyDirectory, func(_ string, info os.FileInfo) bool { return info.IsDir() }},
		{FaultKeyFIFO, func(_ string, info os.FileInfo) bool { return info.Mode()&os.ModeNamedPipe != 0 }},
		{FaultKeyTooBig, func(_ string, info os.FileInfo) bool { return info.Size() > maxArcKey }},
	} {
		path, err := k.issue(c.kind)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(path)
		if err != nil || filepath.Ext(path) != ".key" || !c.ok(path, info) {
			t.Errorf("%s: %s, %v, %v", c.kind, path, info, err)
		}
	}
	k.close()
	if keysIn(t, dir) != 0 {
		t.Error("something is left in the directory")
	}
	for _, path := range outside {
		if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// A reader of the named pipe is not left blocked for ever.
func TestClosingFreesTheReaderOfAPipe(t *testing.T) {
	t.Parallel()
	k, err := openKeyStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	path, err := k.issue(FaultKeyFIFO)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	opening := make(chan int)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		opening <- syscall.Gettid()
		_, err := os.ReadFile(path)
		read <- err
	}()
	awaitOpening(t, <-opening)
	k.close()
	if err := <-read; err != nil {
		t.Error(err)
	}
}

// awaitOpening waits until a thread of this process sleeps in the kernel, opening a file. One that has found a pipe,
// and is not in it yet when that is closed, would sleep for ever.
func awaitOpening(t *testing.T, thread int) {
	t.Helper()
	for opening := fmt.Sprint(syscall.SYS_OPENAT, " "); ; time.Sleep(time.Millisecond) {
		in, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", thread))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(string(in), opening) {
			return
		}
	}
}

func TestKeyDirectoryGone(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "keys")
	s := start(t, ServerOptions{Form: FormArc, ArcKeyDir: dir})
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []FaultKind{0, FaultKeySymlink, FaultKeyDirectory, FaultKeyFIFO} {
		if _, err := s.handler.keys.issue(kind); err == nil {
			t.Errorf("%s: a key in a directory that is gone", kind)
		}
	}
	if got := get(t, s.URL()+arcQuery, "Metadata", "true"); got.status != 500 {
		t.Errorf("%d %s", got.status, got.body)
	}
}

func TestNoKeyOutsideWithoutATemporaryDirectory(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", filepath.Join(dir, "gone"))
	k, err := openKeyStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	for _, kind := range []FaultKind{FaultKeyOutside, FaultKeySymlink} {
		if _, err := k.issue(kind); err == nil {
			t.Errorf("%s: a key in a directory that is not there", kind)
		}
	}
	if keysIn(t, dir) != 0 {
		t.Error("a failure left something")
	}
}
