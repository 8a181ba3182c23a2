package store

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
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
type PolicyChanges struct {
	folder Folder
	boot   func() time.Duration
	id     string   // of this boot; empty: not known
	unread error    // why Load could not read what is there; nil: it could, or was not called
	spoilt []string // the files that Load found spoilt and left where they are
}

// OpenPolicyChanges returns the record in folder. boot returns the time since the device booted, as that of
// tokencache.Clock.
func OpenPolicyChanges(folder Folder, boot func() time.Duration) *PolicyChanges {
	return &PolicyChanges{folder: folder, boot: boot, id: BootID()}
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
	r.unread, r.spoilt = nil, nil
	for _, err := range []*error{&fault, &other} {
		if spoilt, ok := errors.AsType[*SpoiltError](*err); ok && record != nil {
			*err = moveAside(r.folder, spoilt.Name, spoilt)
		} else if ok {
			name := filepath.Base(spoilt.Name)
			r.spoilt = append(r.spoilt, name)
			why := fmt.Errorf("%w; when another is written it is kept as %s%s…", spoilt.Why, name, unreadable)
			*err = &SpoiltError{Name: spoilt.Name, Why: why}
		}
	}
	if record == nil {
		r.unread = cmp.Or(unlessSpoilt(fault), unlessSpoilt(other))
	}
	return record, cmp.Or(r.unread, fault, other)
}

func unlessSpoilt(err error) error {
	if _, spoilt := errors.AsType[*SpoiltError](err); spoilt {
		return nil
	}
	return err
}

func (r *PolicyChanges) load(name string) (*tokencache.Record, error) {
	text, err := r.folder.Read(name, othersMayChange, maxChangesFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil && !isLoose(err) {
		return nil, err
	}
	record, why := r.decode(text)
	if why != nil {
		return nil, &SpoiltError{Name: name, Why: why}
	}
	if err != nil {
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
	if r.unread != nil {
		const why = "the record that is kept cannot be read now, and is not overwritten before it was"
		return fmt.Errorf("%s: %w", why, r.unread)
	}
	text, err := r.encode(record)
	if err != nil {
		return err
	}
	names := []string{changesCopyName, changesName}
	if len(r.spoilt) == 1 && r.spoilt[0] == changesCopyName { // it stays until something is beside it
		slices.Reverse(names)
	}
	for _, name := range names {
		if err := r.replace(name, text); err != nil {
			return err
		}
	}
	return nil
}

// replace first moves aside what Load found spoilt and left there.
func (r *PolicyChanges) replace(name string, text []byte) error {
	if slices.Contains(r.spoilt, name) {
		if _, err := r.folder.Aside(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		r.spoilt = slices.DeleteFunc(r.spoilt, func(spoilt string) bool { return spoilt == name })
	}
	return r.folder.Replace(name, text)
}
