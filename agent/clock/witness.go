package clock

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Socket is where perceptd-clock.socket has another process tell the kernel's word, where this one may not ask.
const Socket = "/run/percept/clock.sock"

const (
	askFor = 2 * time.Second // an answer takes milliseconds

	// A clock that is not synchronised is asked about after as long again as it has not been, within these bounds: soon
	// after a boot, when the time daemon is about to set it, and seldom on a device that has no time daemon.
	askSoonest = 15 * time.Second
	askLatest  = 5 * time.Minute
	// confirmInterval is after how long a synchronised clock is asked about again. The kernel itself goes on believing
	// for hours.
	confirmInterval = 10 * time.Minute
	// wordLasts is how long the last answer counts while nobody gives another.
	wordLasts = 30 * time.Minute

	// stepped is by how much the wall clock moves against the boot clock, since an answer, that ends it: somebody has
	// set the clock. What a time daemon slews moves both alike; a leap second, and the small steps of daemons, are
	// less.
	stepped = 2 * time.Second
)

// The kernel's word, as it goes over the socket.
const (
	saidYes = "synchronised"
	saidNo  = "not synchronised"
)

// Sentence is how the kernel's word is told.
func Sentence(synchronised bool) string {
	if synchronised {
		return saidYes
	}
	return saidNo
}

// Kernel asks the kernel whether a time daemon keeps the wall clock right: chrony, ntpd, systemd-timesyncd and PTP
// daemons all tell it. The error says that this process may not ask: seccomp filters, systemd's ProtectClock= among
// them, often withhold adjtimex even to read.
func Kernel() (synchronised bool, err error) { return kernel(unix.Adjtimex) }

func kernel(adjtimex func(*unix.Timex) (int, error)) (synchronised bool, err error) {
	var t unix.Timex // no Modes: nothing is set
	state, err := adjtimex(&t)
	if err != nil {
		return false, fmt.Errorf("adjtimex: %w", err)
	}
	return state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0, nil
}

// askSocket asks whoever serves the socket at path for the kernel's word.
func askSocket(path string) (synchronised bool, err error) {
	conn, err := net.DialTimeout("unix", path, askFor)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(wall().Add(askFor)); err != nil {
		return false, err
	}
	said, err := io.ReadAll(io.LimitReader(conn, 64))
	if err != nil {
		return false, err
	}
	switch text := strings.TrimSpace(string(said)); text {
	case saidYes, saidNo:
		return text == saidYes, nil
	default:
		return false, fmt.Errorf("%s answers %.40q", path, text)
	}
}

// witness has the kernel's word from another process, and asks for it beside those who want to know.
type witness struct {
	boot func() time.Duration
	wall func() time.Time
	ask  func() (synchronised bool, err error)

	mu           sync.Mutex // protects what follows
	asking       bool
	asked, next  time.Duration // when it was asked last, and is to be asked next, in boot time
	doubted      time.Duration // since when no answer was yes; 0: the last was
	told         bool          // there is an answer that counts
	synchronised bool          // that
	at           time.Duration // when it came
	ahead        time.Duration // what the wall clock was ahead of the boot clock then
}

// word returns the last answer that still counts, and has the next one asked for when it is time. It waits for nothing.
func (w *witness) word() (synchronised, told bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.boot()
	if w.told && (w.aheadAt(now)-w.ahead).Abs() > stepped {
		w.told, w.next = false, min(w.next, w.asked+askSoonest)
	}
	if w.told && now-w.at > wordLasts {
		w.told = false
	}
	if !w.asking && now >= w.next {
		w.asking = true
		go w.inquire()
	}
	return w.synchronised && w.told, w.told
}

// inquire asks once, and notes the answer and when to ask again.
func (w *witness) inquire() {
	synchronised, err := w.ask()
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.boot()
	w.asking, w.asked = false, now
	if err == nil {
		w.told, w.synchronised, w.at, w.ahead = true, synchronised, now, w.aheadAt(now)
	}
	if err == nil && synchronised {
		w.doubted, w.next = 0, now+confirmInterval
		return
	}
	if w.doubted == 0 {
		w.doubted = now
	}
	w.next = now + min(max(now-w.doubted, askSoonest), askLatest)
}

func (w *witness) aheadAt(now time.Duration) time.Duration {
	return w.wall().Sub(time.Unix(0, 0)) - now
}
