package staleness

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"perceptd/agent/simulator"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// check fails the test when lives contradict themselves, or what holds of every strategy.
func check(t *testing.T, lives []*life) {
	t.Helper()
	f := sum(lives, whole)
	if f.episodes == 0 || f.unmet > 0 || f.early > 0 {
		t.Errorf("%d episodes, %d of them without an end, %d that ended before their rollover", f.episodes, f.unmet,
			f.early)
	}
	if f.mislabeled > 0 {
		t.Errorf("%d tokens called current that lacked a change", f.mislabeled)
	}
}

// The same simulation as docs/staleness.md tells of, small: it holds together, and perceptd's figures are
// of the right size.
func TestStalenessInSmall(t *testing.T) {
	t.Parallel()
	for _, m := range models(15) {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			w := world{model: m, keys: 20, days: 15, seed: 1}
			lives := perceptd(t, w, false)
			check(t, lives)
			f, away := sum(lives, learnt), sum(w.follow(oracle()), whole).failedAway
			if f.failed > f.failedAway || f.failedAway > away {
				t.Errorf("%d requests failed, %d of them in the outage; the oracle's %d", f.failed, f.failedAway, away)
			}
			if p99 := f.lag.quantile(0.99); m.rollover != simulator.Jittered && p99 > 15*time.Minute {
				t.Errorf("lag of %v at p99", p99)
			}
			if lag := f.lag.mean(); lag > 10*time.Minute || f.share > 0.7 || f.ordinary > 6 {
				t.Errorf("mean lag %v for %.0f %% of polling's calls; %.1f calls on an ordinary day", lag, f.share*100,
					f.ordinary)
			}
		})
	}
}

// The other strategies do what they are named for.
func TestStalenessOfOthers(t *testing.T) {
	t.Parallel()
	w := world{model: models(15)[1], keys: 20, days: 15, seed: 1}
	for _, row := range []struct {
		strategy
		least, most time.Duration // mean lag
		daily       float64       // calls, at most
	}{
		{oracle(), 0, 0, 2.1},
		{polling(5 * time.Minute), 2 * time.Minute, 3 * time.Minute, 290},
		{halfLife(), time.Second, 2 * time.Minute, 2.1},
		{azidentity(), 6 * time.Hour, 12 * time.Hour, 1.1},
	} {
		lives := w.follow(row.strategy)
		check(t, lives)
		f := sum(lives, whole)
		if f.lag.mean() < row.least || f.lag.mean() > row.most || f.ordinary > row.daily || f.failed > 0 {
			t.Errorf("%s: mean lag %v, %.2f calls a day, %d requests failed", row.name, f.lag.mean(), f.ordinary,
				f.failed)
		}
	}
}
