package store

import (
	"math"
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

// Every kind and extent of failure is kept by a word of its own.
func TestFailuresAreKept(t *testing.T) {
	t.Parallel()
	for _, kind := range kindsInOrder {
		for extent := tokencache.OfKey; extent <= tokencache.OfSource; extent++ {
			f := tokencache.BackOff{Kind: kind, Extent: extent, Detail: "why", Failures: 2, Waits: 1, Asks: 3, Until: time.Hour, Callers: time.Minute}
			if got := failingOf(&f).failing(); got == nil || *got != f {
				t.Errorf("%+v comes back as %+v", f, got)
			}
		}
	}
}

// What could not be read again is left out, and costs neither the token nor the others.
func TestFailuresThatAreLeftOut(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*tokencache.BackOff){
		"no kind":           func(f *tokencache.BackOff) { f.Kind = "" },
		"an unknown kind":   func(f *tokencache.BackOff) { f.Kind = "other" },
		"an unknown extent": func(f *tokencache.BackOff) { f.Extent = 77 },
		"no failure":        func(f *tokencache.BackOff) { f.Failures = 0 },
		"less than none":    func(f *tokencache.BackOff) { f.Asks = -1 },
		"before all time":   func(f *tokencache.BackOff) { f.Until = math.MinInt64 },
		"after all time":    func(f *tokencache.BackOff) { f.Callers = math.MaxInt64 },
	} {
		m := whole(1)
		spoil(m.Failing)
		spoil(m.Keys[0].Failing)
		text, err := encodeMemory(m)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeMemory(text)
		if err != nil || got.Failing != nil || len(got.Keys) != len(m.Keys) || got.Keys[0].Failing != nil || got.Keys[0].Token.Text.IsZero() {
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
		if got := words(text); got != want || !fits(got, maxDetail) {
			t.Errorf("%.20q is kept as %.40q of %d bytes", text, got, len(got))
		}
	}
}
