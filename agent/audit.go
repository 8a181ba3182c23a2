package agent

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// IDs of the audit's entries in the journal: `journalctl MESSAGE_ID=…` finds all of one kind. They never
// change.
const (
	MessageGranted   = "51a68065337a311afdae5715d2c88a40" // the first token for a caller, identity and resource
	MessageChanged   = "9bfec3be9d5fc8cbdf4c5f661007d2db" // the next, for a caller that is another than before
	MessageDenied    = "b9bd9252ad6b85f84e3147969fbf07b8"
	MessageHandedOut = "0f6a31c29d7b4b0c8d0e9a53b7e2c461" // a header secret of the loopback listener was given to somebody
	MessageUnproved  = "84819a3f40d0fd6a5272f8deb3a657b1" // who is calling could not be proved
)

const (
	maxAudited    = 1024 // callers, identities and resources whose first grant is remembered
	maxLimited    = 256  // callers whose lines are limited apart
	shownDenials  = 16   // of the status
	firstBurst    = 512  // lines at once for first grants, then twenty a second
	oftenBurst    = 10   // lines at once for one caller's denials and changes, then one a second
	allOftenBurst = 50   // and for those of all callers, then five a second
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
		return auditKey{container: cmp.Or(c.Container.Name, c.Container.ID)} // a name is missing if nobody confirmed it
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

// Denial is a denial as a technician sees it. Repeats are counted, not listed.
type Denial struct {
	On       time.Time // the last time
	Caller   string
	Identity string // as it was asked for; empty: none was named
	Resource string // empty when who calls was not proved
	Reason   string
	Count    int
}

// denialKey tells denials apart.
type denialKey struct {
	access
	unproved bool
}

// denialNote is a Denial and what it is told apart by.
type denialNote struct {
	denialKey
	Denial
}

// audit writes to the log who got what for the first time, who was denied, and whose caller is another
// than before. It is bounded in lines and in memory, whatever callers do; the next line written counts
// those left out. What it has forgotten counts as a first time again.
type audit struct {
	log   *zap.Logger
	clock tokencache.Clock

	mu      sync.Mutex // protects what follows
	granted recent[access, identitySeen]
	each    recent[auditKey, *rate.Limiter]
	all     *rate.Limiter
	firsts  *rate.Limiter
	skipped int
	denials []denialNote // the latest first
}

func (a *audit) open(log *zap.Logger, clock tokencache.Clock) {
	a.log, a.clock = log, clock
	a.granted.most, a.each.most = maxAudited, maxLimited
	a.all = rate.NewLimiter(5, allOftenBurst)
	a.firsts = rate.NewLimiter(20, firstBurst)
}

// allowed notes that caller got a token.
func (a *audit) allowed(rules *ruleset, caller *grants.Caller, granted grants.GrantedIdentity, resource string) {
	is := identitySeenOf(caller)
	a.mu.Lock()
	was, known := a.granted.use(access{auditKeyOf(caller), granted.Identity.Name, resource})
	before := *was
	*was = is
	if known && before == is {
		a.mu.Unlock()
		return
	}
	skipped, tell := a.admit(auditKeyOf(caller), !known)
	a.mu.Unlock()
	if !tell {
		return
	}
	fields := append(fieldsOf(caller), zap.String("identity", granted.Identity.Name), zap.String("resource", resource),
		zap.String("decision", "granted"), zap.String("reason", rules.Ref(granted.Grant).String()))
	fields = append(fields, leftOut(skipped)...)
	if !known {
		a.log.Info("token granted for the first time", append(fields, zap.String("message_id", MessageGranted))...)
		return
	}
	a.log.Info("caller changed", append(fields, zap.String("before", before.String()), zap.String("message_id", MessageChanged))...)
}

// refused notes err if it is a denial.
func (a *audit) refused(rules *ruleset, caller *grants.Caller, r grants.Request, err error) {
	var refusal *Error
	if errors.As(err, &refusal) && refusal.Reason == NotGranted {
		a.denied(rules, caller, r)
	}
}

// denied notes that no grant allows r.
func (a *audit) denied(rules *ruleset, caller *grants.Caller, r grants.Request) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	asked := r.IdentityText()
	key := denialKey{access: access{auditKeyOf(caller), asked, r.Resource}}
	reason := func() string { return rules.WhyNot(caller, r) }
	a.mu.Lock()
	a.forget(rules, caller, r)
	why, skipped, tell := a.deny(key, caller, reason)
	a.mu.Unlock()
	if !tell {
		return
	}
	fields := append(fieldsOf(caller), zap.String("identity", asked), zap.String("resource", r.Resource),
		zap.String("decision", "denied"), zap.String("reason", why), zap.String("message_id", MessageDenied))
	a.log.Warn("token denied", append(fields, leftOut(skipped)...)...)
}

// unproved notes a caller that nobody could prove to be anyone.
func (a *audit) unproved(caller *grants.Caller, why error) {
	key := denialKey{access: access{auditKey: auditKeyOf(caller)}, unproved: true}
	a.mu.Lock()
	text, skipped, tell := a.deny(key, caller, why.Error)
	a.mu.Unlock()
	if !tell {
		return
	}
	fields := append(fieldsOf(caller), zap.String("decision", "denied"), zap.String("reason", text), zap.String("message_id", MessageUnproved))
	a.log.Warn("caller not proved", append(fields, leftOut(skipped)...)...)
}

func leftOut(skipped int) []zap.Field {
	if skipped == 0 {
		return nil
	}
	return []zap.Field{zap.Int("left_out", skipped)}
}

// forget makes the next grant of what was just denied a first one. The lock is held.
func (a *audit) forget(rules *ruleset, caller *grants.Caller, r grants.Request) {
	for i := range rules.Identities {
		identity := &rules.Identities[i]
		if !r.NamesIdentity() || r.Names(identity) {
			a.granted.remove(access{auditKeyOf(caller), identity.Name, r.Resource})
		}
	}
}

// deny counts a denial and reports whether to write a line, with how many were left out before it. The
// lock is held.
func (a *audit) deny(key denialKey, caller *grants.Caller, reason func() string) (why string, skipped int, tell bool) {
	why = a.list(key, caller, reason)
	skipped, tell = a.admit(key.auditKey, false)
	return why, skipped, tell
}

// admit reports whether a line may be written, with how many were left out before it. The lock is held.
func (a *audit) admit(of auditKey, first bool) (skipped int, tell bool) {
	if first {
		tell = a.firsts.Allow()
	} else {
		limit, known := a.each.use(of)
		if !known {
			*limit = rate.NewLimiter(1, oftenBurst)
		}
		tell = (*limit).Allow() && a.all.Allow()
	}
	if !tell {
		a.skipped++
		return 0, false
	}
	skipped, a.skipped = a.skipped, 0
	return skipped, true
}

// list puts a denial in front of those that the status shows, and returns its reason. The lock is held.
func (a *audit) list(key denialKey, caller *grants.Caller, reason func() string) string {
	note := denialNote{denialKey: key, Denial: Denial{Caller: caller.String(), Identity: key.identity, Resource: cut(key.resource, grants.MaxResource)}}
	at := len(a.denials)
	for i := range a.denials {
		if a.denials[i].denialKey == key {
			note.Count, at = a.denials[i].Count, i
			break
		}
	}
	note.Reason = cut(reason(), maxNote)
	note.On = a.clock.Wall()
	note.Count++
	switch {
	case at < len(a.denials): // it moves to the front
	case at < shownDenials:
		a.denials = append(a.denials, denialNote{})
	default:
		at = a.spare(key.auditKey)
	}
	copy(a.denials[1:at+1], a.denials[:at])
	a.denials[0] = note
	return note.Reason
}

// spare returns the denial that makes room for another of that account: the oldest of whoever has the most, so that nobody
// drives out those of others. The lock is held.
func (a *audit) spare(of auditKey) (at int) {
	has := map[auditKey]int{of: 1}
	for i := range a.denials {
		has[a.denials[i].auditKey]++
	}
	for i := range a.denials {
		if has[a.denials[i].auditKey] >= has[a.denials[at].auditKey] {
			at = i // the latest come first
		}
	}
	return at
}

// recentDenials lists the latest denials, the latest first.
func (a *audit) recentDenials() []Denial {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []Denial
	for _, note := range a.denials {
		all = append(all, note.Denial)
	}
	return all
}

// AuditUnattested notes in the audit that who calls could not be proved. caller is what is known of it.
func (a *Agent) AuditUnattested(caller grants.Caller, why error) { a.audit.unproved(&caller, why) }

// AuditSecretIssued notes in the audit that caller was given the header secret of whom a grant is for.
func (a *Agent) AuditSecretIssued(caller grants.Caller, of grants.Match) {
	a.audit.mu.Lock()
	skipped, tell := a.audit.admit(auditKeyOf(&caller), false)
	a.audit.mu.Unlock()
	if !tell {
		return
	}
	fields := append(fieldsOf(&caller), leftOut(skipped)...)
	a.log.Info("header secret handed out", append(fields, zap.Stringer("for", of),
		zap.String("message_id", MessageHandedOut))...)
}

// fieldsOf returns what the log says about a caller, with room for a few fields more.
func fieldsOf(c *grants.Caller) []zap.Field {
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
