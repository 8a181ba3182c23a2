package socket

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

// percept is the user whom the folders are given to, and mapped is the root of a user namespace.
const percept, mapped = 4242, 100000

// modulesOf makes the folder that the modules' are in, percept's alone.
func modulesOf(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: only root can give folders away")
	}
	dir := filepath.Join(folder(t), "modules")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, percept, percept)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// engineMakes makes a folder as a container engine does.
func engineMakes(t *testing.T, path string, user int) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(path, 0o755), os.Chown(path, user, user)); err != nil {
		t.Fatal(err)
	}
}

func ownerOf(t *testing.T, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st
}

func give(t *testing.T, dir string) map[string]string {
	t.Helper()
	given, err := GiveFolders(dir, "token.sock")
	if err != nil {
		t.Error(err)
	}
	became := make(map[string]string)
	for _, g := range given {
		became[g.Folder] = g.Left
		if again, ok := ParseGiven(g.String()); !ok || again != g {
			t.Errorf("%q is read as %+v", g, again)
		}
	}
	return became
}

// A folder that an engine made becomes perceptd's, and stays the one that its container has mounted.
func TestGiveFolders(t *testing.T) {
	t.Parallel()
	dir := modulesOf(t)
	for name, user := range map[string]int{"vision": 0, "remapped": mapped, "socket": 0, "own": percept} {
		engineMakes(t, filepath.Join(dir, name), user)
	}
	engineMakes(t, filepath.Join(dir, "socket/token.sock"), 0)
	if err := os.Chmod(filepath.Join(dir, "remapped"), 0o700); err != nil {
		t.Fatal(err)
	}
	inode := ownerOf(t, filepath.Join(dir, "vision")).Ino
	if got := give(t, dir); len(got) != 3 || got["vision"]+got["remapped"]+got["socket"] != "" {
		t.Errorf("%v", got)
	}
	for _, name := range []string{"vision", "remapped", "socket", "own"} {
		st := ownerOf(t, filepath.Join(dir, name))
		if st.Uid != percept || st.Gid != percept || st.Mode&0o7777 != 0o755 {
			t.Errorf("%s belongs to %d:%d, mode %04o", name, st.Uid, st.Gid, st.Mode&0o7777)
		}
	}
	if ownerOf(t, filepath.Join(dir, "vision")).Ino != inode {
		t.Error("another folder is in its place")
	}
	if st := ownerOf(t, filepath.Join(dir, "socket/token.sock")); st.Uid != 0 {
		t.Error("what is in a folder changed hands as well")
	}
	if got := give(t, dir); len(got) != 0 {
		t.Errorf("given again: %v", got)
	}
}

// What is not an engine's empty folder is left, and nothing is reached through it.
func TestGiveFoldersLeaves(t *testing.T) {
	t.Parallel()
	dir := modulesOf(t)
	outside := folder(t) // root's, and empty: what would be given away
	engineMakes(t, filepath.Join(outside, "empty"), 0)
	path := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"full", "file", "link", "deep", "two", "odd name", ".hidden", "colon:x"} {
		engineMakes(t, path(name), 0)
	}
	must(os.WriteFile(path("full/data"), nil, 0o644))
	must(os.WriteFile(path("file/token.sock"), nil, 0o644))
	must(os.Symlink(outside, path("link/token.sock")))
	must(os.MkdirAll(path("deep/token.sock/data"), 0o755))
	must(os.MkdirAll(path("two/token.sock"), 0o755))
	must(os.Mkdir(path("two/more"), 0o755))
	// Beside them what percept could put there itself.
	must(os.Symlink(outside, path("linked")))
	must(os.Symlink(filepath.Join(outside, "empty"), path("linked2")))
	must(os.WriteFile(path("plain"), nil, 0o644))
	must(unix.Mkfifo(path("fifo"), 0o644))
	stale(t, path("sock"))
	got := give(t, dir)
	for name, why := range map[string]string{
		"full": `it holds "data"`,
		"file": "token.sock in it is not a folder", "link": "token.sock in it is not a folder",
		"deep": `it holds "data"`, "two": "it holds ",
	} {
		if !strings.HasPrefix(got[name], why) {
			t.Errorf("%s is left since %q, want %q", name, got[name], why)
		}
		delete(got, name)
	}
	if len(got) != 0 {
		t.Errorf("beside them: %v", got)
	}
	for _, of := range []string{dir, outside} {
		must(filepath.WalkDir(of, func(path string, _ os.DirEntry, err error) error {
			if st := ownerOf(t, path); st.Uid != 0 && path != dir {
				t.Errorf("%s was given away", path)
			}
			return err
		}))
	}
}

func TestGiveFoldersRefuses(t *testing.T) {
	t.Parallel()
	dir := modulesOf(t)
	link := filepath.Join(filepath.Dir(dir), "link")
	open := filepath.Join(filepath.Dir(dir), "open")
	if err := errors.Join(os.Symlink(dir, link), os.Mkdir(open, 0o700), os.Chmod(open, 0o770)); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{
		link: "is a link, which is not followed", open: "others may write in",
		filepath.Join(dir, "none"): "no such file",
	} {
		_, err := GiveFolders(path, "token.sock")
		wantError(t, err, says)
	}
}

// A mount in a folder's place is left: what is mounted may be anything of root's, also of the same file system. The
// test has a mount namespace to itself, since mounts are the device's.
func TestGiveFoldersLeavesMounts(t *testing.T) {
	t.Parallel()
	const variable = "PERCEPT_TEST_GIVE_MOUNTS"
	if at := os.Getenv(variable); at != "" {
		dir, source := filepath.Join(at, "modules"), filepath.Join(at, "root's")
		for _, target := range []string{"same", "inner/token.sock"} {
			if err := unix.Mount(source, filepath.Join(dir, target), "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mount("percept", filepath.Join(dir, "other"), "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		got := give(t, dir)
		for _, name := range []string{"same", "other", "inner"} {
			if got[name] != "something is mounted there" {
				t.Errorf("%s: %q", name, got[name])
			}
		}
		if left, known := got["free"]; !known || left != "" {
			t.Errorf("the one without a mount: %v", got)
		}
		if ownerOf(t, source).Uid != 0 || ownerOf(t, filepath.Join(dir, "other")).Uid != 0 {
			t.Error("what is mounted was given away")
		}
		return
	}
	dir := modulesOf(t)
	engineMakes(t, filepath.Join(filepath.Dir(dir), "root's"), 0)
	for _, name := range []string{"same", "other", "inner", "free"} {
		engineMakes(t, filepath.Join(dir, name), 0)
	}
	engineMakes(t, filepath.Join(dir, "inner/token.sock"), 0)
	c := exec.Command(os.Args[0], "-test.run=^TestGiveFoldersLeavesMounts$")
	c.Env = append(os.Environ(), variable+"="+filepath.Dir(dir))
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Unshareflags: unix.CLONE_NEWNS}
	if out, err := c.CombinedOutput(); err != nil {
		if strings.Contains(err.Error(), "operation not permitted") {
			t.Skipf("needs a mount namespace: %v", err)
		}
		t.Errorf("%v\n%s", err, out)
	}
}

// percept, whose folder it is, exchanges an engine's empty folder for links to what is root's, again and again while
// root gives folders away; and a module, which has its folder mounted writable, fills and empties it, changes its owner
// back and puts links in it. Nothing outside changes hands.
func TestGiveFoldersWhileOthersSwap(t *testing.T) {
	t.Parallel()
	dir := modulesOf(t)
	outside := folder(t)
	engineMakes(t, filepath.Join(outside, "empty"), 0)
	at := filepath.Join(dir, "vision")
	engineMakes(t, at, 0)
	var swapping sync.WaitGroup
	stop := make(chan struct{})
	again := func(steps ...func()) {
		swapping.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, step := range steps {
					step() // a step fails where another is ahead of it
				}
			}
		})
	}
	again( // percept
		func() { _ = unix.Rename(at, filepath.Join(dir, "aside")) },
		func() { _ = unix.Symlink(filepath.Join(outside, "empty"), at) },
		func() { _ = unix.Unlink(at) },
		func() { _ = unix.Rename(filepath.Join(dir, "aside"), at) },
	)
	again( // the module
		func() { _ = unix.Lchown(at, 0, 0) },
		func() { _ = unix.Symlink(outside, filepath.Join(at, "token.sock")) },
		func() { _ = unix.Unlink(filepath.Join(at, "token.sock")) },
		func() { _ = unix.Mkdir(filepath.Join(at, "token.sock"), 0o755) },
		func() { _ = unix.Rmdir(filepath.Join(at, "token.sock")) },
	)
	for range 2000 {
		_, _ = GiveFolders(dir, "token.sock")
	}
	close(stop)
	swapping.Wait()
	for _, path := range []string{outside, filepath.Join(outside, "empty")} {
		if ownerOf(t, path).Uid != 0 {
			t.Errorf("%s was given away", path)
		}
	}
	_ = os.RemoveAll(at)
	engineMakes(t, filepath.Join(dir, "last"), 0)
	if left, known := give(t, dir)["last"]; !known || left != "" {
		t.Errorf("a folder after all that: %v %q", known, left)
	}
}

// Whoever runs perceptd without root's rights is told whose the folder is, and that it is not the socket's fault.
func TestListenInAForeignFolder(t *testing.T) {
	t.Parallel()
	const variable = "PERCEPT_TEST_FOREIGN"
	if dir := os.Getenv(variable); dir != "" {
		h := locked(t, dir)
		for name, user := range map[string]uint32{"root": 0, "shut": 0, "mapped": mapped} {
			_, err := h.Listen("modules/"+name, "token.sock", 0o666, -1)
			foreign, is := errors.AsType[*ForeignError](err)
			if !is || foreign.User != user || !strings.Contains(err.Error(), "before perceptd") {
				t.Errorf("%s: %v", name, err)
			}
		}
		if got := h.Foreign("modules"); !slices.Equal(got, []string{"mapped", "root", "shut"}) {
			t.Errorf("%v", got)
		}
		listen(t, h, "modules/own", "token.sock")
		return
	}
	dir := modulesOf(t)
	for name, user := range map[string]int{"root": 0, "shut": 0, "mapped": mapped, "own": percept} {
		engineMakes(t, filepath.Join(dir, name), user)
	}
	engineMakes(t, filepath.Join(dir, "own/token.sock"), 0)
	program := filepath.Join(folder(t), "test")
	text, err := os.ReadFile(os.Args[0])
	if err := errors.Join(err, os.Chmod(filepath.Join(dir, "shut"), 0o700), harness.WriteProgram(program, text),
		os.Chmod(filepath.Dir(program), 0o755), os.Chown(filepath.Dir(dir), percept, percept)); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(program, "-test.run=^TestListenInAForeignFolder$")
	c.Env = append(os.Environ(), variable+"="+filepath.Dir(dir))
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: percept, Gid: percept}}
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// The folder that an engine makes where the socket itself is mounted gives way to the socket.
func TestListenInTheFoldersPlace(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	if err := os.MkdirAll(filepath.Join(dir, "modules/vision/token.sock"), 0o755); err != nil {
		t.Fatal(err)
	}
	l := listen(t, locked(t, dir), "modules/vision", "token.sock")
	talks(t, l, filepath.Join(dir, "modules/vision/token.sock"))
}

// A folder is known again, and not taken for another by the same path.
func TestFolderOfAListener(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	h := locked(t, dir)
	first := listen(t, h, "modules/vision", "token.sock")
	was := first.Folder()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if listen(t, h, "modules/vision", "token.sock").Folder() != was {
		t.Error("the same folder is taken for another")
	}
	// As a container has it, so that no other gets its number.
	held, err := os.Open(filepath.Join(dir, "modules/vision"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := os.RemoveAll(held.Name()); err != nil {
		t.Fatal(err)
	}
	if listen(t, h, "modules/vision", "token.sock").Folder() == was {
		t.Error("another folder is taken for the same")
	}
}

func FuzzParseGiven(f *testing.F) {
	f.Add(Given{Folder: "vision"}.String())
	f.Add(Given{Folder: "vision", User: 7, Left: `it holds "x"`}.String())
	f.Fuzz(func(t *testing.T, line string) {
		if g, ok := ParseGiven(line); ok && (strings.ContainsAny(g.Folder, "/\n ") || g.Folder == "") {
			t.Errorf("%q: %+v", line, g)
		}
	})
}
