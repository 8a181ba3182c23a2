// Package simulator is a managed-identity back end for demonstrations and tests. It opens nothing.
//
// A Backend is the model: identities with their permissions, and the cache that makes the real
// service hand out one token per identity and resource for around 24 hours, whatever changes
// meanwhile. Start puts it on a loopback port, where it answers as Azure's instance metadata
// service, as App Service or as the Azure Arc agent does, so that unmodified clients talk to it, and
// where it fails on request in the ways of [FaultKind].
//
// Nothing it gives out can be taken for real. A token's algorithm is "none", its signature decodes
// to "simulated", its issuer ends in ".invalid", and the claims "simulated" and "warning" say the
// same in words; every answer names the simulation in its Server header; and Start refuses any
// address but loopback. It accepts every caller that reaches that port, so the program that starts it
// must not put real permissions behind it, and must close the Server.
package simulator

import (
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// ErrNoResource is returned for a token request that names no resource.
var ErrNoResource = errors.New("no resource was named")

// Options say what a Backend is like. The zero value is a back end that rolls over at expiry and
// whose permission changes reach the very next token.
type Options struct {
	// Now is its clock. Nil: time.Now.
	Now func() time.Time
	// Identities of the simulated device, names and IDs unique: of two alike the first counts.
	// Empty: DefaultIdentities.
	Identities []Identity
	// Life is a token's whole life. Zero: 24 h.
	Life time.Duration
	// Rollover is when a newer token is handed out. Zero: AtExpiry.
	Rollover Rollover
	// PropagationDelay is how long a permission change takes to reach new tokens. Zero: no time.
	PropagationDelay time.Duration
	// Aged is how old a token may be that the back end hands out first for an identity and
	// resource, as if others had asked before. Zero: it is issued then.
	Aged time.Duration
	// Replicas is how many caches there are; each request meets one of them, so that an older token
	// can come back. Zero: 1.
	Replicas int
	// Seed makes the jitter, the ages, the choice of replicas and the odds of faults repeatable: the
	// same seed and calls give the same tokens.
	Seed uint64
}

// Backend is a managed-identity service with the cache of the real one. It is safe for concurrent use.
type Backend struct {
	options    Options
	identities []Identity

	mu       sync.Mutex // protects what follows
	replicas []map[Key]*cachedToken
	changes  map[string][]permissionsAt // by identity name, oldest first
	serial   uint64                     // of the token issued last
	requests uint64                     // so far; each chooses a replica
	calls    Calls
	underWay int
	faults   faultSet
}

// cachedToken is a replica's cached token.
type cachedToken struct {
	Token
	generation int // how many came before it
}

// permissionsAt is permissions and the time from which new tokens carry them.
type permissionsAt struct {
	reaches time.Time
	to      Permissions
}

// New returns a back end that holds no tokens yet.
func New(o Options) *Backend {
	if o.Now == nil {
		o.Now = time.Now
	}
	if len(o.Identities) == 0 {
		o.Identities = DefaultIdentities()
	}
	if o.Life <= 0 {
		o.Life = 24 * time.Hour
	}
	b := &Backend{options: o, identities: slices.Clone(o.Identities), changes: make(map[string][]permissionsAt)}
	for i := range b.identities {
		id := &b.identities[i]
		if id.TenantID == "" {
			id.TenantID = tenantID
		}
		id.Permissions = id.Permissions.withDefaults(Permissions{})
		if b.changes[id.Name] == nil {
			b.changes[id.Name] = []permissionsAt{{to: id.Permissions}} // reaches: the zero time, so in force always
		}
	}
	for range max(1, o.Replicas) {
		b.replicas = append(b.replicas, make(map[Key]*cachedToken))
	}
	return b
}

// now is the clock without a monotonic reading, which times out of a faster clock and JSON lack as well.
func (b *Backend) now() time.Time { return b.options.Now().Round(0) }

// Token answers a request as the real service does: with the cached token of the identity and
// resource until it rolls over, then with one that carries the permissions in force at that time. Its
// errors are ErrNoResource, *UnknownIdentityError and *AmbiguousIdentityError. Faults do not touch it.
func (b *Backend) Token(sel Selection, resource string) (Token, error) {
	defer b.beginCall(sel, resource)()
	id, err := find(b.identities, sel)
	if err != nil {
		return Token{}, err
	}
	return b.cached(id, resource)
}

// beginCall counts a token request as under way until end is called.
func (b *Backend) beginCall(sel Selection, resource string) (end func()) {
	id, _ := find(b.identities, sel) // unknown counts under no name
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls.begin(Call{b.now(), Key{id.Name, resource}})
	b.underWay++
	b.calls.Peak = max(b.calls.Peak, b.underWay)
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.underWay--
	}
}

// cached returns the token that one of the replicas has now for id and resource.
func (b *Backend) cached(id Identity, resource string) (Token, error) {
	if resource == "" {
		return Token{}, ErrNoResource
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now, key := b.now(), Key{id.Name, resource}
	b.requests++
	at := int(b.random("replica", b.requests) * float64(len(b.replicas)))
	replica := b.replicas[at]
	t, ok := replica[key]
	if !ok {
		age := time.Duration(b.random("age", key, at) * float64(max(0, b.options.Aged)))
		t = b.issueLocked(id, resource, at, 0, now.Add(-age))
		evictOne(replica)
		replica[key] = t
	}
	if !now.Before(t.RollsOn) {
		t = b.issueLocked(id, resource, at, t.generation+1, now)
		replica[key] = t
	}
	return t.Token, nil
}

// expiredText is the text of a token that is like m and expired an hour ago by its own exp.
func (b *Backend) expiredText(m Token) string {
	ago := time.Hour + m.ExpiresOn.Sub(b.now())
	m.IssuedAt, m.NotBefore, m.ExpiresOn = m.IssuedAt.Add(-ago), m.NotBefore.Add(-ago), m.ExpiresOn.Add(-ago)
	m.setText(b.options.Seed)
	return m.Text
}

// evictOne drops the token that rolls over first from a replica that is full.
func evictOne(replica map[Key]*cachedToken) {
	if len(replica) < maxKeys {
		return
	}
	var first Key
	var at time.Time
	for k, t := range replica {
		if at.IsZero() || t.RollsOn.Before(at) {
			first, at = k, t.RollsOn
		}
	}
	delete(replica, first)
}

func (b *Backend) issueLocked(id Identity, resource string, replica, generation int, issuedOn time.Time) *cachedToken {
	b.serial++
	second := issuedOn.Truncate(time.Second) // a token's times are whole seconds
	age := b.options.Rollover.age(b.options.Life, b.random("rollover", id.Name, resource, replica, generation))
	m := Token{
		Identity: id, Resource: resource, Permissions: b.inForceLocked(id.Name, issuedOn),
		Serial: b.serial, Replica: replica,
		IssuedOn: issuedOn, IssuedAt: second.Add(-backdated), NotBefore: second.Add(-backdated),
		ExpiresOn: second.Add(b.options.Life).Truncate(time.Second), RollsOn: second.Add(age),
	}
	m.setText(b.options.Seed)
	return &cachedToken{m, generation}
}

// random returns a number in [0, 1) that depends on the seed and the parts alone.
func (b *Backend) random(parts ...any) float64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%#v", parts) // hash.Hash never returns an error
	return rand.New(rand.NewPCG(b.options.Seed, h.Sum64())).Float64()
}

// ChangePermissions gives the identity of that name other permissions: a nil field stays as it is,
// an empty one is taken away. It returns the moment from which new tokens carry them, which is
// PropagationDelay from now; tokens that were issued before keep theirs. Its error is *UnknownIdentityError.
func (b *Backend) ChangePermissions(identity string, to Permissions) (reaches time.Time, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	past := b.changes[identity]
	if len(past) == 0 {
		return time.Time{}, &UnknownIdentityError{fmt.Sprintf("named %q", identity)}
	}
	now := b.now()
	reaches = now.Add(max(0, b.options.PropagationDelay))
	// Permissions that were replaced longer ago than a token is kept are in no new token, even by Aged.
	for len(past) > 1 && past[1].reaches.Before(now.Add(-b.options.Life-b.options.Aged)) {
		past = past[1:]
	}
	b.changes[identity] = append(past, permissionsAt{reaches, to.withDefaults(past[len(past)-1].to)})
	return reaches, nil
}

// inForceLocked returns the permissions of a token that is issued at that time.
func (b *Backend) inForceLocked(identity string, at time.Time) Permissions {
	var p Permissions
	for _, c := range b.changes[identity] {
		if !c.reaches.After(at) {
			p = c.to
		}
	}
	return p.withDefaults(Permissions{})
}

// RolloverAt returns the moment from which a request may first be answered with a newer token than
// any given so far: with several replicas the earliest of theirs, which is now while one of them
// holds none. False: no token was given yet, or sel means no identity.
func (b *Backend) RolloverAt(sel Selection, resource string) (time.Time, bool) {
	id, err := find(b.identities, sel)
	if err != nil {
		return time.Time{}, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var first time.Time
	given, cold := false, false
	for _, replica := range b.replicas {
		t, ok := replica[Key{id.Name, resource}]
		switch {
		case !ok:
			cold = true
		case !given || t.RollsOn.Before(first):
			first, given = t.RollsOn, true
		}
	}
	if given && cold {
		first = b.now()
	}
	return first, given
}

// Calls returns what was asked so far.
func (b *Backend) Calls() Calls {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls.clone()
}

const (
	maxKeys = 1024 // identities and resources that are distinguished: resources come from callers
	maxLog  = 4096 // calls remembered with their times
)

// Key is what the back end caches by: an identity, and a resource byte for byte.
type Key struct {
	Identity string `json:"identity"` // its name; empty for one the device does not have
	Resource string `json:"resource"`
}

// Call is one token request.
type Call struct {
	At time.Time // when it came in, by the back end's clock
	Key
}

// Calls is what the back end was asked so far. A refused request counts like any other; of Arc's
// two legs only the second is one.
type Calls struct {
	Total  int
	PerKey map[Key]int // of the first 1,024 keys
	Peak   int         // the most requests that were under way at once; Token's take no time
	Log    []Call      // oldest first, the latest 4,096
}

// begin counts a call; the caller holds b.mu and ends the call.
func (c *Calls) begin(call Call) {
	c.Total++
	if c.PerKey == nil {
		c.PerKey = make(map[Key]int)
	}
	if _, known := c.PerKey[call.Key]; known || len(c.PerKey) < maxKeys {
		c.PerKey[call.Key]++
	}
	if len(c.Log) == 2*maxLog { // halved now and then rather than moved at every call
		c.Log = slices.Clone(c.Log[maxLog:])
	}
	c.Log = append(c.Log, call)
}

func (c *Calls) clone() Calls {
	log := c.Log[max(0, len(c.Log)-maxLog):]
	return Calls{c.Total, maps.Clone(c.PerKey), c.Peak, slices.Clone(log)}
}
