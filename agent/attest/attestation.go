package attest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"perceptd/agent/grants"
)

// Socket is what the socket that a connection came in on says about the caller: the first part of every attestation.
type Socket struct {
	// Module is the module that the socket was made for. Empty: a socket that every user may connect to.
	Module string

	// Restricted says that the permissions of the socket's file decide who may connect. Where the caller runs is then
	// not asked for.
	Restricted bool
}

// locationTTL is how long a caller's location is used before its cgroup is read again. Only root can move a process
// out of its cgroup.
const locationTTL = 10 * time.Second

// Attestation is the state of one connection's attestation. NewContext identifies the process that connected. The
// first call of Caller asks the container engine, if the rules need it.
type Attestation struct {
	attestor *Attestor
	conn     *connection
	socket   Socket
	peer     grants.Caller // what the kernel says of the caller
	err      error         // why the caller can never be attested

	mu            sync.Mutex // protects what follows
	process       process
	released      bool
	location      location
	attestedUnder *activeRules  // the rules by which caller was attested; nil: it is not
	caller        grants.Caller // as attested
	locatedUnder  *activeRules  // the rules by which location was determined
	locatedAt     time.Time
}

// contextKey is the key of the Attestation in a context.
type contextKey struct{}

// NewContext identifies the process at the other end of conn, which the Attestor's listener accepted, and returns ctx
// with an Attestation of it. It asks the kernel alone and does not wait. It fits http.Server.ConnContext.
func (a *Attestor) NewContext(ctx context.Context, conn net.Conn, socket Socket) context.Context {
	attestation := &Attestation{attestor: a, socket: socket, peer: grants.Caller{UID: grants.NoID, GID: grants.NoID}}
	c, ok := conn.(*connection)
	if !ok {
		attestation.err = newError("who is at the other end", errNotUnix)
		return context.WithValue(ctx, contextKey{}, attestation)
	}
	attestation.conn = c
	attestation.err = attestation.identifyPeer()
	c.attestation.Store(attestation)
	return context.WithValue(ctx, contextKey{}, attestation)
}

// FromContext returns the Attestation that NewContext attached.
func FromContext(ctx context.Context) (*Attestation, error) {
	p, ok := ctx.Value(contextKey{}).(*Attestation)
	if !ok {
		return nil, errNoAttestation
	}
	return p, nil
}

// Unconfirmed returns what the kernel says of the caller, which is enough to count its connections. Its module and
// container have not been confirmed. With an error the caller will never be attested.
func (a *Attestation) Unconfirmed() (grants.Caller, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	seen := a.peer
	seen.Module = a.socket.Module
	if seen.Module == "" {
		a.location.fillIn(&seen)
	}
	if a.err == nil && a.location.isRejected() {
		return seen, a.location.asError()
	}
	return seen, a.err
}

// Caller returns the caller, if it is attested. If a container engine has to be asked, it waits until ctx ends, and 2
// seconds at most. With an error, which is an *Error, it returns what is known of the caller, which has to be denied.
func (a *Attestation) Caller(ctx context.Context) (grants.Caller, error) {
	if a.err != nil {
		return a.peer, a.err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	known := a.peer
	if a.attestedUnder != nil {
		known = a.caller
	}
	for {
		rules := a.attestor.rules.Load()
		err := a.reattest(ctx, rules)
		if a.attestor.rules.Load() != rules { // they changed while the engine was asked
			continue
		}
		// The last check: until here, facts read by process ID may be another process's.
		if ended := a.checkValid(); ended != nil {
			a.attestedUnder = nil
			if !a.released && a.process.alive() {
				known = a.caller
			}
			return known, ended
		}
		return a.caller, err
	}
}

// reattest attests the caller under these rules, unless it is attested under them already and has not moved.
func (a *Attestation) reattest(ctx context.Context, rules *activeRules) error {
	if a.attestedUnder != rules {
		a.attestedUnder = nil
	}
	if a.needsLocation(rules) && (a.locatedUnder != rules || time.Since(a.locatedAt) >= locationTTL) {
		a.updateLocation(rules)
	}
	if a.attestedUnder != nil {
		return nil
	}
	var err error
	if a.caller, err = a.attest(ctx, rules); err != nil {
		return err
	}
	a.attestedUnder = rules
	return nil
}

// identifyPeer reads what the kernel recorded about the peer and opens its process.
func (a *Attestation) identifyPeer() error {
	a.process, a.conn.process = a.conn.process, process{}
	err := a.conn.ucredErr
	if err == nil {
		a.peer.UID, a.peer.GID, a.peer.PID = a.conn.ucred.Uid, a.conn.ucred.Gid, a.conn.ucred.Pid
		err = a.attestor.kernel.checkCredentials(&a.conn.ucred)
	}
	if err == nil {
		err = withFD(a.conn, a.queryKernel)
	}
	if err != nil {
		return newError("who is at the other end", err)
	}
	a.conn.peerPID.Store(a.peer.PID)
	if rules := a.attestor.rules.Load(); a.needsLocation(rules) {
		a.updateLocation(rules)
	}
	if !a.process.alive() {
		a.location = location{} // of the process that has this ID now
		return newError("that it is the process that connected", errExited)
	}
	return nil
}

// queryKernel reads the peer's groups and opens its process.
func (a *Attestation) queryKernel(fd int) (err error) {
	kernel := a.attestor.kernel
	if a.peer.Groups, err = peerGroups(fd); err != nil {
		return fmt.Errorf("the kernel does not tell the peer's groups: %w", err)
	}
	a.peer.Groups = slices.DeleteFunc(a.peer.Groups, func(gid uint32) bool { return gid == kernel.overflow.gid })
	if !kernel.pidfd {
		return a.conn.processErr
	}
	a.process, err = kernel.openPeer(fd, a.peer.PID)
	return err
}

// needsLocation reports whether the attestation depends on where the caller runs.
func (a *Attestation) needsLocation(rules *activeRules) bool {
	if a.socket.Module == "" {
		return !a.socket.Restricted
	}
	return rules.Modules[a.socket.Module].Container != ""
}

// updateLocation reads where the caller runs. If that has changed, the caller has to be attested again.
func (a *Attestation) updateLocation(rules *activeRules) {
	a.locatedUnder, a.locatedAt = rules, time.Now()
	at := a.attestor.locate(a.process.pid, rules)
	if at != a.location {
		a.attestedUnder = nil
	}
	a.location = at
}

// attest attests the caller under these rules.
func (a *Attestation) attest(ctx context.Context, rules *activeRules) (grants.Caller, error) {
	caller := a.peer
	module, configured := rules.Modules[a.socket.Module]
	switch {
	case a.socket.Module != "" && !configured:
		return caller, &Error{
			What: "that it is module " + a.socket.Module,
			Why:  "the configuration names no such module any more",
		}
	case !a.needsLocation(rules):
		caller.Module = a.socket.Module
		caller.Nested = a.socket.Restricted && a.isNested()
		return caller, nil
	}
	minAge := time.Duration(0)
	if rules.RefuseYoung {
		minAge = minProcessAge
	}
	if err := a.checkSamePeer(minAge); err != nil {
		return caller, newError("that it is the process that connected", err)
	}
	a.location.fillIn(&caller)
	if a.location.kind == unclear {
		return caller, a.location.asError()
	}
	if a.location.kind == inContainer {
		container, err := a.attestor.attestContainer(ctx, rules, a.location)
		caller.Container = container
		if err != nil {
			return caller, err
		}
	}
	if a.socket.Module == "" {
		return caller, nil
	}
	if err := module.check(a.socket.Module, &caller); err != nil {
		return caller, err
	}
	caller.Module = a.socket.Module
	return caller, nil
}

// check returns an error if the caller does not run in the module's container.
func (r Requirement) check(module string, caller *grants.Caller) error {
	unattested := "that it is module " + module
	switch {
	case caller.Container == nil:
		return &Error{
			What: unattested,
			Why:  fmt.Sprintf("it came in on the module's socket, and not out of a container named %s", r.Container),
			Hint: "if whoever reaches that socket may have the module's tokens, " +
				"choose require = \"socket\" in its [[module]]",
		}
	case caller.Container.Name != r.Container:
		return &Error{
			What: unattested,
			Why: fmt.Sprintf("it runs in container %s, and the module's is named %s",
				caller.Container.Name, r.Container),
			Hint: "name the container as the module, or name it in the module's [[module]] as container",
		}
	}
	return nil
}

// isNested reports whether the caller has, or may have, a pid namespace of its own. A container in which the admin
// socket is mounted has a root user that is not the device's.
func (a *Attestation) isNested() bool {
	nested, err := a.attestor.kernel.isNested(a.process.pid)
	return err != nil || nested || a.checkSamePeer(0) != nil
}

// checkSamePeer returns an error if the open process may not be the one that connected. With a pidfd it always is.
// Otherwise a process that is too new, or younger than minAge, passes once it has written after AttestByNextRequest.
func (a *Attestation) checkSamePeer(minAge time.Duration) error {
	if a.process.pidfd {
		return nil
	}
	c := a.conn
	err := a.attestor.kernel.checkPeer(a.process.pid, a.peer.UID, c.queueEmptyAt, c.acceptedAt, c.queueWasEmpty, minAge)
	if errors.Is(err, errTooNew) && c.peerHasWritten() {
		return nil
	}
	return err
}

// AttestByNextRequest prepares for the caller's next request on this connection to attest it, after an Error that is
// Retryable. The process that writes that request has the ID of the open process, which is alive, so it is that
// process. It returns false if data of that request is there already, since a process that has ended may have written
// it. The caller then has to connect again.
func (a *Attestation) AttestByNextRequest() bool { return a.err == nil && a.conn.markDrained() }

// checkValid returns an error if an attestation no longer holds: another process wrote on the connection, or the
// caller's process has ended.
func (a *Attestation) checkValid() error {
	const unattested = "that it is the process that connected"
	if other := a.conn.foreignPID.Load(); other != 0 {
		by := "another process"
		if other > 0 {
			by = fmt.Sprintf("another process (pid %d)", other)
		}
		return &Error{
			What: unattested,
			Why:  by + " writes on its connection",
			Hint: "have each process connect by itself, also after a fork",
		}
	}
	if a.released || !a.process.alive() {
		return &Error{What: unattested, Why: errExited.Error(), Hint: "ask on a connection of your own"}
	}
	return nil
}

// release closes the handle of the caller's process.
func (a *Attestation) release() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn != nil && !a.released && a.process.fd > 0 {
		a.process.close()
	}
	a.released = true
}

// Owner returns the user in whose session or service manager the caller runs, or grants.NoID if there is none or the
// location was not needed. It determines whose quota the caller counts against, and grants nothing.
func (a *Attestation) Owner() uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.location.owner()
}
