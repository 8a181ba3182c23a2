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

// changeSaver saves the policy changes on the disk, whenever the cache's record is of another generation than what was
// saved last.
type changeSaver struct {
	saver       *saver                        // nil: nothing is saved
	writeRecord func(tokencache.Record) error // writes the record
	now         func() tokencache.Record
	log         *zap.Logger

	// unread is why what is on the disk cannot be read now, and so not be overwritten; nil: it was read.
	unread atomic.Pointer[error]

	mu    sync.Mutex        // keeps what is on the disk from being overwritten while it is read; protects what follows
	saved tokencache.Origin // what is on the disk; zero: it is of a lineage before, or nothing is
}

// renewSoonest is how soon after a boot the record is saved anew at the earliest, beside that at the start.
const renewSoonest = 2 * time.Minute

// open makes c ready. What now returns is of a lineage that is not on the disk yet.
//
// The record is saved anew whenever the device has been on for twice as long as the last time, and every hour. So the
// disk shows for how long the device was on, even where it is never on for long, where no tokens are kept, or where a
// boot cannot read them; and files that were damaged meanwhile are mended. A change that is recorded in such a boot
// then has a later on-time than the tokens.
func (c *changeSaver) open(
	write func(tokencache.Record) error, now func() tokencache.Record, clock tokencache.Clock, log *zap.Logger,
) {
	c.writeRecord, c.now, c.log = write, now, log
	if write == nil {
		return
	}
	c.saver = &saver{
		clock: clock, apart: saveRequestInterval, save: c.write, steady: true, patient: true,
		every: func(boot time.Duration) time.Duration { return min(max(renewSoonest, boot), saveEvery) },
		report: func(err, _ error) {
			if err != nil {
				log.Error("the policy changes could not be kept", zap.Error(err))
			} else {
				log.Info("the policy changes are kept again")
			}
		},
	}
	c.saver.start()
}

// write saves the record where it differs from what is on the disk, or where that may differ from what was written.
func (c *changeSaver) write(force bool) (written bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.unread.Load() != nil || !force && originOf(now) == c.saved && c.saver.failure() == nil {
		return false, nil
	}
	if err := c.writeRecord(now); err != nil {
		return false, err
	}
	c.saved = originOf(now)
	return true, nil
}

func originOf(r tokencache.Record) tokencache.Origin {
	return tokencache.Origin{Lineage: r.Lineage, Generation: r.Generation}
}

// save saves the record unless it is saved already, and returns why that did not work; it is then tried again every
// minute. It waits for the disk, and what many have noted meanwhile is written once.
func (c *changeSaver) save() error {
	if c.saver == nil {
		return nil
	}
	if err := c.unreadable(); err != nil {
		return err
	}
	return c.saver.wait()
}

// unreadable returns why nothing can be saved yet, as an *unreadError; nil: it can.
func (c *changeSaver) unreadable() error {
	if c.unread.Load() == nil {
		return nil
	}
	c.mu.Lock() // it may be read at this moment
	defer c.mu.Unlock()
	if why := c.unread.Load(); why != nil {
		return &unreadError{*why}
	}
	return nil
}

// notice requests a save where the cache may have changed the record by itself. It does not wait for the disk.
func (c *changeSaver) notice() {
	if c.saver != nil {
		c.saver.ask(saveSoon)
	}
}

// renew requests a save though the record is the same: a start shows so that it can be saved.
func (c *changeSaver) renew() {
	if c.saver != nil {
		c.saver.ask(saveNow)
	}
}

// hurry has a save that failed tried again soon: the cause may have been mended.
func (c *changeSaver) hurry() {
	if c.saver != nil {
		c.saver.hurry()
	}
}

// read reads what is on the disk, which could not be read before. It calls take, which puts it in force, before
// anything can be written over it. lost is why there is no record and never will be. False: it still cannot be read.
func (c *changeSaver) read(
	load func() (*tokencache.Record, error), take func(disk *tokencache.Record, lost error),
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

// close ends what is saved in the background, and saves what is not saved yet, and until when the device was on.
func (c *changeSaver) close() {
	if c.saver != nil {
		c.saver.stop()
		_ = c.saver.once(true) // it is in the log
	}
}

// trouble says what a technician should know of the record, in sentences. outlives says what becomes of one that is not
// on the disk.
func (c *changeSaver) trouble(outlives string) []string {
	if why := c.unread.Load(); why != nil {
		return []string{fmt.Sprintf("%s: %v; what its copy and the marks on tokens withhold stays withheld, "+
			"other tokens from before are not taken for current; %s", unreadWhat, *why, unreadRemedy(*why))}
	}
	if fault := c.saver.failure(); fault != nil {
		return []string{fmt.Sprintf("policy changes are not kept on the disk: %v; "+
			"if one was noted or withdrawn since, %s; %s; %s", fault, outlives, remedyFor(fault), triedAgain)}
	}
	return nil
}

// unreadRemedy is what a person does about a record that cannot be read now, if it must be for good.
func unreadRemedy(why error) string {
	return remedyFor(why) + "; it is read again every minute, and at once by perceptctl reload. " +
		"If it never can be, move its two files (policy-changes.json, policy-changes.copy.json), " +
		"and whatever begins with tokens.sealed and cannot be read either, " +
		"out of the state folder while perceptd runs. What no copy tells of is lost then, " +
		"and the status says what to do about that"
}
