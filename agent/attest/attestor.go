// Package attest proves who is at the other end of a connection.
//
// It guarantees that nobody is taken for a caller on less than the whole proof: whatever cannot be
// read or is unclear is a refusal. A proof is made once for a connection, and looked at again on each
// request: it ends with the process that connected, with the rules it was made by, and when another
// process writes on the connection. It never rests on a name, a path that a caller could have chosen, or
// a number that another process could have by now.
//
// Whoever serves a socket makes one Prover, accepts through its Listen, calls NewContext for each accepted
// connection, asks the Proof on each request, and answers nothing but the refusal when that returns an error.
package attest

import (
	"os"
	"sync/atomic"
)

// Rules say what a proof needs beside what the kernel tells.
type Rules struct {
	// Engines are the paths at which a container engine may answer; the first that is a socket is asked. None: no
	// engine is asked, and nobody is taken for a container.
	Engines []string

	// Parents are the cgroups, as whole paths, in which engines put containers beside their own usual ones.
	Parents []string

	// Modules are the modules and what each has to be. On the socket of any other nobody is proved.
	Modules map[string]Requirement

	// RefuseYoung has a process that is younger than 20 ms prove itself by its second request, where the kernel gives no handle on
	// the process that connected: its number may have been another's.
	RefuseYoung bool

	// NeedsEngine tells that some caller cannot be proved without an engine, for Blindness.
	NeedsEngine bool
}

// Requirement is what a module has to be.
type Requirement struct {
	// Container is the name of the container that the caller must be in. Empty: whoever comes in on the
	// module's socket is the module.
	Container string
}

// Options are what a Prover is made of. The zero value is right for a daemon.
type Options struct {
	// Proc is where the proc file system is mounted; empty: /proc.
	Proc string

	// NoPidfd goes by /proc alone, as is done by itself on kernels before 6.5, which cannot give a handle on the
	// process that connected.
	NoPidfd bool

	// TrustOwnUser tells that the daemon was started by hand, and not by the service manager: the container engine may then be
	// the daemon's own user's. Otherwise it has to be root's.
	TrustOwnUser bool

	// Changed is called, by any goroutine, when Blindness may have changed by itself. Nil: nobody wants to know.
	Changed func()
}

// Attestor proves callers by the rules set last. It is safe for concurrent use.
type Attestor struct {
	kernel    kernel
	ownCgroup string // the cgroup that this process was started in; empty: not known
	engine    *engine
	rules     atomic.Pointer[ruleset]
}

// ruleset is Rules in force. Its address tells it from those before and after.
type ruleset struct {
	Rules
	parents map[string]bool
}

// New returns a Prover that knows no module and no engine until SetRules.
func New(o Options) *Attestor {
	k := kernel{proc: o.Proc, pidfd: !o.NoPidfd && hasPeerPidfd()}
	if k.proc == "" {
		k.proc = "/proc"
	}
	k.procMismatch = k.checkProc()
	k.overflow = k.readOverflowIDs()
	changed := o.Changed
	if changed == nil {
		changed = func() {}
	}
	p := &Attestor{kernel: k, engine: newEngine(newTrustedOwners(o.TrustOwnUser), changed)}
	p.SetRules(Rules{})
	if file, err := k.readFile(int32(os.Getpid()), "cgroup"); err == nil {
		p.ownCgroup = parseCgroup(file, nil).path
	}
	return p
}

// SetRules puts rules in force. What was proved by others is proved anew at its next request.
func (a *Attestor) SetRules(r Rules) {
	set := &ruleset{Rules: r, parents: make(map[string]bool)}
	for _, parent := range r.Parents {
		set.parents[parent] = true
	}
	a.rules.Store(set)
	a.engine.reset()
}

// Pidfd reports whether proofs rest on the kernel's own handle of a process (SO_PEERPIDFD).
func (a *Attestor) Pidfd() bool { return a.kernel.pidfd }

// Close lets go of the engine.
func (a *Attestor) Close() { a.engine.reset() }
