package agent

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// Persistence saves the cache's state across restarts of the process. Each of the two is called by one goroutine at a
// time, and may block.
type Persistence struct {
	// HandOver takes a snapshot that is to outlive a restart: after each fetch, and when rules or the record have
	// changed.
	HandOver func(tokencache.Snapshot) error
	// Save takes a snapshot that is to outlive a reboot: at a start that has one, after each fetch that brought a newer
	// token, when rules or the record have changed, when the clock has shown how old tokens of an earlier boot are,
	// once an hour, so that it is known how long the device was on at least, and at the end. What happens within
	// seconds is saved together.
	Save func(tokencache.Snapshot) error
}

// snapshotSaver saves the cache's snapshots in both ways of a Persistence.
type snapshotSaver struct {
	handoff, disk *saver // nil: there is none
	take          func() tokencache.Snapshot

	unread atomic.Pointer[error] // why what is on the disk cannot be read now; nil: it was read

	mu     sync.Mutex // keeps what is on the disk from being overwritten while it is read again; protects what follows
	closed bool
}

// open begins to save what take returns. changed is called when the status may have changed.
func (s *snapshotSaver) open(
	to Persistence, take func() tokencache.Snapshot, clock tokencache.Clock, log *zap.Logger, changed func(),
) {
	s.take = take
	hourly := func(time.Duration) time.Duration { return saveEvery }
	report := func(failed string) func(err, before error) {
		return func(err, before error) {
			switch {
			case err == nil:
				log.Info("tokens are kept again")
			case before == nil:
				log.Error(failed, zap.Error(err))
			}
			changed()
		}
	}
	if to.HandOver != nil {
		s.handoff = &saver{
			stalled: logStalled(log, "what systemd keeps", changed),
			clock:   clock, every: hourly, report: report("tokens could not be handed to systemd"),
			save: func(bool) (bool, error) { return true, to.HandOver(s.take()) },
		}
		s.handoff.start()
	}
	if to.Save != nil {
		s.disk = &saver{
			stalled: logStalled(log, "tokens", changed),
			clock:   clock, every: hourly, apart: saveRequestInterval, report: report("tokens could not be saved"),
			save: func(bool) (bool, error) {
				s.mu.Lock()
				defer s.mu.Unlock()
				return true, to.Save(s.take())
			},
		}
		s.disk.start()
	}
}

// notice has the cache carried, and saved as well where there is something newer. It does not wait.
func (s *snapshotSaver) notice(newer bool) {
	if s.handoff != nil {
		s.handoff.ask(saveSoon)
	}
	if s.disk != nil && newer {
		s.disk.ask(saveSoon)
	}
}

// whilePaused calls f while nothing is saved, unless what is saved last was taken already.
func (s *snapshotSaver) whilePaused(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		f()
	}
}

// close ends what is saved in the background and returns what saves the cache for the last time, as it is now.
func (s *snapshotSaver) close() (save func()) {
	all := slices.DeleteFunc([]*saver{s.handoff, s.disk}, func(one *saver) bool { return one == nil })
	for _, one := range all {
		one.stop()
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	last := s.take()
	s.take = func() tokencache.Snapshot { return last }
	return func() {
		for _, one := range all {
			_ = one.once(true) // it is in the log
		}
	}
}

// outlives says what becomes of policy changes that are not on the disk: a copy of the record goes with what is
// carried, and with what is saved, where the state folder can be written to.
func (s *snapshotSaver) outlives(writable bool) string {
	switch {
	case writable && s.disk != nil && s.disk.failure() == nil:
		return "the next start knows of it by the copy beside the tokens alone"
	case s.handoff != nil && s.handoff.failure() == nil:
		return "systemd carries it over a restart, and a stop or a reboot loses it"
	}
	return "the next start does not know of it"
}

// trouble says what a technician should know, in sentences.
func (s *snapshotSaver) trouble() (all []string) {
	if fault := s.unread.Load(); fault != nil {
		all = append(all, fmt.Sprintf("the tokens that were kept cannot be read now: %v; "+
			"they are fetched anew meanwhile; %s; they are read again every minute, and at once by perceptctl reload",
			*fault, remedyFor(*fault)))
	} else if since := s.disk.hangsSince(); !since.IsZero() {
		all = append(all, hangsText("tokens", since, "those that were fetched since are lost at the next reboot"))
	} else if fault := s.disk.failure(); fault != nil {
		all = append(all, fmt.Sprintf("tokens are not saved, and lost at the next reboot: %v; %s; %s",
			fault, remedyFor(fault), triedAgain))
	}
	if since := s.handoff.hangsSince(); !since.IsZero() {
		all = append(all, fmt.Sprintf("saving what systemd keeps has hung since %s: a crash costs calls to the back "+
			"end; look at systemd: systemctl status", formatTime(since)))
	} else if fault := s.handoff.failure(); fault != nil {
		all = append(all,
			fmt.Sprintf("tokens are not handed to systemd, so that a crash costs calls to the back end: %v", fault))
	}
	return all
}
