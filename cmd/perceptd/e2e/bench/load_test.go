//go:build bench

package bench

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// loader sends one request over and over on a fixed number of connections to a Unix socket, each of which
// sends the next one when the answer is there. It is one thread on bare system calls, so that it costs
// less than any server that it measures.
type loader struct {
	socket  string
	request []byte
	conns   []connection
	fresh   bool // a connection for each request

	epoll     int
	waiting   int // connections whose answer is not there yet
	latencies []time.Duration
	errors    int
	first     error // the first of errors
}

type connection struct {
	fd     int // -1: closed
	sent   time.Time
	answer []byte // as much as has arrived
	buffer [8 << 10]byte
}

// sample is what one run of a load measured.
type sample struct {
	perSecond, p50, p99 float64 // requests; microseconds
	answered, errors    int
	first               error         // the first of errors
	elapsed             time.Duration // until the last answer
}

const (
	maxErrors = 100
	noAnswer  = 5 * time.Second // without any answer: the server hangs
)

func newLoader(socket string, request []byte, conns int, fresh bool) (*loader, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	l := &loader{socket: socket, request: request, conns: make([]connection, conns), fresh: fresh, epoll: epoll}
	for i := range l.conns {
		l.conns[i].fd = -1
	}
	return l, nil
}

func (l *loader) close() {
	for i := range l.conns {
		l.hangUp(&l.conns[i])
	}
	_ = unix.Close(l.epoll)
}

// run keeps the load up for d, lets the requests under way end, and returns what it measured.
func (l *loader) run(d time.Duration) (sample, error) {
	l.latencies, l.errors, l.first = l.latencies[:0], 0, nil
	begun := time.Now()
	last, err := l.keepUp(begun.Add(d))
	if err != nil {
		return sample{}, err
	}
	s := sample{answered: len(l.latencies), errors: l.errors, first: l.first, elapsed: last.Sub(begun)}
	s.perSecond = float64(s.answered) / s.elapsed.Seconds()
	slices.Sort(l.latencies)
	if n := len(l.latencies); n > 0 {
		s.p50 = float64(l.latencies[n/2].Nanoseconds()) / 1e3
		s.p99 = float64(l.latencies[n*99/100].Nanoseconds()) / 1e3
	}
	return s, nil
}

// warm asks once on every connection, on one after the other: a server that gives each caller its part of the
// connections may not know yet that those of the run before are closed.
func (l *loader) warm() error {
	for i := range l.conns {
		for since := time.Now(); ; time.Sleep(time.Millisecond) {
			err := l.ask(i)
			if err == nil {
				break
			}
			if l.hangUp(&l.conns[i]); time.Since(since) > noAnswer {
				return err
			}
		}
	}
	return nil
}

// ask asks on connection i, and waits for the answer.
func (l *loader) ask(i int) error {
	err := l.send(i, time.Now())
	if err != nil {
		return err
	}
	l.waiting--
	for whole := false; !whole; {
		poll := []unix.PollFd{{Fd: int32(l.conns[i].fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, int(noAnswer.Milliseconds())); n == 0 && err == nil {
			return fmt.Errorf("no answer after %v", noAnswer)
		}
		if whole, err = l.receive(&l.conns[i]); err != nil {
			return err
		}
	}
	return nil
}

// keepUp sends on every connection until the time is over and returns when the last answer was there.
func (l *loader) keepUp(until time.Time) (last time.Time, err error) {
	last = time.Now()
	for i := range l.conns {
		if err := l.send(i, last); err != nil {
			return last, err
		}
	}
	var events [256]unix.EpollEvent
	for l.waiting > 0 {
		n, err := unix.EpollWait(l.epoll, events[:], int(noAnswer.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return last, err
		case n == 0:
			return last, fmt.Errorf("%d requests are without an answer after %v", l.waiting, noAnswer)
		}
		for _, event := range events[:n] {
			i := int(event.Fd)
			done, err := l.receive(&l.conns[i])
			if err != nil {
				l.note(err)
				l.hangUp(&l.conns[i])
				done = true
			}
			if !done {
				continue
			}
			last = time.Now()
			l.waiting--
			if err == nil {
				l.latencies = append(l.latencies, last.Sub(l.conns[i].sent))
			}
			if last.Before(until) && l.errors < maxErrors {
				if err := l.send(i, last); err != nil {
					return last, err
				}
			}
		}
	}
	return last, nil
}

func (l *loader) note(err error) {
	l.errors++
	if l.first == nil {
		l.first = err
	}
}

// send sends the request on connection i, which it opens if need be.
func (l *loader) send(i int, now time.Time) error {
	c := &l.conns[i]
	c.sent, c.answer = now, c.buffer[:0]
	if c.fd < 0 {
		if err := l.open(c, i); err != nil {
			return err
		}
	}
	n, err := unix.Write(c.fd, l.request)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if n < len(l.request) {
		return fmt.Errorf("only %d bytes of the request were taken", n)
	}
	l.waiting++
	return nil
}

func (l *loader) open(c *connection, i int) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: l.socket}); err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("connect: %w", err)
	}
	// The kernel hands back what is in Fd: which connection it is says more than its descriptor.
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("epoll: %w", err)
	}
	c.fd = fd
	return nil
}

func (l *loader) hangUp(c *connection) {
	if c.fd >= 0 {
		_ = unix.Close(c.fd)
		c.fd = -1
	}
}

// receive reads what has arrived and reports whether the answer is whole. An answer that is no token is
// an error.
func (l *loader) receive(c *connection) (whole bool, err error) {
	n, err := unix.Read(c.fd, c.buffer[len(c.answer):])
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read: %w", err)
	case n == 0:
		return false, errors.New("the server hung up")
	}
	c.answer = c.buffer[:len(c.answer)+n]
	whole, err = isToken(c.answer)
	if whole && err == nil && l.fresh {
		l.hangUp(c)
	}
	return whole, err
}

var (
	statusOK      = []byte("HTTP/1.1 200 OK\r\n")
	headerEnd     = []byte("\r\n\r\n")
	contentLength = []byte("\r\nContent-Length: ")
	tokenBegin    = []byte(`{"access_token":"ey`)
)

// isToken reports whether an answer is whole. An error says that it is no token.
func isToken(answer []byte) (whole bool, err error) {
	end := bytes.Index(answer, headerEnd)
	if end < 0 {
		return false, nil
	}
	header, body := answer[:end], answer[end+len(headerEnd):]
	if !bytes.HasPrefix(header, statusOK) {
		line, _, _ := bytes.Cut(header, []byte("\r\n"))
		return false, fmt.Errorf("answered %q", line)
	}
	at := bytes.Index(header, contentLength)
	if at < 0 {
		return false, errors.New("an answer without Content-Length")
	}
	digits, _, _ := bytes.Cut(header[at+len(contentLength):], []byte("\r"))
	length, err := strconv.Atoi(string(digits))
	switch {
	case err != nil:
		return false, err
	case len(body) < length:
		return false, nil
	case len(body) > length || !bytes.HasPrefix(body, tokenBegin) || body[length-1] != '}':
		return false, errors.New("the body is no token")
	}
	return true, nil
}
