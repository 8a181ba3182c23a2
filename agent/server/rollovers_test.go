package server

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/grants"
	"perceptd/agent/simulator"
	"perceptd/agent/source"
	"perceptd/tokencache"
)

// stepped is a clock that a test moves, beside which real calls take no time.
type stepped struct {
	begun   time.Time
	waiting atomic.Int32 // requests and calls, with the time that they take

	mu     sync.Mutex // protects what follows
	gone   time.Duration
	calls  int // real ones under way
	ended  *sync.Cond
	over   int // calls that have returned, with the time that they take
	timers map[chan time.Time]alarm
}

// alarm is what a timer does when its time has come.
type alarm struct {
	at      time.Duration
	calls   bool // a real call begins: the clock stands still from then on
	returns bool // what it brought is given to the cache: the clock stands still until that has it
}

func newStepped(begun time.Time) *stepped {
	s := &stepped{begun: begun, timers: make(map[chan time.Time]alarm)}
	s.ended = sync.NewCond(&s.mu)
	return s
}

func (s *stepped) boot() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gone
}

func (s *stepped) wall() time.Time { return s.begun.Add(s.boot()) }

func (s *stepped) timer(d time.Duration) (<-chan time.Time, func() bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fired := s.setLocked(alarm{at: s.gone + d})
	return fired, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.timers, fired)
		return true
	}
}

func (s *stepped) setLocked(a alarm) chan time.Time {
	fired := make(chan time.Time)
	s.timers[fired] = a
	s.fireLocked()
	return fired
}

func (s *stepped) fireLocked() {
	for fired, a := range s.timers {
		if a.at > s.gone {
			continue
		}
		if a.calls {
			s.calls++
		}
		if a.returns {
			s.over++
		}
		close(fired)
		delete(s.timers, fired)
	}
}

// call has the clock stand still for a real call, and lets some time go by before and after it. It is false where ctx
// ended first.
func (s *stepped) call(ctx context.Context, takes time.Duration, real func()) bool {
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	s.mu.Lock()
	fired := s.setLocked(alarm{at: s.gone + takes/2, calls: true})
	s.mu.Unlock()
	select {
	case <-fired:
	case <-ctx.Done(): // with the test: nothing moves the clock any more
		return false
	}
	real()
	s.mu.Lock()
	s.calls--
	s.ended.Broadcast()
	fired = s.setLocked(alarm{at: s.gone + takes - takes/2, returns: true})
	s.mu.Unlock()
	select {
	case <-fired:
		return true
	case <-ctx.Done():
		return false
	}
}

// rest waits until no real call is under way, and the cache has taken in all that returned.
func (s *stepped) rest(a *agent.Agent) {
	for {
		s.mu.Lock()
		for s.calls > 0 {
			s.ended.Wait()
		}
		over := s.over
		s.mu.Unlock()
		taken := 0
		for _, key := range a.Status().Tokens {
			taken += key.Fetches
		}
		if taken == over {
			return
		}
		runtime.Gosched()
	}
}

// step moves the clock, once no real call is under way and the agent has done what was due.
func (s *stepped) step(t *testing.T, a *agent.Agent, d time.Duration) {
	for range 2 { // the second look of the schedule's has begun after the first one's end
		for range 20 { // whoever can go on does
			runtime.Gosched()
		}
		if err := a.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.rest(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone += d
	s.fireLocked()
}

// No request fails over rollovers, end to end with the real azidentity, in every form in which a back end answers: it
// rolls over at the expiry and not before, counts whole seconds, and takes up to three of them. (That none waits for
// longer than callers are promised is shown in package tokencache, in virtual time.)
func TestNoRequestFailsOverRollovers(t *testing.T) {
	for _, form := range []struct {
		simulator.Form
		source.Endpoint
	}{
		{simulator.FormIMDS, source.IMDS}, {simulator.FormAppService, source.AppService}, {simulator.FormArc,
			source.Arc},
	} {
		t.Run(form.Form.String(), func(t *testing.T) {
			if form.Form == simulator.FormArc && os.Getuid() != 0 {
				t.Skip("Azure Arc's keys lie in a folder of root's: run it as root")
			}
			for takes, known := range map[time.Duration]bool{0: false, 300 * time.Millisecond: true,
				3 * time.Second: false} {
				t.Run(fmt.Sprintf("%v known=%v", takes, known),
					func(t *testing.T) { overRollovers(t, form.Form, form.Endpoint, takes, known) })
			}
		})
	}
}

func overRollovers(t *testing.T, form simulator.Form, endpoint source.Endpoint, takes time.Duration, known bool) {
	const life = 3 * time.Hour
	clock := newStepped(time.Date(2026, 11, 23, 12, 0, 0, 370e6, time.UTC))
	back := simulator.New(simulator.Options{Now: clock.wall, Life: life})
	server, err := simulator.Start(t.Context(), simulator.ServerOptions{Backend: back, Form: form})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close(context.Background()) }()
	environment := make(map[string]string)
	for _, variable := range server.Environment() {
		name, value, _ := strings.Cut(variable, "=")
		environment[name] = value
	}
	point(t, environment)
	isKnown := func() bool { return known }
	from, err := source.New(source.Options{Endpoint: endpoint, Wall: clock.wall, ClockTrusted: isKnown})
	if err != nil {
		t.Fatal(err)
	}
	me := uint32(os.Getuid())
	d := newDaemonOf(t, agent.Options{
		Fetch: func(ctx context.Context, key tokencache.Key) (f tokencache.Fetched, err error) {
			if !clock.call(ctx, takes, func() { f, err = from.Fetch(ctx, key) }) {
				return tokencache.Fetched{}, ctx.Err()
			}
			return f, err
		},
		Rules: agent.Rules{Rules: grants.Rules{
			Identities: []grants.Identity{{Name: "device", Default: true}},
			Grants: []grants.Grant{{Caller: grants.Match{UID: &me}, Identity: "device",
				Resources: []string{vault}}},
		}},
		Clock: tokencache.Clock{Wall: clock.wall, Boot: clock.boot, Timer: clock.timer, Synchronised: isKnown},
	})
	var all sync.WaitGroup
	waiting := &clock.waiting
	ask := func() {
		waiting.Add(1)
		asked := clock.boot()
		all.Go(func() {
			defer waiting.Add(-1)
			got, err := d.Agent.Token(t.Context(), grants.Caller{UID: me},
				agent.Request{Request: grants.Request{Resource: vault}, MinTTL: sdkLife})
			if err != nil || got.Left <= 0 {
				t.Errorf("a request after %v: %v", asked, err)
			}
		})
	}
	const step, around = 200 * time.Millisecond, 12 * time.Second
	answer := func() { // whoever waits, for a call or for its answer
		for waiting.Load() > 0 {
			clock.step(t, d.Agent, step)
		}
	}
	for rollover := range 4 {
		begins := time.Duration(rollover) * life
		for clock.boot() < begins+around { // the one before, or the start
			ask()
			clock.step(t, d.Agent, step)
		}
		answer()
		for ends := begins + life - around; clock.boot() < ends; answer() {
			clock.step(t, d.Agent, min(10*time.Minute, ends-clock.boot()))
			ask()
		}
	}
	all.Wait()
	if calls := back.Calls().Total; calls < 4 || calls > 60 {
		t.Errorf("%d calls for four tokens", calls)
	}
}
