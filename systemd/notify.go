package systemd

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

const (
	// notifyTimeout is how long a busy service manager is waited for, whose queue is full, by all that is sent
	// together: a start sends hundreds of messages. What was waited comes back in ten times as long.
	notifyTimeout = 2 * time.Second
	comesBackIn   = 10

	longestStatus = 512 // bytes; systemctl shows one line, and a whole notification is cut at 4096
)

// Notify tells the service manager how the daemon is (sd_notify(3)). The zero value tells nobody. Each
// method returns nil outside systemd, and an error when the service manager could not be told, which
// is for the log and never a reason to stop.
//
// It sends by itself and not through go-systemd's SdNotify, which looks into the environment at each
// call and may block without end.
type Notify struct {
	address string      // of NOTIFY_SOCKET; empty outside systemd
	budget  *waitBudget // shared by all copies; nil: each message has its own
}

// ErrBusy reports that the service manager's queue stayed full. What was to be told is worth telling again later.
var ErrBusy = errors.New("its queue is full")

// waitBudget is how long messages may still wait, all together. The zero value is a whole notifyTimeout.
type waitBudget struct {
	mu     sync.Mutex
	waited time.Duration
	asOf   time.Time
}

// left returns how long a message may wait now.
func (p *waitBudget) left(now time.Time) time.Duration {
	if p == nil {
		return notifyTimeout
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waited = max(0, p.waited-max(0, now.Sub(p.asOf))/comesBackIn)
	p.asOf = now
	return max(0, notifyTimeout-p.waited)
}

// spend notes that a message has waited.
func (p *waitBudget) spend(d time.Duration) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waited = min(notifyTimeout, p.waited+d)
}

// NotifyFromEnvironment returns where to notify and takes NOTIFY_SOCKET out of the environment. The
// error says that what is there is no Unix socket; the Notify is then one that tells nobody.
func NotifyFromEnvironment() (Notify, error) {
	address := os.Getenv("NOTIFY_SOCKET")
	_ = os.Unsetenv("NOTIFY_SOCKET") // cannot err
	return parseNotifySocket(address)
}

func parseNotifySocket(address string) (Notify, error) {
	if address == "" {
		return Notify{}, nil
	}
	if len(address) < 2 || (address[0] != '/' && address[0] != '@') || strings.ContainsRune(address, 0) {
		return Notify{}, fmt.Errorf("NOTIFY_SOCKET=%q is neither a path nor an abstract Unix socket", address)
	}
	return Notify{address: address, budget: new(waitBudget)}, nil
}

// Enabled reports whether anyone is told.
func (n Notify) Enabled() bool { return n.address != "" }

// Ready says that the daemon serves: after its start, and after each Reloading.
func (n Notify) Ready() error { return n.send(daemon.SdNotifyReady) }

// Reloading says that a new configuration is being read. It carries the time, by which Type=notify-reload
// (systemd 253) tells the reload that it asked for from an earlier one. Ready ends it, also when nothing changed.
func (n Notify) Reloading() error {
	if !n.Enabled() {
		return nil
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return os.NewSyscallError("clock_gettime", err)
	}
	return n.send(daemon.SdNotifyReloading, "MONOTONIC_USEC="+strconv.FormatInt(now.Nano()/1000, 10))
}

// Extend has the service manager wait for so much longer, from now on, for a start or a stop that takes its time.
func (n Notify) Extend(by time.Duration) error {
	return n.send("EXTEND_TIMEOUT_USEC=" + strconv.FormatInt(by.Microseconds(), 10))
}

// Stopping says that the daemon is shutting down.
func (n Notify) Stopping() error { return n.send(daemon.SdNotifyStopping) }

// Status shows text in `systemctl status`, in place of any earlier text and trouble. Text is made one line
// of at most 512 bytes.
func (n Notify) Status(text string) error { return n.Trouble(text, 0) }

// Trouble shows text as Status does, with the error number that says why the daemon does its work badly:
// `systemctl status` shows it as "Error: 110 (Connection timed out)".
func (n Notify) Trouble(text string, number syscall.Errno) error {
	return n.send("STATUS="+oneLine(text, longestStatus), "ERRNO="+strconv.Itoa(int(number)))
}

// Ping tells the watchdog that the daemon is well. See Watch.
func (n Notify) Ping() error { return n.send(daemon.SdNotifyWatchdog) }

// send makes a socket for each message: they are seconds apart, and the service manager's may be
// another after a daemon-reexec.
func (n Notify) send(assignments ...string) error { return n.sendWith(nil, assignments...) }

// sendWith sends descriptors along.
func (n Notify) sendWith(rights []byte, assignments ...string) error {
	if !n.Enabled() {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: n.address})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer conn.Close()
	if err := sendOn(conn, []byte(strings.Join(assignments, "\n")), rights, n.budget); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// sendOn sends at once, or waits within the budget while the receiver's queue is full. net writes no rights to a socket
// that is connected.
func sendOn(conn *net.UnixConn, message, rights []byte, p *waitBudget) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	send := func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), message, rights, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		return !errors.Is(sent, unix.EAGAIN)
	}
	full := false
	if err := raw.Control(func(fd uintptr) { full = !send(fd) }); err != nil {
		return err
	}
	if full {
		began := time.Now()
		wait := p.left(began)
		if err := conn.SetWriteDeadline(began.Add(wait)); err != nil {
			return err
		}
		err = raw.Write(send)
		p.spend(min(wait, time.Since(began)))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return ErrBusy
		}
	}
	return cmp.Or(err, os.NewSyscallError("sendmsg", sent))
}

// oneLine makes text fit for a terminal and for one line: control characters, line separators, those that turn the
// direction of writing and what is not UTF-8 become spaces, runs of space become one, a backslash another character
// that looks like it, and the whole is cut between characters, and marked, where it would not fit into limit bytes with
// the mark.
func oneLine(text string, limit int) string {
	const mark = "…"
	var b strings.Builder
	space := false
	for _, r := range text {
		switch {
		case !unicode.IsPrint(r) || r == utf8.RuneError:
			r = ' '
		case r == '\\': // which some versions take out of what they are told, and leave "x00" of "\x00"
			r = '⧵'
		}
		if r == ' ' {
			space = b.Len() > 0
			continue
		}
		width := utf8.RuneLen(r)
		if space {
			width++
		}
		if b.Len()+width > limit-len(mark) {
			return b.String() + mark
		}
		if space {
			b.WriteByte(' ')
			space = false
		}
		b.WriteRune(r)
	}
	return b.String()
}
