package staleness

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// The staleness simulation: keys whose permissions change now and then, on a back end that goes on
// handing out the token from before. docs/staleness.md says what is simulated and what the words mean.

// opened is when every simulation begins: the first moment of a synctest bubble.
var opened = time.Date(2000, time.January, 1, 0, 0, 0, 0, time.UTC)

const vault = "https://vault.azure.net"

const (
	day = 24 * time.Hour

	reachesWithin = 8 * time.Minute // how long a policy change takes to reach new tokens, at most
	settles       = 2 * day         // no change is made so shortly before the end, so that all can be met
)

// span is the time from one moment to another, without the latter.
type span struct{ from, to time.Time }

func (s span) holds(t time.Time) bool { return !t.Before(s.from) && t.Before(s.to) }

// shared returns how long s and o have in common.
func (s span) shared(o span) time.Duration {
	from, to := s.from, s.to
	if o.from.After(from) {
		from = o.from
	}
	if o.to.Before(to) {
		to = o.to
	}
	return max(0, to.Sub(from))
}

func (s span) length() time.Duration { return s.to.Sub(s.from) }

// model is a kind of back end.
type model struct {
	name     string
	rollover simulator.Rollover
	odds     float64 // of a call's failing
	outage   span    // in which every call fails; zero: none
}

// models are the back ends compared. The outage, if there is room for one, is in the middle.
func models(days int) []model {
	middle := opened.Add(time.Duration(days/2)*day + 9*time.Hour)
	return []model{
		{name: "expiry", rollover: simulator.AtExpiry},
		{name: "half life", rollover: simulator.AtHalfLife},
		{name: "random", rollover: simulator.Jittered},
		{name: "expiry, faults", rollover: simulator.AtExpiry, odds: 0.01,
			outage: span{middle, middle.Add(6 * time.Hour)}},
	}
}

// world is what a strategy meets: the same for all that have the same seed.
type world struct {
	model
	keys, days int
	seed       uint64
}

func (w world) span() span { return span{opened, opened.Add(time.Duration(w.days) * day)} }

// roll returns a number in [0, 1) that follows from the seed and the parts.
func (w world) roll(parts ...int64) float64 {
	h := fnv.New64a()
	for _, p := range parts {
		_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(p)))
	}
	return rand.New(rand.NewPCG(w.seed, h.Sum64())).Float64()
}

// What rolls are for, so that no two share a number.
const (
	forChange int64 = iota
	forReach
	forFault
	forUse
	forPolling
	forSchedule
	forLatency
)

// policyChange is a change of a key's permissions, and when new tokens begin to carry it.
type policyChange struct{ made, reached time.Time }

// changes returns the policy changes of a key: the first within six days, each other 3 to 6 days after
// the one before.
func (w world) changes(key int) []policyChange {
	var all []policyChange
	last := w.span().to.Add(-settles)
	for n := int64(0); ; n++ {
		roll := w.roll(forChange, int64(key), n)
		made := opened.Add(time.Duration(roll * float64(6*day)))
		if n > 0 {
			made = all[n-1].made.Add(3*day + time.Duration(roll*float64(3*day)))
		}
		if !made.Before(last) {
			return all
		}
		within := time.Duration(w.roll(forReach, int64(key), n) * float64(reachesWithin))
		all = append(all, policyChange{made, made.Add(within)})
	}
}

// use returns when the module of a key uses its token in the nth minute.
func (w world) use(key int, n int64) time.Time {
	return opened.Add(time.Duration((float64(n) + w.roll(forUse, int64(key), n)) * float64(time.Minute)))
}

// nextUse returns the first use of a key's token at or after t.
func (w world) nextUse(key int, t time.Time) time.Time {
	n := max(0, int64(t.Sub(opened)/time.Minute))
	if use := w.use(key, n); !use.Before(t) {
		return use
	}
	return w.use(key, n+1)
}

// episode is the time from a policy change to the moment at which a strategy holds a token that tells the
// truth again.
type episode struct {
	policyChange
	learnt   bool          // the change was made after the key had seen two rollovers
	calls    int           // made in it, without those in the outage
	lost     int           // tokens without the change that were minted after it since somebody asked too early
	forced   int           // likewise, but the token held had expired
	rollover time.Time     // when a current token was first to be had; zero until one was given
	ripe     bool          // the token held had rolled over before the change reached new ones, unasked for
	held     time.Time     // in the strategy's hand
	module   time.Time     // in the module's hand
	outage   time.Duration // of the time from rollover to held, nobody could have it
}

func (e *episode) stale() time.Duration { return e.held.Sub(e.made) }

// life is what happens to one key under one strategy, and the truth about it.
type life struct {
	world
	key     int
	now     func() time.Time
	backend *simulator.Backend

	made     int // policy changes so far
	asked    int // calls so far
	episodes []episode
	current  bool // the strategy holds a token that tells the truth

	given    simulator.Token // by the back end last
	newer    int             // tokens given so far, each newer than the one before
	learntOn time.Time       // when the second rollover had been seen; zero: not yet

	ordinary   [2]int // calls outside of episodes and outage: before and after learntOn
	doubted    int    // of these, made while the token was labelled otherwise than current though it was
	inOutage   int    // calls in the outage
	failed     int    // requests of the module
	failedAway int    // of these, in the outage
	mislabeled int    // tokens called current though they lacked a change
}

// live returns a key's life at its beginning. The clock of its back end is ahead by a part of a second of
// its own, so that whole seconds, which tokens' times are, are different moments for each key.
func (w world) live(key int, now func() time.Time) *life {
	l := &life{world: w, key: key, now: now, current: true}
	l.backend = simulator.New(simulator.Options{
		Now: func() time.Time { return now().Add(l.ahead()) }, Rollover: w.rollover, Aged: day,
		Seed:       w.seed<<16 + uint64(key),
		Identities: []simulator.Identity{{Name: "device", SystemAssigned: true, Permissions: l.permissions()}},
	})
	return l
}

func (l *life) ahead() time.Duration {
	return time.Duration(l.key) * time.Second / time.Duration(l.keys)
}

// permissions are those that were set last.
func (l *life) permissions() simulator.Permissions {
	return simulator.Permissions{Groups: []string{fmt.Sprintf("after change %d", l.made)}}
}

// tellsTruth reports whether a token carries the permissions that were set last.
func (l *life) tellsTruth(groups []string) bool { return slices.Equal(groups, l.permissions().Groups) }

// change makes a policy change, which new tokens do not carry until reach is called.
func (l *life) change(c policyChange) {
	l.made++
	l.current = false
	l.episodes = append(l.episodes, episode{policyChange: c, learnt: !l.learntOn.IsZero()})
}

func (l *life) reach() error {
	_, err := l.backend.ChangePermissions("device", l.permissions())
	return err
}

// episode returns the one under way, or nil.
func (l *life) episode() *episode {
	if l.current || len(l.episodes) == 0 {
		return nil
	}
	return &l.episodes[len(l.episodes)-1]
}

// ask calls the back end. False: the call failed.
func (l *life) ask() (simulator.Token, bool) {
	now := l.now()
	l.asked++
	e := l.episode()
	switch {
	case l.outage.holds(now):
		l.inOutage++
		return simulator.Token{}, false
	case e != nil:
		e.calls++
	case l.learntOn.IsZero():
		l.ordinary[0]++
	default:
		l.ordinary[1]++
	}
	if l.odds > 0 && l.roll(forFault, int64(l.key), int64(l.asked)) < l.odds {
		return simulator.Token{}, false
	}
	m, err := l.backend.Token(simulator.Selection{}, vault)
	if err != nil {
		panic(err)
	}
	l.give(m, e, now)
	return m, true
}

// give notes what a token that the back end gave means for the episode under way.
func (l *life) give(m simulator.Token, e *episode, now time.Time) {
	if m.Serial == l.given.Serial {
		return
	}
	before := l.given
	l.given = m
	if l.newer++; l.newer == 3 {
		l.learntOn = now
	}
	switch expired := !now.Before(before.ExpiresOn.Add(-l.ahead())); {
	case e == nil || !m.IssuedOn.Add(-l.ahead()).After(e.made):
	case l.tellsTruth(m.Permissions.Groups):
		rolled := before.RollsOn.Add(-l.ahead())
		e.rollover, e.ripe = latest(e.reached, rolled), rolled.Before(e.reached)
	case expired:
		e.forced++
	default:
		e.lost++
	}
}

// hold notes that the strategy has m in its hand.
func (l *life) hold(m simulator.Token) {
	e := l.episode()
	if e == nil || !l.tellsTruth(m.Permissions.Groups) {
		return
	}
	l.current = true
	e.held = l.now()
	e.outage = span{e.rollover, e.held}.shared(l.outage)
}

// inModule notes that the module has a token with these groups in its hand.
func (l *life) inModule(groups []string) {
	if n := len(l.episodes); n > 0 && l.episodes[n-1].module.IsZero() && l.tellsTruth(groups) {
		l.episodes[n-1].module = l.now()
	}
}

// fail notes that a request of the module failed, which began at that moment.
func (l *life) fail(began time.Time) {
	l.failed++
	if l.outage.holds(began) {
		l.failedAway++
	}
}

// label notes how a token that the strategy holds is labelled.
func (l *life) label(groups []string, p tokencache.Permissions) {
	if p.State == tokencache.Current && !l.tellsTruth(groups) {
		l.mislabeled++
	}
}

// quiet returns how long, within s, the key was neither stale nor the back end away.
func (l *life) quiet(s span) time.Duration {
	quiet := s.length() - s.shared(l.outage)
	for _, e := range l.episodes {
		stale := span{e.made, e.held}
		quiet -= s.shared(stale)
		if both := (span{latest(stale.from, s.from), earliest(stale.to, s.to)}); both.to.After(both.from) {
			quiet += both.shared(l.outage)
		}
	}
	return quiet
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
