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

// Socket is what the socket that a connection came in on says about the caller: the first part of
// every proof.
type Socket struct {
	// Module is the module whose own socket this is. Empty: a socket that anyone may connect to.
	Module string

	// Restricted tells that the socket's file decides who may connect: where the caller runs is not asked for.
	Restricted bool
}

// locationTTL is after how long the caller's cgroup is read again. Only root can move a process out of its own.
const locationTTL = 10 * time.Second

// Attestation is the proof of one connection's caller, made bit by bit: what the kernel tells at once, and what an
// engine has to say at the first request.
type Attestation struct {
	attestor *Attestor
	conn     *connection
	socket   Socket
	peer     grants.Caller // what the kernel tells
	err      error         // why no more than that can ever be proved

	mu            sync.Mutex // protects what follows
	process       process
	released      bool
	location      location
	attestedUnder *ruleset // by which caller was proved; nil: not proved
	caller        grants.Caller
	locatedUnder  *ruleset
	locatedAt     time.Time
}

type contextKey struct{} // of the one context value of this package

// NewContext takes hold of whoever is at the other end of conn, which the Prover's listener accepted, and returns ctx
// with the Proof attached. It asks the kernel alone and does not wait. It is made for http.Server.ConnContext.
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

// FromContext returns the Proof that NewContext attached.
func FromContext(ctx context.Context) (*Attestation, error) {
	p, ok := ctx.Value(contextKey{}).(*Attestation)
	if !ok {
		return nil, errNoAttestation
	}
	return p, nil
}

// Unconfirmed returns what is known of the caller before anyone else is asked: enough to count its connections by. A module
// and a container are not confirmed yet. An error says that nothing more will be proved.
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

// Caller returns who is calling, as long as that is proved. Where an engine has to be asked, it waits for it until ctx
// ends, and 2 seconds at most. With an error, which is an *UnprovedError, it returns what is known all the same, and the
// caller is to be denied.
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
		if a.attestor.rules.Load() != rules { // while an engine was waited for
			continue
		}
		if ended := a.checkValid(); ended != nil { // last: else everything above is of the process that connected
			a.attestedUnder = nil
			if !a.released && a.process.alive() {
				known = a.caller
			}
			return known, ended
		}
		return a.caller, err
	}
}

// reattest makes the proof by those rules, unless it was and still holds.
func (a *Attestation) reattest(ctx context.Context, rules *ruleset) error {
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

// identifyPeer asks the kernel who connected, and takes hold of that process.
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
		a.location = location{} // of whoever has the number by now
		return newError("that it is the process that connected", errExited)
	}
	return nil
}

// queryKernel asks for what the kernel knows beside the credentials.
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

// needsLocation reports whether it matters where the caller runs.
func (a *Attestation) needsLocation(rules *ruleset) bool {
	if a.socket.Module == "" {
		return !a.socket.Restricted
	}
	return rules.Modules[a.socket.Module].Container != ""
}

// updateLocation reads where the caller runs. Another place than before has everything proved anew.
func (a *Attestation) updateLocation(rules *ruleset) {
	a.locatedUnder, a.locatedAt = rules, time.Now()
	at := a.attestor.locate(a.process.pid, rules)
	if at != a.location {
		a.attestedUnder = nil
	}
	a.location = at
}

// attest makes the proof by those rules.
func (a *Attestation) attest(ctx context.Context, rules *ruleset) (grants.Caller, error) {
	caller := a.peer
	module, configured := rules.Modules[a.socket.Module]
	switch {
	case a.socket.Module != "" && !configured:
		return caller, &Error{What: "that it is module " + a.socket.Module, Why: "the configuration names no such module any more"}
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

// check says why a caller is not in the module's container, or nil.
func (r Requirement) check(module string, caller *grants.Caller) error {
	unattested := "that it is module " + module
	switch {
	case caller.Container == nil:
		return &Error{What: unattested, Why: fmt.Sprintf("it came in on the module's socket, and not out of a container named %s", r.Container),
			Hint: "if whoever reaches that socket may have the module's tokens, choose require = \"socket\" in its [[module]]"}
	case caller.Container.Name != r.Container:
		return &Error{What: unattested, Why: fmt.Sprintf("it runs in container %s, and the module's is named %s", caller.Container.Name, r.Container),
			Hint: "name the container as the module, or name it in the module's [[module]] as container"}
	}
	return nil
}

// isNested reports whether the caller is in a pid namespace of its own, or may be: a container that was given the admin socket
// has a root that is not the device's.
func (a *Attestation) isNested() bool {
	nested, err := a.attestor.kernel.isNested(a.process.pid)
	return err != nil || nested || a.checkSamePeer(0) != nil
}

// checkSamePeer says why the process that is held may be another than the one that connected. With a pidfd it cannot. Without one
// a process that is too new, or younger than minAge, is believed once it has written by itself.
func (a *Attestation) checkSamePeer(minAge time.Duration) error {
	if a.process.pidfd {
		return nil
	}
	err := a.attestor.kernel.checkPeer(a.process.pid, a.peer.UID, a.conn.queueEmptyAt, a.conn.acceptedAt, a.conn.queueWasEmpty, minAge)
	if errors.Is(err, errTooNew) && a.conn.peerHasWritten() {
		return nil
	}
	return err
}

// AttestByNextRequest has the caller's next request on this connection prove it, after an UnprovedError with Again: whoever writes it has
// the number of the process that is held, which is alive, and so is that process. It reports false when something of that
// request is there already, perhaps of a process that has ended; the caller then has to connect again.
func (a *Attestation) AttestByNextRequest() bool { return a.err == nil && a.conn.markDrained() }

// checkValid says why what was proved no longer holds, or nil.
func (a *Attestation) checkValid() error {
	const unattested = "that it is the process that connected"
	if other := a.conn.foreignPID.Load(); other != 0 {
		by := "another process"
		if other > 0 {
			by = fmt.Sprintf("another process (pid %d)", other)
		}
		return &Error{What: unattested, Why: by + " writes on its connection", Hint: "have each process connect by itself, also after a fork"}
	}
	if a.released || !a.process.alive() {
		return &Error{What: unattested, Why: errExited.Error(), Hint: "ask on a connection of your own"}
	}
	return nil
}

// release lets go of the caller's process.
func (a *Attestation) release() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn != nil && !a.released && a.process.fd > 0 {
		a.process.close()
	}
	a.released = true
}

// Owner returns the user in whose session or service manager the caller runs, grants.NoID where it runs in none or that was
// not asked for. It says whom to count the caller for, and nothing about what it may have.
func (a *Attestation) Owner() uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.location.owner()
}
