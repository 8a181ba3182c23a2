package server

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"perceptd/agent/api"
)

func requestIn(ctx context.Context) *http.Request {
	return httptest.NewRequest("GET", "/", nil).WithContext(ctx)
}

// The admin socket has so many connections and no more, of which one user has a quarter; root has room whatever the others
// do, and so has the daemon's check of itself. Those of the token sockets are counted apart.
func TestAdminCrowd(t *testing.T) {
	t.Parallel()
	_, _, of, _ := Limits{}.orDefaults().rooms()
	cr := crowd{room: of}
	if got := len(cr.many(12_281, quotaKey{uid: 1000}, phaseBusy)); got != 16 {
		t.Errorf("one user has %d", got)
	}
	for uid := range uint32(9) {
		cr.many(100, quotaKey{uid: 1001 + uid}, phaseBusy)
	}
	if got := len(cr.placed); got != 48 {
		t.Errorf("all users have %d", got)
	}
	if got := len(cr.many(100, quotaKey{}, phaseBusy)); got != 16 {
		t.Errorf("root has %d", got)
	}
	for range ownPlaces {
		c := &connection{Conn: new(ending), at: -1, crowd: &cr}
		if cr.enter(c, true); !c.isOwn {
			t.Error("the daemon's check of itself is kept out")
		}
	}

	d := newDaemon(t, fetchDay)
	d.Limits = Limits{AdminConnections: 8, AdminPerUser: 2, Place: time.Hour}
	admin, open := d.admin(), d.tokens("")
	for range 20 { // all of them idle
		if _, got := d.kept(admin, get(api.PathStatus)); got.status != 200 {
			t.Fatalf("%+v", got)
		}
	}
	mine := d.crowdOf(onAdmin, "")
	mine.mu.Lock()
	if n := len(mine.placed) + mine.own; n > 2+ownPlaces {
		t.Errorf("%d connections are held", n)
	}
	mine.mu.Unlock()
	if got := send(t, open, get(v1Vault)); got.status != 200 {
		t.Errorf("on the token socket: %+v", got)
	}
}

// So many requests are under way on the admin socket at once, half of them of one user; root is heard beside all others,
// and the daemon's look at its health is never held up.
func TestAdminRequestsAtOnce(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{AdminRequests: 8}
	of := func(uid uint32) *exchange { return &exchange{connection: &connection{key: quotaKey{uid: uid}}} }
	for i, row := range []struct {
		uid, times uint32
		want       int
	}{{1000, 9, 4}, {1001, 9, 2}, {1002, 9, 0}, {0, 9, 2}} {
		got := 0
		for range row.times {
			if f := d.administer(of(row.uid)); f == nil {
				got++
			} else if f.status != 429 || f.retryAfter != time.Second {
				t.Errorf("%+v", f)
			}
		}
		if got != row.want {
			t.Errorf("row %d: %d of user %d, want %d", i, got, row.uid, row.want)
		}
	}
	admin := d.admin()
	if got := send(t, admin, get(api.PathStatus)); got.status != 429 {
		t.Errorf("one more: %+v", got)
	}
	if got := send(t, admin, get(api.PathHealth)); got.status != 200 {
		t.Errorf("health: %+v", got)
	}
}
