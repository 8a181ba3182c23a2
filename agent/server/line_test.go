package server

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/server/limit"
	"perceptd/tokencache"
)

// crowdOn dials that many connections, sends text on each, and returns when each has a place or one in the line.
func (d *daemon) crowdOn(t *testing.T, network, address, text string, conns *limit.Conns, n int) (all []net.Conn) {
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
		there = conns.Usage().Open
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
	conns := d.quotas().loopback
	text := asks(appVault, at, "Connection: close", secretLine(secrets.Header(agent.Match{Module: "vision"})))
	all := d.crowdOn(t, "tcp", at, text, conns, 100)
	if waits := conns.Usage().Waiting; waits != 36 {
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
	held := d.crowdOn(t, "tcp", at, text, d.quotas().loopback, 2)
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
