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

// Record is the policy changes on the disk, in two files of the same text. The copy is written first, so that it is
// never the older one. While one of the two is being written, the other is whole; whichever is lost or spoilt, the
// other has all.
type PolicyChanges struct {
	folder Folder
	boot   func() time.Duration
	id     string   // of this boot; empty: not known
	unread error    // why Load could not read what is there; nil: it could, or was not called
	spoilt []string // the files that Load found spoilt and left where they are
}

// Open returns the record in folder. boot tells the time since the device booted, as tokencache.Clock does.
func OpenPolicyChanges(folder Folder, boot func() time.Duration) *PolicyChanges {
	return &PolicyChanges{folder: folder, boot: boot, id: BootID()}
}

// Load returns the record; nil when there is no file, which is not the same as a record of no changes. The error says
// what is wrong with the files, beside a record where one of them is whole: the other is moved aside then, if it is
// spoilt. What is in a file that others could have changed is on the record too, and withdraws nothing: see
// withoutOrder. Without a record it is a *SpoiltError where what is there was looked at whole and is no record. It
// stays until Save has something to put in its place, so that each start until then finds it. With any other error the
// record cannot be read now: Save then refuses to overwrite it until Load has read it.
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

// withoutOrder returns the changes that are on r as a record of a lineage of its own, which is taken from no other and
// tells no on-time: nobody knows who wrote what into it, and by either it could say that what others have is withdrawn,
// or over. So it is not known either in which boot its changes were noted.
func unordered(r *tokencache.Record) *tokencache.Record {
	for i := range r.Changes {
		r.Changes[i].Unplaced = true
	}
	return &tokencache.Record{Lineage: rand.Text(), Changes: r.Changes}
}

// missing says that the file of that name is gone beside the one that has there; nil where nothing is there, or what a
// release wrote that had one file.
func missing(name string, there *tokencache.Record) error {
	if there == nil || there.On == 0 {
		return nil
	}
	return fmt.Errorf("%s is gone", name)
}

// older says which of the record and its copy is the older one; nil where neither is. A crash while they were written
// leaves an older record, and so does whoever puts back one of them.
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

// joined is the newer of the record and its copy. Where neither is, since one of them was put there by somebody else,
// it is what stands for the changes of both, as the beginning of another lineage: these may be more than there is room
// for, and the cache joins some then.
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
		both = both.Begun(rand.Text(), *twin, *record)
	}
	if both = both.After(*record, now).After(*twin, now); other.On > both.On {
		both.Instant = other.Instant
	}
	return &both
}

// Save puts record on the disk in the place of what was there. When it returns nil it outlives a power cut; with an
// error, what was there before does, or the new one.
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

// replace moves aside what Load left there, though spoilt.
func (r *PolicyChanges) replace(name string, text []byte) error {
	if slices.Contains(r.spoilt, name) {
		if _, err := r.folder.Aside(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		r.spoilt = slices.DeleteFunc(r.spoilt, func(spoilt string) bool { return spoilt == name })
	}
	return r.folder.Replace(name, text)
}
