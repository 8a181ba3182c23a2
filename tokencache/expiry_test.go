package tokencache_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// wholeSeconds is a back end that rolls over at the expiry and not before, counts whole seconds, has a clock that is
// ahead of the device's, and takes its time: it looks at its clock at the beginning of a call, in its middle or at its
// end.
type wholeSeconds struct {
	takes time.Duration
	looks float64 // share of a call after which it looks at its clock
	ahead time.Duration
	dated bool // it tells when a token expires, and not how much life is left

	mu    sync.Mutex
	token tokencache.Token
	ends  time.Time // by the true clock
	calls int
}

func (w *wholeSeconds) Fetch(_ context.Context, _ tokencache.Key) (tokencache.Fetched, error) {
	before := time.Duration(float64(w.takes) * w.looks)
	time.Sleep(before)
	f, err := w.answer()
	time.Sleep(w.takes - before)
	if w.dated && err == nil { // as agent/source reads expires_on
		if f.Left = f.Token.ExpiresOn.Sub(time.Now().Round(0)); f.Left <= 0 {
			return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Malformed, JustExpired: true,
				Detail: "it has expired by its expires_on"}
		}
	}
	return f, err
}

// state returns how often it was asked, and when the token ends that it hands out.
func (w *wholeSeconds) state() (calls int, ends time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls, w.ends
}

func (w *wholeSeconds) answer() (tokencache.Fetched, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls++
	now := time.Now().Round(0)
	if !now.Before(w.ends) {
		w.ends = now.Add(24 * time.Hour)
		issued := now.Add(w.ahead).Truncate(time.Second)
		w.token = tokencache.Token{
			Text: tokencache.NewSecret(fmt.Sprint("token ", w.calls)), ExpiresOn: issued.Add(24 * time.Hour),
			NotBefore: issued.Add(-5 * time.Minute),
			Claims:    tokencache.Claims{IssuedAt: issued.Add(-5 * time.Minute)},
		}
	}
	f := tokencache.Fetched{Token: w.token, Left: w.ends.Sub(now).Truncate(time.Second), Counted: !w.dated,
		Nominal: 24*time.Hour + 5*time.Minute}
	if f.Left <= 0 && !w.dated {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Malformed, JustExpired: true,
			Detail: "it has expired by its expires_in"}
	}
	return f, nil
}

// No request fails over rollovers at the expiry, and each is answered within the time that callers are promised,
// however slow the back end is and whatever it makes of fractions of a second.
func TestNoRequestFailsAtTheExpiry(t *testing.T) {
	t.Parallel()
	for _, takes := range []time.Duration{0, 50 * time.Millisecond, 300 * time.Millisecond, time.Second,
		3 * time.Second} {
		for _, looks := range []float64{0, 0.5, 1} {
			for _, clock := range []struct {
				ahead time.Duration
				dated bool
			}{{0, false}, {0, true}, {-2 * time.Second, true}, {2 * time.Second, true}, {-2 * time.Second,
				false}, {2 * time.Second, false}} {
				if takes == 3*time.Second && clock.ahead < 0 && clock.dated {
					// the token seems to be over six seconds before it is, and one call too many may be under way then
					continue
				}
				for _, known := range []bool{false, true} {
					name := fmt.Sprintf("a call takes %v, looks at %v, %+v, clock known %v", takes, looks, clock, known)
					synctest.Test(t, func(t *testing.T) {
						overRollovers(t, name, &wholeSeconds{takes: takes, looks: looks, ahead: clock.ahead,
							dated: clock.dated}, known)
					})
				}
			}
		}
	}
}

func overRollovers(t *testing.T, name string, w *wholeSeconds, known bool) {
	c := tokencache.New(tokencache.Options{Fetch: w.Fetch,
		Clock: tokencache.Clock{Synchronised: func() bool { return known }}})
	defer c.Close()
	time.Sleep(370 * time.Millisecond)
	mustGet(t, c, vault, sdk)
	for range 3 {
		_, ends := w.state()
		time.Sleep(time.Until(ends) - 12*time.Second)
		var all sync.WaitGroup
		before, _ := w.state()
		for time.Now().Before(ends.Add(12 * time.Second)) {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if _, err := c.Get(ctx, vault, sdk); err != nil {
					t.Errorf("%s: %v after the expiry: %v", name, time.Since(ends), err)
				}
			})
			time.Sleep(100 * time.Millisecond)
		}
		all.Wait()
		if after, _ := w.state(); after-before > 8 {
			t.Errorf("%s: %d calls for one rollover", name, after-before)
		}
	}
}

// A key of which nothing was known asks in the very second in which the back end rolls over.
func TestColdKeyAtTheExpiry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &wholeSeconds{takes: 100 * time.Millisecond}
		if _, err := w.Fetch(t.Context(), vault); err != nil {
			t.Fatal(err)
		}
		_, ends := w.state()
		time.Sleep(time.Until(ends) - 500*time.Millisecond)
		c := tokencache.New(tokencache.Options{Fetch: w.Fetch})
		defer c.Close()
		before := time.Now()
		mustGet(t, c, vault, sdk)
		calls, _ := w.state()
		if waited := time.Since(before); waited > 1200*time.Millisecond || calls > 4 {
			t.Errorf("waited %v, %d calls", waited, calls)
		}
	})
}

// What is asked for in the last second of a token's life is given the next token, and not the word that the old one is
// over.
func TestFetchInTheLastSecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &wholeSeconds{takes: 100 * time.Millisecond}
		c := tokencache.New(tokencache.Options{Fetch: w.Fetch})
		defer c.Close()
		mustGet(t, c, vault, sdk)
		_, ends := w.state()
		time.Sleep(time.Until(ends) - 500*time.Millisecond)
		before, _ := w.state()
		if outcome, err := c.Refresh(t.Context(), vault, true); err != nil || outcome != tokencache.Newer {
			t.Errorf("%v %v", outcome, err)
		}
		if calls, _ := w.state(); calls-before > 4 {
			t.Errorf("%d calls", calls-before)
		}
	})
}

// A back end that hands out nothing but a token whose life is over, as by a clock that is seconds off for good, is
// asked again a few times for each caller's miss, and told of.
func TestForeverJustExpired(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Err: &tokencache.FetchError{Kind: tokencache.Malformed, JustExpired: true,
		Detail: "expired"}}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		before := time.Now()
		if _, err := c.Get(t.Context(), vault, sdk); kindOf(t, err) != tokencache.Malformed {
			t.Error(err)
		}
		if took := time.Since(before); took > 5*time.Second || s.Count() != 7 {
			t.Errorf("told after %v and %d calls", took, s.Count())
		}
		if got := only(t, c); got.Failures != 1 || got.Fetches != 7 {
			t.Errorf("%+v", got)
		}
	})
}
