package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/store"
	"perceptd/tokencache"
)

// The record's files are whole and may be changed by others, as after chmod -R: a revocation stays in force, from what
// they have, and from the copy beside the tokens where somebody has emptied them.
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
					id = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).ID
					time.Sleep(time.Minute)
				})
				if row.emptied {
					r := store.OpenPolicyChanges(store.Disk(dir), func() time.Duration { return time.Hour })
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

// Without a key nothing but the record tells for how long the device was on, and from a loose one that is not taken. So
// nobody knows in which boot its changes were noted; what the back end's counting had shown of them holds: a token from
// after the revocation is served. Where the folder is loose too, nothing is written, and each start finds the same.
func TestLooseRecordLocksNobodyOut(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct{ counts, vouch, later, asked, folder bool }{
		"a back end that counts":      {counts: true, vouch: true, asked: true},
		"nobody asked before":         {counts: true, vouch: true},
		"a clock nobody vouches for":  {counts: true, asked: true},
		"which is vouched for later":  {counts: true, asked: true, later: true},
		"a back end that counts none": {vouch: true, asked: true},
		"at each start":               {counts: true, vouch: true, folder: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				d := &bootable{dir: dir, back: &sticky{counts: row.counts}, vouch: row.vouch}
				var noted time.Time
				d.boot(t, false, func(a *agent.Agent) {
					if row.asked {
						mustHave(t, a)
					}
					time.Sleep(time.Hour)
					noted = note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked}).At
					for range 33 {
						time.Sleep(time.Hour)
						_, _ = a.Token(t.Context(), root, requestFor(storage))
					}
					if withholds(t, a) {
						t.Fatal("the token from after the revocation is withheld")
					}
				})
				if loosen(t, dir); row.folder {
					if err := os.Chmod(dir, 0o770); err != nil {
						t.Fatal(err)
					}
				}
				d.vouch = row.vouch || row.later
				for n := range 3 {
					look := func(a *agent.Agent) {
						time.Sleep(20 * time.Minute) // the revocation may have been noted at the start
						for range 10 {
							if withholds(t, a) {
								t.Errorf("boot %d: a token from after the revocation is withheld", n+2)
							}
							for _, ch := range a.Changes() {
								if !ch.At.Equal(noted) {
									t.Errorf("boot %d: noted on %v, and people are told %v", n+2, noted, ch.At)
								}
							}
							time.Sleep(time.Hour)
						}
					}
					d.boot(t, false, look)
					d.start(t, false, look)
				}
			})
		})
	}
}

// Nor is a token from before it served, where it was noted by a clock that counted as right and was behind, and no
// count has shown that yet.
func TestLooseRecordByAClockThatWasBehind(t *testing.T) {
	t.Parallel()
	for _, boots := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d := &bootable{dir: t.TempDir(), back: &sticky{counts: true}, vouch: true, behind: 3 * time.Hour}
			if _, err := d.back.Fetch(t.Context(), tokencache.Key{}); err != nil { // for somebody else
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
			d.boot(t, false, func(a *agent.Agent) {
				time.Sleep(time.Hour)
				note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
			})
			loosen(t, d.dir)
			d.behind = 0
			look := d.start
			if boots {
				look = d.boot
			}
			for range 2 {
				look(t, false, func(a *agent.Agent) {
					time.Sleep(20 * time.Minute)
					if !withholds(t, a) {
						t.Errorf("boots %v: the revoked token is served", boots)
					}
				})
			}
		})
	}
}

// loosen lets the group write to the files in dir.
func loosen(t *testing.T, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	for _, path := range files {
		err = errors.Join(err, os.Chmod(path, 0o660))
	}
	if err != nil || len(files) < 2 {
		t.Fatal(err, files)
	}
}

// Somebody changed one of the record's files, or both, which others may write to, so that it seems to be the newer one,
// or its revocation to be over: the revocation that the copy beside the tokens and the marks on them have stays in
// force.
func TestForgedRecord(t *testing.T) {
	t.Parallel()
	for name, forge := range map[string]func(*tokencache.Record){
		"its origins": func(r *tokencache.Record) {
			r.Changes = nil
			r.Origins = append(r.Origins, tokencache.Origin{Lineage: r.Lineage, Generation: r.Generation + 10})
		},
		"its on-time": func(r *tokencache.Record) { r.On += 60 * time.Hour },
		"both, and the moment": func(r *tokencache.Record) {
			r.On, r.Boot, r.BootID = 60*time.Hour, time.Minute, "boot 2" // that of the start
			r.Origins = append(r.Origins, tokencache.Origin{Lineage: r.Lineage, Generation: r.Generation + 10})
			r.Changes[0].Moment, r.Changes[0].By = 1, 1
		},
	} {
		for _, which := range []string{"*", "policy-changes.json"} {
			t.Run(name+" "+which, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				synctest.Test(t, func(t *testing.T) {
					d := &bootable{dir: dir, back: &sticky{}}
					d.boot(t, true, func(a *agent.Agent) {
						mustHave(t, a)
						note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Revoked})
						time.Sleep(time.Minute)
						if !withholds(t, a) {
							t.Fatal("not withheld")
						}
					})
					copied, err := os.ReadFile(filepath.Join(dir, "policy-changes.copy.json"))
					r := store.OpenPolicyChanges(store.Disk(dir), func() time.Duration { return time.Hour })
					record, fault := r.Load()
					if err := errors.Join(err, fault); err != nil {
						t.Fatal(err)
					}
					forge(record)
					if err := r.Save(*record); err != nil {
						t.Fatal(err)
					}
					if which != "*" { // one file alone is forged, and the other is ours and whole
						if err := os.WriteFile(filepath.Join(dir, "policy-changes.copy.json"), copied,
							0o600); err != nil {
							t.Fatal(err)
						}
					}
					files, _ := filepath.Glob(filepath.Join(dir, which))
					for _, path := range files {
						if err := os.Chmod(path, 0o666); err != nil {
							t.Fatal(err)
						}
					}
					d.boot(t, true, func(a *agent.Agent) {
						time.Sleep(time.Minute)
						if !withholds(t, a) {
							t.Errorf("the revoked token is served; on record: %+v", a.Changes())
						}
					})
				})
			})
		}
	}
}
