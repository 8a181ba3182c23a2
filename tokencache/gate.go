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
	done  chan struct{} // closed when outcome and err are set

	outcome Outcome
	err     error
}

// gate keeps calls to the source within its limits and in the order of their class.
type gate struct {
	queue   []*flight // not begun, in the order they came
	running int
	begun   [callsPerSecond]time.Duration // boot times of the last calls, a ring
	oldest  int                           // index of the oldest in begun
	paused  time.Duration                 // no call before this boot time: the source asked for it
}

func newGate() gate {
	g := gate{paused: longAgo}
	for i := range g.begun {
		g.begun[i] = longAgo
	}
	return g
}

// opens returns the boot time from which one more call may begin, whatever is running.
func (g *gate) opens() time.Duration {
	return max(g.paused, g.begun[g.oldest]+time.Second)
}

// next takes the flight that is to begin now off the queue, or returns nil when none may.
func (g *gate) next(now time.Duration) *flight {
	if len(g.queue) == 0 || g.running == callsAtOnce || now < g.opens() {
		return nil
	}
	first := 0
	for i, f := range g.queue {
		if f.class < g.queue[first].class {
			first = i
		}
	}
	f := g.queue[first]
	g.remove(f)
	g.running++
	g.begun[g.oldest] = now
	g.oldest = (g.oldest + 1) % len(g.begun)
	return f
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
