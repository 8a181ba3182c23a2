package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/keep"
	"perceptd/tokencache"
)

// The record's files are whole and may be changed by others, as after chmod -R: a revocation stays in force, from what they have, and from
// the copy beside the tokens where somebody has emptied them.
func TestLooseRecord(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct{ hasKey, emptied bool }{
		"without a copy":     {},
		"beside its copy":    {hasKey: true},
		"emptied by another": {hasKey: true, emptied: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				d := &bootable{dir: dir, back: &sticky{}}
				var id string
				d.boot(t, row.hasKey, func(a *agent.Agent) {
					mustHave(t, a)
					id = note(t, a, agent.Change{AllResources: true, Effect: tokencache.Revoked}).ID
					time.Sleep(time.Minute)
				})
				if row.emptied {
					r := keep.Open(keep.Disk(dir), func() time.Duration { return time.Hour })
					record, err := r.Load()
					if err == nil {
						record.Generation, record.Changes = record.Generation+10, nil
						err = r.Save(*record)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				files, err := filepath.Glob(filepath.Join(dir, "*"))
				for _, path := range files {
					err = errors.Join(err, os.Chmod(path, 0o666))
				}
				if err != nil || len(files) < 2 {
					t.Fatal(err, files)
				}
				for range 2 {
					d.boot(t, row.hasKey, func(a *agent.Agent) {
						time.Sleep(time.Minute)
						if !withholds(t, a) || !isOnRecord(a, id) || len(a.Changes()) != 1 {
							t.Errorf("on record: %+v", a.Changes())
						}
					})
				}
			})
		})
	}
}
