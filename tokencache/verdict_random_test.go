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
	"perceptd/tokencache/tokencachetest"
)

// truth is a back end that remembers when each token was really issued, and a device whose clock may be
// wrong.
type truth struct {
	device
	clock tokencachetest.Clock

	spread time.Duration // how long changes take to reach new tokens
	counts bool          // the back end counts lives
	issued sync.Map      // token digest → time.Time
	calls  map[tokencache.Key][]time.Time
}

func (w *truth) Fetch(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	fetched, err := w.device.Fetch(ctx, key)
	if err != nil {
		return fetched, err
	}
	w.mu.Lock()
	w.calls[key] = append(w.calls[key], time.Now())
	w.mu.Unlock()
	// Token gives the same one again: nothing passes between the two calls.
	fetched.Counted = w.counts
	w.issued.LoadOrStore(fetched.Token.Text.SHA256(), fetched.Token.ExpiresOn.Add(-24*time.Hour))
	return fetched, nil
}

// lacks reports whether a token was issued before a change had reached new tokens.
func (w *truth) lacks(digest string, ch happened) bool {
	issued, _ := w.issued.Load(digest)
	return issued.(time.Time).Before(ch.on.Add(w.spread).Truncate(time.Second))
}

// happened is a policy change as it really was.
type happened struct {
	tokencache.PolicyChange
	on    time.Time // by true time
	noted bool
}

var resources = []string{"api://a", "api://b", "api://c"}

// Whatever happens in whatever order: what is labelled current lacks no change that was noted, what a
// revocation withholds is served to nobody, none is followed by an older one, and once the world is
// well again every token becomes current.
func TestRandomPolicyChanges(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		steps := rapid.SliceOfN(rapid.IntRange(0, 999), 20, 80).Draw(r, "steps")
		options := simulator.Options{
			Seed: rapid.Uint64().Draw(r, "seed"),
			Rollover: rapid.SampledFrom([]simulator.Rollover{simulator.AtExpiry, simulator.AtHalfLife,
				simulator.Jittered}).Draw(r, "rollover"),
			Replicas:         rapid.IntRange(1, 3).Draw(r, "replicas"),
			PropagationDelay: time.Duration(rapid.IntRange(0, 9).Draw(r, "spread")) * time.Minute,
			Aged:             time.Duration(rapid.IntRange(0, 20).Draw(r, "aged")) * time.Hour,
		}
		counts := rapid.Bool().Draw(r, "counts")
		var fault error // told to rapid outside of the bubble, whose goroutine is not its own
		synctest.Test(t, func(t *testing.T) { fault = randomPolicyChanges(t, options, counts, steps) })
		if fault != nil {
			r.Fatal(fault)
		}
	})
}

func randomPolicyChanges(t *testing.T, options simulator.Options, counts bool, steps []int) error {
	w := &truth{
		device: device{backend: simulator.New(options)}, clock: tokencachetest.Clock{Trusted: true},
		spread: options.PropagationDelay, counts: counts, calls: make(map[tokencache.Key][]time.Time),
	}
	c := tokencache.New(tokencache.Options{
		Fetch: w.Fetch, Clock: w.clock.AfterUptime(), Roll: rand.New(rand.NewPCG(options.Seed, 0)).Float64,
	})
	defer c.Close()
	run := &randomRun{world: w, cache: c, served: make(map[tokencache.Key]time.Time)}
	for i, step := range steps {
		if err := run.step(t, i, step); err != nil {
			return fmt.Errorf("step %d (%d): %w", i, step, err)
		}
		if err := c.CheckJudgements(nil); err != nil {
			return fmt.Errorf("step %d (%d): %w", i, step, err)
		}
	}
	if err := run.heals(t); err != nil {
		return err
	}
	if calls := w.backend.Calls(); calls.Peak > 2 {
		return fmt.Errorf("%d calls at once", calls.Peak)
	}
	return run.calls()
}

type randomRun struct {
	world   *truth
	cache   *tokencache.Cache
	changes []happened
	served  map[tokencache.Key]time.Time // when the token served last was issued
	asked   int                          // fetches that were asked for by hand
}

// step does what a number says. Its hundreds choose the kind, its rest how much.
func (r *randomRun) step(t *testing.T, i, step int) error {
	kind, much := step/100, step%100
	key := tokencache.Key{Resource: resources[much%3]}
	switch kind {
	case 0, 1, 2:
		time.Sleep(time.Duration(much*much) * 10 * time.Second)
	case 3:
		r.world.device.set(map[bool]error{true: down}[much < 40])
	case 4:
		behind := time.Duration(much-50) * 20 * time.Hour
		if much%2 == 0 {
			behind = time.Duration(much-50) * time.Minute
		}
		// Where lives are counted, a clock that is wrong though it counts as right lets nothing out either.
		r.world.clock.Set(behind, r.world.counts && much%3 == 0)
		if much < 50 {
			r.world.clock.Set(0, true)
		}
	case 5:
		r.change(i, much)
	case 6:
		return r.note(much)
	case 7:
		if much < 20 && len(r.changes) > 0 {
			r.withdraw(much)
			return nil
		}
		r.asked++
		_, _ = r.cache.Refresh(t.Context(), key, much%2 == 0)
	default:
		return r.check(t, key)
	}
	return nil
}

// change is a policy change that nobody told perceptd of yet.
func (r *randomRun) change(i, much int) {
	if _, err := r.world.backend.ChangePermissions("device",
		simulator.Permissions{Roles: []string{fmt.Sprint(i)}}); err != nil {
		panic(err)
	}
	ch := happened{on: time.Now(), PolicyChange: tokencache.PolicyChange{
		ID: fmt.Sprint(i), AllIdentities: true,
		Effect: []tokencache.Effect{tokencache.Changed, tokencache.Granted, tokencache.Revoked}[much%3],
	}}
	if much >= 30 {
		ch.Resource = resources[much%3]
	}
	r.changes = append(r.changes, ch)
}

// note tells of the latest change: right when it happens as "now", later with its date.
func (r *randomRun) note(much int) error {
	if len(r.changes) == 0 {
		return nil
	}
	ch := &r.changes[len(r.changes)-1]
	if ch.noted {
		return nil
	}
	told := ch.PolicyChange
	if !ch.on.Equal(time.Now()) {
		told.At = ch.on.Round(0)
	}
	_, err := r.cache.RecordChange(told)
	if errors.As(err, new(*tokencache.FutureError)) { // its clock is behind: then it is told as people are advised to
		told.At = time.Time{}
		_, err = r.cache.RecordChange(told)
	}
	ch.noted = err == nil
	return err
}

func (r *randomRun) withdraw(much int) {
	ch := &r.changes[much%len(r.changes)]
	r.cache.Withdraw(ch.ID)
	ch.noted = false
	ch.on = time.Time{} // it never was
}

func (r *randomRun) check(t *testing.T, key tokencache.Key) error {
	answer, err := r.cache.Get(t.Context(), key, sdk)
	var fetch *tokencache.FetchError
	switch {
	case err == nil:
		return r.checkAnswer(key, answer)
	case errors.As(err, new(*tokencache.WithheldError)), errors.As(err, &fetch) &&
		(fetch.Kind == tokencache.Unreachable || fetch.Kind == tokencache.Malformed):
		return nil
	}
	return err
}

func (r *randomRun) checkAnswer(key tokencache.Key, answer tokencache.Answer) error {
	digest := answer.Token.Text.SHA256()
	for _, ch := range r.changes {
		if !ch.noted || ch.Resource != "" && ch.Resource != key.Resource || !r.world.lacks(digest, ch) {
			continue
		}
		if ch.Effect == tokencache.Revoked {
			return fmt.Errorf("%v got a token that lacks the revocation %s", key, ch.ID)
		}
		if answer.Permissions.State == tokencache.Current {
			return fmt.Errorf("%v got a token as current that lacks change %s", key, ch.ID)
		}
	}
	if !answer.Token.ExpiresOn.After(time.Now()) {
		return fmt.Errorf("%v got a token that expired on %v", key, answer.Token.ExpiresOn)
	}
	issued, _ := r.world.issued.Load(digest)
	if before := r.served[key]; issued.(time.Time).Before(before) && before.Add(24*time.Hour).After(time.Now()) {
		return fmt.Errorf("%v got a token of %v after one of %v", key, issued, before)
	}
	r.served[key] = issued.(time.Time)
	return nil
}

// heals makes the world well, and looks that every token is current within two lives, and that whoever
// is not current is asked for until then.
func (r *randomRun) heals(t *testing.T) error {
	r.world.device.set(nil)
	r.world.clock.Set(0, true)
	for range 4 * 50 {
		time.Sleep(15 * time.Minute)
		for _, resource := range resources {
			if err := r.check(t, tokencache.Key{Resource: resource}); err != nil {
				return fmt.Errorf("while healing: %w", err)
			}
		}
		for _, s := range r.cache.Status() {
			if s.Permissions.State != tokencache.Current &&
				(s.NextRefresh.IsZero() || time.Until(s.NextRefresh) > 100*time.Minute) {
				return fmt.Errorf("%v is %v and is asked for on %v", s.Key, s.Permissions.State, s.NextRefresh)
			}
		}
	}
	for _, resource := range resources {
		answer, err := r.cache.Get(t.Context(), tokencache.Key{Resource: resource}, sdk)
		if err != nil || answer.Permissions.State != tokencache.Current {
			return fmt.Errorf("%s after all: %v, %w", resource, answer.Permissions.State, err)
		}
	}
	if len(r.cache.Status()) != len(resources) {
		return fmt.Errorf("%d keys after all", len(r.cache.Status()))
	}
	return nil
}

// calls looks that no key was asked for more than probing allows in any hour.
func (r *randomRun) calls() error {
	for key, times := range r.world.calls {
		for i, at := range times {
			in := 0
			for _, other := range times[i:] {
				if other.Sub(at) < time.Hour {
					in++
				}
			}
			if in > 40+r.asked {
				return fmt.Errorf("%v was asked for %d times within an hour", key, in)
			}
		}
	}
	return nil
}
