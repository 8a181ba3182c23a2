package agent

import (
	"cmp"
	"crypto/rand"
	"sync"
	"sync/atomic"

	"perceptd/agent/deny"
	"perceptd/tokencache"
)

// denyRules are the deny rules in force.
type denyRules struct {
	accounts accounts
	saver    recordSaver[deny.Record]

	load func() (*deny.Record, error) // reads the record, which could not be read at the start; nil: it was

	noted tokencache.Origin                  // what note was called for last; who saves uses it
	note  atomic.Pointer[func(isFirst bool)] // called once a record is on the disk

	handing  sync.Mutex              // one call of handOver at a time; protects handed
	handOver func(deny.Record) error // nil: nothing is handed over
	handed   tokencache.Origin       // what was handed over last
	waiting  atomic.Bool             // a goroutine waits to hand over what is in force then
	handers  sync.WaitGroup          // that one, and the one that it waits for

	mu      sync.Mutex      // one change of rules at a time: deny rules, or a reload; protects what follows
	record  deny.Record     // what is in force
	none    bool            // the start found no record anywhere, and nothing has shown since that there was one
	users   accountsVersion // by which users were looked up last for a request
	twinHub string          // this device's identity at the hub whose twin was read last since the start
	hub     string          // this device's identity at the hub now; empty: it has none, or it is not known
}

// namesIn returns what names in deny rules mean with these rules.
func (d *denyRules) namesIn(rules *ruleset) deny.Names {
	return deny.Names{Rules: rules.Rules.Rules, LookupUser: d.accounts.lookup}
}

// putInForce puts rules in force, with the deny rules, and returns those before.
func (a *Agent) putInForce(rules *ruleset) (before *ruleset) {
	a.deny.mu.Lock()
	defer a.deny.mu.Unlock()
	rules.denied = deny.Compile(a.deny.record, a.deny.namesIn(rules))
	before = a.rules.Swap(rules)
	a.cache.Wake()
	return before
}

// enforceLocked puts a record in force, as a newer version of the one before.
func (a *Agent) enforceLocked(record deny.Record) {
	if record.Lineage == "" {
		record.Lineage = rand.Text()
	}
	record.Generation = max(record.Generation, a.deny.record.Generation) + 1
	a.deny.record = record
	rules := *a.rules.Load()
	rules.denied = deny.Compile(record, a.deny.namesIn(&rules))
	a.rules.Store(&rules)
}

// NoteHub says which identity this device has at its hub now. Empty says nothing.
func (a *Agent) NoteHub(hub string) {
	a.deny.mu.Lock()
	defer a.deny.mu.Unlock()
	a.deny.hub = cmp.Or(hub, a.deny.hub)
}

// IsAtHub reports whether this device has that identity at its hub now, as far as it is known.
func (a *Agent) IsAtHub(hub string) bool {
	a.deny.mu.Lock()
	defer a.deny.mu.Unlock()
	return a.deny.hub == "" || a.deny.hub == hub
}

// IsHubSetAside reports whether root has set aside what the hub sets at which this device has that identity. Empty: the
// one that it has now.
func (a *Agent) IsHubSetAside(hub string) bool {
	a.deny.mu.Lock()
	defer a.deny.mu.Unlock()
	return a.deny.record.IsSetAside(cmp.Or(hub, a.deny.hub))
}
