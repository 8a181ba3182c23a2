package store

import (
	"math"
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

// Every kind and extent of failure is kept, by a word that does not change.
func TestFailuresAreKept(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"unreachable", "throttled", "identity-not-found", "refused", "malformed"} {
		for _, extent := range []string{"key", "identity", "source"} {
			f := tokencache.BackOff{Kind: kind, Extent: extent, Detail: "why", Failures: 2, Waits: 1, Asks: 3,
				Until: time.Hour, Callers: time.Minute}
			text, err := encodeSnapshot(tokencache.Snapshot{Failing: &f})
			if err != nil {
				t.Fatal(err)
			}
			if got, err := decodeSnapshot(text); err != nil || got.Failing == nil || *got.Failing != f {
				t.Errorf("%+v comes back as %+v, %v", f, got, err)
			}
		}
	}
}

// What could not be read again is left out, and costs neither the token nor the others.
func TestFailuresThatAreLeftOut(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*tokencache.BackOff){
		"no kind":           func(f *tokencache.BackOff) { f.Kind = "" },
		"an unknown kind":   func(f *tokencache.BackOff) { f.Kind = "none" },
		"an unknown extent": func(f *tokencache.BackOff) { f.Extent = "none" },
		"no failure":        func(f *tokencache.BackOff) { f.Failures = 0 },
		"less than none":    func(f *tokencache.BackOff) { f.Asks = -1 },
		"before all time":   func(f *tokencache.BackOff) { f.Until = math.MinInt64 },
		"after all time":    func(f *tokencache.BackOff) { f.Callers = math.MaxInt64 },
	} {
		m := whole(1)
		spoil(m.Failing)
		spoil(m.Keys[0].Failing)
		text, err := encodeSnapshot(m)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeSnapshot(text)
		if err != nil || got.Failing != nil || len(got.Keys) != len(m.Keys) || got.Keys[0].Failing != nil ||
			got.Keys[0].Token.Text.IsZero() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The words of a failure are cut and cleaned rather than lost.
func TestWordsOfFailuresAreCut(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"plain":                         "plain",
		"two\nlines":                    "two lines",
		"\xff\xfe":                      "  ",
		strings.Repeat("ä", 1000):       strings.Repeat("ä", maxDetail/2),
		"a" + strings.Repeat("ä", 1000): "a" + strings.Repeat("ä", maxDetail/2-1),
	} {
		f := tokencache.BackOff{Kind: "refused", Extent: "key", Detail: text, Failures: 1}
		if got := (tokencache.Snapshot{Failing: &f}).Sanitized().Failing; got == nil || got.Detail != want ||
			got.Validate() != nil {
			t.Errorf("%.20q is kept as %+v", text, got)
		}
	}
}
