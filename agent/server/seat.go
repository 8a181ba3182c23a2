package server

import (
	"context"

	"perceptd/agent"
	"perceptd/agent/caller"
)

// proofOf returns who was proved to be at the other end of a connection, or why nobody was and what is known all
// the same. Where not even a process is known, a uid of 0 is not root.
func proofOf(ctx context.Context) (agent.Caller, error) {
	who, err := caller.FromContext(ctx)
	if err != nil && who.PID <= 0 {
		who.UID, who.GID, who.PID = agent.NoID, agent.NoID, 0
	}
	return who, err
}

// seat is whom connections and requests count for. The callers that one party can make as many of as it
// likes share one: all of a module, all of a container, all of a unit.
type seat struct {
	module, container, unit string
	uid                     uint32
	unproved                bool // of a user none of whose callers could be proved
	own                     bool // the daemon itself, and then nothing else is set
}

// seatOf returns whom a caller counts for.
//
// On a module's socket everybody is the module, whoever is behind it: a process that takes the module's
// place there takes it from nobody else.
func seatOf(who *agent.Caller) seat {
	switch {
	case who.Module != "":
		return seat{module: who.Module}
	case who.Container != nil:
		return seat{container: who.Container.ID}
	case who.Unit != "":
		return seat{unit: who.Unit}
	}
	return seat{uid: who.UID}
}

// unprovedSeat is for what is known of somebody who could not be proved.
func unprovedSeat(who *agent.Caller) seat { return seat{uid: who.UID, unproved: true} }
