package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/config"
)

// edits finds out whether the files of the configuration were edited since they were read last. It looks at their
// names, times, sizes, modes and owners, and has them read, beside whatever else goes on, only where one of these has
// changed.
type edits struct {
	mu      sync.Mutex // protects what follows, and is not held while files are read
	stamp   stamp      // when they were looked at last
	mark    string     // of what they said when they were read last
	on      time.Time  // when they were edited since; zero: they were not
	looking bool       // look runs
}

// stamp is the names, times, sizes, modes and owners of the files and of the folders that they are in, and the latest
// time of the files.
type stamp struct {
	all    string
	latest time.Time
}

// stampOf looks at the files of the configuration at path, and reads none.
func stampOf(path string) stamp {
	var s stamp
	var all strings.Builder
	folder := filepath.Join(filepath.Dir(path), "config.d")
	entries, _ := os.ReadDir(folder) // nothing: the times say enough
	names := []string{path, folder}
	for _, entry := range entries {
		names = append(names, filepath.Join(folder, entry.Name()))
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			fmt.Fprintln(&all, name, err)
			continue
		}
		fmt.Fprintln(&all, name, st.Mtim, st.Ctim, st.Size, st.Mode, st.Uid, st.Gid)
		for _, at := range []unix.Timespec{st.Mtim, st.Ctim} {
			if changed := time.Unix(at.Unix()); changed.After(s.latest) {
				s.latest = changed
			}
		}
	}
	for above := filepath.Dir(path); ; above = filepath.Dir(above) {
		var st unix.Stat_t
		err := unix.Stat(above, &st)
		fmt.Fprintln(&all, above, err, st.Mode, st.Uid, st.Gid) // other files may have changed its times
		if above == filepath.Dir(above) {
			break
		}
	}
	s.all = all.String()
	return s
}

// markOf identifies what was read.
func markOf(found config.Reading) string {
	return config.Sum(found.Files) + fmt.Sprintln(errors.Join(found.Faults...))
}

// read notes that the files were read, when they had that stamp.
func (e *edits) read(found config.Reading, at stamp) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stamp, e.mark, e.on = at, markOf(found), time.Time{}
}

// since returns when the files at path were edited and have not been read since; zero: they were not. Until what has
// changed is read it counts as an edit, so that no caller waits for that. Where no file says when, as of one that was
// removed, it is now, which is when that is noticed.
func (e *edits) since(path string, now time.Time) time.Time {
	at := stampOf(path)
	e.mu.Lock()
	defer e.mu.Unlock()
	if at.all == e.stamp.all || e.looking {
		return e.on
	}
	e.on = now
	if at.latest.After(e.stamp.latest) {
		e.on = at.latest
	}
	e.stamp, e.looking = at, true
	go e.look(path)
	return e.on
}

// look takes back that the files were edited, where they say what they said.
func (e *edits) look(path string) {
	mark := markOf(config.Read(path))
	e.mu.Lock()
	defer e.mu.Unlock()
	e.looking = false
	if mark == e.mark {
		e.on = time.Time{}
	}
}
