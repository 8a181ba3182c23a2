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

// Listeners returns the sockets that systemd passed, by name, and takes LISTEN_* out of the environment: those of
// socket units, which have the given names, and those that an earlier start had it store by names with the prefix stored.
// Outside of systemd there are none; a name that was not passed is absent, and the caller decides whether it can do
// without.
//
// Descriptors of other names, and stored ones that are no listening socket, are closed and their names returned in
// unknown, for the log. An error names
// the descriptor and the unit option to set; nothing is passed on then, and nothing is left open.
func Listeners(stored string, names ...string) (found map[string]*net.UnixListener, unknown []string, err error) {
	count, passedNames, err := passed(os.Getenv, os.Getpid())
	if err != nil || count == 0 {
		unsetPassed()
		return nil, nil, err
	}
	files := activation.Files(true) // close-on-exec, in order, with names of its own making where one is missing
	unsetPassed()
	return claim(stored, names, passedNames, files)
}

func unsetPassed() {
	// activation.Files leaves the last, which systemd added after it was written.
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		_ = os.Unsetenv(name) // cannot err
	}
}

// passed reads how many descriptors systemd passed to the process pid, and their names. go-systemd takes
// whatever it cannot read for "none", which would have the daemon make sockets that systemd serves already.
func passed(getenv func(string) string, pid int) (int, []string, error) {
	if listenPID := getenv("LISTEN_PID"); listenPID != strconv.Itoa(pid) {
		return 0, nil, nil // unset, or meant for another process
	}
	count, err := strconv.Atoi(getenv("LISTEN_FDS"))
	if err != nil || count < 0 || count > mostPassed {
		return 0, nil, fmt.Errorf("LISTEN_FDS=%q is no number of descriptors: start perceptd through perceptd.service", getenv("LISTEN_FDS"))
	}
	if count == 0 {
		return 0, nil, nil
	}
	names := strings.Split(getenv("LISTEN_FDNAMES"), ":")
	if len(names) != count || slices.Contains(names, "") {
		return 0, nil, fmt.Errorf("LISTEN_FDNAMES=%q does not name the %d descriptors passed: set FileDescriptorName= in the socket units (systemd 227)",
			getenv("LISTEN_FDNAMES"), count)
	}
	return count, names, nil
}

// claim turns files into listeners by their names and closes all of files.
func claim(stored string, want, names []string, files []*os.File) (found map[string]*net.UnixListener, unknown []string, err error) {
	found = make(map[string]*net.UnixListener, len(files))
	defer func() {
		for _, file := range files {
			_ = file.Close() // a listener has a duplicate
		}
		if err != nil {
			for _, l := range found {
				_ = l.Close()
			}
			found, unknown = nil, nil
		}
	}()
	if len(files) != len(names) {
		return found, nil, fmt.Errorf("systemd passed %d descriptors and %d names", len(files), len(names))
	}
	for i, name := range names {
		kept := strings.HasPrefix(name, stored) && stored != ""
		if !kept && !slices.Contains(want, name) || kept && found[name] != nil {
			unknown = append(unknown, name)
			continue
		}
		fd := firstPassed + i
		if found[name] != nil {
			return found, nil, fmt.Errorf("descriptor %d is a second socket named %q: one ListenStream= to a socket unit, and a FileDescriptorName= of its own", fd, name)
		}
		l, err := unixListener(files[i])
		if err != nil && kept {
			unknown = append(unknown, name)
			continue
		}
		if err != nil {
			return found, nil, fmt.Errorf("descriptor %d (%s): %w", fd, name, err)
		}
		found[name] = l
	}
	return found, unknown, nil
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
		{unix.SO_TYPE, unix.SOCK_STREAM, "not a stream socket: set ListenStream= in the socket unit, not ListenDatagram= or ListenSequentialPacket="},
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
