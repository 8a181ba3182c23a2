package server

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/server/limit"
)

// arrived connects and returns when the server has accepted n connections of this socket's.
func arrived(t *testing.T, d *daemon, socket string, n int) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	for {
		if u := d.quotas().tokens.Usage(); u.Open+u.Own >= n {
			return conn
		}
	}
}

// Who has connected before the daemon goes down, and asks a moment later, is answered; who says nothing is not waited
// for.
func TestAcceptedConnectionsAreHeard(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("")
	asks := arrived(t, d, socket, 1)
	silent := arrived(t, d, socket, 2)
	down := make(chan error, 1)
	go func() { down <- d.Shutdown(context.Background()) }()
	for { // until nobody accepts any more
		conn, err := net.Dial("unix", socket)
		if err != nil {
			break
		}
		conn.Close()
	}
	if got := exchangeOn(t, asks, get(api.PathHealth)); got.status != 200 {
		t.Errorf("%+v", got)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
	if n, err := silent.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestWaitingForArrivalsEnds(t *testing.T) {
	t.Parallel()
	var a openConns
	ctx, cancel := context.WithCancel(context.Background())
	a.add(ctx, limit.NewConn(new(net.UnixConn), time.Second))
	cancel()
	a.wait(ctx)
}

// slowListener gives out a connection some time after it was accepted, as when the look at its caller takes long.
type slowListener struct {
	conn   chan net.Conn
	looked chan struct{}
	closed chan struct{}
	close  func()
}

func (l *slowListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conn:
		<-l.looked
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *slowListener) Close() error { l.close(); return nil }

func (l *slowListener) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: "slow"} }

// Who was accepted just before the daemon goes down, and is still being looked at, is heard as well; and whoever says
// nothing does not hold it up.
func TestConnectionsBeingLookedAtAreHeard(t *testing.T) {
	t.Parallel()
	inBubble(t, fetchDay, func(b *bubble) {
		l := &slowListener{conn: make(chan net.Conn), looked: make(chan struct{}), closed: make(chan struct{})}
		l.close = sync.OnceFunc(func() { close(l.closed) })
		served := make(chan error)
		go func() { served <- b.server.ServeTokens(l, "") }()
		silent, first := net.Pipe()
		defer silent.Close()
		asks, second := net.Pipe()
		defer asks.Close()
		l.conn <- first
		l.looked <- struct{}{}
		l.conn <- second
		began := time.Now()
		down := make(chan error)
		go func() { down <- b.server.Shutdown(context.Background()) }()
		synctest.Wait()
		l.looked <- struct{}{}
		if got := exchangeOn(b.t, asks, get(api.PathHealth)); got.status != 403 { // a pipe's caller is nobody
			b.t.Errorf("%+v", got)
		}
		for _, ended := range []chan error{down, served} {
			if err := <-ended; err != nil {
				b.t.Error(err)
			}
		}
		if took := time.Since(began); took > 2*limit.SilenceTimeout {
			b.t.Errorf("who says nothing held it up for %v", took)
		}
	})
}

// Who connects to a listener that comes too late is left in its queue, which ends with it; an accepted one would be
// nobody's.
func TestNobodyIsAcceptedAfterShutdown(t *testing.T) {
	t.Parallel()
	for name, serve := range map[string]func(*Server, net.Listener) error{
		"of all services": func(s *Server, l net.Listener) error { return s.ServeTokens(l, "") },
		"of a module":     func(s *Server, l net.Listener) error { return s.ServeTokens(l, "vision") },
		"of technicians":  (*Server).ServeAdmin,
	} {
		inBubble(t, fetchDay, func(b *bubble) {
			l := &slowListener{conn: make(chan net.Conn, 1), looked: make(chan struct{}), closed: make(chan struct{})}
			close(l.looked)
			l.close = func() {
				synctest.Wait() // for whoever accepts
				select {
				case queued := <-l.conn:
					queued.Close()
				default:
				}
				close(l.closed)
			}
			if err := b.server.Shutdown(context.Background()); err != nil {
				b.t.Error(err)
			}
			client, queued := net.Pipe()
			defer client.Close()
			l.conn <- queued
			if err := serve(b.server, l); err != nil {
				b.t.Errorf("the socket %s: %v", name, err)
			}
			_ = client.SetReadDeadline(time.Now().Add(time.Hour))
			if _, err := client.Read(make([]byte, 1)); err != io.EOF {
				b.t.Errorf("on the socket %s it reads %v, want the end", name, err)
			}
		})
	}
}

// passing is an error whose cause can pass, so that net/http accepts again, until it is final.
type passing struct{ final atomic.Bool }

func (p *passing) Error() string { return "too many open files" }

func (p *passing) Timeout() bool { return false }

func (p *passing) Temporary() bool { return !p.final.Load() }

// failing is a listener that gives out errors alone.
type failing struct {
	broken chan error
	closed chan struct{}
	close  func()
}

func newFailing() *failing {
	l := &failing{broken: make(chan error), closed: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.closed) })
	return l
}

func (l *failing) Accept() (net.Conn, error) {
	select {
	case err := <-l.broken:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *failing) Close() error { l.close(); return nil }

func (l *failing) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: "failing"} }

// Where nobody can be accepted at the moment, the daemon goes down all the same.
func TestShutdownWhileAcceptingFails(t *testing.T) {
	t.Parallel()
	inBubble(t, fetchDay, func(b *bubble) {
		l, failure := newFailing(), new(passing)
		served, down := make(chan error), make(chan error)
		go func() { served <- b.server.ServeTokens(l, "") }()
		l.broken <- failure
		synctest.Wait()
		go func() { down <- b.server.Shutdown(context.Background()) }()
		late := time.AfterFunc(time.Hour, func() {
			b.t.Error("it accepts for ever")
			failure.final.Store(true)
		})
		defer late.Stop()
		for range 2 {
			select {
			case err := <-served:
				if err != nil {
					b.t.Error(err)
				}
			case err := <-down:
				if err != nil {
					b.t.Error(err)
				}
			}
		}
	})
}
