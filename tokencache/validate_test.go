package tokencache

import (
	"encoding/json"
	"strings"
	"testing"
)

// Every kind and extent of failure has a word of its own, by which it is kept.
func TestEveryFailureHasAWord(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Unreachable, Throttled, IdentityNotFound, Refused, Malformed} {
		for _, extent := range []Extent{OfKey, OfIdentity, OfSource} {
			f := failingOf(&FetchError{Kind: kind, Extent: extent, Detail: "why"}, 1, 0, 0)
			if got := f.failure(); f.Validate() != nil || got.Kind != kind || got.Extent != extent {
				t.Errorf("%+v is kept as %+v", got, f)
			}
		}
	}
}

// A snapshot that gets into a log, in whatever way, has no token's text in it.
func TestSnapshotHidesTokens(t *testing.T) {
	t.Parallel()
	const canary = "eyJ0.canary-7a21.c2ln"
	m := Snapshot{Keys: []SnapshotEntry{{Key: Key{Resource: "r"}, Token: Token{Text: NewSecret(canary)}, Life: 1}}}
	text, err := json.Marshal(m)
	if err != nil || strings.Contains(string(text), "canary") || !strings.Contains(string(text), redacted) {
		t.Errorf("%v: %s", err, text)
	}
}
