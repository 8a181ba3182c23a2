// Package keep has what perceptd knows outlive a restart and a reboot, in files of the state directory.
//
// It keeps the policy changes on record (Record), and the tokens: sealed in a file (Tokens), and in memory
// that a descriptor holds (Carry). Each file is replaced whole or not at all, whatever happens in between;
// no token text is in one in the clear. What is damaged is moved aside, and the error says where to. The
// caller gives Save the whole each time and calls it once at a time.
package keep

import (
	"errors"
	"io/fs"
	"time"

	"perceptd/tokencache"
)

const (
	fileName = "policy-changes.json"
	maxFile  = 1 << 20 // bytes
)

// Record is the policy changes on the disk.
type Record struct {
	folder Folder
	boot   func() time.Duration
	id     string // of this boot; empty: not known
}

// Open returns the record in folder. boot tells the time since the device booted, as tokencache.Clock does.
func Open(folder Folder, boot func() time.Duration) *Record {
	return &Record{folder: folder, boot: boot, id: BootID()}
}

// Load returns the record; nil when there is no file, which is not the same as a record of no changes. The error is a
// *SpoiltError where the file is not a record: it is moved aside, and the error says where to. With any other error the file
// cannot be read now, and stays where it is.
func (r *Record) Load() (*tokencache.Record, error) {
	text, err := r.folder.Read(fileName, othersMayChange, maxFile)
	var record *tokencache.Record
	if err == nil {
		if record, err = r.decode(text); err != nil {
			err = &SpoiltError{Name: fileName, Why: err}
		}
	}
	_, spoilt := errors.AsType[*SpoiltError](err)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case spoilt:
		return nil, moveAside(r.folder, fileName, err)
	}
	return record, err
}

// Save puts record on the disk in the place of what was there. When it returns nil they outlive a power
// cut; with an error, what was there before does.
func (r *Record) Save(record tokencache.Record) error {
	text, err := r.encode(record)
	if err != nil {
		return err
	}
	return r.folder.Replace(fileName, text)
}
