// Package turnaway answers connections for which there is no room: with status 429, without reading what they ask, and within
// bounds of its own. Whoever calls sees that it was answered, and when to come again, instead of a reset.
package turnaway

import (
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	moment = 2 * time.Second // for the caller to send what it has, and to read the answer
	most   = 64 << 10        // bytes of a request that are dropped

	lookFirst = 10 * time.Millisecond // for whether the answer was read
	lookMost  = time.Second           // between two such looks
)

// Refusals are the connections of a listener that were answered and are not closed yet: a connection that is closed at once
// takes its answer back, or breaks the request that its caller is still sending. K is whom a connection counts for. Set Most
// before the first use.
//
// One caller may have at most twice as many as are free then, so that the next one finds some: it takes several callers, who
// read nothing, to have them all. Beyond that a connection is closed without an answer.
type Refusals[K comparable] struct {
	Most int // at once; zero: each connection is closed without an answer

	mu    sync.Mutex // protects what follows
	all   map[net.Conn]K
	of    map[K]int
	done  chan struct{} // closed by Close
	ended bool          // Close was called
	left  sync.WaitGroup
}

// Refuse answers conn, of which nothing may have been written before, and closes it in the end. It does not wait.
func (r *Refusals[K]) Refuse(conn net.Conn, of K) {
	if !r.take(conn, of) {
		_ = conn.Close()
		return
	}
	Tell(conn)
	go func() {
		defer r.left.Done()
		drop(conn)
		r.wait(conn)
		_ = conn.Close()
		r.giveBack(conn)
	}()
}

func (r *Refusals[K]) take(conn net.Conn, of K) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended || r.of[of] >= 2*(r.Most-len(r.all)) {
		return false
	}
	if r.all == nil {
		r.all, r.of, r.done = make(map[net.Conn]K), make(map[K]int), make(chan struct{})
	}
	_ = conn.SetReadDeadline(time.Now().Add(moment))
	r.all[conn] = of
	r.of[of]++
	r.left.Add(1)
	return true
}

func (r *Refusals[K]) giveBack(conn net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of := r.all[conn]
	delete(r.all, conn)
	if r.of[of]--; r.of[of] == 0 {
		delete(r.of, of)
	}
}

// drop reads what the caller sends, until it has closed its side or the moment of take is over.
func drop(conn net.Conn) {
	dropped := make([]byte, 512)
	for range most / len(dropped) {
		if _, err := conn.Read(dropped); err != nil {
			return
		}
	}
}

// wait returns when the answer was read, or Close is called: what is not read stays this process's memory, in the kernel.
func (r *Refusals[K]) wait(conn net.Conn) {
	for pause := lookFirst; Unread(conn); pause = min(2*pause, lookMost) {
		select {
		case <-time.After(pause):
		case <-r.done:
			return
		}
	}
}

// Close closes all that are left, and waits until they are. What is refused afterwards gets no answer.
func (r *Refusals[K]) Close() {
	r.mu.Lock()
	if !r.ended && r.done != nil {
		close(r.done)
	}
	r.ended = true
	for conn := range r.all {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
	}
	r.mu.Unlock()
	r.left.Wait()
}

// Tell writes the answer to conn, of which nothing may have been written before, and ends what is written there.
func Tell(conn net.Conn) {
	_, _ = conn.Write(answer) // it fits into the socket's buffer; a caller that has gone misses nothing
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // it fails where the caller has gone
	}
}

// Unread reports whether the other end of a Unix socket has not read all that was written. With TCP the other end keeps that.
func Unread(conn net.Conn) bool {
	if Queued(conn, unix.SIOCOUTQ) == 0 {
		return false
	}
	_, isUnix := conn.LocalAddr().(*net.UnixAddr)
	return isUnix
}

// Queued returns how many bytes the kernel holds of a socket in one direction: unix.SIOCINQ, come in and not read, or
// unix.SIOCOUTQ, written and not read at the other end. What is closed, or is no socket, has none.
func Queued(conn net.Conn, which uint) (n int) {
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), which) })
	return n
}
