package agent

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// Keeping has what the cache knows outlive this process. It is called by one goroutine at a time, and may take its time.
type Keeping struct {
	// Carry takes over what is to outlive a restart: after each fetch, and when rules have changed.
	Carry func(tokencache.Snapshot) error
	// Save takes over what is to outlive a reboot: at a start that has something, after each fetch that brought a newer token, when rules have changed,
	// when the clock has shown how old tokens of an earlier boot are, once an hour, so that it is known how long the device was on at least, and at the end.
	// What happens within seconds is saved together.
	Save func(tokencache.Snapshot) error
}

const (
	// saveEvery is how often the cache is saved though nothing has changed.
	saveEvery = time.Hour
	// saveGathered is how far apart saves are at least: the first of many fetches is saved at once, those that follow together.
	saveGathered = 3 * time.Second
)

// memory has the cache's knowledge kept.
type memory struct {
	keeping Keeping
	take    func() tokencache.Snapshot
	clock   tokencache.Clock
	log     *zap.Logger
	told    func() // the status may tell something new

	wake  chan struct{}
	newer atomic.Bool // what is to be saved is another than what was

	ctx    context.Context
	cancel context.CancelFunc
	saver  sync.WaitGroup

	saving sync.Mutex // protects closed, and what is kept of tokens from being saved while it is read again
	closed bool

	unread             atomic.Pointer[error] // why what is kept cannot be read now; nil: it was read
	uncarried, unsaved atomic.Pointer[error] // why the last one failed; nil: it worked, or there is none
}

// open begins to keep what take tells.
func (m *memory) open(keeping Keeping, take func() tokencache.Snapshot, clock tokencache.Clock, log *zap.Logger, told func()) {
	m.keeping, m.take, m.clock, m.log, m.told = keeping, take, clock, log, told
	m.wake = make(chan struct{}, 1)
	m.ctx, m.cancel = context.WithCancel(context.Background())
	if keeping.Carry != nil || keeping.Save != nil {
		m.saver.Go(m.run)
	}
}

// notice has the cache kept soon. It does not wait.
func (m *memory) notice(newer bool) {
	if newer {
		m.newer.Store(true)
	}
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// run has what is known carried whenever somebody wakes it, and saves it at moments that no wake puts off: seconds after the save
// before where there is something newer, a minute after each failure, and once an hour.
func (m *memory) run() {
	carried := m.clock.Boot() // when each was done last, or tried
	saved := carried - saveGathered
	for {
		due := m.saveDue(saved)
		if m.uncarried.Load() != nil {
			due = min(due, carried+keepAgain)
		}
		fired, stop := m.clock.Timer(max(0, due-m.clock.Boot()))
		select {
		case <-m.wake:
		case <-fired:
		case <-m.ctx.Done():
			stop()
			return
		}
		stop()
		if m.clock.Boot() >= m.saveDue(saved) {
			m.newer.Store(false)
			m.saving.Lock()
			m.save(m.take())
			m.saving.Unlock()
			saved = m.clock.Boot()
		} else {
			m.carry(m.take())
		}
		carried = m.clock.Boot()
	}
}

// saveDue returns when it is to be saved after that save, or try.
func (m *memory) saveDue(after time.Duration) time.Duration {
	switch {
	case m.newer.Load():
		return after + saveGathered
	case m.unsaved.Load() != nil:
		return after + keepAgain
	}
	return after + saveEvery
}

// save keeps all in both ways.
func (m *memory) save(known tokencache.Snapshot) {
	m.carry(known)
	m.try(&m.unsaved, m.keeping.Save, known, "tokens could not be saved")
}

func (m *memory) carry(known tokencache.Snapshot) {
	m.try(&m.uncarried, m.keeping.Carry, known, "tokens could not be handed to systemd")
}

// try logs a failure once, and that it is over.
func (m *memory) try(fault *atomic.Pointer[error], keep func(tokencache.Snapshot) error, known tokencache.Snapshot, what string) {
	if keep == nil {
		return
	}
	err := keep(known)
	var before *error
	if err != nil {
		before = fault.Swap(&err)
	} else {
		before = fault.Swap(nil)
	}
	switch {
	case err != nil && before == nil:
		m.log.Error(what, zap.Error(err))
	case err == nil && before != nil:
		m.log.Info("tokens are kept again")
	case err == nil:
		return
	}
	m.told()
}

// close ends the saver and returns what keeps the cache for the last time, as it is now.
func (m *memory) close() (keep func()) {
	m.cancel()
	m.saver.Wait()
	m.saving.Lock()
	m.closed = true
	m.saving.Unlock()
	known := m.take()
	return func() { m.save(known) }
}

// outlives says what becomes of policy changes that are not on the disk: a copy of the record goes with what is carried, and with what
// is saved, where the state folder can be written to.
func (m *memory) outlives(writable bool) string {
	switch {
	case writable && m.keeping.Save != nil && m.unsaved.Load() == nil:
		return "the next start knows of it by the copy beside the tokens alone"
	case m.keeping.Carry != nil && m.uncarried.Load() == nil:
		return "systemd carries it over a restart, and a stop or a reboot loses it"
	}
	return "the next start does not know of it"
}

// trouble says what a technician should know, in sentences.
func (m *memory) trouble() (all []string) {
	if fault := m.unread.Load(); fault != nil {
		all = append(all, fmt.Sprintf("the tokens that were kept cannot be read now: %v; they are fetched anew meanwhile; %s; they are read again every minute, and at once by perceptctl reload", *fault, mendOf(*fault)))
	} else if fault := m.unsaved.Load(); fault != nil {
		all = append(all, fmt.Sprintf("tokens are not saved, and lost at the next reboot: %v; %s; %s", *fault, mendOf(*fault), triedAgain))
	}
	if fault := m.uncarried.Load(); fault != nil {
		all = append(all, fmt.Sprintf("tokens are not handed to systemd, so that a crash costs calls to the back end: %v", *fault))
	}
	return all
}
