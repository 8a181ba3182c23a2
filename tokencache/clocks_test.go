package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// counting is a device whose back end counts the lives of tokens, as the metadata service does.
type counting struct{ *device }

func (c counting) Fetch(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	f, err := c.device.Fetch(ctx, key)
	f.Counted = err == nil
	return f, err
}

// fetcher returns d's Fetch, which counts or does not.
func fetcher(d *device, counts bool) func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
	if counts {
		return counting{d}.Fetch
	}
	return d.Fetch
}

func withheld(t *testing.T, c *tokencache.Cache) bool {
	t.Helper()
	_, err := c.Get(t.Context(), vault, sdk)
	if err != nil && !errors.As(err, new(*tokencache.WithheldError)) {
		t.Fatal(err)
	}
	return err != nil
}

// A clock that is wrong for a while, though it counts as right, ends no change, and lets nothing out that was withheld.
func TestWrongClockThatIsVouchedFor(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		behind  time.Duration // by which the clock is wrong
		counts  bool
		restart bool
	}{
		"three days ahead":                {-72 * time.Hour, false, false},
		"three days ahead, counted":       {-72 * time.Hour, true, false},
		"three days behind":               {72 * time.Hour, false, false},
		"three days behind, at a restart": {72 * time.Hour, false, true},
		"three days ahead, at a restart":  {-72 * time.Hour, false, true},
		"counted, behind, at a restart":   {72 * time.Hour, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := &tokencachetest.Clock{Trusted: true}
				d := &device{backend: simulator.New(simulator.Options{})}
				clock := w.AfterUptime()
				c := tokencache.New(tokencache.Options{Fetch: fetcher(d, row.counts), Clock: clock, BootID: "b"})
				defer func() { c.Close() }()
				mustGet(t, c, vault, sdk)
				time.Sleep(time.Hour)
				noted := note(t, c, "x", tokencache.Revoked, time.Time{})
				w.Set(row.behind, true)
				if row.restart {
					m, record := c.Snapshot(), c.Record()
					c.Close()
					c = tokencache.New(tokencache.Options{
						Fetch: fetcher(d, row.counts), Clock: clock, BootID: "b", Snapshot: &m, Record: record,
						On: tokencache.OnAtBoot("b", clock.Boot(), m.Taken(), record.Instant),
					})
				}
				for range 6 {
					time.Sleep(time.Minute)
					if _, err := c.Get(t.Context(), vault, sdk); err == nil {
						t.Fatal("served while the clock is wrong")
					}
				}
				w.Set(0, true)
				time.Sleep(20 * time.Minute)
				if !withheld(t, c) {
					t.Error("served when the clock was right again")
				}
				if got := c.Record().Changes; len(got) != 1 || got[0] != noted {
					t.Errorf("on record: %+v, noted %+v", got, noted)
				}
				time.Sleep(24 * time.Hour)
				if withheld(t, c) {
					t.Error("withheld after the rollover")
				}
			})
		})
	}
}

// However far the clock is behind that of the issuer, though it counts as right: a token from before the note is not
// current.
func TestClockBehindTheIssuer(t *testing.T) {
	t.Parallel()
	for _, counts := range []bool{true, false} {
		for _, behind := range []time.Duration{5 * time.Minute, 11 * time.Minute, 20 * time.Minute, 2 * time.Hour} {
			synctest.Test(t, func(t *testing.T) {
				d := &device{backend: simulator.New(simulator.Options{})}
				c := tokencache.New(tokencache.Options{Clock: (&tokencachetest.Clock{Trusted: true,
					Behind: behind}).AfterUptime(), Fetch: fetcher(d, counts)})
				defer c.Close()
				mustGet(t, c, vault, sdk)
				time.Sleep(30 * time.Second)
				note(t, c, "x", tokencache.Revoked, time.Time{})
				if _, err := c.Get(t.Context(), vault, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
					t.Errorf("counted %v, %v behind: %v", counts, behind, err)
				}
			})
		}
	}
}

// Without a clock that is known to be right a revocation ends with the first token whose issue is shown to be later,
// whatever the daemon or the device goes through meanwhile, and no later than was promised at any time.
func TestUnvouchedClock(t *testing.T) {
	t.Parallel()
	for _, life := range []string{"quiet", "restarts", "reboots", "reboots, without tokens", "a pipeline"} {
		for _, counts := range []bool{true, false} {
			for _, rolls := range []simulator.Rollover{simulator.AtExpiry, simulator.AtHalfLife, simulator.Jittered} {
				name := fmt.Sprintf("%s, counted %v, rollover %v", life, counts, rolls)
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) { unvouchedClock(t, life, counts, rolls) })
				})
			}
		}
	}
}

func unvouchedClock(t *testing.T, life string, counts bool, rolls simulator.Rollover) {
	w := &tokencachetest.Clock{}
	d := &device{backend: simulator.New(simulator.Options{Rollover: rolls, PropagationDelay: 8 * time.Minute})}
	clock, boots := w.AfterUptime(), 0
	began := time.Now().Add(-tokencachetest.Uptime)
	clock.Boot = func() time.Duration { return time.Since(began) }
	id := func() string { return fmt.Sprint("boot ", boots) }
	c := tokencache.New(tokencache.Options{Fetch: fetcher(d, counts), Clock: clock, BootID: id()})
	defer func() { c.Close() }()
	record := c.Record()
	keep := func() {
		// Where lives are counted it is enough that it is kept when it changes, though it then does not tell how long
		// the device was on after that.
		if now := c.Record(); now.Generation != record.Generation || !counts || life != "reboots, without tokens" {
			record = now
		}
	}
	goOn := func() {
		m := c.Snapshot()
		kept := &m
		keep()
		c.Close()
		if strings.HasPrefix(life, "reboots") {
			boots++
			began = time.Now().Add(-10 * time.Second)
		}
		if life == "reboots, without tokens" {
			kept = nil
		}
		c = tokencache.New(tokencache.Options{
			Fetch: fetcher(d, counts), Clock: clock, BootID: id(), Snapshot: kept, Record: record,
			On: tokencache.OnAtBoot(id(), clock.Boot(), record.Instant),
		})
	}
	mustGet(t, c, vault, sdk)
	time.Sleep(time.Hour)
	d.permit(t, "Less")
	start := time.Now()
	first, _ := d.backend.RolloverAt(simulator.Selection{}, vault.Resource)
	if life == "reboots, without tokens" {
		goOn() // so that nothing is known of the issuer's clock at the note
	}
	note(t, c, "x", tokencache.Revoked, time.Time{})
	promised := start.Add(1000 * time.Hour)
	for i := 1; ; i++ {
		answer, err := c.Get(t.Context(), vault, sdk)
		var why *tokencache.WithheldError
		if err == nil {
			if !has(answer, "Less") || answer.Permissions.State != tokencache.Current && life != "a pipeline" {
				t.Errorf("served after %v: %+v", time.Since(start), answer.Permissions)
			}
			break
		}
		if !errors.As(err, &why) {
			t.Fatal(err)
		}
		if why.Until.Before(promised) {
			promised = why.Until
		}
		if time.Now().After(promised) {
			t.Fatalf("withheld %v after the note, promised for %v", time.Since(start), promised.Sub(start))
		}
		time.Sleep(time.Minute)
		keep()
		switch {
		case life == "a pipeline" && i%9 == 0:
			note(t, c, fmt.Sprint(i), tokencache.Granted, time.Time{})
		case life != "a pipeline" && life != "quiet" && i%(5*60) == 0:
			goOn()
		}
	}
	most := 31 * time.Hour
	if counts { // the rollover's own token shows it
		most = first.Sub(start) + 30*time.Minute
	}
	if took := time.Since(start); took > most {
		t.Errorf("locked out for %v, want %v at most", took, most)
	}
	for range 3 {
		goOn()
		if withheld(t, c) {
			t.Error("locked out again")
		}
		time.Sleep(3 * time.Hour)
	}
}

// An agent on the device counts lives by the device's own clock. Where that is behind and not known to be right, a
// token from the agent's cache seems younger than it is; it is taken for current on no account.
func TestLifeByTheDevicesOwnClock(t *testing.T) {
	t.Parallel()
	for _, behind := range []time.Duration{0, 11 * time.Minute, 3 * time.Hour, -3 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			w := &tokencachetest.Clock{Behind: behind}
			d := &device{backend: simulator.New(simulator.Options{Aged: 2 * time.Hour})}
			c := tokencache.New(tokencache.Options{Clock: w.AfterUptime(),
				Fetch: func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
					f, err := d.Fetch(ctx, key)
					f.Left = min(f.Left+behind, 24*time.Hour)
					return f, err
				}})
			defer c.Close()
			note(t, c, "x", tokencache.Revoked, time.Time{})
			time.Sleep(jitter + time.Minute)
			if _, err := c.Get(t.Context(), vault, sdk); err == nil { // it was issued two hours ago
				t.Errorf("%v behind: a token from before the revocation is served", behind)
			}
		})
	}
}

// A date that is told by a right clock is not taken to be days ago by one that is days ahead, though that one counts as
// right: the back end's counting shows it.
func TestChangeDatedUnderAClockAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &tokencachetest.Clock{Trusted: true}
		d := &device{backend: simulator.New(simulator.Options{Aged: 5 * time.Hour})}
		c := tokencache.New(tokencache.Options{Fetch: counting{d}.Fetch, Clock: w.AfterUptime()})
		defer c.Close()
		mustGet(t, c, tokencache.Key{Resource: "api://other"}, tokencache.Need{})
		w.Set(-72*time.Hour, true)
		noted := note(t, c, "x", tokencache.Revoked, time.Now().Add(-time.Hour))
		w.Set(0, true)
		time.Sleep(time.Minute)
		if !withheld(t, c) {
			t.Errorf("a token of five hours ago is served: %+v", noted)
		}
	})
}

// A token that comes again after it was forgotten was received when it came first.
func TestReceivedAgain(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Edit: byEntra}
	synctest.Test(t, func(t *testing.T) {
		w := &tokencachetest.Clock{}
		c := tokencache.New(tokencache.Options{Fetch: s.Fetch, Clock: w.AfterUptime()})
		defer c.Close()
		first := mustGet(t, c, vault, tokencache.Need{})
		time.Sleep(time.Minute)
		note(t, c, "x", tokencache.Changed, time.Now())
		s.Set(func(s *tokencachetest.Source) {
			s.Edit = func(f *tokencache.Fetched) {
				f.Token, f.Left = *first.Token, 23*time.Hour
			}
		})
		time.Sleep(time.Hour)
		if _, dropped, err := c.Forget(t.Context(), vault, true); err != nil || dropped != first.Token.Text.SHA256() {
			t.Fatal(dropped, err)
		}
		if got := mustGet(t, c, vault, tokencache.Need{}); !got.Token.Text.Equal(first.Token.Text) ||
			got.Permissions.State != tokencache.Stale {
			t.Errorf("%v after %v", got.Permissions.State, time.Since(first.ReceivedOn))
		}
		if got := c.Snapshot().Keys[0].ReceivedOnTime; got != tokencachetest.Uptime+1 {
			t.Errorf("received at %v", got)
		}
	})
}

// A change that is dated before this boot touches no token that was issued after it, though it was received before the
// boot, and withholds those that were issued before it.
func TestChangeDatedBeforeTheBoot(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		ago  time.Duration
		want tokencache.PermissionState
	}{
		{time.Minute, tokencache.Stale},
		{3 * time.Hour, tokencache.Stale},
		{4*time.Hour + 3*time.Minute, tokencache.Uncertain}, // while it spread
		{5 * time.Hour, tokencache.Current},
		{100 * time.Hour, tokencache.Current},
	} {
		synctest.Test(t, func(t *testing.T) {
			l := newSurvivor(simulator.Options{})
			defer func() { l.cache.Close() }()
			mustGet(t, l.cache, vault, tokencache.Need{})
			l.wait(time.Hour)
			l.reboot(true, 3*time.Hour, 0, true)
			if _, err := l.cache.RecordChange(tokencache.PolicyChange{ID: "x", AllIdentities: true,
				Effect: tokencache.Changed, At: l.now().Add(-row.ago)}); err != nil {
				t.Fatal(err)
			}
			if got := mustGet(t, l.cache, vault, tokencache.Need{}).Permissions.State; got != row.want {
				t.Errorf("dated %v ago: %v, want %v", row.ago, got, row.want)
			}
		})
	}
}

// What was kept in an earlier boot was received before every change noted in this one, whatever its on-time says: an
// older file may have been put back, or come from another life of the device.
func TestKeptBeforeTheBoot(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*tokencache.Snapshot){
		"as it was":                   func(*tokencache.Snapshot) {},
		"by a release before":         func(m *tokencache.Snapshot) { m.On, m.Keys[0].ReceivedOnTime = 0, 0 },
		"of a life with more time":    func(m *tokencache.Snapshot) { later(m, 1000*time.Hour) },
		"of a boot that nobody knows": func(m *tokencache.Snapshot) { m.BootID = "" },
	} {
		synctest.Test(t, func(t *testing.T) {
			l := newSurvivor(simulator.Options{})
			defer func() { l.cache.Close() }()
			mustGet(t, l.cache, vault, tokencache.Need{})
			l.wait(2 * time.Hour)
			older := l.memory
			l.reboot(true, time.Minute, 0, false)
			l.wait(time.Minute)
			note(t, l.cache, "x", tokencache.Revoked, time.Time{})
			l.wait(jitter + 10*time.Minute)
			edit(&older)
			m := older
			l.cache.Close()
			l.memory = m
			l.begin(&m) // as if systemd had lost what it holds
			if _, err := l.cache.Get(t.Context(), vault,
				tokencache.Need{}); !errors.As(err, new(*tokencache.WithheldError)) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
}

// later has all on-times of m be later, as of a device that has been on for longer.
func later(m *tokencache.Snapshot, by time.Duration) {
	m.On += by
	r := &m.Keys[0]
	r.ReceivedOnTime, r.IssuedFrom, r.IssuedTo = r.ReceivedOnTime+by, r.IssuedFrom+by, r.IssuedTo+by
}

// A record from before there were on-times is in force, with what its dates tell.
func TestRecordOfTheReleaseBefore(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		known   bool
		vouched bool // its date
		ago     time.Duration
		want    tokencache.PermissionState
	}{
		{"dated after the token", true, true, time.Hour, tokencache.Stale},
		{"dated before the token", true, true, 5 * time.Hour, tokencache.Current},
		{"no date", true, false, 5 * time.Hour, tokencache.Stale},
		{"the clock is not known by now", false, true, 5 * time.Hour, tokencache.Stale},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := &tokencachetest.Clock{Trusted: true}
			d := &device{backend: simulator.New(simulator.Options{})}
			clock := w.AfterUptime()
			c := tokencache.New(tokencache.Options{Fetch: d.Fetch, Clock: clock, BootID: "b"})
			mustGet(t, c, vault, sdk)
			time.Sleep(2 * time.Hour)
			m := c.Snapshot()
			c.Close()
			w.Set(0, row.known)
			at := time.Now().Add(-row.ago)
			before := tokencache.PolicyChange{ID: "x", AllIdentities: true, Effect: tokencache.Changed, At: at,
				RecordedAt: at, Vouched: row.vouched}
			c = tokencache.New(tokencache.Options{
				Fetch: d.Fetch, Clock: clock, BootID: "b", Snapshot: &m,
				Record: tokencache.Record{Changes: []tokencache.PolicyChange{before}},
			})
			defer c.Close()
			if got := policyState(t, c); got != row.want {
				t.Errorf("%s: %v, want %v", row.name, got, row.want)
			}
			if got := c.Record().Changes[0]; got.Moment == 0 {
				t.Errorf("%s: it has no moment", row.name)
			}
		})
	}
}

// Changes that follow each other before the one before has spread keep the back end from being asked for half an hour
// at most.
func TestChangesThatFollowEachOther(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Hour)
		silent, before := time.Duration(0), d.count()
		for i := range 20 * 60 { // minutes
			if i%9 == 0 {
				note(t, c, fmt.Sprint(i), tokencache.Granted, time.Time{})
			}
			mustGet(t, c, vault, sdk)
			time.Sleep(time.Minute)
			if n := d.count(); n != before {
				before, silent = n, 0
				continue
			}
			if silent += time.Minute; silent > 3*jitter+6*time.Minute {
				t.Fatalf("after %d minutes nothing has been asked for %v", i, silent)
			}
			if until := time.Until(only(t, c).HeldUntil); until > 3*jitter+6*time.Minute {
				t.Fatalf("held for %v", until)
			}
		}
		if n := d.count(); n > 3*20 {
			t.Errorf("%d calls in 20 hours", n)
		}
		if got := mustGet(t, c, vault, sdk).Left; got < 12*time.Hour {
			t.Errorf("the token of before the rollover is held: %v left", got)
		}
	})
}

// Changes about another resource put off nothing, though each makes room on a full record, so that something is new
// about every token.
func TestChangesAboutOthersPutNothingOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &registry{}
		c := tokencache.New(tokencache.Options{Clock: (&tokencachetest.Clock{Trusted: true}).AfterUptime(),
			Fetch: r.Fetch})
		defer c.Close()
		pipeline := func(changes int, resource string) {
			for i := range changes {
				if _, err := c.RecordChange(tokencache.PolicyChange{ID: fmt.Sprint(resource, changes, i),
					AllIdentities: true, Resource: resource, Effect: tokencache.Granted}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
			}
		}
		pipeline(tokencache.MaxChanges-100, "") // which tokens meet that are issued then
		issued := time.Now()
		r.gives(func(key tokencache.Key) tokencache.Fetched { return tokenOf("o", key, issued) })
		mustGet(t, c, vault, sdk)
		pipeline(100, "")
		before := len(r.asked(vault))
		pipeline(240, storage.Resource)
		if n := len(r.asked(vault)) - before; n < 8 || n > 40 {
			t.Errorf("%d calls in four hours for a token that is stale", n)
		}
	})
}

// A change ends when on-time says so, and the wall clock where it can speak; the device may have been off in between.
func TestEndOfAChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newSurvivor(simulator.Options{})
		defer func() { l.cache.Close() }()
		note(t, l.cache, "x", tokencache.Revoked, time.Time{})
		l.wait(20 * time.Hour)
		l.reboot(true, 1000*time.Hour, 0, true)
		l.wait(10 * time.Minute)
		if n := len(l.cache.Changes()); n != 1 {
			t.Fatalf("it ended by the wall clock alone: %d on record", n)
		}
		ends := l.cache.Changes()[0].EndsOn
		if in := ends.Sub(l.now()); in < 33*time.Hour || in > 34*time.Hour {
			t.Errorf("ends in %v", in)
		}
		l.wait(ends.Sub(l.now()) - time.Minute)
		if n := len(l.cache.Changes()); n != 1 {
			t.Fatalf("a minute before its end: %d on record", n)
		}
		mustGet(t, l.cache, vault, tokencache.Need{})
		l.wait(10 * time.Minute)
		if n := len(l.cache.Changes()); n != 0 {
			t.Errorf("after its end: %d on record", n)
		}
	})
}

// A change that was noted at the last moment of which anything kept tells keeps the date that a clock gave it which was
// right, as the back end's counting had shown.
func TestChangeAtTheEndOfWhatWasKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &device{backend: simulator.New(simulator.Options{})}
		clock := (&tokencachetest.Clock{Trusted: true}).AfterUptime()
		c := tokencache.New(tokencache.Options{Fetch: fetcher(d, true), Clock: clock, BootID: "a"})
		time.Sleep(time.Hour)
		mustGet(t, c, storage, sdk)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		record := c.Record()
		c.Close()
		time.Sleep(8 * time.Hour) // off
		booted := time.Now()
		clock.Boot = func() time.Duration { return time.Since(booted) + time.Second }
		c = tokencache.New(tokencache.Options{
			Fetch: fetcher(d, true), Clock: clock, BootID: "b", Record: record,
			On: tokencache.OnAtBoot("b", clock.Boot(), record.Instant),
		})
		defer c.Close()
		if a := mustGet(t, c, vault, sdk); a.Permissions.State != tokencache.Current {
			t.Errorf("a token that was issued hours after the change is %v", a.Permissions.State)
		}
	})
}

// A clock that is vouched for and shows that a change happened before 1970 dates nothing: the record could not be kept
// with such a date.
func TestClockBefore1970(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &device{backend: simulator.New(simulator.Options{})}
		w := &tokencachetest.Clock{}
		c := tokencache.New(tokencache.Options{Fetch: d.Fetch, Clock: w.AfterUptime()})
		defer c.Close()
		mustGet(t, c, vault, sdk)
		noted := note(t, c, "x", tokencache.Changed, time.Time{})
		time.Sleep(time.Hour)
		w.Set(time.Since(time.Unix(60, 0)), true)
		time.Sleep(10 * time.Minute)
		got := c.Record().Changes
		if len(got) == 1 {
			got[0].NotLater = noted.NotLater // which each answer bounds anew
		}
		if len(got) != 1 || got[0] != noted {
			t.Errorf("on record: %+v, noted %+v", got, noted)
		}
	})
}

// What is promised of a token without a date that was kept over a boot is kept, however wrong the clock is then.
func TestPromiseOfARestoredUndatedToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var held tokencache.Token
		fetch := func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
			if now := time.Now().Round(0); !now.Before(held.ExpiresOn) {
				held = tokencache.Token{Text: tokencache.NewSecret(now.String()), ExpiresOn: now.Add(24 * time.Hour)}
			}
			return tokencache.Fetched{Token: held, Left: time.Until(held.ExpiresOn), Counted: true}, nil
		}
		w := &tokencachetest.Clock{Trusted: true}
		clock := w.AfterUptime()
		c := tokencache.New(tokencache.Options{Fetch: fetch, Clock: clock, BootID: "a"})
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Hour)
		m := c.Snapshot()
		c.Close()
		w.Set(-20*365*24*time.Hour, false)
		booted := time.Now()
		clock.Boot = func() time.Duration { return time.Since(booted) + time.Second }
		c = tokencache.New(tokencache.Options{Fetch: fetch, Clock: clock, BootID: "b", Snapshot: &m,
			On: tokencache.OnAtBoot("b", clock.Boot(), m.Taken())})
		defer c.Close()
		if _, err := c.Refresh(t.Context(), vault, true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Hour)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		promised := 1000 * time.Hour // on the boot clock
		for withheld(t, c) {
			for _, s := range c.Status() {
				if s.Left > 0 {
					promised = min(promised, clock.Boot()+s.Permissions.CurrentBy.Sub(clock.Wall()))
				}
			}
			if late := clock.Boot() - promised; late > time.Minute {
				t.Fatalf("withheld %v after it was promised at the latest", late)
			}
			time.Sleep(time.Minute)
		}
	})
}
