package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"perceptd/cmd/perceptd/config"
)

// edits finds out whether the files of the configuration were edited since they were read last. It looks at their
// names, times and sizes, and has them read, beside whatever else goes on, only where one of these has changed.
type edits struct {
	mu      sync.Mutex // protects what follows, and is not held while files are read
	stamp   stamp      // when they were looked at last
	mark    string     // of what they said when they were read last
	on      time.Time  // when they were edited since; zero: they were not
	looking bool       // look runs
}

// stamp is the names, times and sizes of the files, and the latest time.
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
		info, err := os.Stat(name)
		if err != nil {
			fmt.Fprintln(&all, name, err)
			continue
		}
		fmt.Fprintln(&all, name, info.ModTime().UnixNano(), info.Size(), info.Mode())
		if info.ModTime().After(s.latest) {
			s.latest = info.ModTime()
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
// changed is read it counts as an edit, so that no caller waits for that.
func (e *edits) since(path string) time.Time {
	now := stampOf(path)
	e.mu.Lock()
	defer e.mu.Unlock()
	if now.all == e.stamp.all || e.looking {
		return e.on
	}
	e.stamp, e.on, e.looking = now, now.latest, true
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
