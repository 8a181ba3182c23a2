//go:build staleness

package staleness

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	benchKeys = 200
	benchDays = 60
	benchSeed = 1

	docsVariable   = "STALENESS_DOCS"   // the folder of staleness.md and staleness.svg to bring up to date; empty: none
	strictVariable = "STALENESS_STRICT" // not empty: a missed bar fails the test
)

// comparison is all strategies on one back end.
type comparison struct {
	model
	perceptd [2][]*life // one device with all keys; a device for each
	others   []named
}

type named struct {
	name string
	figures
}

const (
	together = 0 // one device has all keys
	alone    = 1 // a device for each
)

var arrangements = [...]string{together: "200 keys", alone: "one key"}

// of returns perceptd's figures.
func (c *comparison) of(arrangement int, p part) figures { return sum(c.perceptd[arrangement], p) }

// other returns the figures of the strategy of that name.
func (c *comparison) other(name string) figures {
	return c.others[slices.IndexFunc(c.others, func(n named) bool { return n.name == name })].figures
}

const pollingEvery5 = 5 * time.Minute

// TestStaleness measures everything that docs/staleness.md tells, and says which bars are missed. A part
// of it can be chosen: -run 'TestStaleness/measure/random/200_keys'.
func TestStaleness(t *testing.T) {
	var all []*comparison
	for _, m := range models(benchDays) {
		all = append(all, &comparison{model: m})
	}
	measured := t.Run("measure", func(t *testing.T) {
		for _, c := range all {
			t.Run(c.name, func(t *testing.T) { c.measure(t) })
		}
	})
	if !measured || slices.ContainsFunc(all, func(c *comparison) bool { return !c.complete() }) {
		return
	}
	bars := barsOf(all)
	for _, b := range bars {
		if b.missed() {
			t.Logf("MISSED: %v", b)
			if os.Getenv(strictVariable) != "" {
				t.Fail()
			}
		}
	}
	if docs := os.Getenv(docsVariable); docs != "" {
		curve := curveOf(all[slices.IndexFunc(all, func(c *comparison) bool { return c.name == "random" })])
		renew(t, filepath.Join(docs, "staleness.md"), tables(all, bars, curve))
		if err := os.WriteFile(filepath.Join(docs, "staleness.svg"), []byte(picture(all, curve)), 0o644); err != nil {
			t.Error(err)
		}
	}
}

func (c *comparison) complete() bool {
	return c.perceptd[together] != nil && c.perceptd[alone] != nil && c.others != nil
}

func (c *comparison) world() world {
	return world{model: c.model, keys: benchKeys, days: benchDays, seed: benchSeed}
}

func (c *comparison) measure(t *testing.T) {
	t.Parallel()
	for i, name := range arrangements {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.perceptd[i] = perceptd(t, c.world(), i == alone)
			check(t, c.perceptd[i])
			t.Logf("perceptd, %s, back end %s\n%vfirst days: %v", name, c.name, c.of(i, learnt), c.of(i, unlearnt))
		})
	}
	t.Run("others", func(t *testing.T) {
		t.Parallel()
		for _, s := range []strategy{azidentity(), halfLife(), polling(pollingEvery5), oracle()} {
			lives := c.world().follow(s)
			check(t, lives)
			c.others = append(c.others, named{s.name, sum(lives, whole)})
			t.Logf("%s, back end %s\n%v", s.name, c.name, sum(lives, whole))
		}
	})
}

// renew replaces what stands between the marks of a document.
func renew(t *testing.T, path, text string) {
	t.Helper()
	const begin, end = "<!-- figures: made by make bench-staleness, not by hand -->\n", "<!-- end of figures -->"
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(old), begin)
	_, tail, also := strings.Cut(rest, end)
	if !ok || !also {
		t.Fatalf("%s has no place for figures", path)
	}
	if err := os.WriteFile(path, []byte(head+begin+text+end+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}

// point is a strategy on the curve of lag against calls.
type point struct {
	name    string
	every   time.Duration // of polling; else 0
	calls   float64       // in an hour of staleness
	episode float64       // in an episode
	lag     time.Duration // mean
}

// curveOf returns polling at several intervals and perceptd, on one back end.
func curveOf(c *comparison) []point {
	var all []point
	for _, minutes := range []float64{2, 3, 5, 7.5, 10, 15, 20, 30, 60} {
		every := time.Duration(minutes * float64(time.Minute))
		s := polling(every)
		f := sum(c.world().follow(s), whole)
		all = append(all, point{s.name, every, f.staleHour, f.calls, f.lag.mean()})
	}
	for i, name := range arrangements {
		f := c.of(i, learnt)
		all = append(all, point{"perceptd, " + name, 0, f.staleHour, f.calls, f.lag.mean()})
	}
	return all
}

// bestProduct is mean lag, in minutes, times calls in an hour of staleness that no schedule can go below
// on a back end that rolls over at any age from 8 to 24 hours with equal odds, and whose token is taken
// at its rollover.
//
// At age a, from 8 h on, episodes are under way in proportion to a(24-a), and end in proportion to a. With
// a call every d(a), lag is the mean of d/2 over the ends, calls are the sum of 1/d over the time. Their
// product is least when d is in proportion to the root of what is left of the 24 h.
func bestProduct() float64 {
	const step = 1.0 / 1024
	var ends, lag, calls, stale float64
	for a := step / 2; a < 24; a += step {
		if a < 8 {
			stale += a * 16
			continue
		}
		left := 24 - a
		ends += a
		lag += a * math.Sqrt(left) / 2
		calls += a * left / math.Sqrt(left)
		stale += a * left
	}
	return lag / ends * 60 * calls / stale
}

// String tells the figures in a few lines for whoever tunes the schedule.
func (f figures) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d episodes (%d ripe): lag mean %s p50 %s p99 %s max %s; "+
		"module's mean %s p99 %s, of one episode %s more at p99; stale mean %s p99 %s\n",
		f.episodes, f.ripe, minutes(f.lag.mean()), minutes(f.lag.quantile(0.5)), minutes(f.lag.quantile(0.99)),
		minutes(f.lag.quantile(1)),
		minutes(f.module.mean()), minutes(f.module.quantile(0.99)), minutes(f.further.quantile(0.99)),
		minutes(f.stale.mean()), minutes(f.stale.quantile(0.99)))
	fmt.Fprintf(&b, "  calls: ordinary day %.2f (%.2f of it in doubt); "+
		"episode %.1f, %.2f an hour, %.3f of polling as long; outage %.0f\n",
		f.ordinary, f.doubted, f.calls, f.staleHour, f.share, f.inOutage)
	fmt.Fprintf(&b, "  rollovers lost %d, forced %d; requests failed %d, of these in the outage %d\n", f.lost, f.forced,
		f.failed, f.failedAway)
	return b.String()
}
