//go:build staleness

package staleness

import (
	"fmt"
	"strings"
	"time"
)

// bar is a figure that is not to exceed a limit, for both arrangements of keys.
type bar struct {
	what, backEnd string
	measured      [2]float64
	limit         [2]float64
	unit          string
	digits        int
}

func (b bar) misses(arrangement int) bool { return b.measured[arrangement] > b.limit[arrangement] }

func (b bar) missed() bool { return b.misses(together) || b.misses(alone) }

func (b bar) verdict(arrangement int) string {
	if b.misses(arrangement) {
		return "**MISSED**"
	}
	return "pass"
}

func (b bar) number(x float64) string {
	return strings.TrimSpace(grouped(fmt.Sprintf("%.*f", b.digits, x)) + " " + b.unit)
}

func (b bar) atMost() string {
	limit := strings.TrimSuffix(b.number(b.limit[together]), ".00")
	if b.limit[alone] != b.limit[together] {
		limit += ", " + b.number(b.limit[alone])
	}
	return limit
}

func (b bar) String() string {
	return fmt.Sprintf("%s, back end %s: %s with %s, %s with %s; at most %s", b.what, b.backEnd,
		b.number(b.measured[together]), arrangements[together], b.number(b.measured[alone]), arrangements[alone],
		b.atMost())
}

// aims are what perceptd is to reach once a key has seen two rollovers.
type aims struct {
	mean, p99 time.Duration
	share     float64
}

func aimsOf(m model) aims {
	if m.name == "random" {
		return aims{mean: 5 * time.Minute, share: 1.0 / 3}
	}
	return aims{mean: 3 * time.Minute, p99: 10 * time.Minute, share: 1.0 / 5}
}

const (
	aimFurther  = 30 * time.Minute // more in a module's hand
	aimLearnt   = 6                // calls on an ordinary day
	aimUnlearnt = 12               // before the rollover is known
)

func barsOf(all []*comparison) []bar {
	var bars []bar
	for _, c := range all {
		bars = append(bars, barsOfOne(c)...)
	}
	return bars
}

func barsOfOne(c *comparison) []bar {
	aims, poll, ideal := aimsOf(c.model), c.other(polling(pollingEvery5).name), c.other(oracle().name)
	var bars []bar
	add := func(what, unit string, digits int, limit float64, p part, measure func(figures) float64) {
		b := bar{what: what, backEnd: c.name, unit: unit, digits: digits, limit: [2]float64{limit, limit}}
		for i := range arrangements {
			b.measured[i] = measure(c.of(i, p))
		}
		bars = append(bars, b)
	}
	inMinutes := func(what string, limit time.Duration, measure func(figures) time.Duration) {
		add(what, "min", 1, limit.Minutes(), learnt, func(f figures) float64 { return measure(f).Minutes() })
	}
	inMinutes("lag, mean", aims.mean, func(f figures) time.Duration { return f.lag.mean() })
	if aims.p99 > 0 {
		inMinutes("lag, p99", aims.p99, func(f figures) time.Duration { return f.lag.quantile(0.99) })
	}
	inMinutes("more in a module's hand, mean", aimFurther,
		func(f figures) time.Duration { return f.module.mean() - f.lag.mean() })
	inMinutes("more in a module's hand, p99", aimFurther,
		func(f figures) time.Duration { return f.module.quantile(0.99) - f.lag.quantile(0.99) })
	add("calls of a stale episode, of polling's own", "%", 1, aims.share*100, learnt,
		func(f figures) float64 { return f.calls / poll.calls * 100 })
	add("calls of a stale episode, of polling for as long", "%", 1, aims.share*100, learnt,
		func(f figures) float64 { return f.share * 100 })
	add("calls on an ordinary day", "", 2, aimLearnt, learnt, func(f figures) float64 { return f.ordinary })
	add("the same before two rollovers were seen", "", 2, aimUnlearnt, unlearnt,
		func(f figures) float64 { return f.ordinary })
	add("failed requests", "", 0, 0, whole, func(f figures) float64 { return float64(f.failed - f.failedAway) })
	if c.outage.length() > 0 {
		bars[len(bars)-1].what += " outside of the outage"
		add("failed requests in the outage; the oracle's", "", 0, float64(ideal.failedAway), whole,
			func(f figures) float64 { return float64(f.failedAway) })
	}
	return bars
}
