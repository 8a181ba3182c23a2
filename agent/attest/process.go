package attest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"perceptd/agent/grants"
)

// kernel is where the kernel is asked about peers and processes.
type kernel struct {
	proc         string
	procMismatch error       // why proc does not tell of the processes that the kernel names on a socket
	pidfd        bool        // SO_PEERPIDFD is there (Linux 6.5)
	overflow     overflowIDs // whom the daemon's user namespace cannot tell apart
}

// overflowIDs is what the kernel shows in a user namespace for every user and group that has no number there; grants.NoID
// outside of one. On the device itself the same numbers are nobody's and nogroup's.
type overflowIDs struct{ uid, gid uint32 }

// readOverflowIDs finds out how they look.
func (k kernel) readOverflowIDs() overflowIDs {
	s := overflowIDs{grants.NoID, grants.NoID}
	for _, of := range []struct {
		ids           *uint32
		file, setting string
	}{{&s.uid, "uid_map", "overflowuid"}, {&s.gid, "gid_map", "overflowgid"}} {
		if idMap, err := os.ReadFile(k.proc + "/self/" + of.file); err == nil && isIdentityMap(string(idMap)) {
			continue
		}
		*of.ids = 65534 // the kernel's own choice
		if text, err := os.ReadFile(k.proc + "/sys/kernel/" + of.setting); err == nil {
			if id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil {
				*of.ids = uint32(id)
			}
		}
	}
	return s
}

// isIdentityMap reports whether a uid_map maps every user to itself.
func isIdentityMap(uidMap string) bool {
	fields := strings.Fields(uidMap)
	return len(fields) == 3 && fields[0] == "0" && fields[1] == "0" && fields[2] == "4294967295"
}

// hasPeerPidfd reports whether the kernel gives a handle on the process at the other end of a socket.
func hasPeerPidfd() bool {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return false
	}
	_ = unix.Close(fd) // a handle only
	return true
}

// maxGroups is the kernel's own limit for a process (NGROUPS_MAX).
const maxGroups = 65536

// peerGroups returns the supplementary groups that the kernel recorded of the peer when it connected
// (SO_PEERGROUPS, Linux 4.13).
func peerGroups(fd int) ([]uint32, error) {
	var few [32]uint32
	groups := few[:]
	for {
		size := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return append([]uint32(nil), groups[:size/4]...), nil
		case errno == unix.ERANGE && size/4 > uint32(len(groups)) && size/4 <= maxGroups:
			groups = make([]uint32, size/4)
		default:
			return nil, errno
		}
	}
}

// process is a hold on one process, by which it can be told whether it is still there: its number alone may be
// another's by now.
type process struct {
	pid   int32
	fd    int  // a pidfd, or /proc/PID/statm, which the kernel keeps bound to that process
	pidfd bool // which of the two
}

// openPeer takes openPeer of the peer of a socket, whose pid the kernel recorded when it connected.
//
// Without a pidfd it is the process that has the number now; looksLikePeer tells whether that can be the same.
func (k kernel) openPeer(fd int, pid int32) (process, error) {
	if k.pidfd {
		handle, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		switch err {
		case nil:
		case unix.ENODATA, unix.EINVAL, unix.ESRCH: // by the kernel's version
			return process{}, errExited
		default:
			return process{}, fmt.Errorf("no hold on the process that connected: %w", err)
		}
		return process{pid: pid, fd: handle, pidfd: true}, nil
	}
	if k.procMismatch != nil {
		return process{}, k.procMismatch
	}
	handle, err := unix.Open(k.path(pid, "statm"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return process{}, errExited
	}
	if err != nil {
		return process{}, fmt.Errorf("%s: %w", k.path(pid, "statm"), err)
	}
	return process{pid: pid, fd: handle}, nil
}

// alive reports whether the process has not ended. Of one without memory of its own, as a zombie is, nothing
// can come any more.
func (p *process) alive() bool {
	if p.pidfd {
		// Not through unix.Poll, which tells the scheduler that it may block: it does not, and each request pays for it.
		poll := unix.PollFd{Fd: int32(p.fd), Events: unix.POLLIN}
		var now unix.Timespec
		for {
			n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
			if errno != unix.EINTR { // Go's own signals
				return n == 0 && errno == 0
			}
		}
	}
	var pages [64]byte
	n, err := unix.Pread(p.fd, pages[:], 0)
	return err == nil && n > 1 && pages[0] != '0'
}

func (p *process) close() {
	_ = unix.Close(p.fd) // a handle only
}

func (k kernel) path(pid int32, file string) string {
	return k.proc + "/" + strconv.Itoa(int(pid)) + "/" + file
}

// maxProcFile bounds what is read of a file in /proc, which is a few lines.
const maxProcFile = 64 << 10

// readFile returns a file of a process. Whoever calls must look afterwards whether the process is still alive:
// until then it can be another's.
func (k kernel) readFile(pid int32, file string) (string, error) {
	path := k.path(pid, file)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) // not through os.Open, which tries to have it polled
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var usual [4 << 10]byte
	for text := usual[:0]; ; {
		n, err := unix.Read(fd, text[len(text):cap(text)])
		switch {
		case err == unix.EINTR: // Go's own signals
			continue
		case err != nil:
			return "", &fs.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return string(text), nil
		}
		text = text[:len(text)+n]
		if len(text) > maxProcFile {
			return "", fmt.Errorf("%s is longer than %d bytes", path, maxProcFile)
		}
		text = slices.Grow(text, 1)
	}
}

// tick is the unit of start times in /proc (USER_HZ, the same on every Linux that Go runs on).
const tick = 10 * time.Millisecond

// minProcessAge is how old a process has to be where young ones are refused: longer than an idle daemon takes to accept.
const minProcessAge = 20 * time.Millisecond

// checkPeer returns nil when the process that has the number now can be the one that connected: it is
// the same user's, and it has not started since. emptyAt is when the socket's queue was last known to be
// empty, so that whoever waits in it has connected later; waited tells that the connection was not there yet.
// The process has to be minAge old by when the connection was accepted; zero: any age will do.
func (k kernel) checkPeer(pid int32, uid uint32, emptyAt, acceptedAt time.Duration, queueWasEmpty bool, minAge time.Duration) error {
	stat, err := k.readFile(pid, "stat")
	if err != nil {
		return err
	}
	started, err := parseStartTime(stat)
	if err != nil {
		return err
	}
	status, err := k.readFile(pid, "status")
	if err != nil {
		return err
	}
	switch {
	case !runsAs(status, uid):
		return fmt.Errorf("pid %d is another user's process by now", pid)
	case started > acceptedAt:
		return fmt.Errorf("pid %d has started after the connection was made", pid)
	case started+tick > emptyAt && !queueWasEmpty:
		return fmt.Errorf("pid %d: %w", pid, errTooNew)
	case minAge > 0 && started+tick+minAge > acceptedAt && int(pid) != os.Getpid(): // whose number nobody else can have
		return fmt.Errorf("pid %d is younger than %v: %w", pid, minAge, errTooNew)
	}
	return nil
}

// parseStartTime returns when a process started, since boot, from its /proc/PID/stat (field 22). The process's name,
// which it chooses itself, stands in parentheses before and may have any bytes in it.
func parseStartTime(stat string) (time.Duration, error) {
	const after = 22 - 3 // fields from the state, which is the third, on
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) <= after || !strings.Contains(stat, ")") {
		return 0, fmt.Errorf("stat of a process is %q", truncate(stat))
	}
	ticks, err := strconv.ParseInt(fields[after], 10, 64)
	if err != nil || ticks < 0 || ticks > int64(1<<62)/int64(tick) {
		return 0, fmt.Errorf("stat of a process has start time %q", fields[after])
	}
	return time.Duration(ticks) * tick, nil
}

// runsAs reports whether one of a process's uids is that, from its /proc/PID/status.
func runsAs(status string, uid uint32) bool {
	want := strconv.FormatUint(uint64(uid), 10)
	for line := range strings.Lines(status) {
		if ids, found := strings.CutPrefix(line, "Uid:"); found {
			for _, id := range strings.Fields(ids) {
				if id == want {
					return true
				}
			}
			return false
		}
	}
	return false
}

// isNested reports whether a process is in a pid namespace below the daemon's own. It never leaves the one that it was made
// in. Whoever calls must look afterwards whether the process is still alive.
func (k kernel) isNested(pid int32) (bool, error) {
	if k.procMismatch != nil {
		return false, k.procMismatch
	}
	status, err := k.readFile(pid, "status")
	if err != nil {
		return false, err
	}
	return isInChildNamespace(status)
}

// isInChildNamespace reports whether a process has a number in more than one pid namespace, from its /proc/PID/status: the first is
// that of the namespace that /proc was mounted for (NSpid, Linux 4.1). A kernel that does not tell has no such namespaces.
func isInChildNamespace(status string) (bool, error) {
	for line := range strings.Lines(status) {
		numbers, found := strings.CutPrefix(line, "NSpid:")
		if !found {
			continue
		}
		each := strings.Fields(numbers)
		if len(each) == 0 {
			return false, fmt.Errorf("status of a process has the line %q", truncate(line))
		}
		return len(each) > 1, nil
	}
	return false, nil
}

// checkProc returns an error where proc is not that of the daemon's own pid namespace: the numbers in it are then those of other
// processes than the kernel names on a socket.
func (k kernel) checkProc() error {
	switch self, err := os.Readlink(k.proc + "/self"); {
	case err != nil:
		return fmt.Errorf("%s/self cannot be read: %w", k.proc, withoutPath(err))
	case self != strconv.Itoa(os.Getpid()):
		return fmt.Errorf("%s is that of another pid namespace than perceptd's", k.proc)
	}
	return nil
}

// sinceBoot is the time on the clock that start times are told in.
func sinceBoot() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0 // nothing has started before: nobody is proved by it
	}
	return time.Duration(now.Nano())
}

// checkCredentials refuses credentials that name nobody in particular.
func (k kernel) checkCredentials(peer *unix.Ucred) error {
	switch {
	case peer.Pid <= 0:
		// Seen from outside its pid namespace every peer has pid 0, and may look like root.
		return errOutsidePidNamespace
	case peer.Uid == grants.NoID || peer.Gid == grants.NoID:
		return errors.New("the peer has no uid or gid")
	case peer.Uid == k.overflow.uid || peer.Gid == k.overflow.gid:
		return errOverflowID
	}
	return nil
}
