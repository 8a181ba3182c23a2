package socket

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Given says what became of a folder that belonged to another user than the folder that it is in.
type Given struct {
	Folder string
	User   uint32 // whose it was
	Left   string // why it is left as it is; empty: it was given away
}

// String is a line for people, and for ParseGiven.
func (g Given) String() string {
	if g.Left != "" {
		return fmt.Sprintf("%s: user %d's, left as it is: %s", g.Folder, g.User, g.Left)
	}
	return fmt.Sprintf("%s: user %d's, given to perceptd", g.Folder, g.User)
}

var (
	givenLine = regexp.MustCompile(`^([A-Za-z0-9._-]+): user (\d+)'s, (?:given to perceptd|left as it is: (.+))$`)
	// moduleFolder is what a module's folder may be called, and what such a line can tell of.
	moduleFolder = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
)

// ParseGiven is String's opposite. A line that says nothing of a folder is not ok.
func ParseGiven(line string) (g Given, ok bool) {
	found := givenLine.FindStringSubmatch(line)
	if found == nil {
		return Given{}, false
	}
	user, err := strconv.ParseUint(found[2], 10, 32)
	return Given{Folder: found[1], User: uint32(user), Left: found[3]}, err == nil
}

// GiveFolders gives the folders in dir, which a container engine has made there as another user, to the user whom dir
// belongs to. It is for root. Each keeps its inode, so that a container that has it mounted finds the socket in it.
//
// Nothing is given that is in use: a folder is empty, or has an empty folder at the socket's name, which an engine
// makes where the socket itself is mounted. Nothing is followed: no link, and no mount. All of it goes through the
// folder's descriptor, so that it does not matter what takes its place meanwhile. What is put into it meanwhile goes
// with the folder: who can do that may write in it, and the daemon expects anything there.
func GiveFolders(dir, socketName string) ([]Given, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, folderError(dir, err)
	}
	in := os.NewFile(uintptr(fd), dir)
	defer in.Close()
	var owner unix.Stat_t
	if err := unix.Fstat(fd, &owner); err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	if owner.Mode&0o022 != 0 {
		return nil, fmt.Errorf("others may write in %s (mode %04o): systemd-tmpfiles --create perceptd.conf shuts it",
			dir, owner.Mode&0o7777)
	}
	mount, err := mountOf(in)
	if err != nil {
		return nil, err
	}
	names, err := in.Readdirnames(-1)
	slices.Sort(names)
	var all []Given
	for _, name := range names {
		if !moduleFolder.MatchString(name) {
			continue
		}
		given, isForeign, err2 := giveFolder(in, name, socketName, owner, mount)
		err = errors.Join(err, err2)
		if isForeign {
			all = append(all, given)
		}
	}
	return all, err
}

// giveFolder gives one folder. What is not a folder, or belongs to owner already, is not foreign.
func giveFolder(in *os.File, name, socketName string, owner unix.Stat_t, mount string) (
	g Given, isForeign bool, err error,
) {
	folder, err := openFolder(in, name)
	if err != nil || folder == nil {
		return Given{}, false, err
	}
	defer folder.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(folder.Fd()), &st); err != nil {
		return Given{}, false, fmt.Errorf("%s: %w", folder.Name(), err)
	}
	if st.Uid == owner.Uid {
		return Given{}, false, nil
	}
	g = Given{Folder: name, User: st.Uid}
	if g.Left, err = whyInUse(folder, socketName, mount); err != nil || g.Left != "" {
		return g, true, err
	}
	// The mode first: it takes a right more of its owner.
	if err := unix.Fchmod(int(folder.Fd()), 0o755); err != nil {
		g.Left = "chmod: " + err.Error()
	} else if err := unix.Fchown(int(folder.Fd()), int(owner.Uid), int(owner.Gid)); err != nil {
		g.Left = "chown: " + err.Error()
	}
	return g, true, nil
}

// openFolder opens a folder in another; nil: it is not there, or not a folder.
func openFolder(in *os.File, name string) (*os.File, error) {
	path := filepath.Join(in.Name(), name)
	fd, err := unix.Openat(int(in.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOENT):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// whyInUse returns why a folder is not one that an engine has made and that is not in use; empty: it is.
func whyInUse(folder *os.File, socketName, mount string) (string, error) {
	switch at, err := mountOf(folder); {
	case err != nil:
		return "", err
	case at != mount:
		return "something is mounted there", nil
	}
	holds, err := folder.Readdirnames(2)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("%s: %w", folder.Name(), err)
	}
	switch {
	case len(holds) == 0:
		return "", nil
	case len(holds) > 1 || holds[0] != socketName:
		return fmt.Sprintf("it holds %.40q", holds[0]), nil
	}
	inner, err := openFolder(folder, socketName)
	if err != nil {
		return "", err
	}
	if inner == nil {
		return socketName + " in it is not a folder", nil
	}
	defer inner.Close()
	return whyInUse(inner, "", mount)
}

// mountOf returns the number of the mount that an open folder is on: also where another folder of the same file system
// is mounted, whose device is the same.
func mountOf(folder *os.File) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", folder.Fd()))
	if err != nil {
		return "", fmt.Errorf("which mount %s is on: %w: is /proc mounted?", folder.Name(), err)
	}
	for line := range strings.Lines(string(text)) {
		if id, found := strings.CutPrefix(line, "mnt_id:"); found {
			return strings.TrimSpace(id), nil
		}
	}
	return "", fmt.Errorf("the kernel does not tell which mount %s is on", folder.Name())
}
