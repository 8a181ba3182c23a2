// Package attest identifies the process at the other end of a connection.
//
// It fails closed: a caller is identified by a complete attestation or refused. Whatever cannot be read, or is
// ambiguous, is a refusal. Each connection is attested once and checked again on each request. The attestation ends
// when the process that connected ends, when the rules change, and when another process writes on the connection. It
// never relies on a process name, on a path that the caller could have chosen, or on a process ID that may have been
// reused.
//
// To serve a socket, make one Attestor, accept connections from its Listen, call NewContext for each of them, and
// call Attestation.Caller on each request. When Caller returns an error, answer with the refusal and nothing else.
package attest

import (
	"cmp"
	"os"
	"sync/atomic"
)

// Rules configure what a caller has to be, and which containers can be attested.
type Rules struct {
	// Engines are the paths at which a container engine may answer. The first one that is a socket is used. Empty: no
	// engine is asked, and no caller is attested as a container.
	Engines []string

	// Parents are the cgroups, as whole paths, that may hold containers in addition to the engines' own defaults.
	Parents []string

	// Modules are the configured modules and what each of them has to be. A caller on the socket of any other module
	// is refused.
	Modules map[string]Requirement

	// RefuseYoung refuses the first request of a process that is younger than 20 ms, where the kernel has no
	// SO_PEERPIDFD: its process ID may have belonged to another process. The second request on the connection attests
	// it.
	RefuseYoung bool

	// NeedsEngine says that some caller cannot be attested without a container engine. Limitations then reports an
	// engine that does not answer.
	NeedsEngine bool
}

// Requirement is what the caller on a module's socket has to be.
type Requirement struct {
	// Container is the name of the container that the caller must run in. Empty: every caller on the module's socket
	// is attested as the module.
	Container string
}

// Options configure an Attestor. The zero value is right for a daemon.
type Options struct {
	// Proc is the mount point of the proc file system. Empty: /proc.
	Proc string

	// Cgroups is the mount point of the cgroup hierarchies. Empty: /sys/fs/cgroup.
	Cgroups string

	// NoPidfd identifies processes by /proc alone, as New does on kernels before 6.5, which have no SO_PEERPIDFD.
	NoPidfd bool

	// TrustOwnUser accepts a container engine that runs as the daemon's own user. It is meant for a daemon that was
	// started by hand and not by the service manager. Otherwise the engine has to be root's.
	TrustOwnUser bool

	// Changed is called, by any goroutine, when the result of Limitations may have changed by itself. Nil: no
	// callback.
	Changed func()
}

// Attestor attests callers by the rules that were set last. It is safe for concurrent use.
type Attestor struct {
	kernel    kernel
	ownCgroup string // the cgroup that this process was started in; empty: unknown
	engine    *engine
	rules     atomic.Pointer[activeRules]
}

// activeRules is Rules in force. Each call of SetRules makes a new one: its address identifies the version.
type activeRules struct {
	Rules
	parents map[string]bool
}

// New returns an Attestor that has no modules and no engine until SetRules is called.
func New(o Options) *Attestor {
	k := kernel{
		proc: cmp.Or(o.Proc, "/proc"), cgroups: cmp.Or(o.Cgroups, "/sys/fs/cgroup"),
		pidfd: !o.NoPidfd && hasPeerPidfd(),
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

// SetRules replaces the rules. A connection that was attested by the previous ones is attested again at its next
// request.
func (a *Attestor) SetRules(r Rules) {
	active := &activeRules{Rules: r, parents: make(map[string]bool)}
	for _, parent := range r.Parents {
		active.parents[parent] = true
	}
	a.rules.Store(active)
	a.engine.reset()
}

// Pidfd reports whether processes are identified by the kernel's own handle (SO_PEERPIDFD).
func (a *Attestor) Pidfd() bool { return a.kernel.pidfd }

// Close discards the connection to the container engine.
func (a *Attestor) Close() { a.engine.reset() }
