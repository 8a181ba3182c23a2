package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// The names by which the socket units pass their sockets: FileDescriptorName= in perceptd.socket and
// perceptd-admin.socket.
const (
	TokenSocket = "token"
	AdminSocket = "admin"
)

const (
	firstPassed = 3    // SD_LISTEN_FDS_START
	mostPassed  = 1024 // more sockets than a service has: a mistake, not to be allocated for
)

// Names are what a service knows how to use of what systemd passes.
type Names struct {
	Sockets       []string // of the socket units
	StoredSockets string   // begins the names of listening sockets that an earlier start had stored; empty: none
	StoredFiles   string   // begins those of other descriptors that it had stored; empty: none
}

// Given is what systemd passed, by name, ready to be used.
type Given struct {
	Listeners map[string]*net.UnixListener
	Files     map[string]*os.File
	Unknown   []string // what was closed, for the log and for taking it out of the store
}

// Close closes all of it.
func (g *Given) Close() {
	for _, l := range g.Listeners {
		_ = l.Close()
	}
	for _, file := range g.Files {
		_ = file.Close()
	}
}

// Passed returns what systemd passed, and takes LISTEN_* out of the environment. Outside of systemd it is nothing; a
// name that was not passed is absent, and the caller decides whether it can do without.
//
// Descriptors of other names, and stored ones that are of no use, are closed. An error names the descriptor and the
// unit option to set; nothing is passed on then, and nothing is left open.
func Passed(want Names) (Given, error) {
	count, names, err := readPassed(os.Getenv, os.Getpid())
	if err != nil || count == 0 {
		unsetPassed()
		return Given{}, err
	}
	files := activation.Files(true) // close-on-exec, in order, with names of its own making where one is missing
	unsetPassed()
	return claim(want, names, files)
}

func unsetPassed() {
	// activation.Files leaves the last, which systemd added after it was written.
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		_ = os.Unsetenv(name) // cannot err
	}
}

// readPassed reads how many descriptors systemd passed to the process pid, and their names. go-systemd takes
// whatever it cannot read for "none", which would have the daemon make sockets that systemd serves already.
func readPassed(getenv func(string) string, pid int) (int, []string, error) {
	if listenPID := getenv("LISTEN_PID"); listenPID != strconv.Itoa(pid) {
		return 0, nil, nil // unset, or meant for another process
	}
	count, err := strconv.Atoi(getenv("LISTEN_FDS"))
	if err != nil || count < 0 || count > mostPassed {
		return 0, nil, fmt.Errorf("LISTEN_FDS=%q is no number of descriptors: start perceptd through perceptd.service",
			getenv("LISTEN_FDS"))
	}
	if count == 0 {
		return 0, nil, nil
	}
	names := strings.Split(getenv("LISTEN_FDNAMES"), ":")
	if len(names) != count || slices.Contains(names, "") {
		return 0, nil, fmt.Errorf("LISTEN_FDNAMES=%q does not name the %d descriptors passed: set "+
			"FileDescriptorName= in the socket units (systemd 227)",
			getenv("LISTEN_FDNAMES"), count)
	}
	return count, names, nil
}

// claim sorts files by their names and closes those that are not passed on as they are.
func claim(want Names, names []string, files []*os.File) (given Given, err error) {
	given = Given{Listeners: make(map[string]*net.UnixListener), Files: make(map[string]*os.File)}
	defer func() {
		for i, file := range files {
			if i >= len(names) || given.Files[names[i]] != file {
				_ = file.Close() // a listener has a duplicate
			}
		}
		if err != nil {
			given.Close()
			given = Given{}
		}
	}()
	if len(files) != len(names) {
		return given, fmt.Errorf("systemd passed %d descriptors and %d names", len(files), len(names))
	}
	for i, name := range names {
		fd := firstPassed + i
		switch {
		case slices.Contains(want.Sockets, name):
			if given.Listeners[name] != nil {
				return given, fmt.Errorf("descriptor %d is a second socket named %q: one ListenStream= to a socket "+
					"unit, and a FileDescriptorName= of its own", fd, name)
			}
			if given.Listeners[name], err = unixListener(files[i]); err != nil {
				delete(given.Listeners, name)
				return given, fmt.Errorf("descriptor %d (%s): %w", fd, name, err)
			}
		case !given.takeStored(want, name, files[i]):
			given.Unknown = append(given.Unknown, name)
		}
	}
	return given, nil
}

// takeStored takes in what an earlier start had stored, and reports false when it is of no use.
func (g *Given) takeStored(want Names, name string, file *os.File) bool {
	switch {
	case want.StoredSockets != "" && strings.HasPrefix(name, want.StoredSockets) && g.Listeners[name] == nil:
		l, err := unixListener(file)
		if err == nil {
			g.Listeners[name] = l
		}
		return err == nil
	case want.StoredFiles != "" && strings.HasPrefix(name, want.StoredFiles) && g.Files[name] == nil:
		g.Files[name] = file
		return true
	}
	return false
}

// unixListener checks that file is a listening stream socket of the Unix family, which net would otherwise
// find out at the first Accept.
func unixListener(file *os.File) (*net.UnixListener, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fault error
	if err := raw.Control(func(fd uintptr) { fault = checkListening(int(fd)) }); err != nil || fault != nil {
		return nil, errors.Join(err, fault)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	ul := l.(*net.UnixListener) // as checkListening found
	ul.SetUnlinkOnClose(false)  // the path is systemd's
	return ul, nil
}

func checkListening(fd int) error {
	for _, row := range []struct {
		option, want int
		hint         string
	}{
		{unix.SO_DOMAIN, unix.AF_UNIX, "not a Unix socket: set ListenStream= to a path in the socket unit"},
		{unix.SO_TYPE, unix.SOCK_STREAM,
			"not a stream socket: set ListenStream= in the socket unit, not ListenDatagram= or " +
				"ListenSequentialPacket="},
		{unix.SO_ACCEPTCONN, 1, "not listening: set Accept=no in the socket unit"},
	} {
		got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, row.option)
		if err != nil {
			return fmt.Errorf("not a socket (%w): set ListenStream= in the socket unit", err)
		}
		if got != row.want {
			return errors.New(row.hint)
		}
	}
	return nil
}
