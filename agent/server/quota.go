package server

import (
	"context"
	"fmt"

	"perceptd/agent"
	"perceptd/agent/attest"
)

// seenIn returns what a connection's context tells of the caller before anything else is asked, and whether it is
// certain already that it cannot be proved.
func seenIn(ctx context.Context) (who agent.Caller, isUnproved bool) {
	proof, err := attest.FromContext(ctx)
	if err != nil {
		return agent.Caller{UID: agent.NoID, GID: agent.NoID}, true
	}
	who, err = proof.Seen()
	return who, err != nil
}

// provedIn returns who a connection's context proves the caller to be, or why it proves nobody and what is known all
// the same.
func provedIn(ctx context.Context) (agent.Caller, error) {
	proof, err := attest.FromContext(ctx)
	if err != nil {
		return agent.Caller{UID: agent.NoID, GID: agent.NoID}, err
	}
	return proof.Caller(ctx)
}

// ownerIn returns in whose session or service manager the caller of a connection's context runs.
func ownerIn(ctx context.Context) uint32 {
	proof, err := attest.FromContext(ctx)
	if err != nil {
		return agent.NoID
	}
	return proof.Owner()
}

// quotaKey is whom connections and requests are counted for. The callers that one party can make as many of as it
// likes share one: all of a module, all of a container, all of a unit as one user.
type quotaKey struct {
	module, container, unit string
	uid                     uint32
	unproved                bool // of a user, or a module, none of whose callers could be proved
	own                     bool // the daemon itself, and then nothing else is set
	loopback                bool // of a user, on the loopback listener
	whole                   bool // of all keys of a user, of a unit or of a module together
}

// keyOf returns whom a caller counts for. owner is the user in whose session or service manager it runs, agent.NoID where
// it runs in none: other users that a user can become, such as those of /etc/subuid, count for that user.
//
// On a module's socket every caller counts for the module: a process that takes the module's place there takes it from
// nobody else. That includes those who cannot be proved, whose user says nothing, as a container's: root in there can be
// any.
func keyOf(who *agent.Caller, owner uint32, isUnproved bool) quotaKey {
	uid := who.UID
	if who.Nested { // then it says nothing, as in a container
		uid = agent.NoID
	}
	if uid != 0 && owner != 0 && owner != agent.NoID {
		uid = owner
	}
	switch {
	case who.Module != "":
		return quotaKey{module: who.Module, unproved: isUnproved}
	case isUnproved:
		return quotaKey{uid: uid, unproved: true}
	case who.Container != nil:
		return quotaKey{container: who.Container.ID}
	}
	return quotaKey{uid: uid, unit: who.Unit}
}

// wholes returns the keys that k is a part of: a user's for all that the user runs, a unit's for all users in it, a
// module's. Root's services are not part of one user: they have no more to do with each other than users have.
func (k quotaKey) wholes() (all [2]quotaKey, count int) {
	if k.container != "" {
		return all, 0
	}
	if k.module != "" {
		return [2]quotaKey{{module: k.module, whole: true}}, 1
	}
	if k.uid != 0 && k.uid != agent.NoID {
		all[count] = quotaKey{uid: k.uid, loopback: k.loopback, whole: true}
		count++
	}
	if k.unit != "" {
		all[count] = quotaKey{unit: k.unit, whole: true}
		count++
	}
	return all, count
}

// isBareRoot reports whether k is of root's processes that are in no service and no container, as an administrator's are.
func (k quotaKey) isBareRoot() bool { return k == quotaKey{} }

// String names k for people.
func (k quotaKey) String() string {
	name := "callers whose user is not known"
	switch {
	case k.own:
		return "perceptd itself"
	case k.module != "":
		name = "module " + k.module
	case k.container != "":
		name = "container " + (&agent.Container{ID: k.container}).ShortID()
	case k.unit != "" && k.uid != 0 && k.uid != agent.NoID && !k.whole:
		name = fmt.Sprintf("unit %s as uid %d", k.unit, k.uid)
	case k.unit != "":
		name = "unit " + k.unit
	case k.isBareRoot():
		name = "uid 0 outside of units"
	case k.uid != agent.NoID:
		name = fmt.Sprintf("uid %d", k.uid)
	}
	if k.unproved {
		name += " (not proved)"
	}
	return name
}
