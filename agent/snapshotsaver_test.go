package agent_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// shelf is where a cache's memory is kept, and what went wrong there.
type shelf struct {
	mu             sync.Mutex // protects what follows
	carried, saved []tokencache.Snapshot
	fault          error
	slow           time.Duration
}

func (s *shelf) set(fault error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

func (s *shelf) counts() (carried, saved int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.carried), len(s.saved)
}

func (s *shelf) lastSaved() *tokencache.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.saved) == 0 {
		return nil
	}
	return &s.saved[len(s.saved)-1]
}

func (s *shelf) keeping() agent.Persistence {
	put := func(to *[]tokencache.Snapshot) func(tokencache.Snapshot) error {
		return func(m tokencache.Snapshot) error {
			s.mu.Lock()
			slow := s.slow
			s.mu.Unlock()
			time.Sleep(slow)
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.fault == nil {
				*to = append(*to, m)
			}
			return s.fault
		}
	}
	return agent.Persistence{HandOver: put(&s.carried), Save: put(&s.saved)}
}

// remembering runs an agent that begins with what the shelf has, until f returns.
func remembering(t *testing.T, s *shelf, b *tokencachetest.Source, f func(a *agent.Agent,
	logs *observer.ObservedLogs)) {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	a, err := agent.New(agent.Options{
		Fetch: b.Fetch, Rules: edge(), Log: zap.New(core), BootID: "this", Snapshot: s.lastSaved(),
		Persistence: s.keeping(),
		Clock: tokencache.Clock{Boot: func() time.Duration {
			return time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)) + time.Minute
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	f(a, logs)
}

func mustHave(t *testing.T, a *agent.Agent) agent.Answer {
	t.Helper()
	answer, err := a.Token(t.Context(), root, requestFor(storage))
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// What one process has, the next begins with, and asks the back end for nothing.
func TestTokensOutliveTheProcess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, b := new(shelf), new(tokencachetest.Source)
		var first agent.Answer
		remembering(t, s, b, func(a *agent.Agent, _ *observer.ObservedLogs) {
			first = mustHave(t, a)
			synctest.Wait()
			if carried, saved := s.counts(); carried == 0 || saved == 0 {
				t.Errorf("carried %d times, saved %d times after a fetch", carried, saved)
			}
			time.Sleep(2 * time.Hour)
		})
		fail(b, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		before := b.Count()
		kept, _ := s.counts()
		remembering(t, s, b, func(a *agent.Agent, _ *observer.ObservedLogs) {
			again := mustHave(t, a)
			if !again.Token.Text.Equal(first.Token.Text) || again.Left != 22*time.Hour || again.Unconfirmed {
				t.Errorf("%v left, unconfirmed %v", again.Left, again.Unconfirmed)
			}
			synctest.Wait()
			if carried, _ := s.counts(); carried == kept {
				t.Error("what was remembered is not carried on until the next fetch")
			}
		})
		if made := b.Count() - before; made != 0 {
			t.Errorf("%d calls", made)
		}
	})
}

// A record that is gone while the tokens were kept is as it was beside them; one that is there, though empty, is what
// counts.
func TestRecordThatIsGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, b := new(shelf), new(tokencachetest.Source)
		remembering(t, s, b, func(a *agent.Agent, _ *observer.ObservedLogs) {
			mustHave(t, a)
			synctest.Wait()
			note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
			time.Sleep(3 * time.Second) // saves are as far apart
			synctest.Wait()
			if known := s.lastSaved(); len(known.Record.Changes) != 1 {
				t.Errorf("kept beside the tokens: %+v", known.Record)
			}
		})
		fail(b, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		lineage := s.lastSaved().Record.Lineage
		for _, row := range []struct {
			name     string
			disk     *tokencache.Record
			lost     error
			boot     string
			withheld bool
			record   int
		}{
			{"gone", nil, nil, "this", true, 1},
			{"gone at another boot", nil, nil, "another", true, 1},
			{"cannot be read", nil, errors.New("torn"), "this", true, 1},
			{"empty, since it was withdrawn", &tokencache.Record{Lineage: lineage, Generation: 2}, nil, "this", false,
				0},
		} {
			var kept []tokencache.PolicyChange
			a, err := agent.New(agent.Options{
				Fetch: b.Fetch, Rules: edge(), BootID: row.boot, Snapshot: s.lastSaved(), Record: row.disk,
				LostRecord: row.lost,
				SaveRecord: func(r tokencache.Record) error { kept = r.Changes; return nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			_, err = a.Token(t.Context(), root, requestFor(storage))
			if (codeOf(err) == api.CodeRevoked) != row.withheld || err != nil && !row.withheld {
				t.Errorf("%s: %v", row.name, err)
			}
			synctest.Wait() // for the saver
			if len(kept) != row.record || len(a.Changes()) != row.record {
				t.Errorf("%s: %d on the disk, %d on record", row.name, len(kept), len(a.Changes()))
			}
			a.Close()
		}
	})
}

// The disk is written to for each newer token, once an hour, and at the end; memory alone for every other fetch.
func TestDiskIsSeldomWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, b := new(shelf), new(tokencachetest.Source)
		remembering(t, s, b, func(a *agent.Agent, _ *observer.ObservedLogs) {
			mustHave(t, a)
			synctest.Wait()
			_, begun := s.counts()
			time.Sleep(5*time.Hour + time.Minute)
			if _, saved := s.counts(); saved-begun != 5 {
				t.Errorf("saved %d times in five hours", saved-begun)
			}
			fail(b, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
			carried, saved := s.counts()
			if _, err := a.Refresh(context.Background(), "device", storage, true); err != nil {
				t.Error(err)
			}
			synctest.Wait()
			if c, n := s.counts(); c == carried || n != saved {
				t.Errorf("carried %d times, saved %d times after a fetch without a token", c-carried, n-saved)
			}
			_, begun = s.counts()
			if _, err := a.Apply(edgeWithout(storage)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if _, saved := s.counts(); saved != begun+1 {
				t.Errorf("saved %d times when a grant was taken away", saved-begun)
			}
			for _, key := range s.lastSaved().Keys {
				if key.Key.Resource == storage {
					t.Error("a token that nobody may have any more is still kept")
				}
			}
		})
	})
}

// When a clock that was wrong at the boot is set right, what it shows of the tokens is kept at once: it may be lost
// again.
func TestWhatTheClockHasShownIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, b := new(shelf), new(tokencachetest.Source)
		remembering(t, s, b, func(a *agent.Agent, _ *observer.ObservedLogs) { mustHave(t, a) })
		earlier := *s.lastSaved()
		earlier.BootID = "earlier"
		for i := range earlier.Keys {
			earlier.Keys[i].Token.ExpiresOn = time.Now().Add(24 * time.Hour)
		}
		fail(b, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "down"})
		var right atomic.Bool
		a, err := agent.New(agent.Options{
			Fetch: b.Fetch, Rules: edge(), BootID: "this", Snapshot: &earlier, Persistence: s.keeping(),
			Clock: tokencache.Clock{Synchronised: right.Load},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if !mustHave(t, a).Unconfirmed {
			t.Error("a token of an earlier boot is taken to be valid, whatever the clock")
		}
		_, before := s.counts()
		right.Store(true)
		time.Sleep(6 * time.Minute) // the cache looks at the clock every few minutes
		synctest.Wait()
		if _, saved := s.counts(); saved == before || len(s.lastSaved().Keys) == 0 {
			t.Fatal("nothing is kept")
		}
		for _, key := range s.lastSaved().Keys {
			if key.Unconfirmed {
				t.Errorf("%v is kept as unconfirmed", key.Key)
			}
		}
	})
}

// edgeWithout is edge without the grants for a resource.
func edgeWithout(resource string) agent.Rules {
	rules := edge()
	for i, grant := range rules.Grants {
		var left []string
		for _, r := range grant.Resources {
			if r != resource {
				left = append(left, r)
			}
		}
		rules.Grants[i].Resources = append(left, "https://other.example.net")
	}
	return rules
}

// A disk that takes nothing is trouble that passes, and keeps nobody from a token.
func TestWhatCannotBeKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, b := new(shelf), new(tokencachetest.Source)
		s.set(errors.New("no space left on device"))
		remembering(t, s, b, func(a *agent.Agent, logs *observer.ObservedLogs) {
			mustHave(t, a)
			time.Sleep(10 * time.Minute)
			trouble := strings.Join(a.Status().Trouble, "\n")
			if !strings.Contains(trouble, "tokens are not saved") || !strings.Contains(trouble,
				"not handed to systemd") || !strings.Contains(trouble, "no space left") {
				t.Errorf("trouble %q", trouble)
			}
			if n := logs.FilterMessage("tokens could not be saved").Len(); n != 1 {
				t.Errorf("said %d times", n)
			}
			s.set(nil)
			time.Sleep(time.Minute)
			synctest.Wait()
			if trouble := a.Status().Trouble; len(trouble) != 0 {
				t.Errorf("still %q", trouble)
			}
			if logs.FilterMessage("tokens are kept again").Len() == 0 {
				t.Error("that it is over is not said")
			}
		})
	})
}

// Whoever waits for a token at the end does not wait for the disk.
func TestSlowDiskAtTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, b := &shelf{slow: 3 * time.Second}, new(tokencachetest.Source)
		b.Latency = time.Hour
		answered := make(chan time.Time, 1)
		var closing time.Time
		remembering(t, s, b, func(a *agent.Agent, _ *observer.ObservedLogs) {
			go func() {
				_, _ = a.Token(t.Context(), root, requestFor(storage))
				answered <- time.Now()
			}()
			synctest.Wait()
			closing = time.Now()
		})
		if at := <-answered; !at.Equal(closing) {
			t.Errorf("waited %v for the disk", at.Sub(closing))
		}
	})
}

// What could not be saved is tried again after a minute, however often something else is kept meanwhile.
func TestFailedSaveIsTriedAgainWhileFetchesGoOn(t *testing.T) {
	t.Parallel()
	for _, every := range []time.Duration{2 * time.Minute, 45 * time.Second, 2 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := new(shelf)
			s.set(errors.New("no space left on device"))
			expires := time.Now().Round(0).Add(24 * time.Hour)
			a, err := agent.New(agent.Options{
				Fetch: func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
					same := tokencache.Token{Text: tokencache.NewSecret(canary + key.String()), ExpiresOn: expires}
					return tokencache.Fetched{Token: same, Left: time.Until(expires)}, nil
				},
				Rules: edge(), BootID: "this", Persistence: s.keeping(),
			})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			_, _ = a.Refresh(t.Context(), "", storage, true)
			synctest.Wait()
			time.Sleep(50 * time.Second)
			s.set(nil) // there is room again
			for room := time.Now(); time.Since(room) <= time.Minute; time.Sleep(every) {
				// which brings the same, so that there is nothing new to save
				_, _ = a.Refresh(t.Context(), "", storage, true)
			}
			synctest.Wait()
			if carried, saved := s.counts(); saved == 0 || carried == 0 || len(a.Status().Trouble) != 0 {
				t.Errorf("with a fetch every %v: carried %d times, saved %d times, %q", every, carried, saved,
					a.Status().Trouble)
			}
		})
	}
}

// What came from systemd alone is on the disk soon after the start, and not only with the next newer token.
func TestSavedAtAStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, known := life(t)
		_, before := d.shelf.counts()
		d.start(t, func(o *agent.Options) { o.Record, o.Snapshot = d.there, known },
			func(*agent.Agent, *observer.ObservedLogs) {
				synctest.Wait()
				if _, saved := d.shelf.counts(); saved != before+1 || len(d.shelf.lastSaved().Keys) != len(known.Keys) {
					t.Errorf("saved %d times", saved-before)
				}
			})
	})
}
