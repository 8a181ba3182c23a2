package limit

import (
	"net"
	"slices"
	"sync"
	"time"
)

// Admission is which new connections a listener lets in.
type Admission struct {
	// KeyOf returns whom a connection counts for: all that its user runs or, where closely is set, the unit or
	// container that it comes from. It is called by one goroutine.
	KeyOf func(conn net.Conn, closely bool) Key

	// IsExempt reports whether a connection is let in whatever the budgets say, as the daemon's own check of itself.
	IsExempt func(conn net.Conn) bool

	// Refuse ends a connection that is not let in. It does not wait.
	Refuse func(conn net.Conn)

	// Rate is the budget of new connections of one user, and once more of each of its units.
	Rate *Rate
}

// isWithin takes a new connection out of a budget, and reports false when nothing is left of it.
func (a *Admission) isWithin(k Key, now time.Time) bool {
	_, ok := a.Rate.Reserve(k, now)
	return ok
}

// RateListener is a listener with a budget of new connections for each caller, where callers need not take turns.
type RateListener struct {
	net.Listener
	Admission
}

// Accept waits for the next connection within its caller's budget.
func (l *RateListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		now := time.Now()
		for _, closely := range [...]bool{false, true} {
			if l.isWithin(l.KeyOf(conn, closely), now) || l.IsExempt(conn) {
				return conn, nil
			}
		}
		l.Refuse(conn)
	}
}

// FairListener is a listener at which callers take turns. Accepting a connection is cheap. To find out who calls is
// not, and is done one by one. So a caller that connects without pause only delays its own connections, and those
// beyond its budget are refused at once.
//
// The kernel names the user of a connection at no cost. The unit or container is looked up only for users whose
// budget is used up, or that have several connections waiting. Each unit and container has a budget and a queue of
// its own, so that one that connects in a loop, or many times at once, takes nothing from the others of its user,
// which may be root.
type FairListener struct {
	net.Listener
	admission Admission
	most      int // connections that may wait
	perKey    int // of one key

	mu      sync.Mutex // protects what follows
	changed sync.Cond
	turns   []Key // the keys that have a connection waiting, the next one first
	waiting map[Key][]net.Conn
	count   int
	failure error // why nothing is accepted at the moment
	told    bool  // failure was returned
	closed  bool
}

// fewWaiting is how many connections of a user wait as one caller's, before their units and containers are looked up.
const fewWaiting = 4

// NewFairListener starts accepting on l, until l or what it returns is closed. At most that many connections wait for
// their turn, half of them of one caller. Call Accept until it fails for good, since a connection that was accepted is
// lost otherwise, and then Close.
func NewFairListener(l net.Listener, most int, admission Admission) *FairListener {
	f := &FairListener{
		Listener: l, admission: admission, most: most, perKey: max(1, most/2), waiting: make(map[Key][]net.Conn),
	}
	f.changed.L = &f.mu
	go f.acceptLoop()
	return f
}

// acceptLoop accepts every connection, as fast as it can: the kernel's queue is the same for all callers, and when it
// is full it turns away those that do not wait.
func (f *FairListener) acceptLoop() {
	for {
		conn, err := f.Listener.Accept()
		if err != nil && !f.fail(err) {
			return
		}
		if err == nil && !f.enqueue(conn) {
			f.admission.Refuse(conn)
		}
	}
}

// fail lets Accept return err, and waits until it is called again. It reports false when the listener was closed
// instead.
func (f *FairListener) fail(err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failure, f.told = err, false
	f.changed.Broadcast()
	for f.failure != nil && !f.closed {
		f.changed.Wait()
	}
	if f.failure == nil {
		return true
	}
	f.failure = net.ErrClosed // whatever it was does not pass any more
	return false
}

// enqueue puts conn into its caller's queue. It reports false when conn is to be refused.
func (f *FairListener) enqueue(conn net.Conn) bool {
	key, now, isExempt := f.admission.KeyOf(conn, false), time.Now(), f.admission.IsExempt(conn)
	switch {
	case isExempt:
	case !f.admission.isWithin(key, now):
		if key = f.admission.KeyOf(conn, true); !f.admission.isWithin(key, now) {
			return false
		}
	case f.isBusy(key):
		key = f.admission.KeyOf(conn, true)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !isExempt && (len(f.waiting[key]) >= f.perKey || f.count >= f.most && !f.makeRoomLocked(key)) {
		return false
	}
	if len(f.waiting[key]) == 0 {
		f.turns = append(f.turns, key)
	}
	f.waiting[key] = append(f.waiting[key], conn)
	f.count++
	f.changed.Broadcast()
	return true
}

// isBusy reports whether so many connections wait, of a user or of all, that the user is not enough to tell callers
// apart.
func (f *FairListener) isBusy(key Key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.waiting[key]) >= fewWaiting || f.count >= f.most/2
}

// makeRoomLocked refuses the connection that came last of the key with the most waiting. It reports false when no key
// has more than key would have then.
func (f *FairListener) makeRoomLocked(key Key) bool {
	busiest, n := key, len(f.waiting[key])+1
	for other, conns := range f.waiting {
		if len(conns) > n {
			busiest, n = other, len(conns)
		}
	}
	if busiest == key {
		return false
	}
	last := len(f.waiting[busiest]) - 1
	f.admission.Refuse(f.waiting[busiest][last])
	f.waiting[busiest] = f.waiting[busiest][:last]
	f.count--
	return true
}

// Accept returns the connection whose turn it is, or waits for one. After an error whose cause can pass, call it again.
func (f *FairListener) Accept() (net.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.told && !f.closed {
		f.failure, f.told = nil, false
		f.changed.Broadcast()
	}
	for f.count == 0 && f.failure == nil {
		f.changed.Wait()
	}
	if f.count == 0 {
		f.told = true
		return nil, f.failure
	}
	return f.nextLocked(), nil
}

// nextLocked takes out the first connection of the key whose turn it is.
func (f *FairListener) nextLocked() net.Conn {
	key := f.turns[0]
	f.turns = slices.Delete(f.turns, 0, 1)
	conn, rest := f.waiting[key][0], f.waiting[key][1:]
	f.count--
	if len(rest) == 0 {
		delete(f.waiting, key)
		return conn
	}
	f.waiting[key] = rest
	f.turns = append(f.turns, key)
	return conn
}

// Close stops accepting. Connections that wait keep their turns.
func (f *FairListener) Close() error {
	err := f.Listener.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.changed.Broadcast()
	return err
}
