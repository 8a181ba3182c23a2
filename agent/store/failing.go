package store

import (
	"errors"
	"slices"
	"strings"
	"time"
	"unicode"

	"perceptd/tokencache"
)

const maxDetail = 512 // bytes of what is kept of a failure's words

// failureKinds and failureExtents are the words on the disk for each tokencache.Kind, of which two differ from those on the wire,
// and for each Extent.
var (
	kindsInOrder   = []tokencache.Kind{tokencache.Unreachable, tokencache.Throttled, tokencache.IdentityNotFound, tokencache.Refused, tokencache.Malformed}
	failureKinds   = []string{"unreachable", "throttled", "identity-not-found", "refused", "malformed"}
	failureExtents = []string{"key", "identity", "source"}
)

// failing is a tokencache.BackOff.
type failing struct {
	Kind     string        `json:"kind"`
	Extent   string        `json:"extent"`
	Detail   string        `json:"detail,omitempty"`
	Failures int           `json:"failures"`
	Waits    int           `json:"waits,omitempty"`
	Asks     int           `json:"asks,omitempty"`
	Until    time.Duration `json:"until_ns"`
	Callers  time.Duration `json:"callers_ns"`
}

// failingOf returns nil also for failures that could not be read again: what they slow down is asked for a little sooner.
func failingOf(f *tokencache.BackOff) *failing {
	if f == nil || !slices.Contains(kindsInOrder, f.Kind) || int(f.Extent) >= len(failureExtents) {
		return nil
	}
	w := &failing{
		Kind: failureKinds[slices.Index(kindsInOrder, f.Kind)], Extent: failureExtents[f.Extent], Detail: words(f.Detail), Failures: f.Failures, Waits: f.Waits, Asks: f.Asks,
		Until: f.Until, Callers: f.Callers,
	}
	if w.check() != nil {
		return nil
	}
	return w
}

// words is the beginning of text, without what cannot be printed.
func words(text string) string {
	printable := strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) || c == unicode.ReplacementChar {
			return ' '
		}
		return c
	}, text)
	return strings.ToValidUTF8(printable[:min(len(printable), maxDetail)], "")
}

// failing is failingOf's inverse, of what was checked.
func (w *failing) failing() *tokencache.BackOff {
	if w == nil {
		return nil
	}
	return &tokencache.BackOff{
		Kind: kindsInOrder[slices.Index(failureKinds, w.Kind)], Extent: tokencache.Extent(slices.Index(failureExtents, w.Extent)), Detail: w.Detail,
		Failures: w.Failures, Waits: w.Waits, Asks: w.Asks, Until: w.Until, Callers: w.Callers,
	}
}

func (w *failing) check() error {
	switch {
	case w == nil:
		return nil
	case !slices.Contains(failureKinds, w.Kind) || !slices.Contains(failureExtents, w.Extent) || !fits(w.Detail, maxDetail):
		return errors.New("a failure of it is none")
	case w.Failures < 1 || w.Failures > maxTries || w.Waits < 0 || w.Waits > maxTries || w.Asks < 0 || w.Asks > maxTries:
		return errors.New("a failure's counts are out of range")
	case !within(w.Until, w.Callers):
		return errors.New("a failure's boot times are out of range")
	}
	return nil
}
