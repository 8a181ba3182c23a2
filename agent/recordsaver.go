package agent

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// recordSaver saves a record on the disk, whenever what is in force is of another generation than what was saved last.
type recordSaver[R any] struct {
	saver       *saver                    // nil: nothing is saved
	what        string                    // what it saves, in words: "the record of policy changes"
	writeRecord func(R) error             // writes the record
	now         func() R                  // what is in force
	origin      func(R) tokencache.Origin // zero: there is nothing to be saved
	log         *zap.Logger

	// unread is why what is on the disk cannot be read now, and so not be overwritten; nil: it was read.
	unread atomic.Pointer[error]

	// rejoin puts in force also what is in a folder that took the place of the one that was read; nil: none can. It is
	// called before anything is written there.
	rejoin atomic.Pointer[func() error]

	mu    sync.Mutex        // keeps what is on the disk from being overwritten while it is read; protects what follows
	saved tokencache.Origin // what is on the disk; zero: it is of a lineage before, or nothing is
}

// renewSoonest is how soon after a boot the record is saved anew at the earliest, beside that at the start.
const renewSoonest = 2 * time.Minute

// open makes c ready. The fields what, now and origin are set. What now returns is of a lineage that is not on the disk
// yet. failed and mended are what the log says.
func (c *recordSaver[R]) open(
	write func(R) error, clock tokencache.Clock, log *zap.Logger, failed, mended string, changed func(),
) {
	c.writeRecord, c.log = write, log
	if write == nil {
		return
	}
	c.saver = &saver{
		clock: clock, apart: saveRequestInterval, save: c.write, steady: true, patient: true,
		every:   func(boot time.Duration) time.Duration { return min(max(renewSoonest, boot), saveEvery) },
		stalled: logStalled(log, c.what, changed),
		report: func(err, _ error) {
			if err != nil {
				log.Error(failed, zap.Error(err))
			} else {
				log.Info(mended)
			}
		},
	}
	c.saver.start()
}

// logStalled returns what says in the log that saving something hangs, or is over.
func logStalled(log *zap.Logger, what string, changed func()) func(hangs bool) {
	return func(hangs bool) {
		if hangs {
			log.Error("saving "+what+" hangs: look at the disk", zap.Duration("for", hangsAfter))
		} else {
			log.Info("saving " + what + " hangs no more")
		}
		changed()
	}
}

// write saves the record where it differs from what is on the disk, or where that may differ from what was written.
func (c *recordSaver[R]) write(force bool) (written bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unread.Load() != nil {
		return false, nil
	}
	if rejoin := c.rejoin.Load(); rejoin != nil {
		if err := (*rejoin)(); err != nil {
			return false, err
		}
	}
	now := c.now()
	origin := c.origin(now)
	if origin == (tokencache.Origin{}) ||
		!force && origin == c.saved && c.saver.failure() == nil {
		return false, nil
	}
	if err := c.writeRecord(now); err != nil {
		return false, err
	}
	c.saved = origin
	return true, nil
}

// save saves the record unless it is saved already, and returns why that did not work; it is then tried again every
// minute. It waits for the disk, saveWait at most, and what many have noted meanwhile is written once.
func (c *recordSaver[R]) save() error { return c.by((*saver).waitAWhile) }

// keep is save, which waits for the disk however long that takes.
func (c *recordSaver[R]) keep() error { return c.by((*saver).wait) }

func (c *recordSaver[R]) by(wait func(*saver) error) error {
	if c.saver == nil {
		return nil
	}
	if err := c.unreadable(); err != nil {
		return err
	}
	return wait(c.saver)
}

// begin has the record saved at once, unless it is saved already, and does not wait for it.
func (c *recordSaver[R]) begin() {
	if c.saver != nil {
		_ = c.saver.begin()
	}
}

// unreadable returns why nothing can be saved yet, as an *unreadError; nil: it can.
func (c *recordSaver[R]) unreadable() error {
	if c.unread.Load() == nil {
		return nil
	}
	c.mu.Lock() // it may be read at this moment
	defer c.mu.Unlock()
	if why := c.unread.Load(); why != nil {
		return &unreadError{c.what, *why}
	}
	return nil
}

// notice requests a save where the record may have changed by itself. It does not wait for the disk.
func (c *recordSaver[R]) notice() {
	if c.saver != nil {
		c.saver.ask(saveSoon)
	}
}

// renew requests a save though the record is the same: a start shows so that it can be saved.
func (c *recordSaver[R]) renew() {
	if c.saver != nil {
		c.saver.ask(saveNow)
	}
}

// hurry has a save that failed tried again soon: the cause may have been mended.
func (c *recordSaver[R]) hurry() {
	if c.saver != nil {
		c.saver.hurry()
	}
}

// read reads what is on the disk, which could not be read before. It calls take, which puts it in force, before
// anything can be written over it. lost is why there is no record and never will be. False: it still cannot be read.
func (c *recordSaver[R]) read(
	load func() (*R, error), take func(disk *R, lost error),
) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	disk, err := load()
	switch {
	case disk != nil:
		err = nil // what is wrong with one of its files is no loss
	case err == nil:
		err = errGone
	case !isSpoilt(err):
		c.unread.Store(&err)
		return false
	}
	take(disk, err)
	c.unread.Store(nil)
	return true
}

// isSpoilt reports whether what is there was looked at whole and is no record.
func isSpoilt(err error) bool {
	var spoilt interface{ Spoilt() bool }
	return errors.As(err, &spoilt) && spoilt.Spoilt()
}

// errGone is why a record is lost of which there was something that could not be read.
var errGone = errors.New("its files are gone that could not be read before")

// failure is why the last save failed; nil: it worked, or nothing is saved.
func (c *recordSaver[R]) failure() error { return c.saver.failure() }

// close ends what is saved in the background, and saves what is not saved yet, and until when the device was on.
func (c *recordSaver[R]) close() {
	if c.saver != nil {
		c.saver.stop()
		_ = c.saver.once(true) // it is in the log
	}
}

// unreadError is why nothing can be saved yet.
type unreadError struct {
	what string
	why  error
}

func (e *unreadError) Error() string {
	return fmt.Sprintf("%s cannot be read now, and is not overwritten before it was: %v", e.what, e.why)
}

func (e *unreadError) Unwrap() error { return e.why }
