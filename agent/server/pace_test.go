package server

import (
	"context"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/server/limit"
)

// overdraw leaves k's budget of requests as after a quarter of an hour of asking.
func (d *daemon) overdraw(k limit.Key) {
	r := &d.quotas().requests
	r.PerSecond, r.Burst, r.MaxWait = 1, 1, time.Hour
	for range 1000 {
		r.Reserve(k, time.Now())
	}
	r.MaxWait = rateTimeout
}

// spend makes a budget of so many requests a second of which k has used up what may come at once.
func (d *daemon) spend(k limit.Key, perSecond int) {
	q := d.quotas()
	q.requests = limit.Rate{PerSecond: perSecond, Burst: 1, MaxWait: rateTimeout}
	q.requests.Reserve(k, time.Now())
}

// A caller that asks too often waits for its turn, is then told so, on every path; others, and the daemon's
// look at itself, are not kept waiting.
func TestFloodIsHeldBack(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits.PerSecond, d.Limits.Burst = 1, 1
	socket, module := d.tokens(""), d.tokens("vision")
	me := limit.Key{UID: uint32(os.Getuid())}
	d.overdraw(me)
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
	d.spend(me, 10)
	if got := send(t, socket, get(v1Vault)); got.status != 200 {
		t.Errorf("who waited for its turn: %+v", got)
	}
}

// Nobody waits for a turn while the daemon goes down, or after the caller has gone.
func TestWaitingForATurnEnds(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	down := make(chan struct{})
	close(down)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	d.overdraw(limit.Key{})
	x := &exchange{connection: new(limit.Conn), down: down, request: httptest.NewRequest("GET", "/", nil)}
	if f := d.awaitTurn(x); f == nil || f.status != 429 {
		t.Errorf("going down: %+v", f)
	}
	d.spend(limit.Key{}, 2)
	if f := d.awaitTurn(x); f != nil {
		t.Errorf("going down, with a turn to come: %+v", f)
	}
	d.overdraw(limit.Key{})
	x = &exchange{connection: new(limit.Conn), request: httptest.NewRequest("GET", "/", nil).WithContext(gone)}
	if f := d.awaitTurn(x); f == nil || f.status != 429 {
		t.Errorf("gone: %+v", f)
	}
}
