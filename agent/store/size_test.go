package store

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
)

// What is kept of ten tokens that roll over once a day is as large after two months as docs/reliability.md says, and
// grows no more.
func TestSizeOfWhatIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		issued := make(map[string]time.Time)
		fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			mu.Lock()
			defer mu.Unlock()
			at, there := issued[key.Resource]
			if !there || time.Since(at) >= 24*time.Hour {
				at = time.Now()
				issued[key.Resource] = at
			}
			id := strings.Repeat("0", 36)
			return tokencache.Fetched{
				Token: tokencache.Token{
					Text:      tokencache.NewSecret(fmt.Sprint(key.Resource, at.Unix(), strings.Repeat("x", 1500))),
					ExpiresOn: at.Add(24 * time.Hour),
					Claims: tokencache.Claims{
						Issuer: "https://sts.windows.net/" + id + "/", Audience: key.Resource, ClientID: id,
						ObjectID: id, TenantID: id,
						IssuedAt: at.Add(-5 * time.Minute), NotBefore: at.Add(-5 * time.Minute),
					},
				},
				Left: time.Until(at.Add(24 * time.Hour)), Counted: true,
			}, nil
		}
		c := tokencache.New(tokencache.Options{Fetch: fetch, BootID: strings.Repeat("0", 36)})
		defer c.Close()
		keys := make([]tokencache.Key, 10)
		for i := range keys {
			keys[i] = tokencache.Key{Resource: fmt.Sprintf("https://resource%d.azure.net", i)}
		}
		if err := c.Prefetch(keys); err != nil {
			t.Fatal(err)
		}
		time.Sleep(60 * 24 * time.Hour)
		most := 0
		for range 48 {
			time.Sleep(time.Hour)
			text, err := encodeSnapshot(c.Snapshot())
			if err != nil {
				t.Fatal(err)
			}
			most = max(most, len(text))
		}
		t.Logf("%d bytes", most)
		if most < 90_000 || most > 125_000 {
			t.Errorf("%d bytes are kept of %d tokens", most, len(keys))
		}
	})
}
