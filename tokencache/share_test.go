package tokencache_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// hanging answers as s does, but hangs for some keys.
func hanging(s *tokencachetest.Source, hangs func(tokencache.Key) bool) func(context.Context,
	tokencache.Key) (tokencache.Fetched, error) {
	return func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
		if hangs(key) {
			<-ctx.Done()
			return tokencache.Fetched{}, ctx.Err()
		}
		return s.Fetch(ctx, key)
	}
}

// crowd has callers ask for each key again and again until the context ends.
func crowd(ctx context.Context, all *sync.WaitGroup, c *tokencache.Cache, keys []tokencache.Key) {
	for _, key := range keys {
		all.Go(func() {
			for ctx.Err() == nil {
				bounded, cancel := context.WithTimeout(ctx, 10*time.Second)
				_, _ = c.Get(bounded, key, tokencache.Need{})
				cancel()
				time.Sleep(time.Second)
			}
		})
	}
}

// A refresh that is due while probes are queued and callers of keys that hang come without pause begins within two
// minutes, however many probes came before it.
func TestRefreshBehindProbes(t *testing.T) {
	t.Parallel()
	for _, probes := range []int{1, 5, 20} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			var refreshed []time.Time
			held := map[tokencache.Key]tokencache.Token{}
			s := &tokencachetest.Source{}
			c := tokencache.New(tokencache.Options{Roll: func() float64 { return 0.5 },
				Fetch: func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
					if strings.HasPrefix(key.Resource, "hang:") {
						<-ctx.Done()
						return tokencache.Fetched{}, ctx.Err()
					}
					mu.Lock()
					defer mu.Unlock()
					if key == vault {
						refreshed = append(refreshed, time.Now())
						return s.Fetch(ctx, key)
					}
					if held[key].ExpiresOn.Before(time.Now()) {
						held[key] = tokencache.Token{Text: tokencache.NewSecret(key.Resource),
							ExpiresOn: time.Now().Round(0).Add(16 * time.Hour)}
					}
					return tokencache.Fetched{Token: held[key], Left: time.Until(held[key].ExpiresOn)}, nil
				}})
			defer c.Close()
			keys := []tokencache.Key{}
			for i := range probes { // refreshed at 8 h, which brings the same, and so probed at 12 h
				keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("api://probe/%d", i)})
			}
			if err := c.Prefetch(append(keys, vault)); err != nil {
				t.Fatal(err)
			}
			due := time.Now().Add(12 * time.Hour)
			time.Sleep(11*time.Hour + 50*time.Minute)
			ctx, cancel := context.WithCancel(t.Context())
			var all, hang = sync.WaitGroup{}, []tokencache.Key{}
			for i := range 8 {
				hang = append(hang, tokencache.Key{Resource: fmt.Sprintf("hang://%d", i)})
			}
			crowd(ctx, &all, c, hang)
			time.Sleep(time.Until(due) + 2*time.Minute)
			cancel()
			all.Wait()
			mu.Lock()
			defer mu.Unlock()
			if len(refreshed) != 2 {
				t.Errorf("behind %d probes: %d calls, the refresh was due two minutes ago", probes, len(refreshed))
			}
		})
	}
}

// Thirty keys of one identity that hang keep no cold key of another waiting, from the first moment on.
func TestHangingIdentityLeavesTheOthersAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		bad := tokencache.Selector{Kind: tokencache.ClientID, ID: "bad"}
		c := tokencache.New(tokencache.Options{Fetch: hanging(&tokencachetest.Source{Latency: 300 * time.Millisecond},
			func(key tokencache.Key) bool { return key.Selector == bad })})
		defer c.Close()
		if err := c.Prefetch([]tokencache.Key{{Resource: "api://first"}}); err != nil {
			t.Fatal(err)
		}
		var hang []tokencache.Key
		for i := range 30 {
			hang = append(hang, tokencache.Key{Selector: bad, Resource: fmt.Sprintf("api://%d", i)})
		}
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		crowd(ctx, &all, c, hang)
		synctest.Wait()
		for i := range 100 {
			before := time.Now()
			mustGet(t, c, tokencache.Key{Resource: fmt.Sprintf("api://good/%d", i)}, sdk)
			if waited := time.Since(before); waited > 800*time.Millisecond {
				t.Fatalf("the cold key %d of the other identity waited %v for a call of 300 ms", i, waited)
			}
			time.Sleep(7 * time.Second)
		}
		cancel()
		all.Wait()
	})
}
