package server

import (
	"context"

	"perceptd/agent"
	"perceptd/agent/caller"
)

// seenIn returns what a connection's context tells of the caller before anything else is asked, and whether it is
// certain already that it cannot be proved.
func seenIn(ctx context.Context) (who agent.Caller, isUnproved bool) {
	proof, err := caller.FromContext(ctx)
	if err != nil {
		return agent.Caller{UID: agent.NoID, GID: agent.NoID}, true
	}
	who, err = proof.Seen()
	return who, err != nil
}

// provedIn returns who a connection's context proves the caller to be, or why it proves nobody and what is known all
// the same.
func provedIn(ctx context.Context) (agent.Caller, error) {
	proof, err := caller.FromContext(ctx)
	if err != nil {
		return agent.Caller{UID: agent.NoID, GID: agent.NoID}, err
	}
	return proof.Caller(ctx)
}

// seat is whom connections and requests count for. The callers that one party can make as many of as it
// likes share one: all of a module, all of a container, all of a unit.
type seat struct {
	module, container, unit string
	uid                     uint32
	unproved                bool // of a user, or a module, none of whose callers could be proved
	own                     bool // the daemon itself, and then nothing else is set
	loopback                bool // of a user, on the loopback listener
}

// seatOf returns whom a caller counts for.
//
// On a module's socket everybody is the module, whoever is behind it: a process that takes the module's
// place there takes it from nobody else. That includes those who cannot be proved, whose user says nothing: root in a
// container can be any.
func seatOf(who *agent.Caller, isUnproved bool) seat {
	switch {
	case isUnproved && who.Module != "":
		return seat{module: who.Module, unproved: true}
	case isUnproved:
		return seat{uid: who.UID, unproved: true}
	case who.Module != "":
		return seat{module: who.Module}
	case who.Container != nil:
		return seat{container: who.Container.ID}
	case who.Unit != "":
		return seat{unit: who.Unit}
	}
	return seat{uid: who.UID}
}
