package lock

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// open makes a folder with that mode, whatever the umask, and opens it.
func open(t *testing.T, path string, mode os.FileMode) *os.File {
	t.Helper()
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func TestTake(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "folder")
	first, err := Take(open(t, path, 0o755))
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("others can open it, and so lock it: %v %v", info.Mode(), err)
	}
	_, err = Take(open(t, path, 0o700))
	var held HeldError
	if !errors.As(err, &held) || held.Process != os.Getpid() ||
		!strings.HasPrefix(held.Error(), "program lock.test (process "+strconv.Itoa(os.Getpid())+") holds the lock: ") {
		t.Errorf("the second: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := Take(open(t, path, 0o700))
	if err != nil {
		t.Fatalf("after the first: %v", err)
	}
	if err := errors.Join(second.Close(), (*Folder)(nil).Close()); err != nil {
		t.Error(err)
	}
}

func TestTakeRefuses(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Take(file); err == nil {
		t.Error("a file was taken for a folder")
	}
	if os.Geteuid() != 0 {
		return // only root can give a folder away
	}
	foreign := filepath.Join(t.TempDir(), "foreign")
	folder := open(t, foreign, 0o700)
	if err := os.Chown(foreign, 4711, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := Take(folder); err == nil {
		t.Error("a folder that another user can lock was taken")
	}
}

// Another user, who can reach the folder's path, opens it for nothing: neither before nor beside the daemon can that
// user hold its lock.
func TestAnotherUserCannotLock(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		return // only root can be somebody else
	}
	above, err := os.MkdirTemp("/tmp", "percept-lock") // not in TMPDIR, which may be closed to that user
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(above) })
	if err := os.Chmod(above, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(above, "folder")
	folder, err := Take(open(t, path, 0o755))
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	for _, at := range []struct {
		path string
		want int
	}{{above, 0}, {path, 1}} {
		c := exec.Command("/bin/sh", "-c", `if (exec 3<"$1") 2>/dev/null; then exit 0; else exit 1; fi`, "sh", at.path)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, _ := c.CombinedOutput(); c.ProcessState.ExitCode() != at.want {
			t.Errorf("another user opens %s: exit status %d, want %d\n%s",
				at.path, c.ProcessState.ExitCode(), at.want, out)
		}
	}
}

func TestFindHolder(t *testing.T) {
	t.Parallel()
	const locks = `1: POSIX  ADVISORY  WRITE 11 08:01:77 0 EOF
2: FLOCK  ADVISORY  WRITE 0 08:01:77 0 EOF
3: FLOCK  ADVISORY  WRITE 12 08:02:77 0 EOF
4: FLOCK  ADVISORY  WRITE 13 08:01:77 0 EOF
4: -> FLOCK  ADVISORY  WRITE 14 08:01:77 0 EOF
`
	for inode, want := range map[string]int{"08:01:77": 13, "08:02:77": 12, "08:01:7": 0, "": 0} {
		if got := findHolder(locks, inode); got != want {
			t.Errorf("%s: process %d, want %d", inode, got, want)
		}
	}
}

func FuzzFindHolder(f *testing.F) {
	f.Add("1: FLOCK  ADVISORY  WRITE 12 08:01:77 0 EOF\n", "08:01:77")
	f.Add("4: -> FLOCK  ADVISORY  WRITE -1 08:01:77 0 EOF", "->")
	f.Fuzz(func(t *testing.T, locks, inode string) {
		if pid := findHolder(locks, inode); pid < 0 {
			t.Errorf("process %d", pid)
		}
	})
}

func TestCloseOnExec(t *testing.T) {
	t.Parallel()
	folder, err := Take(open(t, filepath.Join(t.TempDir(), "folder"), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	if flags, err := unix.FcntlInt(folder.file.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("a child would hold the lock: flags %#x, %v", flags, err)
	}
}
