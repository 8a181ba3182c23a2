package store

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync/atomic"
	"time"

	"perceptd/tokencache"
)

const (
	changesName     = "policy-changes.json"
	changesCopyName = "policy-changes.copy.json"
	maxChangesFile  = 1 << 20 // bytes
)

// PolicyChanges is the record of policy changes on the disk: two files with the same text. Save writes the copy first,
// so that it is never the older one. While one is being written, the other is whole. If one is lost or spoilt, the
// other has all.
//
// The record also notes that there are deny rules, and which record of them, so that their own files are missed when
// they are gone, or older ones are in their place.
type PolicyChanges struct {
	twoFiles
	boot func() time.Duration
	id   string // of this boot; empty: not known

	denyRules atomic.Bool                       // whether there are deny rules on the disk, as far as it is known
	denied    atomic.Pointer[tokencache.Origin] // the record of deny rules that was last there; nil: not known
}

// NoteDenyRules has the record note, when it is saved next, that there are deny rules on the disk.
func (r *PolicyChanges) NoteDenyRules() { r.denyRules.Store(true) }

// noteDenied has the record note, when it is saved next, which record of deny rules is on the disk.
func (r *PolicyChanges) noteDenied(of tokencache.Origin) {
	r.NoteDenyRules()
	r.denied.Store(&of)
}

// DenyRecord returns which record of deny rules was last on the disk; zero: that is not known.
func (r *PolicyChanges) DenyRecord() tokencache.Origin {
	if of := r.denied.Load(); of != nil {
		return *of
	}
	return tokencache.Origin{}
}

// HaveDenyRules reports whether there are deny rules on the disk, as far as it is known.
func (r *PolicyChanges) HaveDenyRules() bool { return r.denyRules.Load() }

// OpenPolicyChanges returns the record in folder. boot returns the time since the device booted, as that of
// tokencache.Clock.
func OpenPolicyChanges(folder Folder, boot func() time.Duration) *PolicyChanges {
	return &PolicyChanges{twoFiles: twoFiles{folder: folder, name: changesName, copy: changesCopyName}, boot: boot,
		id: BootID()}
}

// Load returns the record; nil when there is no file, which differs from a record without changes. The error says what
// is wrong with the files. Beside a record it is about one of the two: if that is spoilt, it is moved aside. What is in
// a file that others could have changed is on the record as well, but withdraws nothing: see unordered.
//
// Without a record, a *SpoiltError says that what is there was read whole and is not a record. It stays until Save has
// something to put in its place, so that each start until then finds it. Any other error says that the record cannot be
// read now: Save refuses to overwrite it until Load has read it.
func (r *PolicyChanges) Load() (*tokencache.Record, error) {
	record, fault := r.load(changesName)
	twin, other := r.load(changesCopyName)
	switch {
	case record == nil:
		fault = cmp.Or(fault, missing(changesName, twin))
		record = twin
	case twin == nil:
		other = cmp.Or(other, missing(changesCopyName, record))
	default:
		fault = cmp.Or(fault, older(record, twin))
		if isLoose(fault) {
			record, twin = twin, record
		}
		record = joined(record, twin, r.now(record.Instant, twin.Instant))
	}
	r.settle(record != nil, &fault, &other)
	return record, cmp.Or(r.unread, fault, other)
}

func (r *PolicyChanges) load(name string) (*tokencache.Record, error) {
	text, err := r.folder.Read(name, othersMayChange, maxChangesFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil && !isLoose(err) {
		return nil, err
	}
	noted := r.denied.Load()
	record, why := r.decode(text)
	if why != nil {
		return nil, &SpoiltError{Name: name, Why: why}
	}
	if err != nil {
		r.denied.Store(noted) // which record of deny rules was there, it may claim wrongly
		record = unordered(record)
	}
	return record, err
}

// unordered returns the changes of r as a record of its own lineage, without origins and on-time. Nobody knows who
// wrote the file: by its lineage or its on-time it could claim that changes of other records are withdrawn, or over. So
// it is not known either in which boot its changes were noted.
func unordered(r *tokencache.Record) *tokencache.Record {
	for i := range r.Changes {
		r.Changes[i].Unplaced = true
	}
	return &tokencache.Record{Lineage: rand.Text(), Changes: r.Changes}
}

// missing returns an error where the file of that name is gone and the other, which has there, is not; nil where
// nothing is there, or where an early release wrote it, which had one file.
func missing(name string, there *tokencache.Record) error {
	if there == nil || there.On == 0 {
		return nil
	}
	return fmt.Errorf("%s is gone", name)
}

// older says which of the record and its copy is the older one; nil where neither is. One is older after a crash
// between the two writes, or where somebody has put an old file back.
func older(record, twin *tokencache.Record) error {
	switch {
	case twin.IsNewer(*record):
		return fmt.Errorf("%s is older than %s", changesName, changesCopyName)
	case record.IsNewer(*twin):
		return fmt.Errorf("%s is older than %s", changesCopyName, changesName)
	}
	return nil
}

// now returns this moment in on-time, as far as what was kept shows it.
func (r *PolicyChanges) now(kept ...tokencache.Instant) tokencache.Instant {
	boot := r.boot()
	return tokencache.Instant{On: tokencache.OnAtBoot(r.id, boot, kept...) + boot, Boot: boot, BootID: r.id}
}

// joined returns the newer of the record and its copy. Where neither is newer, since somebody has put one of them
// there, it returns the changes of both, as the beginning of a lineage. These may be more than there is room for: the
// cache then joins some.
func joined(record, twin *tokencache.Record, now tokencache.Instant) *tokencache.Record {
	switch same := record.Lineage == twin.Lineage; {
	case twin.IsNewer(*record), same && twin.Generation == record.Generation && twin.On >= record.On:
		return twin
	case same, record.IsNewer(*twin):
		return record
	}
	both, other := record.In(now), twin.In(now)
	all := tokencache.Both(both.Changes, other.Changes)
	if !slices.EqualFunc(both.Changes, all, tokencache.PolicyChange.StandsFor) {
		both.Changes = all
		both.Generation = max(record.Generation, twin.Generation) + 1
		both = both.WithLineage(rand.Text(), *twin, *record)
	}
	if both = both.After(*record, now).After(*twin, now); other.On > both.On {
		both.Instant = other.Instant
	}
	return &both
}

// Save puts record on the disk. When it returns nil, that outlives a power cut. When it returns an error, the record
// before does, or the new one.
func (r *PolicyChanges) Save(record tokencache.Record) error {
	if err := r.mayWrite(); err != nil {
		return err
	}
	text, err := r.encode(record)
	if err != nil {
		return err
	}
	return r.replaceBoth(text)
}
