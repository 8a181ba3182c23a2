package server

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/server/limit"
)

// connOf returns a connection of a user's that has a place, or waits for one.
func connOf(conns *limit.Conns, uid uint32) *limit.Conn {
	c := limit.NewConn(new(net.UnixConn), time.Second)
	conns.Acquire(c, limit.Key{UID: uid}, false)
	return c
}

func requestIn(ctx context.Context) *http.Request {
	return httptest.NewRequest("GET", "/", nil).WithContext(ctx)
}

// The admin socket has so many connections, of which one user has a part. Those of the token sockets are counted apart.
func TestAdminConnections(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{AdminConnections: 8, AdminPerUser: 2, Place: time.Hour}
	admin, open := d.admin(), d.tokens("")
	for range 20 { // all of them idle
		if _, got := d.kept(admin, get(api.PathStatus)); got.status != 200 {
			t.Fatalf("%+v", got)
		}
	}
	if u := d.quotas().admin.Usage(); u.Open+u.Own > 2+limit.OwnPlaces {
		t.Errorf("%d connections are held", u.Open+u.Own)
	}
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
	of := func(uid uint32) *exchange { return &exchange{connection: connOf(d.quotas().admin, uid)} }
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
