package staleness

import (
	"slices"
	"time"
)

// figures are what a strategy comes to on a back end, over some of its episodes and the time between them.
type figures struct {
	episodes int
	lag      durations // from the rollover to the strategy's hand
	module   durations // and to the module's
	further  durations // from the one hand to the other
	stale    durations // from the policy change to the strategy's hand

	calls      float64 // an episode
	share      float64 // of what polling every 5 minutes would have made in the same episodes
	staleHour  float64 // calls in an hour of an episode
	ordinary   float64 // calls a key and day outside of episodes and outage
	inOutage   float64 // calls a key in the outage
	doubted    float64 // calls a key and day for tokens that were current and not known to be
	ripe       int     // episodes that began with a token that had rolled over unasked for
	lost       int
	forced     int
	failed     int
	failedAway int
	mislabeled int
	unmet      int // episodes without an end
	early      int // tokens in hand before their rollover: the simulation would be wrong
}

// durations are in ascending order.
type durations []time.Duration

func (d durations) mean() time.Duration {
	var sum time.Duration
	for _, x := range d {
		sum += x
	}
	return sum / time.Duration(max(1, len(d)))
}

// quantile returns the smallest that at least that share of d does not exceed.
func (d durations) quantile(share float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	return d[min(len(d)-1, max(0, int(share*float64(len(d))+0.999999)-1))]
}

// part chooses episodes and the days they are in.
type part uint8

const (
	whole    part = iota
	unlearnt      // until a key's second rollover was seen
	learnt        // and from then on
)

func (p part) has(e episode) bool { return p == whole || e.learnt == (p == learnt) }

// span returns the part of l's time.
func (p part) span(l *life) span {
	s, turn := l.world.span(), l.learntOn
	if turn.IsZero() {
		turn = s.to
	}
	switch p {
	case unlearnt:
		s.to = turn
	case learnt:
		s.from = turn
	}
	return s
}

func (p part) ordinary(l *life) int {
	switch p {
	case unlearnt:
		return l.ordinary[0]
	case learnt:
		return l.ordinary[1]
	}
	return l.ordinary[0] + l.ordinary[1]
}

// sum returns the figures of lives over that part of their time.
func sum(lives []*life, p part) figures {
	var f figures
	var quiet, spent time.Duration
	var calls, quietCalls, outage, doubted int
	for _, l := range lives {
		quiet += l.quiet(p.span(l))
		quietCalls += p.ordinary(l)
		outage += l.inOutage
		doubted += l.doubted
		f.failed += l.failed
		f.failedAway += l.failedAway
		f.mislabeled += l.mislabeled
		for _, e := range l.episodes {
			if !p.has(e) {
				continue
			}
			if e.held.IsZero() || e.module.IsZero() {
				f.unmet++
				continue
			}
			f.add(e)
			calls += e.calls
			stale := span{e.made, e.held}
			spent += e.stale() - stale.shared(l.outage)
		}
	}
	for _, d := range []durations{f.lag, f.module, f.further, f.stale} {
		slices.Sort(d)
	}
	f.calls = float64(calls) / float64(max(1, f.episodes))
	f.staleHour = float64(calls) / max(1e-9, spent.Hours())
	f.share = f.staleHour / 12
	f.ordinary = float64(quietCalls) / max(1e-9, quiet.Hours()/24)
	f.inOutage = float64(outage) / float64(len(lives))
	f.doubted = float64(doubted) / max(1e-9, quiet.Hours()/24)
	return f
}

func (f *figures) add(e episode) {
	f.episodes++
	if e.ripe {
		f.ripe++
	}
	f.lost += e.lost
	f.forced += e.forced
	lag := e.held.Sub(e.rollover) - e.outage
	if lag < 0 {
		f.early++
	}
	f.lag = append(f.lag, lag)
	f.further = append(f.further, e.module.Sub(e.held))
	f.module = append(f.module, lag+e.module.Sub(e.held))
	f.stale = append(f.stale, e.stale())
}
