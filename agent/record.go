package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

const (
	// keepAgain is how long after a failure the policy changes are tried to be kept again.
	keepAgain = time.Minute
	// keepGathered is how long after one write that many waited for the next is made: what is noted meanwhile is in it. Whoever notes
	// one change after the other, and waits for each, gains nothing by a wait.
	keepGathered = 100 * time.Millisecond
)

// mendOf is what a person does about a state folder that cannot be read or written to. Who reads and writes it knows.
func mendOf(err error) string {
	var told interface{ Mend() string }
	if errors.As(err, &told) {
		return told.Mend()
	}
	return "look at the disk and at the state folder"
}

// unreadMend is what a person does about a record that cannot be read now, if it must be for good.
func unreadMend(why error) string {
	return mendOf(why) + "; it is read again every minute, and at once by perceptctl reload. If it never can be, move its two files (policy-changes.json, policy-changes.copy.json), and whatever begins with tokens.sealed and cannot be read either, " +
		"out of the state folder while perceptd runs. What no copy tells of is lost then, and the status says what to do about that"
}

// record has the policy changes kept on the disk, whenever the cache's own record is of another generation
// than what was kept last.
type record struct {
	keep  func(tokencache.Record) error // nil: nothing is kept
	now   func() tokencache.Record
	clock tokencache.Clock
	log   *zap.Logger

	ctx    context.Context // ends the saver
	cancel context.CancelFunc
	saver  sync.WaitGroup

	fault  atomic.Pointer[error] // why the last keep failed; nil: it worked
	unread atomic.Pointer[error] // why what is on the disk cannot be read now, and so not be overwritten; nil: it was read

	start   sync.Mutex // protects what follows, and that no saver begins after close
	saving  bool       // there is a saver
	hurried chan struct{}
	latest  *commit // the latest that was begun; nil: none was

	mu    sync.Mutex        // one keep at a time; protects what follows
	kept  tokencache.Origin // what is on the disk; zero: it is of a lineage before, or nothing is
	wrong bool              // what is on the disk may be another by now

	wrote atomic.Int64 // boot time of the last write, or try
}

// commit is one write that somebody waits for, or many do.
type commit struct {
	by    int           // who wait for it; start protects it, and what follows
	begun bool          // it has what there was
	done  chan struct{} // closed when it is over
	err   error         // then
}

// open makes r ready. What now tells is of a lineage that is not on the disk yet.
func (r *record) open(keep func(tokencache.Record) error, now func() tokencache.Record, clock tokencache.Clock, log *zap.Logger) {
	r.keep, r.now, r.clock, r.log = keep, now, clock, log
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.hurried = make(chan struct{})
	r.wrote.Store(int64(clock.Boot() - saveGathered))
	if keep != nil {
		r.saver.Go(r.follow)
	}
}

// save keeps the record unless it is kept already, and returns why that did not work; it is then tried
// again every minute. It waits for the disk, and what many have noted meanwhile is written once.
func (r *record) save() error {
	if r.keep == nil {
		return nil
	}
	err := r.commit()
	if err != nil && r.unread.Load() == nil {
		r.begin(keepAgain)
	}
	return err
}

// commit joins the next write, or begins it.
func (r *record) commit() error {
	r.start.Lock()
	if r.ctx.Err() != nil {
		r.start.Unlock()
		return r.try()
	}
	c, before := r.latest, r.latest
	if c == nil || c.begun {
		c = &commit{done: make(chan struct{})}
		r.latest = c
		r.saver.Go(func() { r.write(c, before) })
	}
	c.by++
	r.start.Unlock()
	<-c.done
	return c.err
}

// write makes c's write when the one before is over, and a moment later where many waited for that.
func (r *record) write(c, before *commit) {
	defer close(c.done)
	if before != nil {
		<-before.done
		if wait := time.Duration(r.wrote.Load()) + keepGathered - r.clock.Boot(); wait > 0 && before.by > 1 {
			r.pause(wait) // not at the end, which waits for it
		}
	}
	r.start.Lock()
	c.begun = true
	r.start.Unlock()
	c.err = r.try()
}

// renew has the record kept anew though it is the same, so that a start shows that it can be.
func (r *record) renew() {
	if r.keep == nil || r.unread.Load() != nil {
		return
	}
	r.mu.Lock()
	r.wrong = true
	r.mu.Unlock()
	r.begin(0)
}

// read reads what is on the disk, which could not be read before, and has take put it in force before anything can be written
// over it. lost is why there is no record and never will be. False: it still cannot be read.
func (r *record) read(load func() (*tokencache.Record, error), take func(disk *tokencache.Record, lost error)) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	disk, err := load()
	switch {
	case disk != nil:
		err = nil // what is wrong with one of its files is no loss
	case err == nil:
		err = errGone
	case !isSpoilt(err):
		r.unread.Store(&err)
		return false
	}
	take(disk, err)
	r.unread.Store(nil)
	return true
}

// isSpoilt reports whether what is there was looked at whole and is no record.
func isSpoilt(err error) bool {
	var spoilt interface{ Spoilt() bool }
	return errors.As(err, &spoilt) && spoilt.Spoilt()
}

// errGone is why a record is lost of which there was something that could not be read.
var errGone = errors.New("its files are gone that could not be read before")

func (r *record) try() error {
	if r.keep == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if why := r.unread.Load(); why != nil {
		return &unreadError{*why}
	}
	now := r.now()
	if !r.differsFrom(now) && r.fault.Load() == nil {
		return nil
	}
	err := r.keep(now)
	r.wrote.Store(int64(r.clock.Boot()))
	if err != nil {
		r.log.Error("the policy changes could not be kept", zap.Error(err))
		r.fault.Store(&err)
		return err
	}
	r.kept, r.wrong = originOf(now), false
	if r.fault.Swap(nil) != nil {
		r.log.Info("the policy changes are kept again")
	}
	return nil
}

// notice has the record kept soon if the cache changed it by itself. It does not wait for the disk.
func (r *record) notice() {
	if r.keep != nil && r.differs() {
		r.begin(max(0, time.Duration(r.wrote.Load())+saveGathered-r.clock.Boot()))
	}
}

func (r *record) differs() bool {
	if !r.mu.TryLock() {
		return true // it is being kept now, perhaps as it was before
	}
	defer r.mu.Unlock()
	return r.differsFrom(r.now())
}

// differsFrom reports whether what is on the disk is not now. The caller holds mu.
func (r *record) differsFrom(now tokencache.Record) bool { return r.wrong || originOf(now) != r.kept }

func originOf(r tokencache.Record) tokencache.Origin {
	return tokencache.Origin{Lineage: r.Lineage, Generation: r.Generation}
}

// begin starts the saver, unless there is one.
func (r *record) begin(wait time.Duration) {
	r.start.Lock()
	defer r.start.Unlock()
	if r.saving || r.ctx.Err() != nil {
		return
	}
	r.saving = true
	r.saver.Go(func() { r.persist(wait) })
}

// hurry has what could not be read or kept tried again now: somebody may have mended it.
func (r *record) hurry() {
	r.start.Lock()
	defer r.start.Unlock()
	close(r.hurried)
	r.hurried = make(chan struct{})
}

// pause waits for so long, or for a second where somebody hurries. False: r is closed.
func (r *record) pause(wait time.Duration) bool {
	r.start.Lock()
	hurried := r.hurried
	r.start.Unlock()
	soonest := min(wait, readAgainSoonest)
	return r.sleep(soonest, nil) && r.sleep(wait-soonest, hurried)
}

// sleep waits for so long, or until something is received.
func (r *record) sleep(wait time.Duration, cut <-chan struct{}) bool {
	fired, stop := r.clock.Timer(wait)
	defer stop()
	select {
	case <-fired:
	case <-cut:
	case <-r.ctx.Done():
		return false
	}
	return true
}

// persist tries until the record is kept.
func (r *record) persist(wait time.Duration) {
	for ; r.pause(wait); wait = keepAgain {
		if r.try() == nil && r.done() {
			return
		}
	}
}

// done ends the saver, unless somebody counts on it by now: whose try failed, or who wants more to be kept.
func (r *record) done() bool {
	r.start.Lock()
	defer r.start.Unlock()
	r.saving = r.fault.Load() != nil || r.differs()
	return !r.saving
}

// renewSoonest is how soon after a boot the record is kept anew at the earliest, beside that at the start.
const renewSoonest = 2 * time.Minute

// follow keeps the record anew whenever the device has been on for twice as long as the last time, and every hour, so that it is known
// for how long it was, also where it is never on for long, no tokens are kept or a boot cannot read them, and that what became of
// the files meanwhile is mended. What is noted in such a boot is to have a later on-time than the tokens.
func (r *record) follow() {
	for {
		fired, stop := r.clock.Timer(min(max(renewSoonest, r.clock.Boot()), saveEvery))
		select {
		case <-fired:
			stop()
		case <-r.ctx.Done():
			stop()
			return
		}
		r.renew()
	}
}

// close ends the saver and keeps what is not kept yet, and until when the device was on.
func (r *record) close() {
	r.start.Lock()
	r.cancel()
	r.start.Unlock()
	r.saver.Wait()
	r.mu.Lock() // somebody may still be noting a change
	r.wrong = true
	r.mu.Unlock()
	_ = r.try() // it has said in the log what went wrong
}

// trouble says what a technician should know of the record, in sentences. outlives says what becomes of one that is not on the disk.
func (r *record) trouble(outlives string) []string {
	if why := r.unread.Load(); why != nil {
		return []string{fmt.Sprintf("%s: %v; what its copy and the marks on tokens withhold stays withheld, other tokens from before are not taken for current; %s",
			unreadWhat, *why, unreadMend(*why))}
	}
	if fault := r.fault.Load(); fault != nil {
		return []string{fmt.Sprintf("policy changes are not kept on the disk: %v; if one was noted or withdrawn since, %s; %s; %s", *fault, outlives, mendOf(*fault), triedAgain)}
	}
	return nil
}

const triedAgain = "it is tried again every minute, and at once by perceptctl reload"
