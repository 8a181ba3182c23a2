package attest

import (
	"net"
	"regexp"
	"strconv"

	"perceptd/agent"
)

// userSlice is below which everything runs that a user has started by logging in, whatever users it has become since. Only
// root's systemd puts processes there.
var userSlice = regexp.MustCompile(`^/user\.slice/user-([0-9]+)\.slice/`)

// owner returns the user whose session or service manager a place is in, or agent.NoID.
func (l *location) owner() uint32 {
	user := userSlice.FindStringSubmatch(l.path)
	if user == nil {
		return agent.NoID
	}
	uid, err := strconv.ParseUint(user[1], 10, 32)
	if err != nil {
		return agent.NoID
	}
	return uint32(uid)
}

// Owner returns the user in whose session or service manager the caller runs, agent.NoID where it runs in none or that was
// not asked for. It says whom to count the caller for, and nothing about what it may have.
func (a *Attestation) Owner() uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.location.owner()
}

// PeerPID returns the process at the other end of a connection that a Prover's listener accepted, as the kernel recorded it
// when it connected, or 0. Its number may be another's by now.
func PeerPID(conn net.Conn) int32 {
	if c, ok := conn.(*connection); ok && c.ucredErr == nil {
		return c.ucred.Pid
	}
	return 0
}

// Peer returns who is at the other end of a connection of Listen's, and its owner, as far as one look at its cgroup shows:
// enough to count connections by that are refused before anything of them is proved.
func (a *Attestor) Peer(conn net.Conn) (caller agent.Caller, owner uint32) {
	c, ok := conn.(*connection)
	if !ok || c.ucredErr != nil {
		return agent.Caller{UID: agent.NoID, GID: agent.NoID}, agent.NoID
	}
	caller = agent.Caller{UID: c.ucred.Uid, GID: c.ucred.Gid, PID: c.ucred.Pid}
	l := a.locate(c.ucred.Pid, a.rules.Load())
	l.fillIn(&caller)
	return caller, l.owner()
}
