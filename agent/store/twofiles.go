package store

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// twoFiles is a record in two files with the same text. While one is being written, the other is whole. If one is lost
// or spoilt, the other has all.
type twoFiles struct {
	folder     Folder
	name, copy string
	unread     error    // why what is there could not be read; nil: it could, or nobody has tried
	spoilt     []string // the files that were found spoilt and left where they are
	from       folderID // the folder that was read; zero: it is not known
}

// isElsewhere reports whether another folder took the place of the one that was read, as one that is mounted late does.
func (f *twoFiles) isElsewhere() bool {
	now := idOf(f.folder)
	return now != folderID{} && now != f.from
}

// settle deals with what was wrong with the two files when they were read, and says more in each fault. A spoilt file
// is moved aside if a record was read; else it stays until there is something to put in its place.
func (f *twoFiles) settle(found bool, faults ...*error) {
	f.unread, f.spoilt = nil, nil
	for _, err := range faults {
		if spoilt, ok := errors.AsType[*SpoiltError](*err); ok && found {
			*err = moveAside(f.folder, spoilt.Name, spoilt)
		} else if ok {
			name := filepath.Base(spoilt.Name)
			f.spoilt = append(f.spoilt, name)
			why := fmt.Errorf("%w; once another is written it is kept as %s%s*", spoilt.Why, f.place(name), unreadable)
			*err = &SpoiltError{Name: spoilt.Name, Why: why}
		}
		if !found {
			f.unread = cmp.Or(f.unread, unlessSpoilt(*err))
		}
	}
}

// place returns where a file is, for people.
func (f *twoFiles) place(name string) string {
	if disk, ok := f.folder.(Disk); ok {
		return disk.path(name)
	}
	return name
}

func unlessSpoilt(err error) error {
	if _, spoilt := errors.AsType[*SpoiltError](err); spoilt {
		return nil
	}
	return err
}

// replaceBoth writes text into both files: the copy first, so that it is never the older one where both can be written.
// One that cannot be does not keep the other from it. When it returns nil, that outlives a power cut. When it returns
// an error, what was there before does, or text.
func (f *twoFiles) replaceBoth(text []byte) error {
	names := []string{f.copy, f.name}
	if len(f.spoilt) == 1 && f.spoilt[0] == f.copy { // it stays until something is beside it
		slices.Reverse(names)
	}
	var fault error
	for _, name := range names {
		if fault != nil && slices.Contains(f.spoilt, name) {
			continue // it shows to the next start that there was a record
		}
		fault = cmp.Or(fault, f.replace(name, text))
	}
	return fault
}

// mayWrite returns why nothing is written yet; nil: it may be.
func (f *twoFiles) mayWrite() error {
	if f.unread == nil {
		return nil
	}
	const why = "the record that is kept cannot be read now, and is not overwritten before it was"
	return fmt.Errorf("%s: %w", why, f.unread)
}

// replace first moves aside what was found spoilt and left there.
func (f *twoFiles) replace(name string, text []byte) error {
	if slices.Contains(f.spoilt, name) {
		if _, err := f.folder.Aside(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f.spoilt = slices.DeleteFunc(f.spoilt, func(spoilt string) bool { return spoilt == name })
	}
	return f.folder.Replace(name, text)
}
