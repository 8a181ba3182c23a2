package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// survivor is a device through restarts and reboots, whose clock may be wrong, and what only an oracle knows of it: the
// time as it is, and every token's real times.
type survivor struct {
	options simulator.Options
	backend *simulator.Backend
	spread  time.Duration

	mu      sync.Mutex
	skipped time.Duration // time that has passed unnoticed by the bubble's clock: suspended, or off
	booted  time.Time
	boots   int
	ahead   time.Duration // the wall clock, of the true time
	known   bool
	sure    bool // it was known at some time of this boot
	alarms  map[*alarm]bool
	broken  error
	mended  time.Time
	calls   map[tokencache.Key][]call
	held    map[tokencache.Key]tokencache.Token // the latest that the back end gave
	shown   map[string]sighting                 // by digest: when it was last given

	cache   *tokencache.Cache
	memory  tokencache.Snapshot // as it was kept last
	kept    time.Time           // when that was
	gaps    []gap
	record  []happened
	asked   int
	startup int // restarts and reboots
}

type call struct {
	on     time.Time
	failed bool
}

type sighting struct {
	on   time.Time
	boot int
	last *sighting // the one before
}

// gap is a time of which the device cannot tell how long it was.
type gap struct{ from, to time.Time }

type alarm struct {
	at    time.Duration
	timer *time.Timer
	once  sync.Once
	fired chan time.Time
}

func (a *alarm) ring() { a.once.Do(func() { close(a.fired) }) }

func newSurvivor(options simulator.Options) *survivor {
	l := &survivor{
		options: options, spread: options.PropagationDelay, known: true, sure: true, alarms: make(map[*alarm]bool),
		calls: make(map[tokencache.Key][]call), held: make(map[tokencache.Key]tokencache.Token),
		shown: make(map[string]sighting),
	}
	options.Now = l.now
	l.backend = simulator.New(options)
	l.booted = l.now().Add(-time.Minute)
	l.kept = l.now()
	l.begin(nil)
	return l
}

// now is the true time.
func (l *survivor) now() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.nowLocked()
}

func (l *survivor) nowLocked() time.Time { return time.Now().Add(l.skipped).Round(0) }

func (l *survivor) boot() time.Duration { return l.now().Sub(l.booted) }

func (l *survivor) clock() tokencache.Clock {
	return tokencache.Clock{
		Wall: func() time.Time {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.nowLocked().Add(l.ahead)
		},
		Boot: l.boot,
		Synchronised: func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.known
		},
		Timer: l.timer,
	}
}

// timer counts suspended time, as the device's does.
func (l *survivor) timer(d time.Duration) (<-chan time.Time, func() bool) {
	a := &alarm{at: l.boot() + d, fired: make(chan time.Time)}
	a.timer = time.AfterFunc(d, a.ring)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.alarms[a] = true
	return a.fired, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.alarms, a)
		return a.timer.Stop()
	}
}

// skip lets time pass of which no program notices anything until it is over.
func (l *survivor) skip(d time.Duration) {
	synctest.Wait() // a call that it falls into would be taken to have lasted as long
	l.mu.Lock()
	l.skipped += d
	now := l.nowLocked().Sub(l.booted)
	for a := range l.alarms {
		if a.timer.Stop() {
			a.timer.Reset(max(0, a.at-now))
		}
	}
	l.mu.Unlock()
	time.Sleep(time.Millisecond) // whose timers are due wake up
	synctest.Wait()
}

func (l *survivor) set(ahead time.Duration, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ahead, l.known = ahead, known
	l.sure = l.sure || known
}

func (l *survivor) fails(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != nil && err == nil {
		l.mended = l.nowLocked()
	}
	l.broken = err
}

func (l *survivor) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls[key] = append(l.calls[key], call{now, l.broken != nil})
	if l.broken != nil {
		return tokencache.Fetched{}, l.broken
	}
	l.mu.Unlock() // the back end looks at the clock
	issued, err := l.backend.Token(simulator.Selection{}, key.Resource)
	l.mu.Lock()
	if err != nil {
		return tokencache.Fetched{}, err
	}
	token := tokencache.Token{
		Text: tokencache.NewSecret(issued.Text), ExpiresOn: issued.ExpiresOn,
		Claims: tokencache.Claims{IssuedAt: issued.IssuedAt},
	}
	l.held[key] = token
	digest := token.Text.SHA256()
	last := l.shown[digest]
	last.last = nil
	l.shown[digest] = sighting{now, l.boots, &last}
	return tokencache.Fetched{Token: token, Left: issued.ExpiresOn.Sub(now), Counted: true}, nil
}

func (l *survivor) begin(m *tokencache.Snapshot) {
	var record tokencache.Record
	if l.cache != nil {
		record = l.cache.Record()
	}
	taken := []tokencache.Instant{record.Instant}
	if m != nil {
		taken = append(taken, m.Taken())
	}
	var c *tokencache.Cache
	ready := make(chan struct{})
	c = tokencache.New(tokencache.Options{
		Fetch: l.Fetch, Clock: l.clock(), Roll: l.roll, Record: record, BootID: l.bootID(), Snapshot: m,
		On:      tokencache.OnAtBoot(l.bootID(), l.boot(), taken...),
		Observe: func(tokencache.Event) { <-ready; l.keep(c) }, ClockConfirmed: func() { <-ready; l.keep(c) },
	})
	l.cache = c
	close(ready)
	synctest.Wait()
	l.keep(c) // as an agent does
}

// roll is as random as the moment: who rolls first of several makes no difference.
func (l *survivor) roll() float64 {
	return rand.New(rand.NewPCG(l.options.Seed, uint64(l.now().UnixNano()))).Float64()
}

func (l *survivor) bootID() string { return fmt.Sprint("boot ", l.boots) }

// keep notes what would be left if the power failed now.
func (l *survivor) keep(c *tokencache.Cache) {
	m, now := c.Snapshot(), l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.memory, l.kept = m, now
}

// wait lets time pass as an agent does, which has the cache kept each hour.
func (l *survivor) wait(d time.Duration) {
	for ; d > 0; d -= time.Hour {
		time.Sleep(min(d, time.Hour))
		synctest.Wait()
		l.keep(l.cache)
	}
}

// end stops the cache, in order or not.
func (l *survivor) end(inOrder bool) *tokencache.Snapshot {
	synctest.Wait()
	if inOrder {
		l.keep(l.cache)
	}
	m := l.memory
	l.startup++
	return &m
}

// restart has another cache go on in the same boot.
func (l *survivor) restart(inOrder bool) {
	m, old := l.end(inOrder), l.cache
	l.begin(m)
	old.Close()
}

// booting is how long a boot has lasted when the cache begins.
const booting = 10 * time.Second

// reboot has another cache go on after the device was off, with whatever time the clock shows then.
func (l *survivor) reboot(inOrder bool, off, ahead time.Duration, known bool) {
	m, old := l.end(inOrder), l.cache
	old.Close()
	l.skip(max(off, booting))
	l.mu.Lock()
	l.boots++
	l.booted = l.nowLocked().Add(-booting)
	l.ahead, l.known, l.sure = ahead, known, known
	l.gaps = slices.DeleteFunc(l.gaps, func(g gap) bool { return !g.from.Before(l.kept) }) // nothing was kept since
	l.gaps = append(l.gaps, gap{l.kept, l.booted})
	l.mu.Unlock()
	l.begin(m)
}

// least is the time that has passed since before, as far as the device can know without a right clock.
func (l *survivor) least(since time.Time) time.Duration {
	passed := l.now().Sub(since)
	for _, g := range l.gaps {
		if !g.from.Before(since) {
			passed -= g.to.Sub(g.from)
		}
	}
	return passed
}

func (l *survivor) state() (known, sure bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.known, l.sure
}

// check asks for a key and judges the answer by what is true.
func (l *survivor) check(t *testing.T, key tokencache.Key, need tokencache.Need) error {
	before := l.heldOf(key)
	earlier := l.sighted(before)
	answer, err := l.cache.Get(t.Context(), key, need)
	now := l.now()
	var fetch *tokencache.FetchError
	switch {
	case errors.As(err, new(*tokencache.ShortLifeError)) && before.ExpiresOn.Sub(now) < need.MinTTL:
		return nil
	case err == nil:
		if !before.Text.Equal(answer.Token.Text) {
			earlier = sighting{}
		}
		return l.judge(key, answer, now, earlier)
	case errors.As(err, new(*tokencache.WithheldError)) && l.revoked():
		return nil
	case before.ExpiresOn.Sub(now) > need.MinTTL:
		return fmt.Errorf("a token that is valid for %v was lost: %w", before.ExpiresOn.Sub(now), err)
	case errors.As(err, &fetch) && l.brokenOn().Add(pardoned).After(now):
		return nil
	}
	return err
}

// pardoned is for how long after a fault is over callers may be told of it, and the pause be kept that it asked for.
const pardoned = 6 * time.Minute

func (l *survivor) brokenOn() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != nil {
		return l.nowLocked()
	}
	return l.mended
}

func (l *survivor) heldOf(key tokencache.Key) tokencache.Token {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held[key]
}

func (l *survivor) revoked() bool {
	return slices.ContainsFunc(l.record, func(ch happened) bool { return ch.noted && ch.Effect == tokencache.Revoked })
}

func (l *survivor) sighted(token tokencache.Token) sighting {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shown[token.Text.SHA256()]
}

// judge looks at an answer by when its token was last given: earlier, or meanwhile to another caller, whose fetch may
// have ended before this answer was made, or after.
func (l *survivor) judge(key tokencache.Key, answer tokencache.Answer, now time.Time, earlier sighting) error {
	latest := l.sighted(*answer.Token)
	err := l.judgeTimes(key, answer, now, latest)
	// it is being given at this very moment, perhaps after this answer was made
	if latest.on.Equal(now) && earlier == latest {
		earlier = *latest.last
	}
	if err != nil && earlier.on.Before(latest.on) && !earlier.on.IsZero() &&
		l.judgeTimes(key, answer, now, earlier) == nil {
		err = nil
	}
	return errors.Join(err, l.judgePermissions(key, answer))
}

func (l *survivor) judgeTimes(key tokencache.Key, answer tokencache.Answer, now time.Time, shown sighting) error {
	left := answer.Token.ExpiresOn.Sub(now)
	known, sure := l.state()
	switch most := answer.Token.ExpiresOn.Sub(shown.on) - l.least(shown.on); {
	case !answer.Unconfirmed && left <= 0:
		return fmt.Errorf("%v got a token that has expired %v ago and is not unconfirmed", key, -left)
	case !answer.Unconfirmed && answer.Left > left:
		return fmt.Errorf("%v got a token told to have %v left, it has %v", key, answer.Left, left)
	case most <= 0:
		return fmt.Errorf("%v got a token that the device knows to have expired %v ago", key, -most)
	case answer.Left > most:
		return fmt.Errorf("%v got a token told to have %v left, which is at most %v", key, answer.Left, most)
	case answer.Unconfirmed && known:
		return fmt.Errorf("%v got an unconfirmed token though the clock is right", key)
	case answer.Unconfirmed && shown.boot == l.boots:
		return fmt.Errorf("%v got an unconfirmed token that was given in this boot", key)
	case !answer.Unconfirmed && shown.boot != l.boots && !sure:
		return fmt.Errorf("%v got a token as confirmed of an earlier boot, and the clock was never right", key)
	}
	return nil
}

func (l *survivor) judgePermissions(key tokencache.Key, answer tokencache.Answer) error {
	issued := answer.Token.ExpiresOn.Add(-24 * time.Hour)
	for _, ch := range l.record {
		if !ch.noted || ch.Resource != "" && ch.Resource != key.Resource ||
			!issued.Before(ch.on.Add(l.spread).Truncate(time.Second)) {
			continue
		}
		if answer.Permissions.State == tokencache.Current || ch.Effect == tokencache.Revoked {
			return fmt.Errorf("%v got a token as %v that lacks change %s (%v)", key, answer.Permissions.State, ch.ID,
				ch.Effect)
		}
	}
	return nil
}

// note has a policy change happen and be told of at once, or withdraws one.
func (l *survivor) note(i, much int) error {
	if much < 20 && len(l.record) > 0 {
		ch := &l.record[much%len(l.record)]
		l.cache.Withdraw(ch.ID)
		ch.noted = false
		return nil
	}
	ch := happened{on: l.now(), noted: true, PolicyChange: tokencache.PolicyChange{
		ID: fmt.Sprint(i), AllIdentities: true,
		Effect: []tokencache.Effect{tokencache.Changed, tokencache.Granted, tokencache.Revoked}[much%3],
	}}
	if much >= 60 {
		ch.Resource = resources[much%3]
	}
	if much%5 == 0 {
		ch.At = ch.on // as somebody tells whose clock is right
		if ahead := l.wallAhead(); ahead < 0 {
			if known, _ := l.state(); known {
				ch.At = time.Time{}
			}
		}
	}
	if _, err := l.backend.ChangePermissions("device", simulator.Permissions{Roles: []string{ch.ID}}); err != nil {
		return err
	}
	if _, err := l.cache.RecordChange(ch.PolicyChange); err != nil {
		return err
	}
	l.record = append(l.record, ch)
	return nil
}

func (l *survivor) wallAhead() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ahead
}

// clockOf returns one of the ways in which a clock is wrong, or right.
func (l *survivor) clockOf(much int) (ahead time.Duration, known bool) {
	const year = 365 * 24 * time.Hour
	switch much % 10 {
	case 0:
		return time.Unix(int64(much), 0).Sub(l.now()), false
	case 1:
		return 20 * year, false
	case 2:
		return -400 * 24 * time.Hour, false // a plausible time: when systemd was built
	case 3:
		return time.Duration(much-50) * time.Minute, false
	case 4:
		return time.Duration(much-50) * time.Hour, false
	case 5, 6:
		return 0, false
	}
	return 0, true
}

// Whatever a device goes through, and whatever its clock shows: what it can know to have expired is served to nobody, a
// valid token is never lost and is labelled unless it is certain, no policy change is forgotten, and the back end is
// left in peace.
func TestRandomLives(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		steps := rapid.SliceOfN(rapid.IntRange(0, 1399), 20, 80).Draw(r, "steps")
		options := simulator.Options{
			Seed: rapid.Uint64().Draw(r, "seed"),
			Rollover: rapid.SampledFrom([]simulator.Rollover{simulator.AtExpiry, simulator.AtHalfLife,
				simulator.Jittered}).Draw(r, "rollover"),
			PropagationDelay: time.Duration(rapid.IntRange(0, 9).Draw(r, "spread")) * time.Minute,
			Aged:             time.Duration(rapid.IntRange(0, 20).Draw(r, "aged")) * time.Hour,
		}
		var fault error // told to rapid outside of the bubble, whose goroutine is not its own
		synctest.Test(t, func(t *testing.T) { fault = randomLife(t, options, steps) })
		if fault != nil {
			r.Fatal(fault)
		}
	})
}

func randomLife(t *testing.T, options simulator.Options, steps []int) error {
	l := newSurvivor(options)
	defer func() { l.cache.Close() }()
	for i, step := range steps {
		if err := l.step(t, i, step); err != nil {
			return fmt.Errorf("step %d (%d) at %v: %w", i, step, l.now(), err)
		}
		if err := l.cache.CheckJudgements(nil); err != nil {
			return fmt.Errorf("step %d (%d) at %v: %w", i, step, l.now(), err)
		}
	}
	if err := l.heals(t); err != nil {
		return err
	}
	return l.storms()
}

// step does what a number says. Its hundreds choose the kind, its rest how much.
func (l *survivor) step(t *testing.T, i, step int) error {
	kind, much := step/100, step%100
	key := tokencache.Key{Resource: resources[much%3]}
	switch kind {
	case 0, 1:
		l.wait(time.Duration(much*much) * 10 * time.Second)
	case 2:
		l.fails(map[bool]error{true: down}[much < 40])
	case 3:
		l.set(l.clockOf(much))
	case 4:
		l.skip(time.Duration(much*much) * 10 * time.Second)
	case 5:
		return l.restarted(t, much%2 == 0)
	case 6, 7:
		ahead, known := l.clockOf(much)
		l.reboot(step%2 == 0, time.Duration(much*much/2)*30*time.Second, ahead, known)
	case 8:
		return l.note(i, much)
	case 9:
		l.asked++
		_, err := l.cache.Refresh(t.Context(), key, much%2 == 0)
		if err == nil {
			answer, err := l.cache.Get(t.Context(), key, tokencache.Need{})
			if err == nil && answer.Unconfirmed {
				return errors.New("still unconfirmed after a fetch")
			}
		}
	default:
		return l.check(t, key, tokencache.Need{})
	}
	return nil
}

// restarted restarts the cache, and looks that nothing is different to whoever asks before and after.
func (l *survivor) restarted(t *testing.T, inOrder bool) error {
	if err := l.cache.Ping(t.Context()); err != nil { // the schedule looks at the clock
		return err
	}
	synctest.Wait()
	before, calls := l.sights(), l.total()
	l.restart(inOrder)
	if after := l.sights(); !slices.EqualFunc(before, after,
		func(a, b seenKey) bool { return a.same(b, inOrder, len(l.record) > 0) }) {
		return fmt.Errorf("after a restart (in order: %v):\n%v\nbefore:\n%v", inOrder, after, before)
	}
	most := 0
	if len(l.record) > 0 {
		most = len(l.cache.Status()) // a change may seem noted since
	}
	if extra := l.total() - calls; extra > most {
		return fmt.Errorf("a restart cost %d calls", extra)
	}
	return nil
}

// paused is for how long a back end is heeded that asks for a pause, which a restart adds to the plan.
const paused = 5 * time.Minute

// seenKey is what is to be the same of a key.
type seenKey struct {
	digest      string
	left        time.Duration
	next        time.Time
	unconfirmed bool
	standing    tokencache.PermissionState
}

// same leaves out what was learnt since the cache was kept last, and the plan where a policy change plays a part: a
// probe is planned anew, and a clock that went back has the change spread again.
func (a seenKey) same(b seenKey, inOrder, noted bool) bool {
	if !inOrder {
		return noted || a.digest == b.digest
	}
	if later := b.next.Sub(a.next); noted && later < 20*time.Minute || later > 0 && later <= paused {
		a.next, b.next = time.Time{}, time.Time{}
	}
	return a == b
}

func (l *survivor) sights() (all []seenKey) {
	status := l.cache.Status()
	slices.SortFunc(status, func(a, b tokencache.Status) int { return strings.Compare(a.Key.Resource, b.Key.Resource) })
	for _, s := range status {
		if s.SHA256 != "" {
			all = append(all, seenKey{s.SHA256, s.Left, s.NextRefresh, s.Unconfirmed, s.Permissions.State})
		}
	}
	return all
}

func (l *survivor) total() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, all := range l.calls {
		n += len(all)
	}
	return n
}

// heals makes the world well, and looks that every key is served, confirmed, within a moment.
func (l *survivor) heals(t *testing.T) error {
	l.fails(nil)
	l.set(0, true)
	l.wait(10 * time.Minute)
	for _, resource := range resources {
		key := tokencache.Key{Resource: resource}
		if err := l.check(t, key, tokencache.Need{}); err != nil {
			return fmt.Errorf("after all: %w", err)
		}
		if _, err := l.cache.Get(t.Context(), key, tokencache.Need{}); err != nil && !l.revoked() {
			return fmt.Errorf("after all: %w", err)
		}
	}
	l.set(-20*365*24*time.Hour, false) // what was confirmed stays so
	for _, resource := range resources {
		if err := l.check(t, tokencache.Key{Resource: resource}, tokencache.Need{}); err != nil {
			return fmt.Errorf("with the clock lost again: %w", err)
		}
	}
	return nil
}

// storms looks that no key was asked for more often in any hour than probing, or trying again after failures, allows.
func (l *survivor) storms() error {
	l.mu.Lock() // a call may be under way
	defer l.mu.Unlock()
	for key, all := range l.calls {
		for i, from := range all {
			answered, failed := 0, 0
			for _, other := range all[i:] {
				switch {
				case other.on.Sub(from.on) >= time.Hour:
				case other.failed:
					failed++
				default:
					answered++
				}
			}
			// Failures: 5 minutes apart on average half that, and at most 5 s apart around an expiry.
			if answered > 40+l.asked+l.startup || failed > 330+l.asked+10*l.startup {
				return fmt.Errorf("%v was asked for %d and %d times within an hour", key, answered, failed)
			}
		}
	}
	return nil
}
