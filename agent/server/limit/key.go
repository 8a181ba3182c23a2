// Package limit bounds what callers may take of a server: connections (Conns), requests and connections a second
// (Rate), requests that stay for long (Semaphore), turns at a listener (FairListener, RateListener), answers to
// connections for which there is no room (Refusals), and the head of a request (Serve).
//
// What counts by caller counts by one type of quota key (Key). The package knows nothing of tokens, nor of how a caller
// is attested: the server derives the keys.
package limit

import "fmt"

// Key is the quota key: whom connections and requests are counted for. Callers of which one party can make as many as
// it likes share one key: all of a module, all of a container, all of a unit as one user.
type Key struct {
	Module, Container, Unit string
	UID                     uint32 // NoUID: not known
	Unattested              bool   // callers of a user, or of a module, that could not be attested
	Loopback                bool   // callers of a user on the loopback listener
	Parent                  bool   // all keys of a user, of a unit or of a module together
}

// NoUID is the uid of callers whose user is not known. The kernel gives it to no process.
const NoUID = ^uint32(0)

// parents returns the keys that k is a part of: a user's for all that the user runs, a unit's for all users in it, a
// module's. Root's services are not part of one user: they have no more to do with each other than users have.
func (k Key) parents() (all [2]Key, count int) {
	if k.Container != "" {
		return all, 0
	}
	if k.Module != "" {
		return [2]Key{{Module: k.Module, Parent: true}}, 1
	}
	if k.UID != 0 && k.UID != NoUID {
		all[count] = Key{UID: k.UID, Loopback: k.Loopback, Parent: true}
		count++
	}
	if k.Unit != "" {
		all[count] = Key{Unit: k.Unit, Parent: true}
		count++
	}
	return all, count
}

// IsBareRoot reports whether k is the key of root's processes that are in no service and no container, as an
// administrator's are.
func (k Key) IsBareRoot() bool { return k == Key{} }

// shortID is how many digits of a container's ID people are shown.
const shortID = 12

// String names k for people.
func (k Key) String() string {
	name := "callers whose user is not known"
	switch {
	case k.Module != "":
		name = "module " + k.Module
	case k.Container != "":
		name = "container " + k.Container[:min(len(k.Container), shortID)]
	case k.Unit != "" && k.UID != 0 && k.UID != NoUID && !k.Parent:
		name = fmt.Sprintf("unit %s as uid %d", k.Unit, k.UID)
	case k.Unit != "":
		name = "unit " + k.Unit
	case k.IsBareRoot():
		name = "uid 0 outside of units"
	case k.UID != NoUID:
		name = fmt.Sprintf("uid %d", k.UID)
	}
	if k.Unattested {
		name += " (not proved)"
	}
	return name
}
