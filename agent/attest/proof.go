package attest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent"
)

// Socket is what the socket that a connection came in on says about the caller: the first part of
// every proof.
type Socket struct {
	// Module is the module whose own socket this is. Empty: a socket that anyone may connect to.
	Module string

	// Restricted tells that the socket's file decides who may connect: where the caller runs is not asked for.
	Restricted bool
}

var (
	errNotUnix  = errors.New("the connection did not come in on a Unix socket")
	errNotAsked = errors.New("nobody asked who is calling")
)

// lookAgain is after how long the caller's cgroup is read again. Only root can move a process out of its own.
const lookAgain = 10 * time.Second

// Attestation is the proof of one connection's caller, made bit by bit: what the kernel tells at once, and what an
// engine has to say at the first request.
type Attestation struct {
	prover *Attestor
	conn   *connection
	socket Socket
	peer   agent.Caller // what the kernel tells
	fault  error        // why no more than that can ever be proved

	mu       sync.Mutex // protects what follows
	process  process
	released bool
	place    place
	rules    *ruleset // by which caller was proved; nil: not proved
	caller   agent.Caller
	lookedBy *ruleset
	lookedOn time.Time
}

type key struct{} // of the one context value of this package

// NewContext takes hold of whoever is at the other end of conn, which the Prover's listener accepted, and returns ctx
// with the Proof attached. It asks the kernel alone and does not wait. It is made for http.Server.ConnContext.
func (p *Attestor) NewContext(ctx context.Context, conn net.Conn, socket Socket) context.Context {
	proof := &Attestation{prover: p, socket: socket, peer: agent.Caller{UID: agent.NoID, GID: agent.NoID}}
	c, ok := conn.(*connection)
	if !ok {
		proof.fault = unproved("who is at the other end", errNotUnix)
		return context.WithValue(ctx, key{}, proof)
	}
	proof.conn = c
	proof.fault = proof.take()
	c.proof.Store(proof)
	return context.WithValue(ctx, key{}, proof)
}

// FromContext returns the Proof that NewContext attached.
func FromContext(ctx context.Context) (*Attestation, error) {
	p, ok := ctx.Value(key{}).(*Attestation)
	if !ok {
		return nil, errNotAsked
	}
	return p, nil
}

// Unconfirmed returns what is known of the caller before anyone else is asked: enough to count its connections by. A module
// and a container are not confirmed yet. An error says that nothing more will be proved.
func (p *Attestation) Unconfirmed() (agent.Caller, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.peer
	seen.Module = p.socket.Module
	if seen.Module == "" {
		p.place.show(&seen)
	}
	if p.fault == nil && p.place.isNowhere() {
		return seen, p.place.refusal()
	}
	return seen, p.fault
}

// Caller returns who is calling, as long as that is proved. Where an engine has to be asked, it waits for it until ctx
// ends, and 2 seconds at most. With an error, which is an *UnprovedError, it returns what is known all the same, and the
// caller is to be denied.
func (p *Attestation) Caller(ctx context.Context) (agent.Caller, error) {
	if p.fault != nil {
		return p.peer, p.fault
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.peer
	if p.rules != nil {
		known = p.caller
	}
	for {
		rules := p.prover.rules.Load()
		err := p.renew(ctx, rules)
		if p.prover.rules.Load() != rules { // while an engine was waited for
			continue
		}
		if ended := p.still(); ended != nil { // last: else everything above is of the process that connected
			p.rules = nil
			if !p.released && p.process.alive() {
				known = p.caller
			}
			return known, ended
		}
		return p.caller, err
	}
}

// renew makes the proof by those rules, unless it was and still holds.
func (p *Attestation) renew(ctx context.Context, rules *ruleset) error {
	if p.rules != rules {
		p.rules = nil
	}
	if p.needsPlace(rules) && (p.lookedBy != rules || time.Since(p.lookedOn) >= lookAgain) {
		p.look(rules)
	}
	if p.rules != nil {
		return nil
	}
	var err error
	if p.caller, err = p.prove(ctx, rules); err != nil {
		return err
	}
	p.rules = rules
	return nil
}

// take asks the kernel who connected, and takes hold of that process.
func (p *Attestation) take() error {
	p.process, p.conn.held = p.conn.held, process{}
	err := p.conn.met
	if err == nil {
		p.peer.UID, p.peer.GID, p.peer.PID = p.conn.ucred.Uid, p.conn.ucred.Gid, p.conn.ucred.Pid
		err = p.prover.kernel.plausible(&p.conn.ucred)
	}
	if err == nil {
		err = control(p.conn, p.ask)
	}
	if err != nil {
		return unproved("who is at the other end", err)
	}
	p.conn.peer.Store(p.peer.PID)
	if rules := p.prover.rules.Load(); p.needsPlace(rules) {
		p.look(rules)
	}
	if !p.process.alive() {
		p.place = place{} // of whoever has the number by now
		return unproved("that it is the process that connected", errGone)
	}
	return nil
}

// ask asks for what the kernel knows beside the credentials.
func (p *Attestation) ask(fd int) (err error) {
	kernel := p.prover.kernel
	if p.peer.Groups, err = peerGroups(fd); err != nil {
		return fmt.Errorf("the kernel does not tell the peer's groups: %w", err)
	}
	p.peer.Groups = slices.DeleteFunc(p.peer.Groups, func(gid uint32) bool { return gid == kernel.stranger.gid })
	if !kernel.pidfd {
		return p.conn.heldFault
	}
	p.process, err = kernel.hold(fd, p.peer.PID)
	return err
}

// plausible refuses credentials that name nobody in particular.
func (k kernel) plausible(peer *unix.Ucred) error {
	switch {
	case peer.Pid <= 0:
		// Seen from outside its pid namespace every peer has pid 0, and may look like root.
		return errOutside
	case peer.Uid == agent.NoID || peer.Gid == agent.NoID:
		return errors.New("the peer has no uid or gid")
	case peer.Uid == k.stranger.uid || peer.Gid == k.stranger.gid:
		return errStranger
	}
	return nil
}

var (
	errOutside  = errors.New("the peer is outside the daemon's pid namespace")
	errStranger = errors.New("the peer's user or group has no number in the daemon's user namespace, where all such look the same")
)

// needsPlace reports whether it matters where the caller runs.
func (p *Attestation) needsPlace(rules *ruleset) bool {
	if p.socket.Module == "" {
		return !p.socket.Restricted
	}
	return rules.Modules[p.socket.Module].Container != ""
}

// look reads where the caller runs. Another place than before has everything proved anew.
func (p *Attestation) look(rules *ruleset) {
	p.lookedBy, p.lookedOn = rules, time.Now()
	is := p.prover.find(p.process.pid, rules)
	if is != p.place {
		p.rules = nil
	}
	p.place = is
}

// find reads where a process runs.
func (p *Attestor) find(pid int32, rules *ruleset) place {
	if p.kernel.misplaced != nil {
		return place{why: fmt.Sprintf("where it runs cannot be told: %v", p.kernel.misplaced), hint: procHint}
	}
	file, err := p.kernel.read(pid, "cgroup")
	if err != nil {
		return place{why: fmt.Sprintf("its cgroup cannot be read: %v", err), hint: sightHint}
	}
	is := readPlace(file, rules.parents)
	if is.kind != inUnit && is.path != "" && is.path == p.own {
		is = place{kind: onHost, path: is.path} // where the daemon itself was started, so in no container of its own
	}
	if is.kind != onHost && is.kind != inUnit {
		return is
	}
	// Not every container has a cgroup by which judge knows it: runc and crun name scopes as they like, unshare and
	// --cgroups=disabled leave theirs where they were started. Root in there is not root of the device.
	nested, err := p.kernel.isNested(pid)
	switch {
	case err != nil:
		return place{path: is.path, why: fmt.Sprintf("its pid namespace cannot be read: %v", err), hint: sightHint}
	case nested && is.kind == onHost:
		return place{path: is.path, why: fmt.Sprintf("it is in cgroup %s, and in a pid namespace of its own, as in a container: its uid says nothing", cut(is.path)),
			hint: "run it as a systemd service, or in a container of an engine that perceptd can ask"}
	}
	is.nested = nested
	return is
}

const (
	sightHint = "perceptctl doctor tells whether the daemon can see its callers at all"
	procHint  = "mount /proc of perceptd's own pid namespace, or run it on the device itself"
)

// prove makes the proof by those rules.
func (p *Attestation) prove(ctx context.Context, rules *ruleset) (agent.Caller, error) {
	caller := p.peer
	module, known := rules.Modules[p.socket.Module]
	switch {
	case p.socket.Module != "" && !known:
		return caller, &Error{What: "that it is module " + p.socket.Module, Why: "the configuration names no such module any more"}
	case !p.needsPlace(rules):
		caller.Module = p.socket.Module
		caller.Nested = p.socket.Restricted && p.isNested()
		return caller, nil
	}
	minAge := time.Duration(0)
	if rules.RefuseYoung {
		minAge = youngAge
	}
	if err := p.samePeer(minAge); err != nil {
		return caller, unproved("that it is the process that connected", err)
	}
	p.place.show(&caller)
	if p.place.kind == unclear {
		return caller, p.place.refusal()
	}
	if p.place.kind == inContainer {
		container, err := p.prover.confirm(ctx, rules, p.place)
		caller.Container = container
		if err != nil {
			return caller, err
		}
	}
	if p.socket.Module == "" {
		return caller, nil
	}
	if err := module.check(p.socket.Module, &caller); err != nil {
		return caller, err
	}
	caller.Module = p.socket.Module
	return caller, nil
}

// check says why a caller is not in the module's container, or nil.
func (r Requirement) check(module string, caller *agent.Caller) error {
	what := "that it is module " + module
	switch {
	case caller.Container == nil:
		return &Error{What: what, Why: fmt.Sprintf("it came in on the module's socket, and not out of a container named %s", r.Container),
			Hint: "if whoever reaches that socket may have the module's tokens, choose require = \"socket\" in its [[module]]"}
	case caller.Container.Name != r.Container:
		return &Error{What: what, Why: fmt.Sprintf("it runs in container %s, and the module's is named %s", caller.Container.Name, r.Container),
			Hint: "name the container as the module, or name it in the module's [[module]] as container"}
	}
	return nil
}

// isNested reports whether the caller is in a pid namespace of its own, or may be: a container that was given the admin socket
// has a root that is not the device's.
func (p *Attestation) isNested() bool {
	nested, err := p.prover.kernel.isNested(p.process.pid)
	return err != nil || nested || p.samePeer(0) != nil
}

// samePeer says why the process that is held may be another than the one that connected. With a pidfd it cannot. Without one
// a process that is too new, or younger than minAge, is believed once it has written by itself.
func (p *Attestation) samePeer(minAge time.Duration) error {
	if p.process.pidfd {
		return nil
	}
	err := p.prover.kernel.looksLikePeer(p.process.pid, p.peer.UID, p.conn.emptyAt, p.conn.acceptedAt, p.conn.waited, minAge)
	if errors.Is(err, errTooNew) && p.conn.hasWritten() {
		return nil
	}
	return err
}

// AttestByNextRequest has the caller's next request on this connection prove it, after an UnprovedError with Again: whoever writes it has
// the number of the process that is held, which is alive, and so is that process. It reports false when something of that
// request is there already, perhaps of a process that has ended; the caller then has to connect again.
func (p *Attestation) AttestByNextRequest() bool { return p.fault == nil && p.conn.fallSilent() }

// still says why what was proved no longer holds, or nil.
func (p *Attestation) still() error {
	const what = "that it is the process that connected"
	if other := p.conn.foreign.Load(); other != 0 {
		by := "another process"
		if other > 0 {
			by = fmt.Sprintf("another process (pid %d)", other)
		}
		return &Error{What: what, Why: by + " writes on its connection", Hint: "have each process connect by itself, also after a fork"}
	}
	if p.released || !p.process.alive() {
		return &Error{What: what, Why: errGone.Error(), Hint: "ask on a connection of your own"}
	}
	return nil
}

// release lets go of the caller's process.
func (p *Attestation) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn != nil && !p.released && p.process.fd > 0 {
		p.process.release()
	}
	p.released = true
}

// isNowhere reports whether it was looked for, and nothing can be relied on.
func (pl *place) isNowhere() bool { return pl.kind == unclear && pl.why != "" }

func (pl *place) refusal() error {
	return &Error{What: "where it runs", Why: pl.why, Hint: pl.hint}
}

// show fills in what a place says of a caller.
func (pl *place) show(c *agent.Caller) {
	switch pl.kind {
	case inUnit:
		c.Unit, c.Nested = pl.unit, pl.nested
	case inContainer:
		c.Container = &agent.Container{ID: pl.container}
	}
}

func unproved(what string, err error) error {
	var known *Error
	if errors.As(err, &known) {
		return known
	}
	e := &Error{What: what, Why: err.Error()}
	switch {
	case errors.Is(err, errOutside):
		e.Hint = "run perceptd on the device itself, or in its pid namespace (--pid host)"
	case errors.Is(err, errStranger):
		e.Hint = usersHint
	case errors.Is(err, errGone):
		e.Hint = "ask on a connection of your own"
	case errors.Is(err, errTooNew):
		e.Hint, e.Retryable = "ask again on this connection, or connect again", true
	}
	return e
}
