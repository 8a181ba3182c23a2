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

// kernel reads facts about peers and processes from the kernel.
type kernel struct {
	proc         string      // mount point of the proc file system
	cgroups      string      // mount point of the cgroup hierarchies
	procMismatch error       // why proc shows other processes than the kernel reports for sockets; nil: it does not
	pidfd        bool        // the kernel has SO_PEERPIDFD (Linux 6.5)
	overflow     overflowIDs // shown for users and groups outside the daemon's user namespace
}

// overflowIDs are the uid and gid that the kernel shows in a user namespace for every user and group that is not
// mapped into it. Outside of a user namespace they are grants.NoID: there the same numbers are the ordinary nobody and
// nogroup.
type overflowIDs struct{ uid, gid uint32 }

// readOverflowIDs returns the overflow IDs of the daemon's user namespace.
func (k kernel) readOverflowIDs() overflowIDs {
	overflow := overflowIDs{grants.NoID, grants.NoID}
	for _, kind := range []struct {
		ids           *uint32
		file, setting string
	}{{&overflow.uid, "uid_map", "overflowuid"}, {&overflow.gid, "gid_map", "overflowgid"}} {
		if idMap, err := os.ReadFile(k.proc + "/self/" + kind.file); err == nil && isIdentityMap(string(idMap)) {
			continue
		}
		*kind.ids = 65534 // the kernel's own choice
		if text, err := os.ReadFile(k.proc + "/sys/kernel/" + kind.setting); err == nil {
			if id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil {
				*kind.ids = uint32(id)
			}
		}
	}
	return overflow
}

// isIdentityMap reports whether a uid_map or gid_map maps every ID to itself.
func isIdentityMap(idMap string) bool {
	fields := strings.Fields(idMap)
	return len(fields) == 3 && fields[0] == "0" && fields[1] == "0" && fields[2] == "4294967295"
}

// checkProc returns an error if proc belongs to another pid namespace than the daemon's. Its process IDs then differ
// from those that the kernel reports for a socket.
func (k kernel) checkProc() error {
	switch self, err := os.Readlink(k.proc + "/self"); {
	case err != nil:
		return fmt.Errorf("%s/self cannot be read: %w", k.proc, withoutPath(err))
	case self != strconv.Itoa(os.Getpid()):
		return fmt.Errorf("%s is that of another pid namespace than perceptd's", k.proc)
	}
	return nil
}

// hasPeerPidfd reports whether the kernel has SO_PEERPIDFD.
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

// checkCredentials refuses peer credentials that identify no particular process or user.
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

// maxGroups is the kernel's own limit of groups per process (NGROUPS_MAX).
const maxGroups = 65536

// peerGroups returns the supplementary groups that the peer had when it connected (SO_PEERGROUPS, Linux 4.13).
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

// process is a handle of one process. Unlike a process ID, it shows whether the process still runs.
type process struct {
	pid   int32
	fd    int  // a pidfd, or /proc/PID/statm, which the kernel binds to that process
	pidfd bool // fd is a pidfd
}

// openPeer opens a handle of the peer of a socket. pid is the process ID that the kernel recorded when the peer
// connected.
//
// Without SO_PEERPIDFD it opens the process that has this ID now. checkPeer decides whether that can be the peer.
func (k kernel) openPeer(fd int, pid int32) (process, error) {
	if k.pidfd {
		handle, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		switch err {
		case nil:
		case unix.ENODATA, unix.EINVAL, unix.ESRCH: // depending on the kernel's version
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

// alive reports whether the process still runs. A process without memory, such as a zombie, can send nothing and does
// not count.
func (p *process) alive() bool {
	if p.pidfd {
		// Not unix.Poll: it tells the scheduler that it may block. This call does not, and each request pays for it.
		poll := unix.PollFd{Fd: int32(p.fd), Events: unix.POLLIN}
		var now unix.Timespec
		for {
			n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL,
				uintptr(unsafe.Pointer(&poll)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
			if errno != unix.EINTR { // Go's own signals
				return n == 0 && errno == 0
			}
		}
	}
	var pages [64]byte
	n, err := unix.Pread(p.fd, pages[:], 0)
	return err == nil && n > 1 && pages[0] != '0'
}

// close closes the handle.
func (p *process) close() {
	_ = unix.Close(p.fd) // a handle only
}

// path returns the path of a file of a process in /proc.
func (k kernel) path(pid int32, file string) string {
	return k.proc + "/" + strconv.Itoa(int(pid)) + "/" + file
}

// maxProcFile limits what is read of a file in /proc. Such a file has a few lines.
const maxProcFile = 64 << 10

// readFile reads a file of a process in /proc. The caller has to check afterwards that the process is still alive:
// otherwise the text may be another process's that has the same ID now.
func (k kernel) readFile(pid int32, file string) (string, error) {
	path := k.path(pid, file)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) // not os.Open, which tries to register it for polling
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

// tick is the unit of start times in /proc (USER_HZ, the same on every Linux that Go supports).
const tick = 10 * time.Millisecond

// minProcessAge is the age below which Rules.RefuseYoung refuses a process. It is longer than an idle daemon takes to
// accept a connection.
const minProcessAge = 20 * time.Millisecond

// checkPeer returns nil if the process that has this ID now can be the one that connected: it belongs to the same
// user and started before the connection was made.
//
// emptyAt is when the listener's queue was last known to be empty: every connection in it was made later.
// queueWasEmpty says that this connection was not in the queue at the last check. minAge is the age that the process
// must have had when the connection was accepted; zero: any age.
func (k kernel) checkPeer(
	pid int32, uid uint32, emptyAt, acceptedAt time.Duration, queueWasEmpty bool, minAge time.Duration,
) error {
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
	case minAge > 0 && started+tick+minAge > acceptedAt && int(pid) != os.Getpid(): // this process's own ID is its own
		return fmt.Errorf("pid %d is younger than %v: %w", pid, minAge, errTooNew)
	}
	return nil
}

// sinceBoot is the current time on the clock of start times in /proc.
func sinceBoot() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0 // no process started before boot, so no caller is attested
	}
	return time.Duration(now.Nano())
}

// parseStartTime returns when a process started, since boot, from its /proc/PID/stat (field 22). The process's name,
// which the process chooses itself, precedes it in parentheses and may contain any bytes.
func parseStartTime(stat string) (time.Duration, error) {
	const after = 22 - 3 // index of field 22 among those from the state on, which is field 3
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

// runsAs reports whether one of a process's uids in its /proc/PID/status is uid.
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

// isNested reports whether a process is in a pid namespace below the daemon's own. A process never leaves the pid
// namespace that it was created in. The caller has to check afterwards that the process is still alive.
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

// isInChildNamespace reports whether /proc/PID/status lists more than one process ID for a process (NSpid, Linux
// 4.1). The first is that of the pid namespace that /proc was mounted for. A kernel that lists none has no pid
// namespaces.
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
