package tokencache_test

import (
	"testing"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// What is learnt in three days saves calls on those that follow, and whoever asks sees when a newer
// token is expected.
func TestLearningSavesCalls(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		rollover simulator.Rollover
		kind     tokencache.PatternKind
		age      time.Duration
	}{
		{simulator.AtExpiry, tokencache.Regular, 24 * time.Hour},
		{simulator.AtHalfLife, tokencache.Regular, 12 * time.Hour},
		{simulator.Jittered, tokencache.Irregular, 0},
	} {
		t.Run(row.rollover.String(), func(t *testing.T) {
			t.Parallel()
			days(t, simulator.Options{Rollover: row.rollover, Seed: 7},
				func(t *testing.T, d *device, c *tokencache.Cache) {
					serveThrough(t, c, 24*time.Hour, time.Minute)
					if d.count() > 13 {
						t.Errorf("%d calls on the first day", d.count())
					}
					serveThrough(t, c, 4*24*time.Hour+time.Hour, time.Minute)
					before := d.count()
					serveThrough(t, c, 10*24*time.Hour, time.Minute)
					if spent := d.count() - before; spent > 60 {
						t.Errorf("%d calls in ten days", spent)
					}
					got := only(t, c)
					if got.Pattern.Kind != row.kind || (got.Pattern.Age-row.age).Abs() > time.Minute || got.Seen == 0 {
						t.Errorf("learnt %+v from %d", got.Pattern, got.Seen)
					}
					rolls, _ := d.backend.RolloverAt(simulator.Selection{}, vault.Resource)
					if off := got.Expected.Sub(rolls).Abs(); row.kind == tokencache.Regular && off > time.Minute {
						t.Errorf("expected on %v, the rollover is on %v", got.Expected, rolls)
					}
					t.Logf("%d calls in ten days", d.count()-before)
				})
		})
	}
}

// A back end that changes its ways is found out by the hourly probes of a stale token.
func TestRolloverEarlierThanLearnt(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Reuse: true}
	s.Edit = func(f *tokencache.Fetched) {
		f.Token.Claims.IssuedAt = f.Token.ExpiresOn.Add(-24*time.Hour - 5*time.Minute)
	}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		serveThrough(t, c, 4*24*time.Hour+time.Hour, time.Minute)
		if got := only(t, c); got.Pattern.Kind != tokencache.Regular {
			t.Fatalf("learnt %+v", got.Pattern)
		}
		note(t, c, "x", tokencache.Changed, time.Time{})
		time.Sleep(5 * time.Hour)
		s.Set(func(s *tokencachetest.Source) { s.Reuse = false })
		time.Sleep(70 * time.Minute)
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("%v", got)
		}
		if got := only(t, c); !got.Expected.IsZero() && got.Expected.Before(time.Now()) {
			t.Errorf("expected on %v", got.Expected)
		}
	})
}

// A key that is new on a device learns from what the others have seen.
func TestKeysLearnFromEachOther(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife}, func(t *testing.T, d *device, c *tokencache.Cache) {
		serveThrough(t, c, 3*24*time.Hour, time.Minute)
		other := tokencache.Key{Resource: "https://storage.azure.com"}
		mustGet(t, c, other, sdk)
		for _, s := range c.Status() {
			if s.Pattern.Kind != tokencache.Regular || (s.Pattern.Age-12*time.Hour).Abs() > time.Minute {
				t.Errorf("%v: %+v from %d of its own", s.Key, s.Pattern, s.Seen)
			}
		}
	})
}

// An advice of the back end's is followed once for each token.
func TestAdvice(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Reuse: true, Edit: func(f *tokencache.Fetched) { f.RefreshIn = time.Hour }}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		if got := mustGet(t, c, vault, sdk).RefreshIn; got != time.Hour {
			t.Errorf("planned in %v", got)
		}
		time.Sleep(time.Hour + time.Second)
		if got := mustGet(t, c, vault, sdk).RefreshIn; s.Count() != 2 || got < 10*time.Hour {
			t.Errorf("%d calls, the next in %v", s.Count(), got)
		}
	})
}
