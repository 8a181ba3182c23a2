package tokencache_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"perceptd/tokencache"
)

// learned returns a cache of 30 keys whose history of rollovers is full and irregular, with a token of each that is stale or not.
func learned(b *testing.B, stale bool) (*tokencache.Cache, []tokencache.Key) {
	b.Helper()
	m := tokencache.Memory{BootID: "before", Boot: time.Hour, Wall: time.Now(), Synchronised: true}
	var keys []tokencache.Key
	for i := range 30 {
		keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("https://r%d.example.net", i)})
	}
	for i := range 512 {
		at := 0.3 + float64(i%100)/200
		m.Rollovers = append(m.Rollovers, tokencache.Rollover{Key: keys[i%len(keys)], After: at, By: at + 0.01, Watched: 1})
	}
	s := &script{}
	fetch := func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
		f, err := s.Fetch(ctx, key)
		f.Token.Claims.IssuedAt = time.Now().Add(-5 * time.Minute)
		return f, err
	}
	c := tokencache.New(tokencache.Options{Fetch: fetch, BootID: "now", Memory: &m})
	b.Cleanup(c.Close)
	for _, key := range keys {
		if _, err := c.Get(context.Background(), key, tokencache.Need{}); err != nil {
			b.Fatal(err)
		}
	}
	if stale {
		if _, err := c.Note(tokencache.PolicyChange{ID: "x", AllIdentities: true, Effect: tokencache.Granted}); err != nil {
			b.Fatal(err)
		}
	}
	return c, keys
}

// What a token costs that is there, once much was learnt.
func BenchmarkGet(b *testing.B) {
	for _, stale := range []bool{false, true} {
		b.Run(fmt.Sprintf("stale=%v", stale), func(b *testing.B) {
			c, keys := learned(b, stale)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Get(context.Background(), keys[0], tokencache.Need{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// How long the status of 30 keys keeps callers from the lock.
func BenchmarkStatus(b *testing.B) {
	for _, stale := range []bool{false, true} {
		b.Run(fmt.Sprintf("stale=%v", stale), func(b *testing.B) {
			c, _ := learned(b, stale)
			b.ReportAllocs()
			for b.Loop() {
				c.Status()
			}
		})
	}
}
