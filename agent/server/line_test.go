package server

import (
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/tokencache"
)

// A line is as long as is said, for each and for all; the first to come gets the first place; and who has waited for long
// enough and said nothing is ended.
func TestLine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cr := crowd{room: room{all: 3, perWhole: 2, share: 2, line: 3, linePer: 2, wait: time.Second}}
		user := func(uid uint32) quotaKey { return quotaKey{uid: uid} }
		held := append(cr.many(2, user(1), phaseBusy), cr.many(1, user(2), phaseBusy)...)
		var line []*connection
		for i, row := range []struct {
			of   uint32
			want bool
		}{{1, true}, {1, true}, {1, false}, {3, true}, {4, false}} {
			c, placed := cr.comes(user(row.of), phaseSilent)
			if placed || c.inLine.Load() != row.want {
				t.Errorf("%d, of user %d: has a place %v, waits %v", i, row.of, placed, c.inLine.Load())
			}
			if row.want {
				line = append(line, c)
			}
		}
		if cr.away.count != 2 {
			t.Errorf("%d were turned away", cr.away.count)
		}
		has := func() (all []bool) {
			for _, c := range line {
				all = append(all, c.at >= 0)
			}
			return all
		}
		cr.forget(held[2])
		if got := has(); !slices.Equal(got, []bool{false, false, true}) {
			t.Errorf("when another's place is free: %v", got)
		}
		cr.rest(held[0])
		if got := has(); !slices.Equal(got, []bool{true, false, true}) || !held[0].wasEnded() {
			t.Errorf("when one of its own is idle: %v", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if !line[1].wasEnded() || line[0].wasEnded() || line[2].wasEnded() {
			t.Error("who has waited its time and said nothing")
		}
		cr.forget(held[1])
		if got := has(); got[1] {
			t.Error("a place is given to who is being refused")
		}
		for _, c := range append(line, held[0]) {
			cr.forget(c)
		}
		if len(cr.placed)+len(cr.line)+len(cr.tallies) != 0 {
			t.Errorf("left over: %d, %d, %v", len(cr.placed), len(cr.line), cr.tallies)
		}
	})
}

// Nobody waits in line while the daemon goes down, or after the caller has gone.
func TestWaitingInLineEnds(t *testing.T) {
	t.Parallel()
	cr := crowd{room: room{all: 1, perWhole: 1, share: 1, line: 2, linePer: 2, wait: time.Hour}}
	cr.many(1, quotaKey{uid: 1}, phaseBusy)
	c, _ := cr.comes(quotaKey{uid: 1}, phaseBusy)
	defer cr.forget(c)
	down := make(chan struct{})
	close(down)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if f := c.await(&exchange{down: down, request: requestIn(t.Context())}); f == nil || f.status != 503 {
		t.Errorf("going down: %+v", f)
	}
	if f := c.await(&exchange{request: requestIn(gone)}); f == nil || f.status != 429 {
		t.Errorf("gone: %+v", f)
	}
}

// crowdOn dials that many connections, sends text on each, and returns when each has a place or one in the line.
func (d *daemon) crowdOn(t *testing.T, network, address, text string, cr *crowd, n int) (all []net.Conn) {
	t.Helper()
	for range n {
		conn, err := net.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		all = append(all, conn)
	}
	for there := 0; there < n; {
		cr.mu.Lock()
		there = len(cr.placed) + len(cr.line)
		cr.mu.Unlock()
		time.Sleep(time.Millisecond) // and not at full speed, on the same processor
	}
	return all
}

// A user may have 64 connections on the loopback listener. A hundred calls at once, as of an SDK without a pool, are all
// answered: those that find no place wait for one.
func TestLoopbackHundredAtOnce(t *testing.T) {
	t.Parallel()
	let := make(chan struct{})
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		select {
		case <-let:
		case <-ctx.Done():
		}
		return fetchDay(ctx, k)
	})
	d.Limits = Limits{Place: time.Hour, Answer: time.Hour}
	at, secrets := d.loopbackListener()
	cr := d.crowdOf(onLoopback, "")
	text := asks(appVault, at, "Connection: close", secretLine(secrets.Header(agent.Match{Module: "vision"})))
	all := d.crowdOn(t, "tcp", at, text, cr, 100)
	if waits := cr.waiting.Load(); waits != 36 {
		t.Errorf("%d wait", waits)
	}
	close(let)
	var asking sync.WaitGroup
	for _, conn := range all {
		asking.Go(func() {
			if got := exchangeOn(t, conn, ""); got.status != 200 {
				t.Errorf("%+v", got)
			}
		})
	}
	asking.Wait()
}

// refusedAtLast asks on a connection for which there is no place, and says no more, which ends its wait as its time does: so
// the wait may be long, and no busy machine makes it end before the request has come, or before another's place is free.
func refusedAtLast(t testing.TB, conn net.Conn, text string) reply {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	return exchangeOn(t, conn, "")
}

// Who finds no place there is told so; a kept connection that is idle makes room.
func TestLoopbackCrowd(t *testing.T) {
	t.Parallel()
	let := make(chan struct{})
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		select {
		case <-let:
		case <-ctx.Done():
		}
		return fetchDay(ctx, k)
	})
	d.Limits = Limits{LoopbackPerUser: 2, Place: time.Hour, Answer: time.Hour}
	at, secrets := d.loopbackListener()
	text := asks(appVault, at, secretLine(secrets.Header(agent.Match{Module: "vision"})))
	held := d.crowdOn(t, "tcp", at, text, d.crowdOf(onLoopback, ""), 2)
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := refusedAtLast(t, conn, text)
	if got.status != 429 || got.header.Get("Retry-After") != "1" || !got.closes || !strings.Contains(got.body, "all 2 connections") {
		t.Errorf("one too many: %+v", got)
	}
	close(let)
	for _, conn := range held {
		if got := exchangeOn(t, conn, ""); got.status != 200 {
			t.Errorf("%+v", got)
		}
	}
	for range 3 { // the two are kept, and idle
		if got := sendTCP(t, at, text); got.status != 200 {
			t.Errorf("beside idle ones: %+v", got)
		}
	}
}

// A connection that made room, and whose client leaves unread what net/http says to the rest of what it had sent, counts
// again for its caller until that is read.
func TestUnreadRefusalAfterMakingRoomCounts(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("unix", shortFolder(t)+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cr := &crowd{room: tokensRoom(Limits{Connections: 64})}
	defer cr.close()
	open := func() (*connection, net.Conn) {
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c := &connection{Conn: accepted, on: time.Now(), at: -1, key: quotaKey{uid: 7}, crowd: cr}
		if !cr.enter(c, false) {
			t.Fatal("there is not even a line")
		}
		c.phase.Store(phaseBusy)
		return c, client
	}
	first, client := open()
	most := first.counted[0].most
	for len(cr.placed) < most {
		open()
	}
	waits, _ := open()
	cr.rest(first) // it is idle, with the rest of what was sent in net/http's own buffer
	if first.at >= 0 || waits.at < 0 {
		t.Fatal("it has made no room")
	}
	if _, err := first.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = first.Close()
	cr.forget(first)
	if len(cr.placed) != most+1 || waits.whole().placed != most+1 {
		t.Errorf("%d connections are counted of %d that are open", len(cr.placed), most+1)
	}
	client.Close()
	for open := most + 1; open > most; {
		time.Sleep(time.Millisecond)
		cr.mu.Lock()
		open = len(cr.placed)
		cr.mu.Unlock()
	}
}

// What was asked for on a connection that was refused in that very moment does not come about: its client asks again.
func TestRefusedInLineAsksForNothing(t *testing.T) {
	t.Parallel()
	cr := &crowd{room: tokensRoom(Limits{Connections: 64})}
	c := &connection{Conn: new(ending), on: time.Now(), at: -1, key: quotaKey{uid: 7}, crowd: cr}
	c.counted = cr.countedFor(c.key)
	if !cr.queue(c) {
		t.Fatal("there is no line")
	}
	defer c.expiry.Stop()
	c.wrote.Store(true) // nothing more is written on it
	cr.expire(c)
	if c.begin() {
		t.Error("it may bring another request")
	}
	if f := c.await(new(exchange)); f == nil || f.status != 429 || len(cr.placed) != 0 {
		t.Errorf("%+v, %d placed", f, len(cr.placed))
	}
}
