package tokencache

import (
	"slices"
	"time"
)

const (
	callsAtOnce    = 2
	callsPerSecond = 5
	fetchTimeout   = 15 * time.Second
)

// priority orders the flights that wait for a call.
type priority uint8

const (
	forCaller  priority = iota // a caller waits
	forRefresh                 // a token is due
	forProbe                   // the back end gave its cached copy last time
)

// A flight that was passed over for this long is starved. Every second call then goes to the flight that has starved
// longest: if a source hangs for some keys whose callers come again and again, the other keys must still be refreshed.
const (
	agingAfter      = 30 * time.Second
	probeAgingAfter = 5 * time.Minute
)

// slowCall is how long a call takes before its identity seems to hang.
const slowCall = 5 * time.Second

// identityCalls is what is known of the calls for one identity.
type identityCalls struct {
	turn     uint64 // rank of its last call among all
	answered bool   // its last call that ended was answered, with whatever
}

// fetchQueue keeps calls to the source within its limits, orders them by priority, and shares them among identities.
// Among flights of one priority, the identity goes first whose last call is longest ago. If there are several
// identities, one for which the source does not answer, or has not answered yet, gets one of the calls at once.
type fetchQueue struct {
	waiting    []*flight                // not begun, in the order they came
	running    []*flight                // begun
	starts     [callsPerSecond]bootTime // boot times of the last calls, a ring
	oldest     int                      // index of the oldest of starts
	paused     bootTime                 // no call before this boot time: the source asked for it
	backOff    sourceBackOff
	given      uint64                     // tokens that the source gave
	quarantine bootTime                   // no call for a key in quarantine before
	agingTurn  bool                       // the next call is for a flight that was passed over for long
	probed     bootTime                   // when the last probe began
	turns      uint64                     // calls that have begun
	identities map[Selector]identityCalls // of the identities that there are
}

// newFetchQueue returns an empty queue.
func newFetchQueue() fetchQueue {
	g := fetchQueue{paused: longAgo, quarantine: longAgo, probed: longAgo, identities: make(map[Selector]identityCalls)}
	for i := range g.starts {
		g.starts[i] = longAgo
	}
	return g
}

// starvedFor returns for how long f has been passed over too long; 0 or less: it has not. Probes that follow each other
// do not starve each other.
func (g *fetchQueue) starvedFor(f *flight, now bootTime) time.Duration {
	if f.priority == forProbe {
		return now.sub(max(f.asked, g.probed)) - probeAgingAfter
	}
	return now.sub(f.asked) - agingAfter
}

// earliest returns the boot time from which f may begin; never if another flight has to land first. A probe leaves room
// for a caller: one of the calls at once, and one of the calls in a second.
func (g *fetchQueue) earliest(f *flight, now bootTime) bootTime {
	atOnce := callsAtOnce
	if g.backOff.failures > 0 {
		atOnce = 1
	}
	if len(g.running) >= atOnce || !g.hasRoom(f.key.Selector, now) {
		return never
	}
	at := max(f.notBefore, g.paused, g.starts[g.oldest].add(time.Second))
	at = max(at, g.backOff.earliest(f, now), g.backOff.yields(f))
	if f.quarantined {
		at = max(at, g.quarantine)
	}
	if f.priority != forProbe || g.starvedFor(f, now) > 0 {
		return at
	}
	if len(g.running) == callsAtOnce-1 {
		return never
	}
	return max(at, g.starts[(g.oldest+1)%len(g.starts)].add(time.Second))
}

// earliest returns the boot time from which the source's back-off lets f begin. A token that expires in these minutes
// is as urgent as a caller.
func (r *sourceBackOff) earliest(f *flight, now bootTime) bootTime {
	switch {
	case r.failures == 0:
		return longAgo
	case f.priority == forCaller, f.expires.sub(now).Abs() < lastMinutes:
		return r.callers
	}
	return r.until
}

// yields returns the boot time until which f leaves the first call to a caller that was turned away.
func (r *sourceBackOff) yields(f *flight) bootTime {
	if r.failures > 0 && r.turnedAway && (f.priority != forCaller || f.yields) {
		return r.callers.add(callersFirst)
	}
	return longAgo
}

// hasRoom reports whether one more call for an identity leaves the others their share.
func (g *fetchQueue) hasRoom(s Selector, now bootTime) bool {
	if len(g.identities) == 1 {
		return true
	}
	for _, f := range g.running {
		if f.key.Selector == s && (!g.identities[s].answered || now.sub(f.startedAt) > slowCall) {
			return false
		}
	}
	return true
}

// first returns the flight that may begin now. If there is none, it returns nil and when one may; never if another has
// to land first.
func (g *fetchQueue) first(now bootTime) (*flight, bootTime) {
	var best *flight
	at := never
	for _, f := range g.waiting {
		if from := g.earliest(f, now); from > now {
			at = min(at, from)
		} else if best == nil || g.goesBefore(f, best, now) {
			best = f
		}
	}
	if best != nil {
		at = now
	}
	return best, at
}

// goesBefore reports whether f goes before o, which was queued earlier.
func (g *fetchQueue) goesBefore(f, o *flight, now bootTime) bool {
	if f.yields != o.yields {
		return o.yields
	}
	if x, y := max(0, g.starvedFor(f, now)), max(0, g.starvedFor(o, now)); g.agingTurn && x != y {
		return x > y
	}
	if f.priority != o.priority {
		return f.priority < o.priority
	}
	return g.identities[f.key.Selector].turn < g.identities[o.key.Selector].turn
}

// nextStart returns the boot time from which the next flight may begin; never if another has to land first.
func (g *fetchQueue) nextStart(now bootTime) bootTime {
	_, at := g.first(now)
	return at
}

// begin takes the next flight off the queue and counts it as begun. Nil: none may begin now.
func (g *fetchQueue) begin(now bootTime) *flight {
	f, _ := g.first(now)
	if f == nil {
		return nil
	}
	g.agingTurn = !g.agingTurn
	g.remove(f)
	if f.started, f.startedAt = true, now; f.priority == forProbe {
		g.probed = now
	} else if f.priority == forCaller && !f.yields {
		g.backOff.turnedAway = false
	}
	g.running = append(g.running, f)
	g.starts[g.oldest] = now
	g.oldest = (g.oldest + 1) % len(g.starts)
	g.turns++
	g.identities[f.key.Selector] = identityCalls{turn: g.turns, answered: g.identities[f.key.Selector].answered}
	return f
}

// ended takes in that f's call is over, and whether the source answered it.
func (g *fetchQueue) ended(f *flight, answered bool) {
	g.running = slices.DeleteFunc(g.running, func(o *flight) bool { return o == f })
	if s, ok := g.identities[f.key.Selector]; ok {
		s.answered = answered
		g.identities[f.key.Selector] = s
	}
}

// remove takes f off the queue, if it is there.
func (g *fetchQueue) remove(f *flight) {
	g.waiting = slices.DeleteFunc(g.waiting, func(o *flight) bool { return o == f })
}

// track adds an identity. If there are more than keys, it forgets the one whose last call was longest ago.
func (g *fetchQueue) track(s Selector) {
	if _, known := g.identities[s]; known {
		return
	}
	if len(g.identities) >= MaxKeys {
		var oldest Selector
		least := g.turns + 1
		for o, known := range g.identities {
			if known.turn < least {
				oldest, least = o, known.turn
			}
		}
		delete(g.identities, oldest)
	}
	g.identities[s] = identityCalls{}
}

// wakeSchedule makes the schedule look again soon.
func (c *Cache) wakeSchedule() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
