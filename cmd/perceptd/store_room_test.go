package main

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/perceptdtest"
)

// A store that is full costs a module what it is there for and nothing else, and is told of.
func TestFullStore(t *testing.T) {
	t.Parallel()
	binary(t, "perceptd")
	store := newFDStore(t)
	d := newFolder(t, simulatedFor("a", "b", "c"))
	store.start(t, d, "FDSTORE=3")
	d.awaitHealth(t)
	for _, module := range []string{"a", "b", "c"} {
		if status, _, err := d.get(d.module(module), vaultToken); status != 200 {
			t.Errorf("module %s: %d %v", module, status, err)
		}
	}
	trouble := strings.Join(d.status(t).Trouble, "\n")
	for _, part := range []string{"module b and 1 more: the socket is not kept through a restart", "systemd keeps 1 sockets", "FileDescriptorStoreMax="} {
		if !strings.Contains(trouble, part) {
			t.Errorf("trouble %q says nothing of %q", trouble, part)
		}
	}
	if names := store.names(); len(names) != 1 || names[0] != storedName("a", inodeOf(t, d.module("a"))) {
		t.Errorf("stored %q", names)
	}
	if status := d.stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if conn, err := net.Dial("unix", d.module("a")); err != nil {
		t.Errorf("nobody can wait: %v", err)
	} else {
		conn.Close()
	}
	if _, err := os.Lstat(d.module("b")); err == nil {
		t.Error("a socket that is not kept is left where nobody will answer")
	}

	// What a module that was removed has left is another's.
	store.start(t, d, "FDSTORE=3")
	d.awaitHealth(t)
	if status, body := d.reload(t, simulatedFor("b")); status != 200 {
		t.Fatal(body)
	}
	if trouble := d.status(t).Trouble; len(trouble) != 0 {
		t.Errorf("trouble %q", trouble)
	}
	until(t, "b to be stored", d.ended, func() bool {
		return slices.Equal(store.names(), []string{storedName("b", inodeOf(t, d.module("b")))})
	})
}

// After a stop, which empties the store, the sockets at the paths are nobody's and are replaced.
func TestEmptiedStore(t *testing.T) {
	t.Parallel()
	binary(t, "perceptd")
	store := newFDStore(t)
	d := newFolder(t, simulatedFor("vision", "gone"))
	store.start(t, d)
	d.awaitHealth(t)
	until(t, "both sockets to be stored", d.ended, func() bool { return len(store.names()) == 2 })
	folder := inodeOf(t, filepath.Dir(d.module("vision")))
	d.stop(t)
	store.clear()
	if conn, err := net.Dial("unix", d.module("vision")); err == nil {
		conn.Close()
		t.Error("somebody listens on the socket of a daemon that was stopped")
	}
	d.rewrite(t, simulatedFor("vision", "new"))
	store.start(t, d)
	d.awaitHealth(t)
	for _, module := range []string{"vision", "new"} {
		if status, _, err := d.get(d.module(module), vaultToken); status != 200 {
			t.Errorf("module %s: %d %v", module, status, err)
		}
	}
	if inodeOf(t, filepath.Dir(d.module("vision"))) != folder {
		t.Error("a module's folder is another: what has it mounted sees nothing any more")
	}
	if _, err := os.Lstat(filepath.Dir(d.module("gone"))); err == nil {
		t.Error("the folder of the module that was removed is still there")
	}
	until(t, "the new ones to be stored", d.ended, func() bool { return len(store.names()) == 2 })
}

// What is of no use does not stay in the store, where it would take up room at every start.
func TestUselessInStore(t *testing.T) {
	t.Parallel()
	binary(t, "perceptd")
	store := newFDStore(t)
	d := newFolder(t, simulatedFor("vision"))
	store.start(t, d)
	d.awaitHealth(t)
	until(t, "the socket to be stored", d.ended, func() bool { return len(store.names()) == 1 })
	d.stop(t)
	inode := inodeOf(t, d.module("vision"))
	for _, name := range []string{"module-x", "module-other-7", storedName("vision", inode), "module-../../vision-7"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(perceptdtest.ShortFolder(t), "s"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		file, err := l.File()
		l.Close()
		if err != nil {
			t.Fatal(err)
		}
		store.put(renamed(t, file, name))
	}
	for _, name := range []string{"module-null-7", "later"} {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		store.put(renamed(t, null, name))
	}
	store.start(t, d)
	d.awaitHealth(t)
	if status, _, err := d.get(d.module("vision"), vaultToken); status != 200 {
		t.Errorf("%d %v", status, err)
	}
	if inodeOf(t, d.module("vision")) != inode {
		t.Error("the socket is another")
	}
	until(t, "the one of use to be alone in the store", d.ended, func() bool {
		return slices.Equal(store.names(), []string{storedName("vision", inode)})
	})
}

// renamed is file by the name that it is stored by.
func renamed(t *testing.T, file *os.File, name string) *os.File {
	t.Helper()
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), name)
}
