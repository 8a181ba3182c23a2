package lives

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"time"

	"perceptd/tokencache"
)

// failing is a way in which the back end gives no token.
type failing uint8

const (
	works failing = iota
	hangs
	unreachable
	throttles       // and says for how long
	throttlesMutely // and does not
	answersPages
	tellsShort // lives of a minute only
	refuses
	knowsNoIdentity
	failings
)

func (f failing) String() string {
	return [...]string{"works", "hangs", "unreachable", "throttles", "throttles without Retry-After", "answers pages",
		"tells short lives", "refuses", "knows no identity"}[f]
}

// administrators heal refuses and knowsNoIdentity.
func (f failing) lasting() bool { return f >= refuses }

// issued is the truth about a token.
type issued struct {
	text      string
	key       tokencache.Key
	replica   int
	on        time.Time // it was issued
	expires   time.Time // whole seconds
	rolls     time.Time // from then on the replica issues anew
	principal int
	boot      int       // in which the daemon had it last
	came      time.Time // and had it first then
}

// misdated is a date of t that is to come until its last minutes.
func (t *issued) misdated() time.Time { return t.expires.Add(-5*time.Minute - time.Second) }

// outage is a span of time in which the back end fails for a key, or for all.
type outage struct {
	failing
	from, to time.Time
	key      *tokencache.Key // nil: all
}

func (o outage) touches(key tokencache.Key) bool { return o.key == nil || *o.key == key }

type shelf struct {
	key     tokencache.Key
	replica int
}

// backEnd is the managed-identity service with its replicas. The life's lock protects it.
type backEnd struct {
	device
	seed    uint64
	held    map[shelf]*issued
	byText  map[string]*issued
	outages []outage
	renewed map[shelf]time.Time           // when what was held was given up
	former  map[tokencache.Selector][]int // by replica: which principal it has
	ages    map[shelf]time.Duration       // of the token that is issued next
}

func newBackEnd(p plan) *backEnd {
	return &backEnd{device: p.device, seed: p.seed, held: make(map[shelf]*issued), byText: make(map[string]*issued),
		renewed: make(map[shelf]time.Time), former: make(map[tokencache.Selector][]int),
		ages: make(map[shelf]time.Duration)}
}

// draw returns a number in [0, 1) that follows from the seed, a moment and what it is for: who draws first makes no
// difference.
func (l *life) draw(what string, key tokencache.Key) float64 {
	h := fnv.New64a()
	_ = binary.Write(h, binary.BigEndian, time.Since(l.began))
	fmt.Fprint(h, what, key)
	return rand.New(rand.NewPCG(l.plan.seed, h.Sum64())).Float64()
}

// failure returns what is wrong for key now.
func (b *backEnd) failure(key tokencache.Key, now time.Time) (failing, time.Time) {
	for _, o := range b.outages {
		if o.touches(key) && !now.Before(o.from) && now.Before(o.to) {
			return o.failing, o.to
		}
	}
	return works, time.Time{}
}

// fetch is the daemon's source.
func (l *life) fetch(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	l.mu.Lock()
	l.called(key)
	takes := time.Duration(l.draw("takes",
		key)*float64(l.plan.device.slowest-20*time.Millisecond)) + 20*time.Millisecond
	there := time.Duration(l.draw("there", key) * float64(takes))
	replica := int(l.draw("replica", key) * float64(l.plan.device.replicas))
	l.mu.Unlock()
	if err := pass(ctx, there); err != nil {
		return tokencache.Fetched{}, err
	}
	l.mu.Lock()
	failing, until := l.backEnd.failure(key, time.Now())
	answer, err := l.answer(key, replica, failing, until)
	l.mu.Unlock()
	if failing == hangs {
		takes = there + 14*time.Second + time.Duration(l.draw("hangs", key)*float64(900*time.Millisecond))
	}
	if err := pass(ctx, takes-there); err != nil {
		return tokencache.Fetched{}, err
	}
	return answer, err
}

func pass(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// answer is what agent/source makes of the back end's answer.
func (l *life) answer(key tokencache.Key, replica int, failing failing, until time.Time) (tokencache.Fetched, error) {
	fail := func(kind tokencache.Kind, of tokencache.Extent, retry time.Duration) (tokencache.Fetched, error) {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: kind, Extent: of, RetryAfter: retry,
			Detail: failing.String()}
	}
	now := time.Now()
	switch failing {
	case hangs:
		return fail(tokencache.Unreachable, tokencache.OfIdentity, 0)
	case unreachable:
		return fail(tokencache.Unreachable, tokencache.OfSource, 0)
	case throttles:
		return fail(tokencache.Throttled, tokencache.OfSource, min(until.Sub(now).Truncate(time.Second)+time.Second,
			time.Minute))
	case throttlesMutely:
		return fail(tokencache.Throttled, tokencache.OfSource, 0)
	case answersPages:
		return fail(tokencache.Malformed, tokencache.OfKey, 0)
	case refuses:
		return fail(tokencache.Refused, tokencache.OfKey, 0)
	case knowsNoIdentity:
		return fail(tokencache.IdentityNotFound, tokencache.OfKey, 0)
	}
	v, t := l.plan.device, l.backEnd.token(l, key, replica, now)
	f := tokencache.Fetched{Token: tokencache.Token{Text: tokencache.NewSecret(t.text), ExpiresOn: t.expires},
		Counted: v.form != uncounted}
	if v.form != opaque {
		dated := t.on.Truncate(time.Second).Add(-5 * time.Minute)
		f.Token.NotBefore, f.Nominal = dated, t.expires.Sub(dated)
		f.Token.Claims = tokencache.Claims{
			Audience: key.Resource, ObjectID: fmt.Sprint("principal ",
				t.principal), TenantID: "tenant", IssuedAt: dated, NotBefore: dated,
		}
	}
	if v.form == misdated {
		f.Token.Claims.IssuedAt = t.misdated()
	}
	f.Left, f.Presumed = l.left(t, failing, now)
	if f.Left > 7*day {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Malformed,
			Detail: "the token expires in more than seven days"}
	}
	if f.Left <= 0 {
		return tokencache.Fetched{}, &tokencache.FetchError{
			Kind: tokencache.Malformed, JustExpired: -f.Left <= tokencache.JustExpired,
			Detail: "the token is already expired",
		}
	}
	return f, nil
}

// left is the life that t is told to have left, in whole seconds where the back end counts it; else as the device's
// clock tells it, unless it is only presumed.
func (l *life) left(t *issued, failing failing, now time.Time) (left time.Duration, presumed bool) {
	v := l.plan.device
	if v.form == uncounted {
		left = min(t.expires.Sub(l.clocks.wall()), v.life+5*time.Minute)
		if left < -longOver && !l.clocks.isVouched() {
			return presumedLife, true
		}
		return left, false
	}
	left = t.expires.Sub(now).Truncate(time.Second)
	if v.roundsUp {
		left = t.expires.Sub(now.Truncate(time.Second))
	}
	if failing == tellsShort {
		left = min(left, time.Minute)
	}
	return left, false
}

// token is what a replica hands out now.
func (b *backEnd) token(l *life, key tokencache.Key, replica int, now time.Time) *issued {
	place := shelf{key, replica}
	if t := b.held[place]; t != nil && now.Before(t.rolls) {
		return t
	}
	on := now
	if age, aged := b.ages[place]; aged {
		on = on.Add(-age)
		delete(b.ages, place)
	} else if b.held[place] == nil && b.renewed[place].IsZero() {
		on = on.Add(-time.Duration(l.draw("aged", key) * float64(b.aged)))
	}
	t := b.issue(l, key, replica, on)
	if !now.Before(t.rolls) { // it would be no more
		t = b.issue(l, key, replica, now)
	}
	b.held[place] = t
	return t
}

func (b *backEnd) issue(l *life, key tokencache.Key, replica int, on time.Time) *issued {
	t := &issued{
		text: fmt.Sprintf("token-%d-of-%v", len(b.byText),
			key.Selector.ID+"-"+key.Resource), key: key, replica: replica,
		on: on, expires: on.Truncate(time.Second).Add(b.life), principal: b.principal(key.Selector, replica),
	}
	switch t.rolls = t.expires.Add(b.late); b.rolls {
	case atHalfLife:
		t.rolls = on.Add(b.life / 2)
	case atRandom:
		t.rolls = on.Add(b.life/3 + time.Duration(l.draw("rolls", key)*float64(b.life*2/3)))
	}
	b.byText[t.text] = t
	return t
}

func (b *backEnd) principal(of tokencache.Selector, replica int) int {
	if all := b.former[of]; all != nil {
		return all[replica]
	}
	return 0
}

// renew gives an identity another principal, of which a replica knows from now on. Its tokens were issued that long
// ago.
func (b *backEnd) renew(of tokencache.Selector, replica int, age time.Duration) {
	if b.former[of] == nil {
		b.former[of] = make([]int, b.replicas)
	}
	b.former[of][replica]++
	for place := range b.held {
		if place.key.Selector == of && place.replica == replica {
			delete(b.held, place)
			b.renewed[place] = time.Now()
			b.ages[place] = age
		}
	}
}

// As agent/source has them.
const (
	longOver     = 5 * time.Minute
	presumedLife = 10 * time.Minute
)
