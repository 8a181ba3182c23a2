package tokencache_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// What is worked out of the judgement of each token once is what judging them anew by every change would tell, whatever
// happened: to the tokens, to the record, which is full at times, to what resources go by, and to what is known of
// clocks.
func TestRandomJudgements(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		steps := rapid.SliceOfN(rapid.IntRange(0, 999), 20, 40).Draw(r, "steps")
		seed := rapid.Uint64().Draw(r, "seed")
		var fault error // told to rapid outside of the bubble, whose goroutine is not its own
		synctest.Test(t, func(t *testing.T) { fault = randomJudgements(t, seed, steps) })
		if fault != nil {
			r.Fatal(fault)
		}
	})
}

func randomJudgements(t *testing.T, seed uint64, steps []int) error {
	j := judged{roll: rand.New(rand.NewPCG(seed, 0)), tokens: rand.New(rand.NewPCG(seed, 1)),
		clock: tokencachetest.Clock{Trusted: true}, counts: true}
	j.cache = tokencache.New(tokencache.Options{Fetch: j.Fetch, Clock: j.clock.AfterUptime(), BootID: "b",
		On: 1000 * time.Hour})
	defer j.cache.Close()
	for i, step := range steps {
		j.step(t, i, step)
		if err := j.cache.CheckJudgements(j.alternates); err != nil {
			return fmt.Errorf("step %d (%d): %w", i, step, err)
		}
	}
	return nil
}

// judged is a cache of few keys, to which much happens. Its back end gives tokens that are more or less old.
type judged struct {
	clock tokencachetest.Clock
	mu    sync.Mutex // protects counts and tokens

	cache      *tokencache.Cache
	roll       *rand.Rand // of what happens
	tokens     *rand.Rand // of what is fetched, beside that
	counts     bool
	alternates map[string][]string
}

func (j *judged) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	left := time.Duration(1+j.tokens.IntN(24*60-1)) * time.Minute
	now := time.Now().Round(0)
	f := tokencache.Fetched{Left: left, Counted: j.counts, Token: tokencache.Token{
		Text: tokencache.NewSecret(fmt.Sprint(key, now, j.tokens.Uint64())), ExpiresOn: now.Add(left),
	}}
	if j.tokens.IntN(2) == 0 {
		f.Token.Claims.IssuedAt = f.Token.ExpiresOn.Add(-24*time.Hour - 5*time.Minute)
	}
	return f, nil
}

// judgedResources are of few spellings, so that changes are about several keys.
var judgedResources = []string{"https://a.example", "https://A.example/", "https://b.example:443", "api://c", "api://d",
	"api://e"}

func (j *judged) resource() string { return judgedResources[j.roll.IntN(len(judgedResources))] }

func (j *judged) selector() tokencache.Selector {
	return []tokencache.Selector{{}, {Kind: tokencache.ClientID, ID: "x"}}[j.roll.IntN(2)]
}

// step does what a number says. Its hundreds choose the kind, its rest how much.
func (j *judged) step(t *testing.T, i, step int) {
	kind, much := step/100, step%100
	key := tokencache.Key{Selector: j.selector(), Resource: j.resource()}
	switch kind {
	case 0:
		time.Sleep(time.Duration(much*much) * 10 * time.Second)
	case 1:
		j.clock.Set(time.Duration(much-50)*time.Hour, much%3 == 0)
		j.mu.Lock()
		j.counts = much%2 == 0
		j.mu.Unlock()
	case 2:
		j.alternates = make(map[string][]string)
		for range much % 4 {
			one := j.resource()
			j.alternates[one] = append(j.alternates[one], j.resource())
		}
		j.cache.SetAlternates(j.alternates)
	case 3:
		j.cache.SetPropagationDelay(time.Duration(1+much) * time.Minute)
	case 4:
		for n := range 1 + much*much/16 { // more than there is room for, at times
			j.note(fmt.Sprint(i, ".", n))
		}
	case 5:
		if on := j.cache.Changes(); len(on) > 0 {
			j.cache.Withdraw(on[much%len(on)].ID)
		}
	case 6:
		j.replace(i, much)
	case 7:
		j.cache.ContinueFrom(tokencache.Instant{On: time.Duration(much*20) * time.Hour, BootID: "a"})
	default:
		_, _ = j.cache.Refresh(t.Context(), key, true)
	}
}

func (j *judged) note(id string) {
	p := tokencache.PolicyChange{ID: id,
		Effect: []tokencache.Effect{tokencache.Changed, tokencache.Granted, tokencache.Revoked,
			tokencache.Unknown}[j.roll.IntN(4)], AllIdentities: j.roll.IntN(2) == 0}
	if !p.AllIdentities {
		p.Selector = j.selector()
	}
	if j.roll.IntN(4) > 0 {
		p.Resource = j.resource()
	}
	if j.roll.IntN(2) == 0 {
		p.At = j.clock.AfterUptime().Wall().Add(-time.Duration(j.roll.IntN(30*60)) * time.Minute)
	}
	_, _ = j.cache.RecordChange(p) // there may be no room for it
}

// replace puts the record in its own place without some of its changes, or with some of other IDs besides.
func (j *judged) replace(i, much int) {
	r := j.cache.Record()
	if much%2 == 0 {
		r.Changes = slices.DeleteFunc(r.Changes, func(tokencache.PolicyChange) bool { return j.roll.IntN(3) == 0 })
	} else {
		for _, p := range r.Changes[:len(r.Changes)/2] {
			p.ID = fmt.Sprint(i, "'", p.ID)
			p.Moment += time.Duration(j.roll.IntN(100)-50) * time.Minute
			r.Changes = append(r.Changes, p)
		}
	}
	j.cache.ReplaceRecord(r)
}
