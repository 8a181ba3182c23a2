package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"strings"

	"perceptd/agent/store"
	"perceptd/cmd/perceptd/config"
)

// keepConfig has root keep a copy of the configuration that is in force, as the daemon has recorded it: what goes on
// when the next start cannot read a file. The files are read by the daemon's own rules, and nothing but what they say
// is kept, so that whoever has taken over the daemon cannot have grants kept that root has not written.
func keepConfig(f flags, made string, stdout, stderr io.Writer) int {
	kept := config.Kept{Folder: config.KeptFolder}
	if first, _, _ := strings.Cut(made, ":"); first != "" {
		kept.Folder = first
	}
	written, err := keepNow(f, kept)
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "perceptd: no copy of the configuration is kept: %v\n", err)
		return exitFailed
	case written:
		fmt.Fprintf(stdout, "perceptd: a copy of the configuration in force is kept in %s\n", kept.Folder)
	}
	return exitOK
}

// keepNow keeps a copy. It does so again while another configuration is put in force meanwhile: what was noticed of
// that may be lost while this runs.
func keepNow(f flags, kept config.Kept) (written bool, err error) {
	unlock, err := kept.Lock()
	if err != nil {
		return false, err
	}
	defer unlock()
	for before := ""; ; {
		record, fault := store.LoadConfigRecord(store.Disk(cmp.Or(f.stateDir, deviceStateDir)))
		if record == nil {
			return written, errors.Join(err, fmt.Errorf("it is not known which is in force: %w", fault))
		}
		if record.SHA256 == before {
			return written, err
		}
		before = record.SHA256
		var again bool
		again, err = kept.Keep(config.ReadForService(f.config), record.SHA256)
		written = written || again
	}
}
