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
	"path/filepath"
	"time"

	"perceptd/tokencache"
)

const (
	fileName = "policy-changes.json"
	maxFile  = 1 << 20 // bytes
)

// Record is the policy changes on the disk.
type Record struct {
	dir  string
	boot func() time.Duration
	id   string // of this boot; empty: not known
}

// Open returns the record in dir, which is made if need be, and which nobody but root and this process's
// user may write to. boot tells the time since the device booted, as tokencache.Clock does.
func Open(dir string, boot func() time.Duration) (*Record, error) {
	if err := prepare(dir, fileName); err != nil {
		return nil, err
	}
	return &Record{dir: dir, boot: boot, id: BootID()}, nil
}

// Load returns the record; nil when there is no file, which is not the same as a record of no changes. A file that cannot be
// read is moved aside, and the error says what is wrong with it and where it is now.
func (r *Record) Load() (*tokencache.Record, error) {
	path := filepath.Join(r.dir, fileName)
	text, err := read(path, othersMayChange, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var record *tokencache.Record
	if err == nil {
		record, err = r.decode(text)
	}
	if err != nil {
		return nil, moveAside(path, err)
	}
	return record, nil
}

// Save puts record on the disk in the place of what was there. When it returns nil they outlive a power
// cut; with an error, what was there before does.
func (r *Record) Save(record tokencache.Record) error {
	text, err := r.encode(record)
	if err != nil {
		return err
	}
	return replace(filepath.Join(r.dir, fileName), text)
}
