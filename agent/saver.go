package agent

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"perceptd/tokencache"
)

const (
	// saveRetryInterval is how long after a failed save the next is made.
	saveRetryInterval = time.Minute
	// saveRetrySoonest is the same where a person asks for it, who may have mended the cause.
	saveRetrySoonest = time.Second
	// saveRequestInterval is how far apart requested saves are at least. The first of many requests is served at once,
	// those that follow together.
	saveRequestInterval = 3 * time.Second
	// saveBatchInterval is how long after a save that several callers waited for the next is made, which has all that
	// was requested meanwhile. A caller that requests one save after the other, and waits for each, would gain nothing
	// by it.
	saveBatchInterval = 100 * time.Millisecond
	// saveWait is how long who wants something on the disk waits for it: less than a request on the admin socket may
	// take, and a place there is taken meanwhile.
	saveWait = 5 * time.Second
	// hangsAfter is how long a save takes at most before it is said to hang.
	hangsAfter = 30 * time.Second
	// saveEvery is how often something is saved though nothing has changed.
	saveEvery = time.Hour
)

// saver saves something in the background: when it is requested, together with what is requested soon after; a minute
// after a failed save; and every so often without a request. Callers may also wait for a save.
type saver struct {
	// save saves all there is, and reports whether it had to. It is called by one goroutine at a time and may take its
	// time. force says to save also what is saved already.
	save func(force bool) (saved bool, err error)
	// report is called after a failed save, and after the first that works again. before is why the save before failed.
	report func(err, before error)
	// apart is how far apart requested saves are at least.
	apart time.Duration
	// every is how long it is until a save without a request, by the boot time of the one before. A requested save puts
	// it off, unless steady is set.
	every  func(boot time.Duration) time.Duration
	steady bool
	// patient has requests that nobody waits for wait for the next try while saves fail.
	patient bool
	clock   tokencache.Clock
	// stalled is called when a save hangs, and when it is over after all.
	stalled func(hangs bool)

	current atomic.Pointer[oneSave] // nil: nothing is saved now
	fault   atomic.Pointer[error]   // why the last save failed; nil: it worked, or there was none
	saving  sync.Mutex              // held while something is saved

	loop sync.WaitGroup
	wake chan struct{}

	mu       sync.Mutex // protects what follows
	stopped  bool
	request  saveRequest
	waiters  *saveBatch    // they wait for the save that begins next; nil: nobody does
	batched  bool          // several waited for the last save
	last     time.Duration // boot time at which the last save ended, or the last that failed
	unasked  time.Duration // boot time of the next save that nothing requests
	hurrying bool          // a save that failed is tried again soon
}

// saveRequest is how a save was requested.
type saveRequest int

const (
	noSave   saveRequest = iota
	saveSoon             // when apart is over
	saveNow              // at once, also what is saved already
)

// saveBatch is those who wait for one save.
type saveBatch struct {
	callers int           // the saver's mu protects it
	done    chan struct{} // closed when the save is over
	err     error         // then
}

// start begins to save in the background. The fields above are set.
func (s *saver) start() {
	s.wake = make(chan struct{}, 1)
	s.last = s.clock.Boot() - s.apart
	s.unasked = s.nextUnasked()
	s.loop.Go(s.run)
}

// run saves whatever is due until the saver is stopped and nobody waits for a save any more.
func (s *saver) run() {
	for {
		wait, stopped := s.next()
		switch {
		case wait <= 0:
			_ = s.once(false) // callers that wait are told, and the status
			continue
		case stopped:
			return
		}
		fired, stop := s.clock.Timer(min(wait, saveEvery))
		select {
		case <-fired:
		case <-s.wake:
		}
		stop()
	}
}

// next returns how long it is until the next save.
func (s *saver) next() (wait time.Duration, stopped bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	due := s.unasked
	switch {
	case s.request == saveNow:
		due = s.last
	case s.request == saveSoon && (!s.patient || s.failure() == nil):
		due = min(due, s.last+s.apart)
	}
	if s.failure() != nil {
		retry := saveRetryInterval
		if s.hurrying {
			retry = saveRetrySoonest
		}
		due = min(due, s.last+retry)
	}
	switch {
	case s.waiters != nil && s.batched && !s.stopped:
		due = min(due, s.last+saveBatchInterval)
	case s.waiters != nil:
		due = s.last
	case s.stopped:
		due = math.MaxInt64
	}
	return due - s.clock.Boot(), s.stopped
}

// once saves now, and tells the callers that wait for it how that ended.
func (s *saver) once(force bool) error {
	s.saving.Lock()
	defer s.saving.Unlock()
	s.mu.Lock()
	force = force || s.request == saveNow || s.clock.Boot() >= s.unasked
	waiters := s.waiters
	s.waiters, s.request, s.hurrying = nil, noSave, false
	s.mu.Unlock()

	ended := s.watch()
	saved, err := s.save(force)
	ended()
	s.mu.Lock()
	if saved || err != nil {
		s.last = s.clock.Boot()
		s.batched = waiters != nil && waiters.callers > 1
	}
	if force || !s.steady && (saved || err != nil) {
		s.unasked = s.nextUnasked()
	}
	s.mu.Unlock()
	s.note(err)
	if waiters != nil {
		waiters.err = err
		close(waiters.done)
	}
	return err
}

// oneSave is a save under way.
type oneSave struct {
	began       time.Time   // by the wall clock
	slow, hangs atomic.Bool // it takes longer than saveWait, than hangsAfter
}

// watch notes that a save begins, and has it said when it hangs. Its result is called when the save is over. A disk
// takes its time by no clock but the process's own, however fast a simulated device's runs.
func (s *saver) watch() (ended func()) {
	save := &oneSave{began: s.clock.Wall()}
	s.current.Store(save)
	over, told := make(chan struct{}), make(chan bool, 1)
	go func() {
		for _, stage := range []struct {
			after   time.Duration
			reached *atomic.Bool
		}{{saveWait, &save.slow}, {hangsAfter - saveWait, &save.hangs}} {
			timer := time.NewTimer(stage.after)
			select {
			case <-timer.C:
				stage.reached.Store(true)
			case <-over:
				timer.Stop()
				told <- false
				return
			}
		}
		s.stalled(true)
		told <- true
	}()
	return func() {
		s.current.Store(nil)
		close(over)
		if <-told {
			s.stalled(false)
		}
	}
}

// hangsSince is since when a save hangs, by the wall clock; zero: none does.
func (s *saver) hangsSince() time.Time {
	if s == nil {
		return time.Time{}
	}
	if save := s.current.Load(); save != nil && save.hangs.Load() {
		return save.began
	}
	return time.Time{}
}

func (s *saver) nextUnasked() time.Duration {
	boot := s.clock.Boot()
	return boot + s.every(boot)
}

// note remembers how a save ended, and reports it where that is news.
func (s *saver) note(err error) {
	before := s.failure()
	if err == nil {
		s.fault.Store(nil)
	} else {
		s.fault.Store(&err)
	}
	if err != nil || before != nil {
		s.report(err, before)
	}
}

// failure is why the last save failed; nil: it worked, or there is none.
func (s *saver) failure() error {
	if s == nil {
		return nil
	}
	if fault := s.fault.Load(); fault != nil {
		return *fault
	}
	return nil
}

// ask requests a save and does not wait for it.
func (s *saver) ask(request saveRequest) {
	s.mu.Lock()
	s.request = max(s.request, request)
	s.mu.Unlock()
	s.wakeUp()
}

func (s *saver) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// hurry has a save that failed tried again soon: its cause may have been mended.
func (s *saver) hurry() {
	s.mu.Lock()
	s.hurrying = true
	s.mu.Unlock()
	s.wakeUp()
}

// errSaving is why a caller does not know whether something is on the disk: it is still being written.
var errSaving = fmt.Errorf("saving has not ended after %v, and goes on", saveWait)

// wait saves what there is and returns why that did not work. What several callers wait for is one save.
func (s *saver) wait() error {
	waiters := s.begin()
	if waiters == nil {
		return s.once(false)
	}
	<-waiters.done
	return waiters.err
}

// waitAWhile is wait for a caller that is answered in time whatever the disk does. The error may be errSaving.
func (s *saver) waitAWhile() error {
	waiters := s.begin()
	if waiters == nil {
		return s.once(false)
	}
	if save := s.current.Load(); save != nil && save.slow.Load() {
		return errSaving
	}
	timer := time.NewTimer(saveWait)
	defer timer.Stop()
	select {
	case <-waiters.done:
		return waiters.err
	case <-timer.C:
		return errSaving
	}
}

// begin has what there is saved as wait does, and does not wait for it. It returns those who do, together; nil: the
// saver is stopped.
func (s *saver) begin() *saveBatch {
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return nil
	}
	if s.waiters == nil {
		s.waiters = &saveBatch{done: make(chan struct{})}
	}
	waiters := s.waiters
	waiters.callers++
	s.mu.Unlock()
	s.wakeUp()
	return waiters
}

// stop ends what is saved in the background. Callers that wait get their save.
func (s *saver) stop() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.wakeUp()
	s.loop.Wait()
}

// remedyFor says what a person does about a state folder that cannot be read or written to. The package that reads and
// writes there knows.
func remedyFor(err error) string {
	var known interface{ Remedy() string }
	if errors.As(err, &known) {
		return known.Remedy()
	}
	return "look at the disk and at the state folder"
}

// hangsText says that a save of something hangs since then, and what that means.
func hangsText(what string, since time.Time, meanwhile string) string {
	return fmt.Sprintf("saving %s has hung since %s: %s; nothing ends that but the disk: see journalctl -k, and "+
		"whether the state folder answers (ls), and replace the disk or mount it anew", what, formatTime(since),
		meanwhile)
}

const triedAgain = "it is tried again every minute, and at once by perceptctl reload"
