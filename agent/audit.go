package agent

import (
	"cmp"
	"container/list"
	"errors"
	"fmt"
	"slices"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// IDs of the audit's entries in the journal: `journalctl MESSAGE_ID=…` finds all of one kind. They never change.
const (
	MessageGranted      = "51a68065337a311afdae5715d2c88a40" // the first token for a caller, identity and resource
	MessageChanged      = "9bfec3be9d5fc8cbdf4c5f661007d2db" // the next, if the caller's attested identity differs
	MessageDenied       = "b9bd9252ad6b85f84e3147969fbf07b8"
	MessageDeniedByRule = "d06e5b7f31c94c28a2f87d4be9105c3a" // a deny rule took away what a grant allows
	MessageSecretIssued = "0f6a31c29d7b4b0c8d0e9a53b7e2c461" // a header secret of the loopback listener was handed out
	MessageUnattested   = "84819a3f40d0fd6a5272f8deb3a657b1" // a caller could not be attested
)

const (
	maxAudited    = 1024 // callers, identities and resources whose first grant is remembered
	maxLimited    = 256  // callers whose lines are limited separately
	shownDenials  = 16   // in the status
	maxReason     = 512  // bytes of a denial's reason
	firstBurst    = 512  // lines at once for first grants, then twenty a second
	oftenBurst    = 10   // lines at once for one caller's denials and changes, then one a second
	allOftenBurst = 50   // lines at once for those of all callers, then five a second
)

// auditKey is what people know a caller by. It stays the same when the caller's process or container is replaced.
type auditKey struct {
	module, container, unit string
	uid, gid                uint32 // gid where uid is not known
	bySecret                bool   // which says less than a socket, and is of another process
}

func auditKeyOf(c *grants.Caller) auditKey {
	if c.Via != "" {
		plain := *c
		plain.Via = ""
		key := auditKeyOf(&plain)
		key.bySecret = true
		return key
	}
	switch {
	case c.Module != "":
		return auditKey{module: c.Module}
	case c.Container != nil:
		return auditKey{container: cmp.Or(c.Container.Name, c.Container.ID)} // no name: not confirmed by the engine
	case c.Unit != "":
		return auditKey{unit: c.Unit}
	}
	if c.UID == grants.NoID {
		return auditKey{uid: grants.NoID, gid: c.GID}
	}
	return auditKey{uid: c.UID}
}

// identitySeen is all that was attested of a caller, except its pid.
type identitySeen struct {
	container, image, unit, via string
	uid, gid                    uint32
}

func identitySeenOf(c *grants.Caller) identitySeen {
	seen := identitySeen{unit: c.Unit, via: c.Via, uid: c.UID, gid: c.GID}
	if c.Container != nil {
		seen.container, seen.image = c.Container.ID, c.Container.Digest
	}
	return seen
}

func (i identitySeen) String() string {
	text := fmt.Sprintf("uid %d, gid %d", i.uid, i.gid)
	if i.via != "" {
		text = i.via // the ids are the grant's, or not known
	}
	if i.unit != "" {
		text = "unit " + i.unit + ", " + text
	}
	if i.container != "" {
		short := (&grants.Container{ID: i.container}).ShortID()
		text = fmt.Sprintf("container %s of image %s, %s", short, i.image, text)
	}
	return text
}

// access is what a caller asked for.
type access struct {
	auditKey
	identity, resource string
}

// denialKey identifies the denials that count as repeats of one.
type denialKey struct {
	access
	processUID uint32 // services, containers and modules may have processes of several users
	unattested bool
}

// denialEntry is a denial as the status shows it, with its key. Repeats are counted, not listed.
type denialEntry struct {
	denialKey
	api.Denial

	// caller and request are those of the last time: what would be decided now is told by them.
	caller  grants.Caller
	request grants.Request
}

// audit logs first grants, denials, and callers whose attested identity changed. Its lines and its memory are bounded,
// whatever callers do: a line says how many were left out before it, and a grant that was evicted counts as a first one
// again.
type audit struct {
	log   *zap.Logger
	clock tokencache.Clock

	mu      sync.Mutex // protects what follows
	granted lru[access, identitySeen]
	each    lru[auditKey, *rate.Limiter] // denials and changes of one caller
	all     *rate.Limiter                // denials and changes of all callers
	firsts  *rate.Limiter                // first grants
	skipped int                          // lines left out since the last one
	denials []denialEntry                // the latest first
	lastID  int                          // of a denial
}

func (a *audit) open(log *zap.Logger, clock tokencache.Clock) {
	a.log, a.clock = log, clock
	a.granted.size, a.each.size = maxAudited, maxLimited
	a.all = rate.NewLimiter(5, allOftenBurst)
	a.firsts = rate.NewLimiter(20, firstBurst)
}

// allowed records that caller got a token.
func (a *audit) allowed(rules *ruleset, caller *grants.Caller, granted grants.GrantedIdentity, resource string) {
	now := identitySeenOf(caller)
	key := access{auditKeyOf(caller), granted.Identity.Name, resource}
	a.mu.Lock()
	seen, known := a.granted.use(key)
	before := *seen
	*seen = now
	if known && before == now {
		a.mu.Unlock()
		return
	}
	skipped, write := a.mayWriteLocked(key.auditKey, !known)
	a.mu.Unlock()
	if !write {
		return
	}
	fields := append(callerFields(caller), zap.String("identity", granted.Identity.Name),
		zap.String("resource", resource), zap.String("decision", "granted"),
		zap.String("reason", rules.Ref(granted.Grant).String()))
	fields = append(fields, leftOut(skipped)...)
	if !known {
		a.log.Info("token granted for the first time", append(fields, zap.String("message_id", MessageGranted))...)
		return
	}
	a.log.Info("caller changed",
		append(fields, zap.String("before", before.String()), zap.String("message_id", MessageChanged))...)
}

// refused records err if it is a denial.
func (a *audit) refused(rules *ruleset, caller *grants.Caller, r grants.Request, err error) {
	var refusal *Error
	if errors.As(err, &refusal) && refusal.isDenial() {
		a.denied(rules, caller, r, refusal)
	}
}

// denied records that no grant allows r, that one which decides is faulty, or that a deny rule takes it away.
func (a *audit) denied(rules *ruleset, caller *grants.Caller, r grants.Request, refusal *Error) {
	r.Resource = grants.TrimScope(r.Resource)
	asked := r.IdentityText()
	key := denialKey{access: access{auditKeyOf(caller), asked, r.Resource}, processUID: caller.UID}
	message, reason := MessageDenied, func() string { return rules.WhyNot(caller, r) }
	switch refusal.Code {
	case api.CodeDenied:
		message, reason = MessageDeniedByRule, func() string { return refusal.forAudit }
	case api.CodeFaultyGrant:
		reason = func() string { return cmp.Or(refusal.forAudit, refusal.Detail) }
	}
	a.mu.Lock()
	a.forgetGrantsLocked(rules, caller, r)
	why, skipped, write := a.recordDenialLocked(key, caller, r, refusal.Code, reason)
	a.mu.Unlock()
	if !write {
		return
	}
	fields := append(callerFields(caller), zap.String("identity", asked), zap.String("resource", r.Resource),
		zap.String("decision", "denied"), zap.String("reason", why), zap.String("message_id", message))
	a.log.Warn("token denied", append(fields, leftOut(skipped)...)...)
}

// unattested records that a caller could not be attested.
func (a *audit) unattested(caller *grants.Caller, why error) {
	key := denialKey{access: access{auditKey: auditKeyOf(caller)}, processUID: caller.UID, unattested: true}
	a.mu.Lock()
	text, skipped, write := a.recordDenialLocked(key, caller, grants.Request{}, api.CodeUnknownCaller, why.Error)
	a.mu.Unlock()
	if !write {
		return
	}
	fields := append(callerFields(caller), zap.String("decision", "denied"), zap.String("reason", text),
		zap.String("message_id", MessageUnattested))
	a.log.Warn("caller not proved", append(fields, leftOut(skipped)...)...)
}

func leftOut(skipped int) []zap.Field {
	if skipped == 0 {
		return nil
	}
	return []zap.Field{zap.Int("left_out", skipped)}
}

// forgetGrantsLocked makes the next grant of what was just denied a first one.
func (a *audit) forgetGrantsLocked(rules *ruleset, caller *grants.Caller, r grants.Request) {
	for i := range rules.Identities {
		identity := &rules.Identities[i]
		if !r.NamesIdentity() || r.Names(identity) {
			a.granted.remove(access{auditKeyOf(caller), identity.Name, r.Resource})
		}
	}
}

// mayWriteLocked reports whether a line may be written, and how many were left out before it.
func (a *audit) mayWriteLocked(key auditKey, first bool) (skipped int, write bool) {
	if first {
		write = a.firsts.Allow()
	} else {
		limit, known := a.each.use(key)
		if !known {
			*limit = rate.NewLimiter(1, oftenBurst)
		}
		write = (*limit).Allow() && a.all.Allow()
	}
	if !write {
		a.skipped++
		return 0, false
	}
	skipped, a.skipped = a.skipped, 0
	return skipped, true
}

// recordDenialLocked puts a denial in front of those that the status shows. It returns the reason that is shown,
// whether to write a line, and how many lines were left out before it.
func (a *audit) recordDenialLocked(
	key denialKey, caller *grants.Caller, r grants.Request, code api.Code, reason func() string,
) (why string, skipped int, write bool) {
	entry := denialEntry{denialKey: key, caller: *caller, request: r, Denial: api.Denial{
		Code: code, Caller: caller.String(), Identity: key.identity, Resource: truncate(key.resource, grants.MaxResource),
	}}
	at := len(a.denials)
	for i := range a.denials {
		if a.denials[i].denialKey == key {
			entry.Count, entry.ID, at = a.denials[i].Count, a.denials[i].ID, i
			break
		}
	}
	if entry.ID == 0 {
		a.lastID++
		entry.ID = a.lastID
	}
	entry.Reason = truncate(reason(), maxReason)
	entry.On = api.Time(a.clock.Wall())
	entry.Count++
	switch {
	case at < len(a.denials): // it moves to the front
	case at < shownDenials:
		a.denials = append(a.denials, denialEntry{})
	default:
		at = a.evictionLocked(key.auditKey)
	}
	copy(a.denials[1:at+1], a.denials[:at])
	a.denials[0] = entry
	skipped, write = a.mayWriteLocked(key.auditKey, false)
	return entry.Reason, skipped, write
}

// evictionLocked returns the denial to evict for another one of that caller: the oldest of the caller with the most, so
// that no caller evicts all those of others.
func (a *audit) evictionLocked(key auditKey) (at int) {
	count := map[auditKey]int{key: 1}
	for i := range a.denials {
		count[a.denials[i].auditKey]++
	}
	for i := range a.denials {
		if count[a.denials[i].auditKey] >= count[a.denials[at].auditKey] {
			at = i // the latest come first
		}
	}
	return at
}

// recentDenials returns the latest denials, the latest first.
func (a *audit) recentDenials() []denialEntry {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.denials)
}

// AuditUnattested records in the audit that a caller could not be attested. caller is what is known of it.
func (a *Agent) AuditUnattested(caller grants.Caller, why error) { a.audit.unattested(&caller, why) }

// AuditSecretIssued records in the audit that caller was given the header secret of the callers that of matches.
func (a *Agent) AuditSecretIssued(caller grants.Caller, of grants.Match) {
	a.audit.mu.Lock()
	skipped, write := a.audit.mayWriteLocked(auditKeyOf(&caller), false)
	a.audit.mu.Unlock()
	if !write {
		return
	}
	fields := append(callerFields(&caller), leftOut(skipped)...)
	a.log.Info("header secret handed out",
		append(fields, zap.Stringer("for", of), zap.String("message_id", MessageSecretIssued))...)
}

// callerFields returns what the log says about a caller, with room for a few fields more.
func callerFields(c *grants.Caller) []zap.Field {
	fields := append(make([]zap.Field, 0, 16), zap.Stringer("caller", *c),
		zap.Uint32("uid", c.UID), zap.Uint32("gid", c.GID), zap.Int32("pid", c.PID))
	if c.Via != "" {
		fields = append(fields, zap.String("via", c.Via))
	}
	if c.Module != "" {
		fields = append(fields, zap.String("module", c.Module))
	}
	if c.Unit != "" {
		fields = append(fields, zap.String("unit", c.Unit))
	}
	if c.Container != nil {
		fields = append(fields, zap.String("container", c.Container.ID), zap.String("container_name", c.Container.Name),
			zap.String("container_image", c.Container.Digest))
	}
	return fields
}

// lru is a map that evicts its least recently used entry when it is full. The zero value is empty. It does no locking.
type lru[K comparable, V any] struct {
	size    int // entries at most
	order   list.List
	entries map[K]*list.Element
}

type lruEntry[K comparable, V any] struct {
	key   K
	value V
}

// use returns the value of key and whether there was one; if not, it adds a zero value.
func (l *lru[K, V]) use(key K) (value *V, known bool) {
	if e := l.entries[key]; e != nil {
		l.order.MoveToFront(e)
		return &e.Value.(*lruEntry[K, V]).value, true
	}
	if l.entries == nil {
		l.entries = make(map[K]*list.Element)
	}
	if len(l.entries) >= l.size {
		l.remove(l.order.Back().Value.(*lruEntry[K, V]).key)
	}
	entry := &lruEntry[K, V]{key: key}
	l.entries[key] = l.order.PushFront(entry)
	return &entry.value, false
}

func (l *lru[K, V]) remove(key K) {
	if e := l.entries[key]; e != nil {
		l.order.Remove(e)
		delete(l.entries, key)
	}
}
