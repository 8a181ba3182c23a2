package lives

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// oracle judges what callers get: by the truth, and by what the daemon could know. The life's lock protects it.
type oracle struct {
	*life
	fault   *fault
	changes []*happened
	lies    []span // while the clock was vouched for and wrong
	liar    bool
	served  map[tokencache.Key]served
	promise map[tokencache.Key]promise
	recent  []time.Time // calls of the last hour
	got     map[tokencache.Key]got
	lasting map[tokencache.Key][]time.Time // calls that only an administrator's help would have let succeed
	wrongOn time.Time                      // the clock was last seen not to be right
	right   bool                           // it is, since rightOn
	rightOn time.Time
	// a replica that lags last issued a token of a former principal after the switch was seen
	relapsed map[tokencache.Selector]time.Time
	wasOff   span      // the device, last
	unseen   time.Time // since then no daemon ran, until the device was on again
	endedOn  time.Time // a daemon, last
	joined   int       // how many changes others on record stood for, at the last look
	// what systemd holds is of a daemon that could not read anything
	carriedBlind bool
	blind        bool // nothing could be read of what was kept
	// since then it is on record that nobody knows what was on record; zero: it is not
	unknown time.Time
	// the back end told the same short life again, a minute later, or of a token that has minutes more: since then it
	// counts none; zero: it has not
	static            time.Time
	longestShort      time.Duration // that a token had left of which a short life was told
	insisted, renewed time.Time     // a technician last did, and a principal was last made anew
	// since then trouble is told of a save, and the disk is sound; zero: not
	unsaved time.Time
}

// got is what a process was last given for a key.
type got struct {
	by        *process
	text      string
	until     time.Time // it expires, by what was told
	former    time.Time // the one before it was to expire
	principal int       // the latest that was seen
	first     time.Time // that one was seen
	short     bool      // the life told was too short
	sameShort time.Time // since then it was told so, from the first answer on; zero: the first told another
	on        time.Time // since then it was told, the same each time
}

type span struct{ from, to time.Time }

// fault is what went wrong.
type fault struct {
	kind   string // in a few words, always the same
	after  time.Duration
	detail string
}

func (f *fault) String() string {
	return fmt.Sprintf("%s, after %v: %s", f.kind, f.after.Round(time.Millisecond), f.detail)
}

// happened is a policy change, and what became of its notice.
type happened struct {
	id        string
	identity  *tokencache.Selector // nil: all
	resource  string               // empty: all
	effect    tokencache.Effect
	on        time.Time     // it happened
	spreads   time.Duration // until new tokens have it
	dated     bool
	noted     time.Time
	vouched   bool // the clock was, then
	lied      bool // and it was wrong
	boot      int
	kept      bool                       // its notice was acknowledged
	must      bool                       // it is to be in force in this process
	withdrawn bool                       // and that was acknowledged
	present   bool                       // it was on record at the last look
	dropped   bool                       // it went off a full record, which none stands for since
	held      map[tokencache.Key]*issued // what the daemon was known to hold then
}

type served struct {
	by    *process
	token *issued
	on    time.Time // last
}

// promise is that a key is current by then at the latest.
type promise struct {
	by      time.Time
	made    time.Time
	changes int // policy changes noted and withdrawn before
}

func (o *oracle) open(l *life) {
	*o = oracle{life: l, served: make(map[tokencache.Key]served), promise: make(map[tokencache.Key]promise),
		got: make(map[tokencache.Key]got), lasting: make(map[tokencache.Key][]time.Time),
		relapsed: make(map[tokencache.Selector]time.Time)}
}

// fail notes what went wrong first.
func (o *oracle) fail(kind, format string, args ...any) {
	if o.fault == nil {
		o.fault = &fault{kind, time.Since(o.began), fmt.Sprintf(format, args...)}
	}
}

// bounds on what callers are promised.
const (
	tolerance = 1200 * time.Millisecond        // tokens' times are whole seconds
	blur      = 5*time.Minute + 10*time.Second // tokens are dated back by so much

	// soon is within which callers have a token that the back end would give: probes are as far apart as that. While
	// policy changes follow each other the back end is left alone for three times their spreading besides.
	soon = 3 * time.Hour

	// pardoned is for how long after a fault is over it may still be told: the longest pause.
	pardoned = 5*time.Minute + 30*time.Second

	// pardonedLie is for how long after a clock lied tokens may count as expired that had by it: until other answers
	// bear out that they have not.
	pardonedLie = 2 * time.Hour

	// pardonedLong is that where an administrator heals the fault, or the back end throttled.
	pardonedLong = 21 * time.Minute
)

// touches reports whether ch is about k, with the resources that stand in for each other.
func (o *oracle) touches(ch *happened, k tokencache.Key) bool {
	if ch.identity != nil && *ch.identity != k.Selector {
		return false
	}
	both := o.plan.device.alternates && twin(ch.resource) && twin(k.Resource)
	same := o.plan.device.spelled && strings.TrimSuffix(ch.resource, "/") == strings.TrimSuffix(k.Resource, "/")
	return ch.resource == "" || ch.resource == k.Resource || both || same
}

func twin(resource string) bool { return resource == resourceName(0) || resource == resourceName(1) }

// lacks is the truth.
func (ch *happened) lacks(t *issued) bool { return t.on.Before(ch.on.Add(ch.spreads)) }

// note has a policy change happen, and somebody note it.
func (l *life) note(e event) {
	p := l.process
	if p == nil {
		return // who notes it is told that nobody answers
	}
	now := time.Now()
	ch := &happened{effect: e.effect, on: now, dated: e.dated, noted: now, boot: l.clocks.number()}
	c := api.PolicyChangeRequest{Effect: e.effect, AllResources: e.resource == 0}
	if e.resource > 0 {
		k := l.keys[e.resource-1]
		ch.resource, c.Resource = k.Resource, k.Resource
	}
	if e.identity > 0 {
		identity := identities[e.identity-1]
		selector := identity.Selector()
		ch.identity, c.Identity = &selector, identity.Name
	}
	if e.dated {
		c.At = now.Add(-e.ago)
		if e.ago > 0 {
			ch.on = c.At
		}
	}
	ahead, vouched := l.clocks.error()
	ch.vouched, ch.lied = vouched, vouched && ahead.Abs() > agreeing
	ch.spreads = time.Duration(l.draw("spreads", tokencache.Key{}) * 0.95 * float64(l.plan.device.spread))
	noted, err := p.agent.RecordChange("the plan", c)
	onRecord := p.agent.Changes()
	l.mu.Lock()
	defer l.mu.Unlock()
	var refusal *agent.Error
	switch {
	case err == nil:
		ch.kept = true
	case errors.As(err, &refusal) && refusal.Code == api.CodeNotKept:
	case errors.As(err, &refusal) && (refusal.Code == api.CodeFutureChange || refusal.Code == api.CodeBadRequest):
		return
	case errors.As(err, &refusal) && refusal.Code == api.CodeTooManyChanges:
		if e.effect == tokencache.Revoked {
			l.oracle.fail("revocation refused", "%v", err)
		}
		return
	default:
		l.oracle.fail("strange error", "noting: %v", err)
		return
	}
	ch.id, ch.must, ch.present = noted.ID, true, true
	l.oracle.changes = append(l.oracle.changes, ch)
	l.oracle.takeIn(onRecord)
}

func (l *life) withdraw(n int) {
	p := l.process
	o := &l.oracle
	if p == nil || len(o.changes) == 0 {
		return
	}
	ch := o.changes[max(0, len(o.changes)-1-n)]
	_, err := p.agent.WithdrawChange("the plan", ch.id)
	l.mu.Lock()
	defer l.mu.Unlock()
	ch.must, ch.present = false, false
	ch.kept = false // after an error it may be back, and need not
	ch.withdrawn = err == nil
	clear(o.promise)
}

// starts takes in what of all that was kept a start finds.
func (o *oracle) starts() {
	o.mu.Lock()
	defer o.mu.Unlock()
	d := &o.disk
	told := o.carried != nil && !o.carriedBlind
	o.blind = d.now() == unreadable && !told
	if d.now() == unreadable {
		// a start that cannot read the record knows no more of the doubt before it: it is from then on
		o.unknown = time.Time{}
	}
	for _, ch := range o.changes {
		kept := told || d.has("policy-changes") || d.has(tokensName) && o.hasKeyLocked() && !d.savedOn.Before(ch.noted)
		if ch.kept && !kept && o.excuse(allGone) {
			ch.kept = false
		}
	}
}

// isBlind reports whether the daemon could not read anything yet of what was kept.
func (o *oracle) isBlind(now time.Time) bool {
	if o.blind && now.Sub(o.disk.until) > 2*time.Minute {
		o.blind = false
	}
	return o.blind
}

// booted takes in that the device was off for that long. A promise is made for a device that stays on, where no clock
// tells how long it was not.
func (o *oracle) booted(off time.Duration) {
	o.wasOff = span{time.Now().Add(-off), time.Now()}
	if o.unseen = o.wasOff.from; o.endedOn.Before(o.unseen) {
		o.unseen = o.endedOn
	}
	if o.isRight() {
		return
	}
	for k, p := range o.promise {
		p.by = p.by.Add(off + 15*time.Minute)
		o.promise[k] = p
	}
}

// started takes in which changes are on record after a start.
func (o *oracle) started() {
	o.mu.Lock()
	for _, ch := range o.changes {
		ch.must = ch.kept
	}
	o.mu.Unlock()
	o.look()
}

// ended takes in that the daemon is gone.
func (o *oracle) ended() {
	o.endedOn = time.Now()
	clear(o.served)
}

func (o *oracle) clockSet(ahead time.Duration, vouched bool) {
	now := time.Now()
	if o.liar {
		o.lies[len(o.lies)-1].to = now
	}
	if right := o.isRight(); right != o.right {
		o.right, o.rightOn = right, now
	}
	if o.liar = vouched && ahead.Abs() > agreeing; o.liar {
		o.lies = append(o.lies, span{now, now.Add(1e6 * time.Hour)})
	}
}

// liedSince reports whether the clock lied at any time since then.
func (o *oracle) liedSince(t time.Time) bool {
	for _, s := range o.lies {
		if s.to.After(t) {
			return true
		}
	}
	return false
}

// liedAbout reports whether the clock lied just now, or since a token of k was issued.
func (o *oracle) liedAbout(k tokencache.Key, now time.Time) bool {
	since := now.Add(-pardonedLie)
	for _, t := range o.backEnd.held {
		if t.key == k && t.on.Before(since) {
			since = t.on
		}
	}
	return o.liedSince(since)
}

// received takes in what the daemon is given.
func (o *oracle) received(p *process, f tokencache.Fetched) {
	t, now := o.backEnd.byText[f.Token.Text.Reveal()], time.Now()
	if boot := o.clocks.number(); t.boot != boot {
		t.came, t.boot = now, boot
	}
	before := o.got[t.key]
	for k, g := range o.got {
		if g.by == p && k.Selector == t.key.Selector && t.principal < g.principal && t.on.After(g.first) {
			o.relapsed[k.Selector] = now
		}
	}
	failing, _ := o.backEnd.failure(t.key, now)
	g := got{by: p, text: t.text, until: now.Add(f.Left), former: before.former, principal: t.principal, first: now,
		short: failing == tellsShort, sameShort: before.sameShort, on: now}
	if before.text != g.text {
		g.former, g.sameShort = before.until, time.Time{}
		if g.short {
			g.sameShort = now
		}
	}
	if g.short && f.Counted {
		left := t.expires.Sub(now)
		repeated := !g.sameShort.IsZero() && now.Sub(g.sameShort) >= time.Minute || left < o.longestShort-5*time.Minute
		if o.static.IsZero() && repeated {
			o.static = now
		}
		o.longestShort = max(o.longestShort, left)
	}
	if before.by == p && before.text == g.text && !before.short && before.until.Sub(g.until).Abs() < agreeing {
		g.on = before.on
	}
	if before.by == p && before.principal >= g.principal {
		g.principal, g.first = before.principal, before.first
	}
	o.got[t.key] = g
}

// answered judges a token that a caller got.
func (o *oracle) answered(p *process, k *key, a agent.Answer) {
	now := time.Now()
	t := o.backEnd.byText[a.Token.Text.Reveal()]
	if t == nil || t.key.Selector != k.Selector || t.key.Resource != a.Resource {
		o.fail("another token", "%v got a token of %v", k.Key, t)
		return
	}
	if a.Resource == k.Resource {
		o.served[k.Key] = served{p, t, now}
	}
	o.judgeLife(p, k, a, t, now)
	for _, ch := range o.changes {
		if !ch.must || !o.touches(ch, t.key) || !ch.lacks(t) || ch.effect != tokencache.Revoked &&
			a.Permissions.State != tokencache.Current || o.excusesChange(ch, t) {
			continue
		}
		switch {
		case o.isBlind(now) && a.Permissions.State != tokencache.Current && o.excuse(unreadNow):
		case ch.effect == tokencache.Revoked:
			o.fail("revoked token served", "%v got as %v a token issued on %v, before %v of %v (noted %v)",
				k.Key, a.Permissions.State, t.on.Sub(o.began), ch.effect, ch.on.Sub(o.began), ch.noted.Sub(o.began))
		default:
			o.fail("called current", "%v got as current a token issued on %v, before %v of %v (noted %v)",
				k.Key, t.on.Sub(o.began), ch.effect, ch.on.Sub(o.began), ch.noted.Sub(o.began))
		}
	}
	if a.Permissions.State != tokencache.Current {
		o.judgeLag(k, now, false)
	}
	if a.Resource == k.Resource {
		o.judgePrincipal(p, k, t, now)
		if g := o.got[k.Key]; g.by == p && g.text == t.text && !g.short && now.Sub(g.on) > borneOut &&
			o.plan.device.tells() && a.Left+agreeing+5*time.Second < g.until.Sub(now) && !a.Unconfirmed &&
			!o.liedSince(t.on) {
			o.fail("life not corrected", "%v got a token told to have %v left, and the back end said %v last",
				k.Key, a.Left, g.until.Sub(now))
		}
	}
}

// judgePrincipal looks whose token it is: that of the latest principal that was seen.
func (o *oracle) judgePrincipal(p *process, k *key, t *issued, now time.Time) {
	if o.plan.device.form == opaque || o.liedSince(now.Add(-2*day)) && o.excuse(lyingClock) {
		return // it does not say, or whose token is the later one is told by that clock
	}
	// what was issued since the switch brings the former one back
	relapse := now.Sub(o.relapsed[k.Selector]) < confirmed+o.plan.device.spread
	if g := o.got[k.Key]; g.by == p && t.principal < g.principal && !(relapse && o.excuse(replicasDisagree)) {
		o.fail("former principal served", "%v got a token of principal %d, %v after one of %d had come", k.Key,
			t.principal, now.Sub(g.first), g.principal)
	}
	for replica := range o.plan.device.replicas {
		if o.backEnd.principal(k.Selector, replica) <= t.principal {
			return
		}
	}
	for _, other := range o.keys {
		g := o.got[other.Key]
		if other.Selector != k.Selector || g.by != p || g.principal <= t.principal {
			continue
		}
		if since := now.Sub(g.first); since > confirmed+o.plan.device.spread && !o.disturbed(k.Key, g.first, now) {
			o.fail("principal not confirmed", "%v got a token of principal %d, %v after %v had one of %d", k.Key,
				t.principal, since, other.Key, g.principal)
		}
	}
}

// borneOut is how long a back end has to tell a longer life than before until it is believed: another answer bears it
// out.
const borneOut = 15 * time.Minute

// confirmed is within which the other keys of an identity are fetched anew when one shows another principal.
const confirmed = time.Hour

// excusesChange reports whether the daemon cannot know that t lacks ch.
func (o *oracle) excusesChange(ch *happened, t *issued) bool {
	switch {
	case ch.dated && ch.lied:
		return o.excuse(lyingClock)
	case o.plan.device.form == uncounted && o.liedSince(ch.on):
		return o.excuse(lyingClock)
	case ch.dropped && ch.held[t.key] != t:
		return o.excuse(fullRecord)
	case o.plan.device.form == misdated && t.came.After(ch.noted) &&
		!t.misdated().After(t.came.Add(2*time.Minute+tolerance)):
		return o.excuse(laterPast)
	case o.plan.device.form == misdated && t.came.After(ch.noted) && o.toldShort(t.key, time.Now()):
		return o.excuse(toldWrong) // a date that is to come is none by the issuer's clock, which is told wrong too then
	case o.plan.device.form == misdated && t.came.After(ch.noted) && !o.static.IsZero() && !o.isRight():
		return o.excuse(toldWrong) // nor is there such a clock where no count is one
	}
	return false
}

// takeIn takes in what is on record. On a full record a change makes room, and how is told by how many others those
// there stand for: two have become one, or one has gone. One that stands for two withholds what each of these would,
// and no more: a life has fewer sorts of changes (whose, on what, of which effect) than a record has room for, so two
// of one sort are joined always, with the moments of the later. So joining excuses nothing. What has gone is missed by
// tokens that the daemon did not hold then.
func (o *oracle) takeIn(all []api.PolicyChange) {
	joined := 0
	on := make(map[string]api.PolicyChange, len(all))
	for _, n := range all {
		on[n.ID], joined = n, joined+n.Joined
	}
	for _, ch := range o.changes {
		there, present := on[ch.id]
		switch {
		case present && ((there.Identity == "") != (ch.identity == nil) ||
			(there.Resource == "") != (ch.resource == "")):
			o.fail("widened", "a change for %v on %q is on record as %+v", ch.identity, ch.resource, there)
		case ch.present && !present && ch.effect != tokencache.Revoked && joined <= o.joined &&
			len(all) == tokencache.MaxChanges:
			ch.dropped, ch.held = true, o.holds()
		}
		ch.present = present
	}
	o.joined = joined
}

// holds returns the tokens that callers got last of this process.
func (o *oracle) holds() map[tokencache.Key]*issued {
	all := make(map[tokencache.Key]*issued)
	for k, s := range o.served {
		if s.by == o.process && s.token.expires.After(time.Now()) {
			all[k] = s.token
		}
	}
	return all
}

// judgeLife looks that a token has not expired.
func (o *oracle) judgeLife(p *process, k *key, a agent.Answer, t *issued, now time.Time) {
	left, most := t.expires.Sub(now), tolerance
	if o.plan.device.form == uncounted {
		most += agreeing
	}
	switch {
	case left > -most && a.Left <= left+most:
	case a.Unconfirmed && o.excuse(offTime):
	// else the life was counted in this boot
	case o.liedSince(t.on) && (o.plan.device.form == uncounted || t.boot != o.clocks.number()) && o.excuse(lyingClock):
	case o.plan.device.form == uncounted && !o.isRight() && o.excuse(ownClock):
	default:
		o.fail("expired token served", "%v got a token told to have %v left, it has %v", k.Key, a.Left, left)
	}
}

// refused judges an error that a caller got.
func (o *oracle) refused(p *process, k *key, asked time.Time, e *agent.Error) {
	now := time.Now()
	if e.Code == api.CodeRevoked {
		o.judgeLag(k, now, true)
		return
	}
	if o.liedAbout(k.Key, now) && o.excuse(lyingClock) {
		return // by that clock the token had expired, or was to expire sooner
	}
	if s := o.served[k.Key]; s.by == p && s.token.expires.Sub(now) > 3*time.Second && o.plan.device.form != uncounted &&
		!(o.toldShort(k.Key, now) && o.excuse(toldWrong)) {
		o.fail("valid token lost", "%v got %v though a token is held for %v more", k.Key, e, s.token.expires.Sub(now))
		return
	}
	if o.mayFail(p, k.Key, asked, now) {
		return
	}
	o.fail("request failed", "%v got: %v", k.Key, e)
}

// toldShort reports whether the back end tells lives that are too short, or did while a token of now was about.
func (o *oracle) toldShort(k tokencache.Key, now time.Time) bool {
	return slices.ContainsFunc(o.backEnd.outages, func(out outage) bool {
		return out.failing == tellsShort && out.touches(k) && out.from.Before(now) &&
			now.Before(out.to.Add(o.plan.device.life))
	})
}

// hung reports whether calls hang, or did just now.
func (o *oracle) hung(now time.Time) bool {
	return slices.ContainsFunc(o.backEnd.outages, func(out outage) bool {
		return out.failing == hangs && out.from.Before(now) && now.Before(out.to.Add(pardoned))
	})
}

// mayFail reports whether a miss has a reason that is not the daemon's.
func (o *oracle) mayFail(p *process, k tokencache.Key, asked, now time.Time) bool {
	v := o.plan.device
	for _, out := range o.backEnd.outages {
		grace := pardoned
		throttled := out.failing == throttles || out.failing == throttlesMutely // which is about all calls
		switch {
		case out.lasting(), throttled:
			grace = pardonedLong
		case out.failing == tellsShort:
			grace = o.plan.device.life
		}
		over := out.to
		if over.After(o.unseen) && over.Before(o.wasOff.to) {
			over = o.wasOff.to // of which the daemon knows nothing
		}
		if (out.touches(k) || throttled) && out.from.Before(now) && now.Before(over.Add(grace)) {
			return o.excuse(backEndFails)
		}
		if out.failing == hangs && out.from.Before(now) && now.Before(out.to.Add(time.Minute)) {
			return o.excuse(callsAtOnce) // those that hang take the calls that others wait for
		}
	}
	if ahead, _ := o.clocks.error(); v.form == uncounted && !o.isRight() && (o.seemsOver(k) || ahead < -v.life) {
		return o.excuse(ownClock)
	}
	queue := max(time.Duration(v.keys)*v.slowest/2, time.Duration(v.keys)*time.Second/5)
	return queue > 8*time.Second && now.Sub(asked) >= 10*time.Second && o.excuse(callsAtOnce)
}

// seemsOver reports whether by the device's clock a token of k has expired just now: before that it has life left, and
// later it is taken to have some, since no back end hands out what was over for minutes.
func (o *oracle) seemsOver(k tokencache.Key) bool {
	wall := o.clocks.wall()
	for _, t := range o.backEnd.held {
		if over := wall.Sub(t.expires); t.key == k && over > -time.Minute && over < longOver+pardoned {
			return true
		}
	}
	return false
}

// isRight reports whether the clock is right, and is vouched for.
func (o *oracle) isRight() bool {
	ahead, vouched := o.clocks.error()
	return vouched && ahead.Abs() <= agreeing
}

// judgeLag looks for how long the back end would have given a token that callers may have, or that is current.
func (o *oracle) judgeLag(k *key, now time.Time, withheld bool) {
	p := o.process
	if p == nil || o.liedSince(now.Add(-2*day)) && o.excuse(lyingClock) || o.toldShort(k.Key, now) &&
		o.excuse(toldWrong) {
		return
	}
	since, need := later(p.began, o.static), o.began
	for _, ch := range o.changes {
		if !ch.present || !o.touches(ch, k.Key) || withheld && ch.effect != tokencache.Revoked {
			continue
		}
		need = later(need, o.certainFrom(ch))
		since = later(since, ch.noted)
		// until then no clock told how old tokens are, or for how long the device was off
		if !o.counts() || ch.boot != o.clocks.number() {
			since = later(since, o.rightOn)
		}
	}
	if !withheld && !o.unknown.IsZero() {
		need = later(need, o.certainFrom(&happened{noted: o.unknown, boot: o.clocks.number()}))
		since = later(since, o.unknown)
	}
	if need.After(now) {
		return
	}
	for _, out := range o.backEnd.outages {
		if (out.touches(k.Key) || out.failing == hangs || out.failing == throttles || out.failing == throttlesMutely) &&
			out.from.Before(now) {
			if out.to.After(now) {
				return
			}
			since = later(since, out.to)
		}
	}
	for replica := range o.plan.device.replicas {
		t := o.backEnd.held[shelf{k.Key, replica}]
		from := need
		switch {
		case t == nil:
			from = later(from, o.backEnd.renewed[shelf{k.Key, replica}])
		case !now.Before(t.rolls):
			from = later(from, t.rolls)
		case t.on.Before(need):
			return // it is as it is until it rolls over
		default:
			from = t.on
		}
		since = later(since, from)
	}
	if lag := now.Sub(since); lag > soon+3*o.plan.device.spread {
		what, kind := "a stale token", "late"
		if withheld {
			what, kind = "nothing", "locked out"
		}
		o.fail(kind, "%v gets %s, for %v already the back end would give a token that is known to be current",
			k.Key, what, lag)
	}
}

// counts reports whether the back end's word tells how old a token is.
func (o *oracle) counts() bool { return o.plan.device.form != uncounted && o.static.IsZero() }

// certainFrom returns from when on a token must have been issued for the daemon to know that it has ch.
func (o *oracle) certainFrom(ch *happened) time.Time {
	v := o.plan.device
	moment := ch.noted
	if ch.dated && ch.vouched && !ch.lied && ch.on.Before(ch.noted) {
		moment = ch.on
	}
	right := o.isRight()
	if !right && ch.boot != o.clocks.number() {
		if booted := o.clocks.bootedOn(); booted.After(moment) {
			moment = booted // for how long the device was off it cannot know
		}
	}
	need := moment.Add(v.spread + blur)
	if v.form == opaque || v.form == misdated || !o.counts() && !right {
		need = need.Add(28*time.Hour + 5*time.Minute - v.life)
	}
	if !o.counts() && !right {
		need = need.Add(v.life)
	}
	return need
}

// look looks at what the daemon tells.
func (o *oracle) look() {
	p := o.process
	if p == nil || p.agent == nil {
		return
	}
	_ = p.agent.Ping(context.Background())
	s := p.agent.Status()
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	ahead, _ := o.clocks.error()
	wall := now.Add(ahead)
	if !o.isRight() {
		o.wrongOn = now
	}
	unknown := false
	for _, ch := range s.Changes {
		unknown = unknown || ch.Effect == tokencache.Unknown
	}
	switch {
	case !unknown:
		o.unknown = time.Time{}
	case o.unknown.IsZero():
		o.unknown = now
	}
	o.takeIn(s.Changes)
	if len(s.Tokens) > len(o.keys) {
		o.fail("grows", "%d keys are cached, of %d", len(s.Tokens), len(o.keys))
	}
	for _, token := range s.Tokens {
		is := func(k *key) bool { return k.identity == token.Identity && k.Resource == token.Resource }
		if i := slices.IndexFunc(o.keys, is); i >= 0 {
			o.judgePromise(o.keys[i].Key, token, now, wall)
		}
	}
	o.judgeSaves(s.Trouble, now)
}

// judgeSaves looks that a save is tried again when the disk is sound again.
func (o *oracle) judgeSaves(told []string, now time.Time) {
	troubled := slices.ContainsFunc(told, func(s string) bool { return strings.Contains(s, "every minute") })
	switch {
	case !troubled || o.disk.now() != sound:
		o.unsaved = time.Time{}
	case o.unsaved.IsZero():
		o.unsaved = now
	case now.Sub(o.unsaved) > 5*time.Minute:
		o.fail("not saved again", "the disk is sound since %v: %q", now.Sub(o.unsaved), told)
	}
}

// judgePromise looks that a key is current when it was said to be.
func (o *oracle) judgePromise(k tokencache.Key, token api.TokenStatus, now, wall time.Time) {
	if token.ExpiresIn <= 0 || token.Permissions.State == tokencache.Current || o.liedSince(now.Add(-2*day)) &&
		o.excuse(lyingClock) {
		delete(o.promise, k)
		return
	}
	switch {
	case !o.unknown.IsZero() && o.excuse(unreadNow),
		now.Sub(o.renewed) < 2*day && o.excuse(madeAnew),
		o.toldShort(k, now) && o.excuse(toldWrong),
		o.plan.device.form == uncounted && now.Sub(o.wrongOn) < 2*day && o.excuse(ownClock),
		o.plan.device.replicas > 1 && o.excuse(replicasDisagree):
		delete(o.promise, k)
		return
	}
	by := now.Add(token.Permissions.CurrentBy.Sub(wall))
	before, made := o.promise[k]
	if !made || before.changes != len(o.changes) {
		o.promise[k] = promise{by, now, len(o.changes)}
		return
	}
	late := now.Sub(before.by)
	if late > 2*time.Minute && !o.disturbed(k, before.by, now) {
		o.fail("promise broken", "%v was to be current by %v at the latest, as was said on %v; it is not, %v later",
			k, before.by.Sub(o.began), before.made.Sub(o.began), late)
	}
}

// disturbed reports whether there was a while, around then, in which no call could be made.
func (o *oracle) disturbed(k tokencache.Key, by, now time.Time) bool {
	if now.Sub(o.process.began) < 10*time.Minute {
		return true
	}
	for _, out := range o.backEnd.outages {
		if out.from.Before(now) && now.Before(out.to.Add(pardonedLong)) && (out.touches(k) || out.failing == hangs) {
			return true
		}
	}
	return false
}

// called counts the daemon's calls.
func (o *oracle) called(k tokencache.Key) {
	now := time.Now()
	o.recent = append(o.recent, now)
	for now.Sub(o.recent[0]) > time.Hour {
		o.recent = o.recent[1:]
	}
	o.calledInVain(k, now)
	o.calledTooSoon(k, now)
	most := callsAnHour
	for _, k := range o.keys {
		most += callsOfAKey
		g := o.got[k.Key]
		expires := func(on time.Time) bool {
			left := on.Sub(now)
			return left < 6*time.Minute &&
				left > -70*time.Minute
		}
		if expires(g.until) || expires(g.former) || o.plan.device.form == uncounted && !o.isRight() {
			most += callsAtExpiry
		}
	}
	if slices.ContainsFunc(o.backEnd.outages, func(out outage) bool {
		return out.failing == unreachable && out.from.Before(now) && now.Before(out.to.Add(time.Hour))
	}) {
		most += callsInOutage
	}
	if n := len(o.recent); n > most && !o.excusesCalls(now) {
		o.fail("too many calls", "%d calls in an hour, of at most %d", n, most)
	}
}

// excusesCalls reports whether the daemon cannot know that what it asks for is not over yet.
func (o *oracle) excusesCalls(now time.Time) bool {
	switch {
	case o.liedSince(now.Add(-2 * day)):
		return o.excuse(lyingClock)
	case o.plan.device.form == uncounted && !o.isRight():
		return o.excuse(ownClock)
	}
	return slices.ContainsFunc(o.keys, func(k *key) bool { return o.toldShort(k.Key, now) }) && o.excuse(toldWrong)
}

// What a daemon may call in an hour.
const (
	callsAnHour   = 120
	callsOfAKey   = 80
	callsAtExpiry = 220 // of a key whose token expires in that hour while the back end fails
	callsInOutage = 720 // while the endpoint cannot be reached: one finds out for all keys
)

// calledInVain counts the calls that only an administrator's help would have let succeed, from an hour on after
// its beginning, the daemon's, and the expiry of what was held.
func (o *oracle) calledInVain(k tokencache.Key, now time.Time) {
	failing, _ := o.backEnd.failure(k, now)
	g := o.got[k]
	held := g.text != "" && now.Sub(g.until) < 2*time.Hour
	// another replica may have given one that expires sooner, last; or it may have been served for longer
	if s := o.served[k]; s.token != nil {
		held = held || now.Sub(s.token.expires) < 2*time.Hour || now.Sub(s.on) < 2*time.Hour
	}
	if !failing.lasting() || held || now.Sub(o.insisted) < 2*time.Hour || o.process == nil ||
		now.Sub(o.process.began) < time.Hour {
		delete(o.lasting, k)
		return
	}
	all := append(o.lasting[k], now)
	for now.Sub(all[0]) > 3*time.Hour {
		all = all[1:]
	}
	o.lasting[k] = all
	late := slices.IndexFunc(all, func(t time.Time) bool { return now.Sub(t) <= time.Hour })
	if n := len(all) - late; n > callsInVain && now.Sub(all[0]) > 90*time.Minute {
		o.fail("calls in vain", "%d calls for %v in an hour, and an administrator alone could help", n, k)
	}
}

// callsInVain is how often in an hour a key is asked for that the back end refuses for hours already, whoever asks for
// it: 60 keys make 180 calls then, and somebody who insists some more.
const callsInVain = 8

// calledTooSoon looks that the back end is left alone while a policy change is spreading: it would issue a token that
// lacks it, and hand that out for a day. Where changes follow each other it is asked all the same, now and then; and
// where a token expires meanwhile, or there is none, unless the change is a revocation, since then nobody would get
// what is issued.
func (o *oracle) calledTooSoon(k tokencache.Key, now time.Time) {
	s := o.served[k]
	spread := o.plan.device.spread
	// what is on record is not looked at yet
	if o.process == nil || o.isBlind(now) || !o.unknown.IsZero() || now.Sub(o.process.began) < time.Second {
		return
	}
	held := s.by == o.process && now.Sub(s.by.began) >= 30*time.Minute &&
		s.token.expires.Sub(now) >= spread+15*time.Minute
	if now.Sub(o.insisted) < time.Minute || now.Sub(o.renewed) < day || o.plan.device.alternates ||
		o.liedSince(now.Add(-day)) || o.hung(now) || o.toldShort(k, now) || o.plan.device.form == uncounted &&
		!o.isRight() {
		return
	}
	var spreading, revoked, others int
	for _, ch := range o.changes {
		switch since := now.Sub(ch.noted); {
		case !ch.present || !o.touches(ch, k):
		case !ch.dated && since > time.Second && since < spread-time.Second:
			if spreading++; ch.must && ch.effect == tokencache.Revoked {
				revoked++
			}
		case since < 5*spread+2*blur:
			others++
		}
	}
	switch {
	case spreading != 1 || others > 0:
	case held:
		o.fail("asked too soon", "the back end is asked for %v, whose token has %v left, while a change is spreading",
			k, s.token.expires.Sub(now))
	case revoked > 0:
		o.fail("asked in vain",
			"the back end is asked for %v while a revocation is spreading: nobody gets what it issues", k)
	}
}

// tells reports whether the back end tells a life that is believed as it is: App Service tells none, and one of more
// than 24 hours is believed only with a date.
func (v device) tells() bool { return v.form != uncounted && (v.form != opaque || v.life <= day) }

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
