package keep

import (
	"errors"
	"fmt"
	"time"

	"perceptd/tokencache"
)

// Begin is what a start begins with, by all that was kept.
type Begin struct {
	// Record is the policy changes on the disk; nil: none were read. Unread is then why they cannot be read now: Record.Load may
	// yet read them. Lost is why they never will, since what was there is spoilt, or gone while what may be a copy of it cannot be
	// read. With neither nothing was there.
	Record       *tokencache.Record
	Unread, Lost error
	// Memory is the newest of what a cache of ours knew; nil: there is none. What was taken in this boot is newer than what was before it.
	Memory *tokencache.Memory
	// Copies is all of what a cache knew that was read, whatever its source: for the copies of the record and the marks on the
	// tokens that are in it.
	Copies []tokencache.Memory
	// On is for tokencache.Options.
	On time.Duration

	// RecordFault and TokensFault are what else is wrong with the files, for the log: one of the record's two, or the tokens.
	RecordFault, TokensFault error
}

// Start reads the record, what the file of tokens has, and what was carried over, the latest first. tokens may be nil: there
// is no file. ours reports whether the tokens of what a cache knew are of use. bootID names this boot.
func Start(record *Record, tokens *Tokens, carried []tokencache.Memory, ours func(*tokencache.Memory) bool, bootID string) Begin {
	var b Begin
	var err error
	b.Record, err = record.Load()
	_, spoilt := errors.AsType[*SpoiltError](err)
	switch {
	case err == nil:
	case b.Record != nil:
		b.RecordFault = err
	case spoilt:
		b.Lost = err
	default:
		b.Unread = err
	}
	b.Copies = carried
	if tokens != nil {
		var saved *tokencache.Memory
		if saved, b.TokensFault = tokens.Load(); saved != nil {
			b.Copies = append(b.Copies, *saved)
		}
		later, fault := tokens.LoadUnopened()
		b.Copies, b.TokensFault = append(b.Copies, later...), errors.Join(b.TokensFault, fault)
	}
	if err == nil && b.Record == nil && tokens != nil && (tokens.unopened || tokens.still) {
		b.Lost = fmt.Errorf("it is gone, and a copy of it may be where none can be read: %w", b.TokensFault)
	}
	var taken []tokencache.Taken
	if b.Record != nil {
		taken = append(taken, b.Record.Taken)
	}
	for _, m := range b.Copies {
		taken = append(taken, m.Taken())
	}
	boot := record.boot()
	b.On = tokencache.OnAtBoot(bootID, boot, taken...)
	now := tokencache.Taken{On: b.On + boot, Boot: boot, BootID: bootID}
	for i := range b.Copies {
		m := &b.Copies[i]
		if ours(m) && (b.Memory == nil || m.Taken().In(now).On > b.Memory.Taken().In(now).On) {
			b.Memory = m
		}
	}
	return b
}
