package lives

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"perceptd/tokencache"
)

const day = 24 * time.Hour

// plan is all that happens to a device, drawn before it lives.
type plan struct {
	seed   uint64
	about  subject
	device device
	events []event // in the order of their time
}

// device is what does not change in a life: the device, its modules, and the back end behind it.
type device struct {
	lasts      time.Duration
	identities int
	keys       int
	prefetch   bool
	keyless    bool          // there is no key to seal tokens with: none outlive a reboot
	alternates bool          // the first two resources stand in for each other
	spelled    bool          // the second resource is the first with a slash
	asks       time.Duration // about how often each key is asked for
	spread     time.Duration

	vouched bool          // a time daemon keeps the clock right, and the kernel vouches for it
	drift   float64       // of a clock that nobody keeps right
	ahead   time.Duration // of such a one at the beginning

	life     time.Duration // of a token
	rolls    rolling
	replicas int
	slowest  time.Duration // a call
	late     time.Duration // after a token's expiry, for which the back end still hands it out
	roundsUp bool          // the back end counts the begun second of a life
	form     form
	aged     time.Duration // of the tokens that the back end has already when it is first asked
}

// rolling is when a back end issues anew.
type rolling uint8

const (
	atExpiry rolling = iota
	atHalfLife
	atRandom
)

func (r rolling) String() string { return [...]string{"expiry", "half life", "random"}[r] }

// form is what a back end tells of a token.
type form uint8

const (
	counted   form = iota // its life, counted, and its date
	opaque                // its life, counted, and no date
	uncounted             // its expiry and its date
	misdated              // its life, counted, and a date that is to come
)

func (f form) String() string {
	return [...]string{"life counted, dated", "life counted, no date", "expiry told and no life",
		"life counted, dated ahead"}[f]
}

func (v device) String() string {
	var b strings.Builder
	add := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	add("a device for %v: identities %d, keys %d, each asked for about every %v",
		v.lasts.Round(time.Second), v.identities, v.keys, v.asks)
	for _, is := range []struct {
		so   bool
		text string
	}{
		{v.prefetch, "prefetched"}, {v.keyless, "with no key to seal them"}, {v.alternates,
			"the first two resources stand in for each other"},
		{v.spelled, "the second resource is the first with a slash"},
	} {
		if is.so {
			add(", %s", is.text)
		}
	}
	if v.vouched {
		add("; its clock is kept right and vouched for")
	} else {
		add("; its clock is not vouched for, ahead by %v, and drifts by %.0f ppm", v.ahead, v.drift*1e6)
	}
	add("\nits back end: spread %v, tokens for %v (%v), the first of which are aged by %v, issued anew at %v (%v "+
		"late), replicas %d, calls of %v at most",
		v.spread, v.life, v.form, v.aged, v.rolls, v.late, v.replicas, v.slowest)
	if v.roundsUp {
		add(", counts the begun second of a life")
	}
	return b.String()
}

// kind is what an event is.
type kind uint8

const (
	restart  kind = iota // the daemon ends in order, and begins again after span
	crash                // it is killed
	torn                 // it is killed in the n-th step that it takes on the disk from then on
	reboot               // the device ends in order, is off for span, and boots
	powerCut             // it loses power
	clockSet             // the wall clock is ahead by offset from then on, and vouched for or not
	diskFault
	gone // a file is deleted
	backFault
	change   // a policy change happens, and is noted
	withdraw // the n-th from the last of the policy changes is withdrawn
	pipeline // changes are noted every so often, for a span
	insist   // a technician has a key's token fetched
	crowd    // a key is asked for every so often, for a span
	anew     // an identity is made anew: another principal
	kinds
)

var kindNames = [kinds]string{
	"restart", "crash", "crash in a save", "reboot", "power cut", "clock", "disk", "file deleted", "back end", "change",
	"withdraw", "pipeline", "refresh", "crowd", "another principal",
}

// event is one thing that happens.
type event struct {
	on    time.Duration // since the beginning of the life
	kind  kind
	span  time.Duration
	every time.Duration
	n     int

	offset  time.Duration
	vouched bool
	lost    bool // the clock begins again in 1970

	disk   trouble
	back   failing
	tokens bool // it is the tokens that are being saved

	effect   tokencache.Effect
	ago      time.Duration // the change is dated so long ago; less than zero: ahead
	dated    bool
	identity int // of the change, from 1; 0: all
	resource int // of the change, from 1; 0: all
}

func (e event) String() string {
	text := fmt.Sprintf("%12v  %s", e.on.Round(time.Millisecond), kindNames[e.kind])
	add := func(format string, args ...any) { text += " " + fmt.Sprintf(format, args...) }
	switch e.kind {
	case restart, crash:
		add("for %v", e.span)
	case torn:
		add("at step %d (of the tokens' file: %v), for %v", e.n, e.tokens, e.span)
	case reboot, powerCut:
		add("off for %v, clock %s", e.span, e.clock())
	case clockSet:
		add("%s", e.clock())
	case diskFault:
		add("%v for %v", e.disk, e.span)
	case backFault:
		add("%v for %v, %s", e.back, e.span, allOr(e.n, "keys", "key number"))
	case change, pipeline:
		add("%v, %s, %s", e.effect, allOr(e.identity, "identities", "identity"),
			allOr(e.resource, "resources", "the resource of key"))
		if e.dated {
			add("dated %v ago", e.ago)
		}
		if e.kind == pipeline {
			add("every %v for %v", e.every, e.span)
		}
	case anew:
		add("of identity %d, whose tokens are aged by %v", e.n, e.span)
	case withdraw, insist, gone:
		add("%d", e.n)
	case crowd:
		add("key %d every %v for %v", e.n, e.every, e.span)
	}
	return text
}

func allOr(n int, all, one string) string {
	if n == 0 {
		return "all " + all
	}
	return fmt.Sprintf("%s %d", one, n)
}

func (e event) clock() string {
	vouched := "not vouched for"
	if e.vouched {
		vouched = "vouched for"
	}
	if e.lost {
		return "in 1970, " + vouched
	}
	return fmt.Sprintf("ahead by %v, %s", e.offset, vouched)
}

func (p plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v\n", p.device)
	for _, e := range p.events {
		fmt.Fprintf(&b, "%v\n", e)
	}
	return b.String()
}

// drawing is a source of choices.
type drawing struct{ *rand.Rand }

func (d drawing) one(in int) bool         { return d.IntN(in) == 0 }
func (d drawing) between(a, b int) int    { return a + d.IntN(b-a+1) }
func choose[T any](d drawing, all ...T) T { return all[d.IntN(len(all))] }
func (d drawing) upTo(m time.Duration) time.Duration {
	return time.Duration(d.Int64N(int64(m) + 1)).Truncate(time.Second)
}

// draw is the plan of a seed. Which kinds of events a life has is drawn first: rare things then meet often in some
// lives.
func draw(seed uint64, about subject) plan {
	d := drawing{rand.New(rand.NewPCG(seed, 1))}
	p := plan{seed: seed, about: about, device: d.device()}
	var weights [kinds]int
	for k := range weights {
		switch {
		case kind(k) == anew && !d.one(6):
		case d.IntN(10) < 4:
			weights[k] = d.between(1, 4)
		}
	}
	weights[change] += 4
	about.shape(d, &p.device, &weights)
	total := 0
	for _, w := range weights {
		total += w
	}
	lies := about == aboutLies || d.one(5) // the clock is wrong while it is vouched for
	for range d.between(2, 5*int(p.device.lasts/day)+4) {
		pick, k := d.IntN(total), kind(0)
		for pick >= weights[k] {
			pick -= weights[k]
			k++
		}
		p.events = append(p.events, d.events(k, p.device, lies)...)
	}
	p.events = append(p.events, about.events(d, p.device)...)
	slices.SortStableFunc(p.events, func(a, b event) int { return cmp.Compare(a.on, b.on) })
	for i := range p.events { // no two at one moment
		p.events[i].on += time.Duration(i+1) * 1001 * time.Microsecond
	}
	return p
}

func (d drawing) device() device {
	v := device{
		lasts: time.Duration(d.between(1, 5)) * day, identities: d.between(1, 3), keys: choose(d, 1, 1, 2, 2, 3, 3, 4,
			6, 9),
		prefetch: d.one(2), keyless: d.one(6), asks: time.Duration(choose(d, 3, 7, 15,
			40))*time.Minute + d.upTo(time.Minute), spread: 10 * time.Minute,
		vouched: !d.one(3), life: 24 * time.Hour, rolls: choose(d, atExpiry, atExpiry, atHalfLife,
			atRandom), replicas: 1,
		slowest: choose(d, 300*time.Millisecond, time.Second, 3*time.Second), roundsUp: d.one(2), form: counted,
	}
	if d.one(40) {
		v.keys, v.slowest = 60, 300*time.Millisecond
	}
	v.keys = max(v.keys, v.identities)
	v.alternates = v.keys >= 2*v.identities && d.one(3)
	v.spelled = v.keys >= 2*v.identities && !v.alternates && d.one(10)
	if d.one(5) {
		v.spread = choose(d, time.Minute, 20*time.Minute, 2*time.Hour)
	}
	if !v.vouched {
		v.drift = choose(d, 0, 20e-6, -50e-6)
		v.ahead = choose(d, 0, 0, 5*time.Second, -11*time.Minute, 40*time.Minute, -3*day)
	}
	if d.one(4) {
		v.life = choose(d, time.Hour, 8*time.Hour, 28*time.Hour)
	}
	if d.one(5) {
		v.replicas = d.between(2, 3)
	}
	if v.roundsUp && d.one(2) {
		v.late = time.Duration(d.Int64N(int64(time.Second)))
	}
	if d.one(4) {
		v.form = choose(d, opaque, uncounted, misdated)
	}
	if d.one(2) {
		v.aged = d.upTo(v.life * 9 / 10)
	}
	return v
}

// events draws an event of that kind, and what ends it.
func (d drawing) events(k kind, v device, lies bool) []event {
	e := event{kind: k, on: 10*time.Minute + d.upTo(v.lasts-10*time.Minute), n: d.between(0, 7)}
	switch k {
	case restart, crash, torn:
		e.span = time.Second + d.upTo(choose(d, 4*time.Second, 4*time.Second, 5*time.Minute, 6*time.Hour))
		e.n, e.tokens = e.n+1, d.one(3)
	case reboot, powerCut:
		e.span = 5*time.Second + d.upTo(choose(d, time.Minute, time.Hour, day, 20*day))
		then := d.clockAfterBoot(&e, v)
		return append(then, e)
	case clockSet:
		return d.clockSet(e, v, lies)
	case diskFault:
		e.disk, e.span = trouble(d.between(1, int(troubles)-1)), time.Minute+d.upTo(choose(d, 10*time.Minute,
			12*time.Hour))
		if d.one(2) { // a start finds it so
			return append(d.startIn(e.span, e.on, v), e)
		}
	case gone:
		if d.one(2) {
			return append(d.startIn(5*time.Minute, e.on, v), e)
		}
	case backFault:
		e.back, e.span = failing(d.between(1, int(failings)-1)), 10*time.Second+d.upTo(choose(d, 2*time.Minute,
			time.Hour, 30*time.Hour))
		if d.one(2) || e.back == unreachable || e.back == hangs && d.one(2) {
			e.n = 0 // all keys
		}
		if e.back == tellsShort && v.form == opaque {
			e.back = answersPages // nothing else would tell the token's age
		}
		if e.back == tellsShort {
			e.span = min(e.span, 2*time.Hour)
		}
	case change, pipeline:
		e.effect = choose(d, tokencache.Revoked, tokencache.Revoked, tokencache.Granted, tokencache.Changed)
		e.identity, e.resource = d.IntN(v.identities+1), d.IntN(v.keys+1)
		switch d.IntN(4) {
		case 0:
			e.dated, e.ago = true, d.upTo(choose(d, time.Minute, time.Hour, 12*time.Hour))
		case 1:
			if d.one(3) {
				e.dated, e.ago = true, -d.upTo(choose(d, time.Minute, time.Hour))
			}
		}
		if k == pipeline {
			e.effect = choose(d, tokencache.Granted, tokencache.Changed)
			e.every, e.span = time.Minute+d.upTo(14*time.Minute), time.Hour+d.upTo(30*time.Hour)
		}
	case anew:
		if d.one(2) {
			e.span = d.upTo(v.life * 9 / 10)
		}
	case crowd:
		e.every, e.span = choose(d, 200*time.Millisecond, time.Second,
			10*time.Second), time.Minute+d.upTo(10*time.Minute)
		if e.every == 10*time.Second {
			e.span *= 12
		}
	}
	return []event{e}
}

// startIn draws what has the daemon start again within a span.
func (d drawing) startIn(span, on time.Duration, v device) []event {
	again := event{kind: choose(d, restart, crash, reboot, powerCut, powerCut),
		on: on + time.Second + d.upTo(span-2*time.Second), span: time.Second + d.upTo(4*time.Second)}
	if again.kind < reboot {
		return []event{again}
	}
	again.span = 5*time.Second + d.upTo(10*time.Minute)
	then := d.clockAfterBoot(&again, v)
	return append(then, again)
}

// clockAfterBoot draws what the clock shows when the device has booted, and when it is set right.
func (d drawing) clockAfterBoot(e *event, v device) (then []event) {
	switch d.IntN(4) {
	case 0: // it has run on
		e.vouched = v.vouched && d.one(2)
	case 1: // it begins where it was when the device went off
		e.offset = -e.span
	case 2:
		e.lost = true
	case 3:
		e.offset = choose(d, -time.Hour, -400*day, 20*365*day)
	}
	if right := (event{kind: clockSet, on: e.on + e.span + d.upTo(choose(d, 2*time.Minute, time.Hour, day)),
		vouched: v.vouched}); v.vouched || d.one(3) {
		then = append(then, right)
	}
	return then
}

// clockSet draws a step of the clock, and what ends it.
func (d drawing) clockSet(e event, v device, lies bool) []event {
	e.offset = choose(d, -3*day, -2*time.Hour, -20*time.Minute, -11*time.Minute, -4*time.Second, 3*time.Second,
		11*time.Minute, 2*time.Hour, 3*day, 400*day)
	e.lost, e.vouched = d.one(8), lies
	back := event{kind: clockSet, on: e.on + time.Minute + d.upTo(choose(d, 6*time.Minute, time.Hour, day)),
		vouched: v.vouched}
	if lies && d.one(2) { // there is something to be wrong about
		before := event{kind: change, on: max(10*time.Minute, e.on-d.upTo(6*time.Hour)),
			effect: choose(d, tokencache.Revoked, tokencache.Changed)}
		return []event{before, e, back}
	}
	return []event{e, back}
}
