package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"perceptd/agent/grants"
)

// trust opens files that say who gets tokens, or what else nobody may change. Every step on the way to one counts: each
// folder, each link with the folders that it leads through, and the file, of which what is checked is what was opened.
type trust struct {
	self   int     // beside root, who may own them
	guards string  // what they say, for errors; empty: who gets tokens
	secret bool    // nobody else is to read what is opened: what mends a file is not to let all others do so
	reader *reader // who has to be able to read them, beside this process; nil: nobody
	shared []shared
}

// shared is a file or folder that a group may write to.
type shared struct {
	path string
	mode uint32
	gid  uint32
}

// ownFiles trusts root's files, and outside of a systemd service those of this process's user.
func ownFiles() *trust {
	if os.Getppid() == 1 && os.Getenv("INVOCATION_ID") != "" {
		return &trust{}
	}
	return &trust{self: os.Geteuid()}
}

// maxLinks is how many links may be on the way, as in the kernel.
const maxLinks = 40

// open opens a regular file or a folder.
func (t *trust) open(path string) (*os.File, error) {
	if !filepath.IsAbs(path) {
		here, err := os.Getwd()
		if err != nil {
			return nil, err
		}
		path = here + "/" + path
	}
	way := &way{trust: t}
	defer way.close()
	if err := way.enter(unix.AT_FDCWD, "/"); err != nil {
		return nil, err
	}
	links := 0
	for steps := strings.Split(path, "/"); len(steps) > 0; {
		step := steps[0]
		steps = steps[1:]
		switch step {
		case "", ".":
			continue
		case "..":
			way.leave()
			continue
		}
		target, file, err := way.take(step)
		switch {
		case err != nil:
			return nil, err
		case target != "":
			if links++; links > maxLinks {
				return nil, &fs.PathError{Op: "open", Path: path, Err: unix.ELOOP}
			}
			if target[0] == '/' {
				way.restart()
			}
			steps = append(strings.Split(target, "/"), steps...)
		case file != nil && len(steps) > 0:
			return nil, errors.Join(&fs.PathError{Op: "open", Path: file.Name(), Err: unix.ENOTDIR}, file.Close())
		case file != nil:
			return file, nil
		}
	}
	at := way.at()
	folder, err := openAt(at, ".", at.Name(), unix.O_DIRECTORY)
	return folder, t.mended(err, at)
}

// way is the folders from the root down to where open has got, all of them checked.
type way struct {
	trust   *trust
	folders []*os.File
}

func (w *way) at() *os.File { return w.folders[len(w.folders)-1] }

// leave goes up, but not above the root.
func (w *way) leave() {
	if len(w.folders) > 1 {
		_ = w.at().Close() // a handle only
		w.folders = w.folders[:len(w.folders)-1]
	}
}

func (w *way) restart() {
	for len(w.folders) > 1 {
		w.leave()
	}
}

func (w *way) close() {
	for _, folder := range w.folders {
		_ = folder.Close()
	}
}

// enter goes down into a folder.
func (w *way) enter(at int, name string) error {
	folder, st, err := handle(at, name, "/")
	if err != nil {
		return err
	}
	w.folders = append(w.folders, folder)
	return w.trust.check(folder, st)
}

// take goes one step: into a folder, or it returns where a link leads, or the file that is there.
func (w *way) take(step string) (target string, file *os.File, err error) {
	in := int(w.at().Fd())
	path := filepath.Join(w.at().Name(), step)
	there, st, err := handle(in, step, path)
	if err != nil {
		return "", nil, w.trust.mended(err, w.at())
	}
	if err := w.trust.check(there, st); err != nil {
		return "", nil, errors.Join(err, there.Close())
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		w.folders = append(w.folders, there)
		return "", nil, nil
	case unix.S_IFLNK:
		defer there.Close()
		text := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(there.Fd()), "", text)
		if err != nil || n == 0 {
			return "", nil, &fs.PathError{Op: "readlink", Path: path, Err: err}
		}
		return string(text[:n]), nil, nil
	case unix.S_IFREG:
		defer there.Close()
		file, err := openAt(w.at(), step, path, 0)
		if err != nil {
			return "", nil, w.trust.mended(err, there)
		}
		var opened unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &opened); err != nil || opened.Dev != st.Dev || opened.Ino != st.Ino {
			return "", nil, errors.Join(
				fmt.Errorf("%s: it was replaced while it was opened: try again", path), err, file.Close())
		}
		return "", file, nil
	}
	return "", nil, errors.Join(fmt.Errorf("%s: not a regular file", path), there.Close())
}

// handle returns a handle on what is at name, and follows no link.
func handle(at int, name, path string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, st, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, st, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), st, nil
}

func openAt(folder *os.File, name, path string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(folder.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags,
		0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// check refuses what another user could change, and notes what a group could. In a sticky folder nobody can replace
// what is another's, which is then checked by itself.
func (t *trust) check(there *os.File, st unix.Stat_t) error {
	path, mode := there.Name(), st.Mode&0o7777
	if st.Uid != 0 && int(st.Uid) != t.self {
		return fmt.Errorf("%s: its owner, user %s (mode %04o), could change %s: chown root %s",
			path, userName(st.Uid), mode, t.what(), path)
	}
	kind := st.Mode & unix.S_IFMT
	if err := t.reader.checkAccess(there, st, t.secret); err != nil {
		return err
	}
	if kind == unix.S_IFLNK || kind == unix.S_IFDIR && st.Mode&unix.S_ISVTX != 0 {
		return nil
	}
	if mode&0o002 != 0 {
		return t.openToOthers(path, mode, st.Uid)
	}
	if mode&0o020 == 0 {
		return nil // nor does a list let anybody write: the group's bits are its mask
	}
	list, err := accessList(there)
	if err != nil {
		return fmt.Errorf("%s: mode %04o, and its access control list cannot be read: %w", path, mode, err)
	}
	users, groups := writers(list, st.Gid)
	for _, uid := range users {
		if uid != 0 && int(uid) != t.self {
			return fmt.Errorf("%s: an access control list lets user %s change %s (owner %s, mode %04o): setfacl -b %s",
				path, userName(uid), t.what(), userName(st.Uid), mode, path)
		}
	}
	for _, gid := range groups {
		if place := (shared{path, mode, gid}); !slices.Contains(t.shared, place) {
			t.shared = append(t.shared, place)
		}
	}
	return nil
}

func (t *trust) what() string { return cmp.Or(t.guards, "who gets tokens") }

func (t *trust) openToOthers(path string, mode, owner uint32) error {
	return fmt.Errorf("%s: mode %04o lets others change %s (owner %s): chmod go-w %s",
		path, mode, t.what(), userName(owner), path)
}

// list lists a folder in which nobody else may put files, be it sticky or not.
func (t *trust) list(path string) ([]os.DirEntry, error) {
	folder, err := t.open(path)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(folder.Fd()), &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return nil, fmt.Errorf("%s: not a directory", path)
	case st.Mode&unix.S_ISVTX != 0 && st.Mode&0o022 != 0:
		return nil, t.openToOthers(path, st.Mode&0o7777, st.Uid)
	}
	if err := t.reader.checkListing(folder, st); err != nil {
		return nil, err
	}
	entries, err := folder.ReadDir(-1)
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, err
}

// readTrusted reads a file of at most so many bytes that only those who are trusted can have written, and returns its
// mode beside what is in it.
func readTrusted(path string, most int, by *trust) ([]byte, fs.FileMode, error) {
	f, err := by.open(path)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, 0, errors.Join(fmt.Errorf("%s: not a regular file", path), err)
	}
	text, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, 0, err
	}
	if len(text) > most {
		return nil, 0, fmt.Errorf("%s: larger than %d bytes", path, most)
	}
	return text, info.Mode(), nil
}

// settle decides about what groups may write to: it is refused where the daemon or a caller whom a grant names is in
// the group, and else worth a warning. Who a unit runs as, and who is in a group by another directory than the device's
// own files, is not known here.
func (t *trust) settle(
	all []grants.Grant, in func(gid uint32, all []grants.Grant) string,
) (warnings []string, faults []error) {
	for _, place := range t.shared {
		group := groupName(place.gid)
		if who := in(place.gid, all); who != "" {
			faults = append(faults, fmt.Errorf(
				"%s: mode %04o lets group %s change who gets tokens, and %s is in it: chmod g-w %s",
				place.path, place.mode, group, who, place.path))
			continue
		}
		warnings = append(warnings, fmt.Sprintf(
			"%s: mode %04o lets group %s change who gets tokens: "+
				"chmod g-w %s, unless its members are the administrators",
			place.path, place.mode, group, place.path))
	}
	return warnings, faults
}

// memberOf names the daemon or a caller of the grants who is in a group; empty: neither is.
func memberOf(gid uint32, all []grants.Grant) string {
	own, _ := os.Getgroups() // what cannot be told is told by the files
	if os.Getegid() == int(gid) || slices.Contains(own, int(gid)) || slices.Contains(groupsOf(uint32(os.Geteuid())),
		gid) {
		return "perceptd itself"
	}
	return otherMemberOf(gid, all)
}

// otherMemberOf is memberOf where the daemon is the service, and not this process.
func otherMemberOf(gid uint32, all []grants.Grant) string {
	if service := serviceReader(); service != nil && service.isIn(gid) {
		return "the service's user " + serviceUser
	}
	for _, grant := range all {
		switch caller := grant.Caller; {
		case caller.GID != nil && *caller.GID == gid, caller.UID != nil && slices.Contains(groupsOf(*caller.UID), gid):
			return fmt.Sprintf("the caller of the grant for %v", caller)
		}
	}
	return ""
}

// mended adds to an error what lets this process read there, where permission is all that it lacks and others may have
// it.
func (t *trust) mended(err error, there *os.File) error {
	if t.guards != "" && !t.secret || !errors.Is(err, unix.EACCES) {
		return err
	}
	var st unix.Stat_t
	if unix.Fstat(int(there.Fd()), &st) != nil {
		return err
	}
	return unreadable(there.Name(), st, userName(uint32(os.Geteuid())), []uint32{uint32(os.Getegid())},
		t.secret)
}

// CheckFolder refuses a folder where another user could put files. guards is what they would change, for the error.
func CheckFolder(path, guards string) error {
	by := ownFiles()
	by.guards = guards
	folder, err := by.open(path)
	if err != nil {
		return err
	}
	return folder.Close()
}
