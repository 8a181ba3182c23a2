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
	"perceptd/agent/simulator"
	"perceptd/agent/source"
	"perceptd/tokencache"
)

// stepped is a clock that a test moves, beside whom real calls take no time.
type stepped struct {
	begun time.Time

	mu      sync.Mutex // protects what follows
	gone    time.Duration
	calls   int          // real ones under way
	waiting atomic.Int32 // requests and calls, with the time that they take
	ended   *sync.Cond
	timers  map[chan time.Time]time.Duration
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
	fired := make(chan time.Time)
	if d <= 0 {
		close(fired)
		return fired, func() bool { return false }
	}
	s.timers[fired] = s.gone + d
	return fired, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.timers, fired)
		return true
	}
}

func newStepped(begun time.Time) *stepped {
	s := &stepped{begun: begun, timers: make(map[chan time.Time]time.Duration)}
	s.ended = sync.NewCond(&s.mu)
	return s
}

// call has the clock stand still for a real call, and lets some time go by before and after it.
func (s *stepped) call(ctx context.Context, takes time.Duration, real func()) {
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	under := func(n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.calls += n
		s.ended.Broadcast()
	}
	s.sleep(ctx, takes/2)
	under(1)
	real()
	under(-1)
	s.sleep(ctx, takes-takes/2)
}

func (s *stepped) sleep(ctx context.Context, d time.Duration) {
	fired, stop := s.timer(d)
	defer stop()
	select {
	case <-fired:
	case <-ctx.Done():
	}
}

// step moves the clock, once no real call is under way and the agent has done what was due.
func (s *stepped) step(t *testing.T, a *agent.Agent, d time.Duration) {
	for range 2 { // the second look of the schedule's has begun after the first one's end
		for range 20 { // whoever can go on does
			runtime.Gosched()
		}
		if err := a.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.calls > 0 {
		s.ended.Wait()
	}
	s.gone += d
	for fired, at := range s.timers {
		if at <= s.gone {
			close(fired)
			delete(s.timers, fired)
		}
	}
}

// No request fails over rollovers, end to end with the real azidentity, in every form in which a back end answers: it rolls
// over at the expiry and not before, counts whole seconds, and takes up to three of them. (That none waits for longer than
// callers are promised is shown in package tokencache, in virtual time.)
func TestNoRequestFailsOverRollovers(t *testing.T) {
	for _, form := range []struct {
		simulator.Form
		source.Endpoint
	}{
		{simulator.FormIMDS, source.IMDS}, {simulator.FormAppService, source.AppService}, {simulator.FormArc, source.Arc},
	} {
		t.Run(form.Form.String(), func(t *testing.T) {
			if form.Form == simulator.FormArc && os.Getuid() != 0 {
				t.Skip("Azure Arc's keys lie in a folder of root's: run it as root")
			}
			for takes, known := range map[time.Duration]bool{0: false, 300 * time.Millisecond: true, 3 * time.Second: false} {
				t.Run(fmt.Sprintf("%v known=%v", takes, known), func(t *testing.T) { overRollovers(t, form.Form, form.Endpoint, takes, known) })
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
	from, err := source.New(source.Options{Endpoint: endpoint, Wall: clock.wall, Known: isKnown})
	if err != nil {
		t.Fatal(err)
	}
	me := uint32(os.Getuid())
	d := newDaemonOf(t, agent.Options{
		Fetch: func(ctx context.Context, key tokencache.Key) (f tokencache.Fetched, err error) {
			clock.call(ctx, takes, func() { f, err = from.Fetch(ctx, key) })
			return f, err
		},
		Rules: agent.Rules{
			Identities: []agent.Identity{{Name: "device", Default: true}},
			Grants:     []agent.Grant{{Caller: agent.Match{UID: &me}, Identity: "device", Resources: []string{vault}}},
		},
		Clock: tokencache.Clock{Wall: clock.wall, Boot: clock.boot, Timer: clock.timer, Synchronised: isKnown},
	})
	var all sync.WaitGroup
	waiting := &clock.waiting
	ask := func() {
		waiting.Add(1)
		asked := clock.boot()
		all.Go(func() {
			defer waiting.Add(-1)
			got, err := d.Agent.Token(t.Context(), agent.Caller{UID: me}, agent.Request{Resource: vault, MinTTL: sdkLife})
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
