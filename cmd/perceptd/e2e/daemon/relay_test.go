package daemon

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"testing"
)

// relay is the network between a device and a hub: it can be cut, and says nothing then.
type relay struct {
	host     string // where it listens
	listener net.Listener

	mu    sync.Mutex // protects what follows
	cut   bool       // nothing is passed on, and nobody is told
	conns map[net.Conn]bool
	mend  *sync.Cond
}

// newRelay listens on a port of a loopback address that nobody else has.
func newRelay(t *testing.T, port int) *relay {
	t.Helper()
	var l net.Listener
	for tries := 0; l == nil; tries++ {
		host := fmt.Sprintf("127.%d.%d.%d", 1+rand.N(250), rand.N(256), 1+rand.N(250))
		var err error
		if l, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port))); err != nil && tries > 20 {
			t.Fatal(err)
		}
	}
	host, _, _ := net.SplitHostPort(l.Addr().String())
	r := &relay{host: host, listener: l, conns: make(map[net.Conn]bool)}
	r.mend = sync.NewCond(&r.mu)
	t.Cleanup(func() { _ = l.Close() })
	return r
}

// passTo passes on what comes in to an address, until the test ends.
func (r *relay) passTo(t *testing.T, to string) {
	t.Helper()
	var passing sync.WaitGroup
	passing.Go(func() {
		for {
			conn, err := r.listener.Accept()
			if err != nil {
				return
			}
			passing.Go(func() { r.pass(conn, to, &passing) })
		}
	})
	t.Cleanup(func() {
		_ = r.listener.Close()
		r.setCut(false)
		r.drop()
		passing.Wait()
	})
}

// pass connects a connection with the other side.
func (r *relay) pass(near net.Conn, to string, passing *sync.WaitGroup) {
	far, err := net.Dial("tcp", to)
	if err != nil {
		_ = near.Close()
		return
	}
	r.mu.Lock()
	r.conns[near], r.conns[far] = true, true
	r.mu.Unlock()
	passing.Go(func() { r.copy(far, near) })
	r.copy(near, far)
}

// copy hands on what is read until either side ends, and waits while the network is cut.
func (r *relay) copy(to, from net.Conn) {
	defer func() { _ = to.Close(); _ = from.Close() }()
	for buffer := make([]byte, 32<<10); ; {
		n, err := from.Read(buffer)
		r.mu.Lock()
		for r.cut {
			r.mend.Wait()
		}
		r.mu.Unlock()
		if _, failed := to.Write(buffer[:n]); err != nil || failed != nil {
			return
		}
	}
}

// setCut cuts the network, or mends it.
func (r *relay) setCut(cut bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = cut
	r.mend.Broadcast()
}

// drop ends every connection, as a router does that was started anew.
func (r *relay) drop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for conn := range r.conns {
		_ = conn.Close()
	}
	clear(r.conns)
}
