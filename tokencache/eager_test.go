package tokencache_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
)

// A back end without a cache gives another token at each call. Nothing is to be learnt there, and no call is spent on
// trying.
func TestBackEndWithoutACache(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 20} {
		synctest.Test(t, func(t *testing.T) {
			var calls atomic.Int64
			c := tokencache.New(tokencache.Options{Roll: func() float64 { return 0.5 },
				Fetch: func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
					issued := time.Now().Truncate(time.Second)
					return tokencache.Fetched{
						Token: tokencache.Token{
							Text:      tokencache.NewSecret(fmt.Sprint(key, calls.Add(1))),
							ExpiresOn: issued.Add(24 * time.Hour),
							Claims:    tokencache.Claims{IssuedAt: issued.Add(-5 * time.Minute)},
						},
						Left: 24 * time.Hour, Counted: true, Nominal: 24*time.Hour + 5*time.Minute,
					}, nil
				}})
			defer c.Close()
			var keys []tokencache.Key
			for i := range n {
				keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("https://r%d.example.net", i)})
			}
			if err := c.Prefetch(keys); err != nil {
				t.Fatal(err)
			}
			for day := range 7 {
				before := calls.Load()
				time.Sleep(24 * time.Hour)
				if got := calls.Load() - before; day > 1 && got > int64(3*n) {
					t.Errorf("%d keys cost %d calls on day %d", n, got, day+1)
				}
			}
		})
	}
}
