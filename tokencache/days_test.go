package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// device is the simulated back end behind a network that may be down.
type device struct {
	backend *simulator.Backend

	mu     sync.Mutex
	broken error
	calls  int
}

func (d *device) set(broken error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.broken = broken
}

func (d *device) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls
}

func (d *device) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	d.mu.Lock()
	d.calls++
	broken := d.broken
	d.mu.Unlock()
	if broken != nil {
		return tokencache.Fetched{}, broken
	}
	issued, err := d.backend.Token(simulator.Selection{}, key.Resource)
	if err != nil {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.IdentityNotFound, Detail: err.Error()}
	}
	return tokencache.Fetched{
		Token: tokencache.Token{
			Text:      tokencache.NewSecret(issued.Text),
			ExpiresOn: issued.ExpiresOn,
			Claims: tokencache.Claims{
				IssuedAt: issued.IssuedAt, Groups: issued.Permissions.Groups, Roles: issued.Permissions.Roles,
				WIDs: issued.Permissions.WIDs,
			},
		},
		Left: time.Until(issued.ExpiresOn),
	}, nil
}

var down = &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"}

// days runs f in virtual time with a cache on a simulated back end.
func days(t *testing.T, o simulator.Options, f func(t *testing.T, d *device, c *tokencache.Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d := &device{backend: simulator.New(o)}
		c := tokencache.New(tokencache.Options{Fetch: d.Fetch, Roll: rand.New(rand.NewPCG(o.Seed, 0)).Float64})
		defer c.Close()
		f(t, d, c)
	})
}

var sdk = tokencache.Need{MinTTL: 5 * time.Minute}

// serveThrough asks as a module's SDK does, every step, until the time is over, and returns how long
// the longest answer took. Each token must be valid.
func serveThrough(t *testing.T, c *tokencache.Cache, span, step time.Duration) (slowest time.Duration) {
	t.Helper()
	for end := time.Now().Add(span); time.Now().Before(end); time.Sleep(step) {
		before := time.Now()
		answer, err := c.Get(t.Context(), vault, sdk)
		slowest = max(slowest, time.Since(before))
		if err != nil {
			t.Fatalf("at %v: %v", time.Now(), err)
		}
		if !answer.Token.ExpiresOn.After(time.Now()) || answer.Left > time.Until(answer.Token.ExpiresOn) {
			t.Fatalf("at %v: a token that expired at %v, told to have %v left", time.Now(), answer.Token.ExpiresOn,
				answer.Left)
		}
	}
	return slowest
}

// A week on each kind of back end: every request is answered at once, for few calls.
func TestWeeks(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name     string
		rollover simulator.Rollover
		calls    int // a day, at most
		slowest  time.Duration
	}{
		{"newer at expiry only", simulator.AtExpiry, 12, time.Second}, // a miss waits for the moment after the expiry
		{"newer at half life", simulator.AtHalfLife, 4, 500 * time.Millisecond},
		{"newer at random between 8 and 24 h", simulator.Jittered, 12, 500 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			days(t, simulator.Options{Rollover: row.rollover}, func(t *testing.T, d *device, c *tokencache.Cache) {
				slowest := serveThrough(t, c, 7*24*time.Hour, time.Minute)
				if d.count() > 7*row.calls+1 {
					t.Errorf("%d calls in a week", d.count())
				}
				if slowest > row.slowest {
					t.Errorf("an answer took %v", slowest)
				}
				t.Logf("%d calls in a week, slowest answer %v", d.count(), slowest)
			})
		})
	}
}

// One token's life, boundary by boundary, on a back end that keeps its copy to the end.
func TestDayAtEveryBoundary(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &device{backend: simulator.New(simulator.Options{})}
		c := tokencache.New(tokencache.Options{Fetch: d.Fetch, Roll: func() float64 { return 0.5 }})
		defer c.Close()
		first := mustGet(t, c, vault, sdk)
		lives := []time.Duration{12 * time.Hour, 18 * time.Hour, 21 * time.Hour, 22*time.Hour + 30*time.Minute,
			23*time.Hour + 15*time.Minute, 23*time.Hour + 37*time.Minute + 30*time.Second}
		start := time.Now()
		for i, boundary := range lives {
			time.Sleep(time.Until(start.Add(boundary - time.Second)))
			if d.count() != 1+i {
				t.Fatalf("a second before %v: %d calls, want %d", boundary, d.count(), 1+i)
			}
			time.Sleep(2 * time.Second)
			if d.count() != 2+i {
				t.Fatalf("a second after %v: %d calls, want %d", boundary, d.count(), 2+i)
			}
			if got := only(t, c); got.State != tokencache.Fresh || got.LastOutcome != tokencache.Unchanged {
				t.Fatalf("after %v: %+v", boundary, got)
			}
		}
		time.Sleep(time.Until(start.Add(24*time.Hour - time.Second)))
		if got := mustGet(t, c, vault, sdk); !got.Token.Text.Equal(first.Token.Text) {
			t.Error("another token before the rollover")
		}
		time.Sleep(3 * time.Second)
		if got := mustGet(t, c, vault, sdk); got.Token.Text.Equal(first.Token.Text) || got.Left < 23*time.Hour {
			t.Errorf("two seconds after the expiry: %v left", got.Left)
		}
	})
}

// The back end is away from hour 11 until a minute before the token's expiry; fifty callers ask
// through it all.
func TestOutageUntilTheLastMinute(t *testing.T) {
	t.Parallel()
	for _, rollover := range []simulator.Rollover{simulator.AtExpiry, simulator.AtHalfLife} {
		days(t, simulator.Options{Rollover: rollover}, func(t *testing.T, d *device, c *tokencache.Cache) {
			mustGet(t, c, vault, sdk)
			time.Sleep(11 * time.Hour)
			d.set(down)
			before := d.count()
			var all sync.WaitGroup
			for i := range 50 {
				all.Go(func() {
					time.Sleep(time.Duration(i) * 100 * time.Millisecond)
					serveThrough(t, c, 13*time.Hour+10*time.Minute, 7*time.Minute)
				})
			}
			time.Sleep(12*time.Hour + 59*time.Minute)
			d.set(nil)
			spent := d.count() - before
			all.Wait()
			// 5 minutes apart on average half that, for 12 h; then at most 5 s apart for 4 minutes.
			if spent < 100 || spent > 12*60/2+4*60+20 {
				t.Errorf("%d calls during the outage", spent)
			}
			if after := d.count() - before - spent; after > 20 {
				t.Errorf("%d calls after the outage", after)
			}
			t.Logf("%d calls during 13 hours of outage", spent)
		})
	}
}

// Fifty callers all come in the last five minutes of a token that the back end will not renew before
// its expiry: each gets it, waits half a second at most, and together they cost a call every 30 s.
func TestCrowdInTheLastMinutes(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(24*time.Hour - 5*time.Minute)
		before := d.count()
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				if slowest := serveThrough(t, c, 5*time.Minute-time.Second,
					time.Second); slowest > 500*time.Millisecond {
					t.Errorf("an answer took %v", slowest)
				}
			})
		}
		all.Wait()
		if spent := d.count() - before; spent > 12 {
			t.Errorf("%d calls for %d requests", spent, 50*299)
		}
		time.Sleep(3 * time.Second)
		if got := mustGet(t, c, vault, sdk); got.Left < 23*time.Hour {
			t.Errorf("%v left after the rollover", got.Left)
		}
	})
}

// After an outage longer than the token's life the first caller is served within seconds of the back
// end's return.
func TestRecoveryAfterExpiry(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		d.set(down)
		time.Sleep(30 * time.Hour)
		if _, err := c.Get(t.Context(), vault, sdk); kindOf(t, err) != tokencache.Unreachable {
			t.Fatal(err)
		}
		d.set(nil)
		returned := time.Now()
		for {
			if _, err := c.Get(t.Context(), vault, sdk); err == nil {
				break
			}
			time.Sleep(time.Second)
		}
		if took := time.Since(returned); took > 6*time.Second {
			t.Errorf("served %v after the return", took)
		}
	})
}

// Whatever happens in whatever order, an expired token is never served, a valid one always is, none is
// followed by an older one, and the source's limits hold.
func TestRandomDays(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		steps := rapid.SliceOfN(rapid.IntRange(0, 99), 20, 60).Draw(r, "steps")
		options := simulator.Options{
			Seed: rapid.Uint64().Draw(r, "seed"),
			Rollover: rapid.SampledFrom([]simulator.Rollover{simulator.AtExpiry, simulator.AtHalfLife,
				simulator.Jittered}).Draw(r, "rollover"),
			Replicas: rapid.IntRange(1, 3).Draw(r, "replicas"),
		}
		var fault error // told to rapid outside of the bubble, whose goroutine is not its own
		synctest.Test(t, func(t *testing.T) { fault = randomDays(t, options, steps) })
		if fault != nil {
			r.Fatal(fault)
		}
	})
}

func randomDays(t *testing.T, options simulator.Options, steps []int) error {
	d := &device{backend: simulator.New(options)}
	c := tokencache.New(tokencache.Options{Fetch: d.Fetch, Roll: rand.New(rand.NewPCG(options.Seed, 0)).Float64})
	defer c.Close()
	served := make(map[tokencache.Key]tokencache.Token)
	for _, step := range steps {
		key := tokencache.Key{Resource: []string{"api://a", "api://b", "api://c"}[step%3]}
		switch {
		case step < 40:
			time.Sleep(time.Duration(step*step) * time.Minute)
		case step < 50:
			d.set(down)
		case step < 60:
			d.set(nil)
		case step < 65:
			_, _ = c.Refresh(t.Context(), key, false)
		default:
			if err := checkAnswer(t, c, key, served); err != nil {
				return err
			}
		}
	}
	if calls := d.backend.Calls(); calls.Peak > 2 {
		return fmt.Errorf("%d calls at once", calls.Peak)
	}
	return nil
}

// checkAnswer asks for key and compares the answer with what was served before.
func checkAnswer(t *testing.T, c *tokencache.Cache, key tokencache.Key,
	served map[tokencache.Key]tokencache.Token) error {
	answer, err := c.Get(t.Context(), key, sdk)
	now, before := time.Now(), served[key]
	var fetch *tokencache.FetchError
	switch {
	case err == nil && (answer.Left <= 0 || !answer.Token.ExpiresOn.After(now)):
		return fmt.Errorf("an expired token: %v left, expired %v, now %v", answer.Left, answer.Token.ExpiresOn, now)
	case err == nil && before.ExpiresOn.After(now) && answer.Token.Claims.IssuedAt.Before(before.Claims.IssuedAt):
		return fmt.Errorf("a token of %v after one of %v", answer.Token.Claims.IssuedAt, before.Claims.IssuedAt)
	case err == nil:
		served[key] = *answer.Token
	case before.ExpiresOn.After(now):
		return fmt.Errorf("no token, though one is valid until %v: %w", before.ExpiresOn, err)
	case !errors.As(err, &fetch) || fetch.Kind != tokencache.Unreachable && fetch.Kind != tokencache.Malformed:
		return fmt.Errorf("an error of another kind: %w", err)
	}
	return nil
}
