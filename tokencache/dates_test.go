package tokencache_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// A token that is dated ahead, by a replica whose clock is wrong or by mistake, keeps no later one from its place:
// neither where its receipt shows that its date is none, nor where nothing shows it, once the later one meets a policy
// change which it does not.
func TestDateAheadKeepsNoLaterTokenOut(t *testing.T) {
	t.Parallel()
	const ahead = 12 * time.Hour
	for _, vouched := range []bool{false, true} {
		// the source has cut the life by the dates, so that nothing contradicts them
		for _, believed := range []bool{false, true} {
			for _, changed := range []bool{false, true} {
				t.Run(fmt.Sprintf("vouched %v believed %v changed %v", vouched, believed, changed), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						w := &tokencachetest.Clock{Trusted: vouched}
						calls := 0
						c := tokencache.New(tokencache.Options{Clock: w.AfterUptime(),
							Fetch: func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
								f := tokenOf("o", key, time.Now())
								if calls++; calls == 1 {
									f.Token.Claims.IssuedAt = f.Token.Claims.IssuedAt.Add(ahead)
									if believed {
										f.Left = f.Token.ExpiresOn.Sub(f.Token.Claims.IssuedAt)
										f.Nominal = f.Left
									}
								}
								return f, nil
							}})
						defer c.Close()
						mustGet(t, c, vault, sdk)
						time.Sleep(time.Minute)
						if changed {
							note(t, c, "x", tokencache.Revoked, time.Time{})
							start := time.Now()
							for withheld(t, c) {
								time.Sleep(time.Minute)
							}
							// five of them since tokens are dated back
							if took := time.Since(start); took > jitter+7*time.Minute {
								t.Errorf("withheld for %v, in which %d tokens were fetched", took, calls-1)
							}
							return
						}
						if believed {
							return // it has the later date of the two, for all that anybody can tell
						}
						if got, err := c.Refresh(t.Context(), vault, true); got != tokencache.Newer || err != nil {
							t.Errorf("a later token is %v, %v", got, err)
						}
					})
				})
			}
		}
	}
}

// A date that is later than the token's receipt is none, and gets no better when it has come to be past: it does not
// show, once the clock is known to be right, that the token has a policy change.
func TestDateAheadOfTheReceiptStaysNone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, r := &tokencachetest.Clock{}, &registry{}
		issued := time.Now().Add(-10 * time.Hour)
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			f := tokenOf("o", key, issued)
			f.Counted, f.Token.Claims.IssuedAt = false, f.Token.ExpiresOn.Add(-time.Hour)
			return f
		})
		c := tokencache.New(tokencache.Options{Clock: w.AfterUptime(), Fetch: r.Fetch})
		defer c.Close()
		note(t, c, "x", tokencache.Granted, time.Time{})
		time.Sleep(jitter + time.Minute)
		mustGet(t, c, vault, sdk)
		for time.Sleep(13 * time.Hour); time.Since(issued) < 24*time.Hour-time.Minute; time.Sleep(5 * time.Minute) {
			w.Set(0, true)
			if got := policyState(t, c); got == tokencache.Current {
				t.Fatalf("a token of %v before the change is %v", 10*time.Hour, got)
			}
		}
	})
}
