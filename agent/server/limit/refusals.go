package limit

import (
	"fmt"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	refusalTime = 2 * time.Second // for the caller to send what it has, and to read the answer
	mostDropped = 64 << 10        // bytes of a request that are dropped
)

// How often it is checked whether a client has read its answer.
const (
	lingerFirst = 10 * time.Millisecond // most clients are about to read
	lingerMost  = time.Second           // between two checks of those that do not
)

// Refusals answers the connections of a listener for which there is no room: with status 429, without reading what
// they ask. So a caller sees that it was answered, and when to come again, instead of a reset. A connection that is
// closed at once takes its answer back, or breaks the request that its caller is still sending; so Refusals keeps it
// for a while. Set Most before the first use.
//
// One caller may have at most twice as many as are free then, so that the next one finds some: it takes several callers
// that read nothing to have them all. Beyond that a connection is closed without an answer.
type Refusals struct {
	Most int // at once; zero: each connection is closed without an answer

	mu    sync.Mutex // protects what follows
	all   map[net.Conn]Key
	of    map[Key]int
	done  chan struct{} // closed by Close
	ended bool          // Close was called
	left  sync.WaitGroup
}

// Refuse answers conn, to which nothing may have been written before, and closes it in the end. It does not wait.
func (r *Refusals) Refuse(conn net.Conn, of Key) {
	if !r.acquire(conn, of) {
		_ = conn.Close()
		return
	}
	writeRefusal(conn)
	go func() {
		defer r.left.Done()
		dropRequest(conn)
		r.wait(conn)
		_ = conn.Close()
		r.release(conn)
	}()
}

func (r *Refusals) acquire(conn net.Conn, of Key) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended || r.of[of] >= 2*(r.Most-len(r.all)) {
		return false
	}
	if r.all == nil {
		r.all, r.of, r.done = make(map[net.Conn]Key), make(map[Key]int), make(chan struct{})
	}
	_ = conn.SetReadDeadline(time.Now().Add(refusalTime))
	r.all[conn] = of
	r.of[of]++
	r.left.Add(1)
	return true
}

func (r *Refusals) release(conn net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of := r.all[conn]
	delete(r.all, conn)
	if r.of[of]--; r.of[of] == 0 {
		delete(r.of, of)
	}
}

// dropRequest reads what the caller sends, until it has closed its side or refusalTime is over.
func dropRequest(conn net.Conn) {
	dropped := make([]byte, 512)
	for range mostDropped / len(dropped) {
		if _, err := conn.Read(dropped); err != nil {
			return
		}
	}
}

// wait returns when the answer was read, or Close is called: what is not read stays this process's memory, in the
// kernel.
func (r *Refusals) wait(conn net.Conn) {
	for pause := lingerFirst; hasUnread(conn); pause = min(2*pause, lingerMost) {
		select {
		case <-time.After(pause):
		case <-r.done:
			return
		}
	}
}

// Close closes all that are left, and waits until they are. What is refused afterwards gets no answer.
func (r *Refusals) Close() {
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

// writeRefusal writes the answer to conn, to which nothing may have been written before, and then the end.
func writeRefusal(conn net.Conn) {
	_, _ = conn.Write(refusal) // it fits into the socket's buffer; a caller that has gone misses nothing
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // it fails where the caller has gone
	}
}

// hasUnread reports whether the other end of a Unix socket has not read all that was written. With TCP the other end
// keeps that.
func hasUnread(conn net.Conn) bool {
	if queuedBytes(conn, unix.SIOCOUTQ) == 0 {
		return false
	}
	_, isUnix := conn.LocalAddr().(*net.UnixAddr)
	return isUnix
}

// queuedBytes returns how many bytes the kernel holds of a socket in one direction: unix.SIOCINQ, come in and not read,
// or unix.SIOCOUTQ, written and not read at the other end. What is closed, or is not a socket, has none.
func queuedBytes(conn net.Conn, which uint) (n int) {
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

// refusal has the fields of RFC 9457, as perceptd's own form, and those that SDKs show: which form would be asked for
// is not known. Whatever reads JSON reads both.
var refusal = func() []byte {
	const (
		status = http.StatusTooManyRequests
		code   = "too_many_requests" // api.CodeBusy
		detail = "there is no free connection: ask again in a moment, and keep fewer connections at once"
	)
	title := http.StatusText(status)
	body := fmt.Sprintf(`{"type":"urn:percept:problem:%s","title":%q,"status":%d,"detail":%q,"code":%q,`+
		`"error":"invalid_request","error_description":%q,"statusCode":%d,"message":%q}`+"\n",
		code, title, status, detail, code, detail, status, detail)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: application/problem+json\r\nCache-Control: no-store\r\n"+
		"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", status, title, len(body), body)
}()
