package server

import (
	"context"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
)

func TestPace(t *testing.T) {
	t.Parallel()
	limits := Limits{PerSecond: 10, Burst: 5}
	start := time.Unix(1e9, 0)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	var p pace
	flood, quiet := quotaKey{uid: 1}, quotaKey{uid: 2}
	for i := range 5 {
		if wait, ok := p.turn(flood, at(0), limits.requests()); wait != 0 || !ok {
			t.Fatalf("request %d of the burst: %v %v", i, wait, ok)
		}
	}
	for i := range 10 {
		want := time.Duration(i+1) * 100 * time.Millisecond
		if wait, ok := p.turn(flood, at(0), limits.requests()); wait != want || !ok {
			t.Fatalf("request %d beyond: %v %v, want %v", i, wait, ok, want)
		}
	}
	for range 100 { // those that are refused take nothing
		if wait, ok := p.turn(flood, at(0), limits.requests()); wait != 100*time.Millisecond || ok {
			t.Fatalf("overdrawn: %v %v", wait, ok)
		}
	}
	if wait, ok := p.turn(quiet, at(0), limits.requests()); wait != 0 || !ok {
		t.Errorf("another caller: %v %v", wait, ok)
	}
	if wait, ok := p.turn(flood, at(100), limits.requests()); wait != time.Second || !ok {
		t.Errorf("a moment later: %v %v", wait, ok)
	}
	if wait, ok := p.turn(flood, at(60_000), limits.requests()); wait != 0 || !ok {
		t.Errorf("a minute later: %v %v", wait, ok)
	}
	if wait, ok := p.turn(flood, at(-60_000), limits.requests()); ok && wait > patience {
		t.Errorf("the clock went back: %v %v", wait, ok)
	}
}

// However many callers come, what is kept of them is bounded, and those that are long gone leave nothing.
func TestPaceIsBounded(t *testing.T) {
	t.Parallel()
	limits := Limits{PerSecond: 10, Burst: 5}
	start := time.Unix(1e9, 0)
	var p pace
	for i := range uint32(3 * mostPaced) {
		if wait, ok := p.turn(quotaKey{uid: i}, start, limits.requests()); i < mostPaced && (wait != 0 || !ok) {
			t.Fatalf("caller %d: %v %v", i, wait, ok)
		}
	}
	if len(p.full) != mostPaced+1 {
		t.Errorf("%d are kept", len(p.full))
	}
	if _, ok := p.turn(quotaKey{uid: 1 << 30}, start, limits.requests()); ok {
		t.Error("the budget of everyone else has no end")
	}
	if wait, ok := p.turn(quotaKey{uid: 1 << 30}, start.Add(time.Minute), limits.requests()); wait != 0 || !ok || len(p.full) != 1 {
		t.Errorf("later: %v %v, %d are kept", wait, ok, len(p.full))
	}
}

// A caller that asks too often waits for its turn, is then told so, on every path; others, and the daemon's
// look at itself, are not kept waiting.
func TestFloodIsHeldBack(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits.PerSecond, d.Limits.Burst = 1, 1
	socket, module := d.tokens(""), d.tokens("vision")
	// As if it had asked for a long time.
	d.pace.mu.Lock()
	d.pace.full = map[quotaKey]time.Time{{uid: uint32(os.Getuid())}: time.Now().Add(time.Hour)}
	d.pace.mu.Unlock()
	var all sync.WaitGroup
	for _, text := range []string{get(imdsVault, metadata), get(v1Vault), get("/nowhere"), get(api.PathWhoAmI)} {
		all.Go(func() {
			got := send(t, socket, text)
			if got.status != 429 || got.header.Get("Retry-After") == "" || got.field(t, "code") != string(api.CodeBusy) {
				t.Errorf("%.30q: %+v", text, got)
			}
		})
	}
	if got := send(t, module, get(v1Vault)); got.status != 200 {
		t.Errorf("another caller: %+v", got)
	}
	if got := send(t, socket, get(api.PathHealth)); got.status != 200 {
		t.Errorf("the daemon itself: %+v", got)
	}
	if got := send(t, d.admin(), get(api.PathStatus)); got.status != 200 {
		t.Errorf("an administrator: %+v", got)
	}
	all.Wait()
	d.pace.mu.Lock()
	d.pace.full[quotaKey{uid: uint32(os.Getuid())}] = time.Now().Add(100 * time.Millisecond)
	d.pace.mu.Unlock()
	if got := send(t, socket, get(v1Vault)); got.status != 200 {
		t.Errorf("who waited for its turn: %+v", got)
	}
}

// Nobody waits for a turn while the daemon goes down, or after the caller has gone.
func TestWaitingForATurnEnds(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	full := func() { d.pace.full = map[quotaKey]time.Time{{}: time.Now().Add(time.Hour)} }
	down := make(chan struct{})
	close(down)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	full()
	x := &exchange{connection: new(connection), down: down, request: httptest.NewRequest("GET", "/", nil)}
	if f := d.Server.admit(x); f == nil || f.status != 429 {
		t.Errorf("going down: %+v", f)
	}
	limits := d.Limits.orDefaults()
	budget := time.Second / time.Duration(limits.PerSecond) * time.Duration(limits.Burst)
	d.pace.full[quotaKey{}] = time.Now().Add(budget + patience/2)
	if f := d.Server.admit(x); f != nil {
		t.Errorf("going down, with a turn to come: %+v", f)
	}
	full()
	x = &exchange{connection: new(connection), request: httptest.NewRequest("GET", "/", nil).WithContext(gone)}
	if f := d.Server.admit(x); f == nil || f.status != 429 {
		t.Errorf("gone: %+v", f)
	}
}
