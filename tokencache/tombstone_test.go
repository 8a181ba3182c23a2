package tokencache_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// A token that is not held any more is remembered until it has expired and nothing on record happened while it was
// valid. So what is kept does not grow with each rollover.
func TestBygonesGo(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, _ *device, c *tokencache.Cache) {
		keys := make([]tokencache.Key, 10)
		for i := range keys {
			keys[i] = tokencache.Key{Resource: api(i)}
		}
		if err := c.Prefetch(keys); err != nil {
			t.Fatal(err)
		}
		most := 0
		for range 20 * 24 {
			time.Sleep(time.Hour)
			most = max(most, len(c.Snapshot().Tombstones))
		}
		if rollovers := 2; most == 0 || most > rollovers*len(keys) {
			t.Errorf("%d tokens that are not held are remembered of %d keys", most, len(keys))
		}

		var before []string // the change
		for _, r := range c.Snapshot().Keys {
			before = append(before, r.Token.Text.SHA256())
		}
		note(t, c, "x", tokencache.Revoked, time.Time{})
		noted := time.Now()
		remembered := func() (n int) {
			for _, r := range c.Snapshot().Tombstones {
				for _, digest := range before {
					if r.SHA256 == digest {
						n++
					}
				}
			}
			return n
		}
		time.Sleep(29 * time.Hour)
		for ; onRecord(c, "x") != nil; time.Sleep(time.Hour) {
			if n := remembered(); n != len(keys) {
				t.Fatalf("%v after the change %d of %d tokens that it withheld are remembered", time.Since(noted), n,
					len(keys))
			}
		}
		time.Sleep(time.Hour)
		if n := remembered(); n != 0 {
			t.Errorf("%d tokens that expired are remembered though no change on record is about them", n)
		}
	})
}

// A back end that goes on giving a token that has expired, with 24 hours to live each time, is not believed however
// long it does, nor after a boot: of that, no more is known than that the token was received, and given again, before
// it.
func TestExpiredTokenThatComesForEver(t *testing.T) {
	t.Parallel()
	for _, boots := range []int{0, 1, 3} {
		for _, known := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d boots, the clock is known %v", boots, known), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					f := tokenOf("o", vault, time.Now())
					f.Left, f.Counted = 24*time.Hour, true
					f.Token.ExpiresOn = time.Now().Add(24 * time.Hour)
					w := &tokencachetest.Clock{Trusted: known}
					fetch := func(context.Context, tokencache.Key) (tokencache.Fetched, error) { return f, nil }
					c := tokencache.New(tokencache.Options{Clock: w.AfterBoot(), BootID: "0", Fetch: fetch})
					defer func() { c.Close() }()
					mustGet(t, c, vault, sdk)
					time.Sleep(24 * time.Hour)
					for hours := 2; hours <= 10*24; hours += 2 {
						time.Sleep(2 * time.Hour)
						if hours%48 == 12 && hours/48 < boots {
							c = after(c, fetch, w.AfterBoot(), fmt.Sprint(hours))
							time.Sleep(time.Minute)
						}
						if a, err := c.Get(t.Context(), vault, sdk); err == nil {
							t.Fatalf("after %d hours it is served, with %v left", hours, a.Left)
						}
					}
				})
			})
		}
	}
}
