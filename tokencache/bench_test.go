package tokencache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// A device on which everything is as full as it gets: a token of each key, a history of rollovers that is full and
// irregular, and, unless the tokens are current, a full record of policy changes of that effect: half of them are for
// all resources, half for one each.
func fullCache(b *testing.B, keys int, effect Effect) (*Cache, Key) {
	b.Helper()
	const hour, now = time.Hour, 10 * time.Hour
	wall, began := time.Now(), time.Now()
	at := func(boot time.Duration) time.Time { return wall.Add(boot - now) }
	m := Snapshot{BootID: "now", Boot: now, On: now, Wall: wall, Synchronised: true}
	for i := range keys {
		key := Key{Resource: fmt.Sprintf("https://r%03d.example.net", i)}
		m.Keys = append(m.Keys, SnapshotEntry{
			Key:     key,
			Token:   Token{Text: NewSecret(key.Resource), ExpiresOn: at(25 * hour)},
			Nominal: 24 * hour, Life: 24 * hour, Given: 24 * hour, ReceivedWall: at(hour),
			IssueWindow: IssueWindow{Earliest: at(hour), Latest: at(hour)},
			IssuedAt:    hour, ReceivedBoot: hour, ReceivedOnTime: hour, IssuedFrom: hour, IssuedTo: hour, Shown: hour,
			Answered: hour, Tries: 1,
			Deadline: 25 * hour, Next: new(20 * hour), Asked: new(now),
		})
	}
	for i := range 512 {
		share := 0.3 + float64(i%100)/200
		m.Rollovers = append(m.Rollovers, Rollover{Key: m.Keys[i%keys].Key, After: share, By: share + 0.01, Watched: 1})
	}
	var r Record
	for i := range MaxChanges {
		moment := 2*hour + time.Duration(i)*time.Second
		r.Changes = append(r.Changes, PolicyChange{
			ID: fmt.Sprintf("%08x", i), AllIdentities: true, Effect: effect, At: at(moment), RecordedAt: at(moment),
			Vouched:  true,
			Resource: []string{"", m.Keys[i%keys].Key.Resource}[i%2], Moment: moment, By: moment,
			Issuer: Window{Earliest: at(moment), Latest: at(moment)}, Checked: true,
		})
	}
	if effect == "" {
		r.Changes = nil
	}
	alternates := make(map[string][]string)
	for i := range 20 {
		alternates[m.Keys[i].Key.Resource] = []string{m.Keys[i+20].Key.Resource, "api://none"}
	}
	c := New(Options{
		Fetch: func(context.Context, Key) (Fetched, error) {
			return Fetched{}, errors.New("nothing is due")
		},
		Clock:  Clock{Boot: func() time.Duration { return now + time.Since(began) }},
		BootID: "now", Snapshot: &m, Record: r,
	})
	b.Cleanup(c.Close)
	c.SetAlternates(alternates)
	return c, m.Keys[0].Key
}

// What a token costs, under the cache's lock, that is there.
func BenchmarkGet(b *testing.B) {
	for _, effect := range []Effect{"", Changed, Revoked} {
		b.Run(cmp.Or(string(effect), "no effect"), func(b *testing.B) {
			c, key := fullCache(b, 60, effect)
			var withheld *WithheldError
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Get(context.Background(), key,
					Need{}); errors.As(err, &withheld) != (effect == Revoked) {
					b.Fatal(err)
				}
			}
		})
	}
}

// What it costs to tell of all keys, or of all changes, and for how long that keeps callers from the lock.
func BenchmarkTelling(b *testing.B) {
	for _, telling := range []struct {
		name string
		tell func(*Cache)
	}{
		{"Status", func(c *Cache) { c.Status() }}, // all of it under the lock
		{"Memory", func(c *Cache) { c.Snapshot() }},
		{"Memory-locked", func(c *Cache) { c.snapshot() }},
		{"Changes", func(c *Cache) { c.Changes() }},
		{"Changes-locked", func(c *Cache) { c.describeAll() }},
		// everything anew under the lock, as after each change of the record
		{"Judging", func(c *Cache) { c.SetPropagationDelay(0) }},
	} {
		for _, keys := range []int{60, MaxKeys} {
			for _, effect := range []Effect{"", Revoked} {
				b.Run(fmt.Sprintf("%s/keys=%d/%v", telling.name, keys, cmp.Or(effect, "no effect")),
					func(b *testing.B) {
						c, _ := fullCache(b, keys, effect)
						b.ReportAllocs()
						for b.Loop() {
							telling.tell(c)
						}
					})
			}
		}
	}
}
