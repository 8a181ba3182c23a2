package tokencache

import "time"

const (
	callsAtOnce    = 2
	callsPerSecond = 5
	fetchTimeout   = 15 * time.Second
)

// class orders the flights that wait for a call.
type class uint8

const (
	forCaller  class = iota // somebody waits
	forRefresh              // a token is due
	forProbe                // the back end gave its cached copy last time
)

// flight is one fetch of one key, from the wish for it to its landing.
type flight struct {
	key   Key
	class class
	asked time.Duration // boot time of the wish
	begun bool          // the call is under way
	done  chan struct{} // closed when outcome and err are set

	outcome Outcome
	err     error
}

// How long a flight is passed over by those of a better class. After that every second call is for such a
// flight: a source that hangs for some keys, whose callers come again and again, must not keep the others
// from being refreshed.
const (
	patience      = 30 * time.Second
	probePatience = 5 * time.Minute
)

// gate keeps calls to the source within its limits and in the order of their class.
type gate struct {
	queue    []*flight // not begun, in the order they came
	running  int
	begun    [callsPerSecond]time.Duration // boot times of the last calls, a ring
	oldest   int                           // index of the oldest in begun
	paused   time.Duration                 // no call before this boot time: the source asked for it
	favoured bool                          // the next call is for a flight that was passed over for long
	probed   time.Duration                 // when the last probe began
}

// late reports whether f was passed over for too long. Probes that follow each other are not.
func (g *gate) late(f *flight, now time.Duration) bool {
	if f.class == forProbe {
		return now-max(f.asked, g.probed) > probePatience
	}
	return now-f.asked > patience
}

func newGate() gate {
	g := gate{paused: longAgo, probed: longAgo}
	for i := range g.begun {
		g.begun[i] = longAgo
	}
	return g
}

// opens returns the boot time from which the flight whose turn it is may begin; never when another has to
// land before. A probe leaves room for a caller: one of the calls at once, and one of those in a second.
func (g *gate) opens(now time.Duration) time.Duration {
	if len(g.queue) == 0 || g.running == callsAtOnce {
		return never
	}
	at := max(g.paused, g.begun[g.oldest]+time.Second)
	if f := g.first(now); f.class != forProbe || g.late(f, now) {
		return at
	}
	if g.running == callsAtOnce-1 {
		return never
	}
	return max(at, g.begun[(g.oldest+1)%len(g.begun)]+time.Second)
}

// next takes the flight that is to begin now off the queue, or returns nil when none may.
func (g *gate) next(now time.Duration) *flight {
	if now < g.opens(now) {
		return nil
	}
	f := g.first(now)
	g.favoured = !g.favoured
	g.remove(f)
	if f.begun = true; f.class == forProbe {
		g.probed = now
	}
	g.running++
	g.begun[g.oldest] = now
	g.oldest = (g.oldest + 1) % len(g.begun)
	return f
}

// first returns the flight whose turn it is, of a queue that is not empty.
func (g *gate) first(now time.Duration) *flight {
	best := g.queue[0]
	if g.favoured && g.late(best, now) {
		return best
	}
	for _, f := range g.queue {
		if f.class < best.class {
			best = f
		}
	}
	return best
}

// remove takes f off the queue, if it is there.
func (g *gate) remove(f *flight) {
	for i, queued := range g.queue {
		if queued == f {
			g.queue = append(g.queue[:i], g.queue[i+1:]...)
			return
		}
	}
}
