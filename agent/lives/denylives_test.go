package lives

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
	"perceptd/agent/store"
	"perceptd/tokencache/tokencachetest"
)

var denyModules = []string{"vision", "speech", "camera"}

// belief is what is known of a rule without asking the daemon.
type belief uint8

const (
	absent   belief = iota
	possible        // it may be in force, or not: the daemon died while it was set or lifted, or it was not kept
	standing        // it denies
)

// side is who sets a rule for a module.
type side struct {
	origin api.DenyOrigin
	module string
}

// denyLife is the life of a device as far as deny rules go: its disk, what systemd holds, and what is known of the
// rules.
type denyLife struct {
	*testing.T
	random  *rand.Rand
	seed    uint64
	history []string

	mu              sync.Mutex // the daemon's savers use the disk, too; protects what follows
	luck            *rand.Rand // of a step that may have been taken
	files           map[string][]byte
	reading, saving error // why the disk fails
	steps           int   // until the daemon is killed in one on the disk; 0: it is not
	dead            *bool // the daemon's that runs
	held            []deny.Record

	// Only the test uses these.
	agent   *agent.Agent
	rules   map[side]belief
	unkept  map[side]belief // what becomes of those at a reboot
	version int64
	// mayBeLost says that the record may count as lost: both files were damaged, or cannot be read.
	mayBeLost bool
	checks    int
}

// diskOf is the state folder as one process sees it.
type diskOf struct {
	l    *denyLife
	dead *bool
}

var _ store.Folder = diskOf{}

func (d diskOf) Read(name string, _ fs.FileMode, _ int) ([]byte, error) {
	d.l.mu.Lock()
	defer d.l.mu.Unlock()
	if d.l.reading != nil {
		return nil, d.l.reading
	}
	b, there := d.l.files[name]
	if !there {
		return nil, fs.ErrNotExist
	}
	return b, nil
}

// step is one on the disk. That in which the daemon dies, or writing fails with EIO, may be taken all the same.
func (d diskOf) step(take func()) error {
	l := d.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if *d.dead {
		return syscall.EIO
	}
	if l.steps > 0 {
		if l.steps--; l.steps == 0 {
			*d.dead = true
			if l.luck.IntN(2) == 0 {
				take()
			}
			return syscall.EIO
		}
	}
	if l.saving != nil {
		if l.saving == syscall.EIO && l.luck.IntN(2) == 0 {
			take()
		}
		return l.saving
	}
	take()
	return nil
}

func (d diskOf) Replace(name string, text []byte) error {
	return d.step(func() { d.l.files[name] = text })
}

func (d diskOf) Aside(name string) (string, error) {
	return name + aside, d.step(func() { delete(d.l.files, name) })
}

func (d diskOf) Remove(name string) error { return d.step(func() { delete(d.l.files, name) }) }

// set changes what the disk and systemd share with the daemon.
func (l *denyLife) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

func (l *denyLife) heldNow() (all []deny.Record) {
	l.set(func() { all = slices.Clone(l.held) })
	return all
}

func (l *denyLife) isDead() (dead bool) {
	l.set(func() { dead = *l.dead })
	return dead
}

// isReading reports whether the disk can be read.
func (l *denyLife) isReading() (reads bool) {
	l.set(func() { reads = l.reading == nil })
	return reads
}

func (l *denyLife) note(format string, args ...any) {
	l.history = append(l.history, fmt.Sprintf(format, args...))
}

func (l *denyLife) fail(format string, args ...any) {
	l.Fatalf("seed %d: %s\nafter %q", l.seed, fmt.Sprintf(format, args...), l.history)
}

func (l *denyLife) start() {
	l.set(func() { l.dead = new(bool) })
	for of := range l.unkept { // of two records that went on apart the rules of both count
		if l.rules[of] == absent {
			l.rules[of] = possible
		}
	}
	disk := diskOf{l, l.dead}
	changes := store.OpenPolicyChanges(disk, func() time.Duration { return time.Hour })
	kept, err := changes.Load()
	rules := store.OpenDenyRules(changes)
	record, fault := rules.Load()
	dead := l.dead
	o := agent.Options{
		Fetch: new(tokencachetest.Source).Fetch, Record: kept, SaveRecord: changes.Save, LoadRecord: changes.Load,
		Deny: agent.DenyStore{Record: record, Noted: changes.DenyRecord(), Copies: l.heldNow(), Load: rules.Load,
			Save: rules.Save,
			HandOver: func(r deny.Record) error {
				l.mu.Lock()
				defer l.mu.Unlock()
				if !*dead {
					l.held = []deny.Record{r}
				}
				return nil
			}},
	}
	if kept == nil {
		o.UnreadRecord = err
	}
	_, spoilt := errors.AsType[*store.SpoiltError](fault)
	switch {
	case record != nil:
	case spoilt:
		o.Deny.Lost = fault
	default:
		o.Deny.Unread = fault
	}
	o.Rules.Identities = identities[:1]
	for _, module := range denyModules {
		o.Rules.Grants = append(o.Rules.Grants, grants.Grant{
			Caller: grants.Match{Module: module}, Identity: "device", Resources: []string{resourceName(0)},
		})
	}
	if l.agent, err = agent.New(o); err != nil {
		l.fail("start: %v", err)
	}
	synctest.Wait()
	if l.isDead() {
		l.crash()
	}
}

// crash kills the daemon, if it still lives, and starts another.
func (l *denyLife) crash() {
	l.set(func() { *l.dead, l.steps = true, 0 })
	l.agent.Close()
	l.start()
}

// done notes what becomes of rules by an operation that ended with err.
func (l *denyLife) done(err error, after map[side]belief) {
	var refusal *agent.Error
	isUnkept := errors.As(err, &refusal) && refusal.Code == api.CodeNotKept
	if err != nil && !isUnkept {
		l.fail("%v", err)
	}
	for of, is := range after {
		before := l.rules[of]
		switch {
		case l.isDead(): // it died of it: systemd or the disk may have it, or not
			if before != is {
				l.rules[of] = possible
			}
		case isUnkept:
			l.rules[of] = is
			if before != is || l.unkept[of] != absent {
				l.unkept[of] = possible
			}
		default:
			l.rules[of] = is
			if l.isReading() {
				clear(l.unkept) // the whole record was kept
			}
		}
	}
	isSound := err == nil && !l.isDead() && l.isReading() && !l.areSpoilt()
	if isSound && len(after) > 0 && l.agent.DenyStatus().Lost == "" {
		l.mayBeLost = false
	}
	if l.isDead() {
		l.note("died")
		l.crash()
	}
}

// areSpoilt reports whether there is a file of deny rules, and none that is whole.
func (l *denyLife) areSpoilt() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	there, whole := false, false
	for name, text := range l.files {
		if slices.Contains(denyFiles, name) {
			there, whole = true, whole || len(text) > 1
		}
	}
	return there && !whole
}

var denyFiles = []string{"deny-rules.json", "deny-rules.copy.json"}

// forgetDamaged is for a loss that was ended: what was on the record may be gone.
func (l *denyLife) forgetDamaged() {
	for of, is := range l.rules {
		if is == standing {
			l.rules[of] = possible
		}
	}
}

func (l *denyLife) pick() string { return denyModules[l.random.IntN(len(denyModules))] }

func (l *denyLife) request(module string) api.DenyRequest {
	return api.DenyRequest{DenyTarget: api.DenyTarget{Module: module}}
}

// happen has one thing happen.
func (l *denyLife) happen() {
	switch n := l.random.IntN(20); {
	case n < 4:
		of := side{api.DenyLocal, l.pick()}
		l.note("deny %s", of.module)
		_, err := l.agent.Deny("uid 0", api.DenySide{Origin: of.origin}, l.request(of.module))
		l.done(err, map[side]belief{of: standing})
	case n < 6:
		of := side{api.DenyLocal, l.pick()}
		if l.rules[of] != standing {
			return
		}
		l.note("lift %s", of.module)
		listed := l.agent.DenyStatus()
		i := slices.IndexFunc(listed.Rules, func(r api.DenyRule) bool {
			return r.Origin == of.origin && r.Module == of.module
		})
		switch {
		case i < 0 && listed.Lost != "":
			return // it cannot be read now
		case i < 0:
			l.fail("the rule for %s stands, and is not listed", of.module)
		}
		_, err := l.agent.LiftDeny("uid 0", api.DenySide{Origin: of.origin}, listed.Rules[i].ID)
		if listed.Lost != "" { // there may be another one where it cannot be read now
			l.unkept[of] = possible
			l.done(err, map[side]belief{of: possible})
			return
		}
		l.done(err, map[side]belief{of: absent})
	case n < 9:
		l.version++
		var wanted []api.DenyRequest
		after := make(map[side]belief)
		for _, module := range denyModules {
			after[side{api.DenyTwin, module}] = absent
			if l.random.IntN(2) == 0 {
				wanted = append(wanted, l.request(module))
				after[side{api.DenyTwin, module}] = standing
			}
		}
		if l.random.IntN(2) == 0 {
			l.note("notification of %v", wanted)
			maps.DeleteFunc(after, func(_ side, is belief) bool { return is == absent })
			_, err := l.agent.TightenTwinDeny("hub/edge", wanted, l.version)
			l.done(cmp.Or(err, l.agent.KeepDenyRules()), after)
			return
		}
		l.note("twin %v", wanted)
		if l.agent.DenyStatus().Lost != "" {
			l.forgetDamaged()
		}
		l.done(cmp.Or(l.agent.SetTwinDeny("hub/edge", wanted, l.version), l.agent.KeepDenyRules()), after)
	case n < 11:
		l.note("restart")
		l.agent.Close()
		l.start()
	case n < 13:
		l.note("crash")
		l.crash()
	case n < 14:
		l.note("reboot")
		l.agent.Close()
		l.set(func() { l.held = nil })
		for of, is := range l.unkept {
			l.rules[of] = is
		}
		clear(l.unkept)
		l.start()
	case n < 16:
		n := 1 + l.random.IntN(6)
		l.set(func() { l.steps = n })
		l.note("killed in step %d", n)
	case n < 17:
		fault := []error{syscall.ENOSPC, syscall.EIO, nil}[l.random.IntN(3)]
		l.set(func() { l.saving = fault })
		l.note("saving: %v", fault)
	case n < 18:
		fault := []error{syscall.EIO, nil, nil}[l.random.IntN(3)]
		l.set(func() { l.reading = fault })
		l.mayBeLost = l.mayBeLost || fault != nil
		l.note("reading: %v", fault)
	case n < 19:
		l.damage()
	default:
		l.note("forget")
		if l.agent.DenyStatus().Lost == "" {
			return
		}
		l.forgetDamaged()
		l.done(l.agent.ForgetLostDenyRules("uid 0"), nil)
	}
}

// damage spoils one of the two files, or both.
func (l *denyLife) damage() {
	first, both := l.random.IntN(2), l.random.IntN(3) == 0
	l.note("damage %d, both %v", first, both)
	l.set(func() {
		for i, name := range denyFiles {
			if _, there := l.files[name]; there && (both || i == first) {
				l.files[name] = []byte("{")
			}
		}
	})
	l.mayBeLost = l.mayBeLost || l.areSpoilt()
}

// check asks for a token of each module.
func (l *denyLife) check() {
	for _, module := range denyModules {
		is := max(l.rules[side{api.DenyLocal, module}], l.rules[side{api.DenyTwin, module}])
		_, err := l.agent.Token(context.Background(), grants.Caller{Module: module, UID: 7},
			agent.Request{Request: grants.Request{Resource: resourceName(0)}})
		refusal := new(agent.Error)
		_ = errors.As(err, &refusal)
		l.checks++
		switch {
		case err == nil && is == standing:
			l.fail("%s got a token that a standing rule denies", module)
		case refusal.Code == api.CodeDenied && is == absent:
			l.fail("%s is denied, and no rule stands: %v", module, err)
		case refusal.Code == api.CodeDenyRulesLost && !l.mayBeLost:
			l.fail("the record counts as lost, and is not: %v", err)
		case err != nil && refusal.Code != api.CodeDenied && refusal.Code != api.CodeDenyRulesLost:
			l.fail("%s: %v", module, err)
		}
	}
}

// Over restarts, crashes at any step, reboots and disk faults no caller gets a token that a standing rule denies, and
// none is refused without a rule, unless the record may be lost.
func TestDenyRulesOverWholeLives(t *testing.T) {
	t.Parallel()
	const lives = 200
	checks := 0
	for seed := range uint64(lives) {
		synctest.Test(t, func(t *testing.T) {
			l := &denyLife{
				T: t, seed: seed, random: rand.New(rand.NewPCG(seed, 1)), luck: rand.New(rand.NewPCG(seed, 2)),
				files: make(map[string][]byte),
				rules: make(map[side]belief), unkept: make(map[side]belief),
			}
			l.start()
			defer func() { l.agent.Close() }()
			for range 40 {
				l.happen()
				time.Sleep(time.Duration(l.random.IntN(90)) * time.Second)
				synctest.Wait()
				if l.isDead() {
					l.note("died")
					l.crash()
				}
				l.check()
			}
			checks += l.checks
		})
	}
	t.Logf("%d requests in %d lives", checks, lives)
}
