package tokencache_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

const year = 365 * 24 * time.Hour

// What a cache serves that begins with another's token of 24 h, by where it is and what its clock shows.
func TestRestore(t *testing.T) {
	t.Parallel()
	const rebooted = 20*time.Hour - 10*time.Second // as if the device had been off for no time
	for _, row := range []struct {
		name  string
		off   time.Duration // 0: a restart within the boot
		ahead time.Duration
		known bool
		edit  func(*tokencache.Snapshot)

		left        time.Duration // 0: nothing is served
		unconfirmed bool
		calls       int           // at once
		early       time.Duration // how long before its expiry it is given up
	}{
		{name: "same boot", known: true, left: 20 * time.Hour},
		{name: "same boot, the clock in 1970", ahead: -30 * year, left: 20 * time.Hour},
		{name: "same boot, the clock 20 years ahead", ahead: 20 * year, left: 20 * time.Hour},
		{name: "other boot, synchronised", off: 3 * time.Hour, known: true, left: 17 * time.Hour},
		{name: "other boot, synchronised, not so before", off: 3 * time.Hour, known: true, left: 17 * time.Hour,
			edit: func(m *tokencache.Snapshot) { m.Synchronised, m.Wall = false, m.Wall.Add(-30*year) }},
		{name: "other boot, right but not known to be", off: 3 * time.Hour, left: rebooted, unconfirmed: true},
		{name: "other boot, the clock in 1970", off: 3 * time.Hour, ahead: -30 * year, left: rebooted,
			unconfirmed: true},
		{name: "other boot, the clock 20 years ahead", off: 3 * time.Hour, ahead: 20 * year, left: 17 * time.Hour,
			calls: 1},
		{name: "expired during the absence", off: 21 * time.Hour, known: true, left: 24 * time.Hour, calls: 1},
		{name: "perhaps expired during the absence", off: 21 * time.Hour, ahead: -30 * year, left: rebooted,
			unconfirmed: true},
		{name: "from later in the same boot", known: true, left: 20 * time.Hour,
			edit: func(m *tokencache.Snapshot) {
				m.Boot += time.Hour
				m.Keys[0].Deadline += time.Hour
				*m.Keys[0].Next += time.Hour
			}},
		{name: "of an unknown boot", known: true, left: 20 * time.Hour,
			edit: func(m *tokencache.Snapshot) { m.BootID = "" }},
		{name: "of an unknown boot, the clock in 1970", ahead: -30 * year, left: 16 * time.Hour, unconfirmed: true,
			early: 4 * time.Hour,
			// At least as long as this boot has lasted, since nobody can tell that it is the same.
			edit: func(m *tokencache.Snapshot) { m.BootID = "" }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				l := newSurvivor(simulator.Options{})
				defer func() { l.cache.Close() }()
				l.skip(-time.Minute) // so that boot times are those since the beginning
				mustGet(t, l.cache, vault, tokencache.Need{})
				l.wait(4 * time.Hour)
				mustGet(t, l.cache, vault, tokencache.Need{})
				l.keep(l.cache)
				if row.edit != nil {
					row.edit(&l.memory)
				}
				calls := l.total()
				if row.off > 0 {
					l.reboot(false, row.off, row.ahead, row.known)
				} else {
					l.set(row.ahead, row.known)
					l.restart(false)
				}
				if got := l.total() - calls; got != row.calls {
					t.Errorf("%d calls at once, want %d", got, row.calls)
				}
				got := mustGet(t, l.cache, vault, tokencache.Need{})
				if (got.Left-row.left).Abs() > time.Second || got.Unconfirmed != row.unconfirmed {
					t.Errorf("%v left, unconfirmed %v; want %v, %v", got.Left, got.Unconfirmed, row.left,
						row.unconfirmed)
				}
				l.set(0, true)
				l.wait(6 * time.Minute)
				l.set(-30*year, false) // what was confirmed stays so
				got = mustGet(t, l.cache, vault, tokencache.Need{})
				if truly := got.Token.ExpiresOn.Sub(l.now()); got.Unconfirmed || got.Left > truly ||
					truly-got.Left > row.early+time.Second {
					t.Errorf("when the clock had been right: %v left, unconfirmed %v; it has %v", got.Left,
						got.Unconfirmed, truly)
				}
			})
		})
	}
}

// A key that nobody asked for any more stays so; when somebody asks again whose token's life is a guess, the back end
// is asked.
func TestRestoreOfAnIdleKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newSurvivor(simulator.Options{Rollover: simulator.AtHalfLife})
		defer func() { l.cache.Close() }()
		mustGet(t, l.cache, vault, tokencache.Need{})
		l.wait(30 * time.Hour)
		if next := l.memory.Keys[0].Next; next != nil {
			t.Fatalf("it is not idle yet: %v", next)
		}
		calls := l.total()
		l.reboot(true, time.Minute, -30*year, false)
		l.wait(30 * time.Minute)
		if l.total() != calls {
			t.Errorf("an idle key cost %d calls", l.total()-calls)
		}
		mustGet(t, l.cache, vault, tokencache.Need{})
		l.wait(time.Second)
		if got := mustGet(t, l.cache, vault, tokencache.Need{}); got.Unconfirmed || l.total() != calls+1 {
			t.Errorf("when it was asked for: %d calls, unconfirmed %v", l.total()-calls, got.Unconfirmed)
		}
	})
}

// Until all has been told that the schedule is to know, it makes no call for what is remembered, and forgets none of
// it.
func TestScheduleBeginsWhenItIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, w := &registry{}, &tokencachetest.Clock{}
		r.gives(func(key tokencache.Key) tokencache.Fetched { return tokenOf("a", key, time.Now()) })
		c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: w.AfterUptime()})
		mustGet(t, c, vault, tokencache.Need{})
		m := c.Snapshot()
		c.Close()
		time.Sleep(30 * time.Hour) // nobody asks for it any more, and its token has expired
		calls, begin := len(r.asked(vault)), make(chan struct{})
		c = tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: w.AfterUptime(), Snapshot: &m, Begin: begin})
		defer func() { c.Close() }()
		time.Sleep(time.Hour)
		only(t, c)
		if err := c.Prefetch([]tokencache.Key{vault}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if n := len(r.asked(vault)); n != calls {
			t.Errorf("%d calls before it was to begin", n-calls)
		}
		close(begin)
		time.Sleep(time.Minute)
		if n := len(r.asked(vault)); n != calls+1 {
			t.Errorf("%d calls since, want 1", n-calls)
		}
		c.Close() // also one that never began
		c = tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: w.AfterUptime(), Begin: make(chan struct{})})
	})
}

// What is prefetched and was remembered is not fetched at once, what was not is; what no rule allows is dropped.
func TestRestoreUnderRules(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newSurvivor(simulator.Options{})
		defer func() { l.cache.Close() }()
		key := func(name string) tokencache.Key { return tokencache.Key{Resource: "api://" + name} }
		old, gone, fresh := key("old"), key("gone"), key("fresh")
		mustGet(t, l.cache, old, tokencache.Need{})
		mustGet(t, l.cache, gone, tokencache.Need{})
		l.restart(true)
		l.cache.Retain(func(key tokencache.Key) bool { return key != gone })
		if err := l.cache.Prefetch([]tokencache.Key{old, fresh}); err != nil {
			t.Fatal(err)
		}
		l.wait(time.Minute)
		if len(l.calls[old]) != 1 || len(l.calls[gone]) != 1 || len(l.calls[fresh]) != 1 {
			t.Errorf("calls: %v", l.calls)
		}
		if _, err := l.cache.Get(t.Context(), gone, tokencache.Need{}); err == nil {
			t.Error("what no rule allows was served")
		}
	})
}

// Of more keys than a cache holds, those asked for last stay.
func TestRestoreOfTooManyKeys(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newSurvivor(simulator.Options{})
		defer func() { l.cache.Close() }()
		mustGet(t, l.cache, vault, tokencache.Need{})
		l.keep(l.cache)
		one := l.memory.Keys[0]
		l.memory.Keys = nil
		for i := range tokencache.MaxKeys + 10 {
			one.Key.Resource = fmt.Sprint("api://", i)
			one.Asked = new(time.Duration(i)) // the first were asked for the longest ago
			l.memory.Keys = append(l.memory.Keys, one)
		}
		one.Key.Resource, one.Asked = "api://never", nil
		l.memory.Keys = append(l.memory.Keys, one, one)
		l.restart(false)
		var held []string
		for _, s := range l.cache.Status() {
			held = append(held, s.Key.Resource)
		}
		if len(held) != tokencache.MaxKeys || slices.Contains(held, "api://9") || !slices.Contains(held, "api://10") ||
			slices.Contains(held, "api://never") {
			t.Errorf("%d keys: %v", len(held), held)
		}
	})
}

// What was learnt of rollovers outlives a reboot, also for a key whose token has expired and which nobody asked for
// lately; a time that nobody can tell teaches nothing.
func TestRolloversAreRestored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newSurvivor(simulator.Options{Rollover: simulator.AtHalfLife})
		defer func() { l.cache.Close() }()
		for range 4 * 24 {
			mustGet(t, l.cache, vault, tokencache.Need{})
			l.wait(time.Hour)
		}
		before := only(t, l.cache)
		if before.Pattern.Kind != tokencache.Regular || before.Seen < 3 {
			t.Fatalf("nothing was learnt: %+v", before.Pattern)
		}
		l.reboot(true, 3*time.Hour, -30*year, false)
		if got := only(t, l.cache); got.Pattern != before.Pattern || got.Seen != before.Seen {
			t.Errorf("after a reboot: %+v of %d, it was %+v of %d", got.Pattern, got.Seen, before.Pattern, before.Seen)
		}
		l.fails(down)
		l.skip(23 * time.Hour)
		l.fails(nil)
		l.wait(time.Hour)
		mustGet(t, l.cache, vault, tokencache.Need{})
		if got := only(t, l.cache); got.Pattern.Kind != tokencache.Regular || got.Seen != before.Seen {
			t.Errorf("a time that nobody can tell has taught: %+v of %d", got.Pattern, got.Seen)
		}
		l.reboot(true, 60*time.Hour, 0, true)
		l.wait(time.Minute)
		mustGet(t, l.cache, vault, tokencache.Need{})
		if got := only(t, l.cache); got.Seen < before.Seen {
			t.Errorf("after days: %d rollovers, it were %d", got.Seen, before.Seen)
		}
	})
}

// A pause that the back end asked for, and a wish that it has met, are not forgotten by a restart.
func TestRestartCostsNoCall(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(t *testing.T, l *survivor){
		"in a pause": func(t *testing.T, l *survivor) {
			l.wait(only(t, l.cache).NextRefresh.Sub(l.now()) - 2*time.Minute)
			l.fails(&tokencache.FetchError{Kind: tokencache.Throttled, RetryAfter: 5 * time.Minute, Detail: "too many"})
			_, _ = l.cache.Refresh(t.Context(), tokencache.Key{Resource: "api://other"}, true)
			l.wait(3 * time.Minute) // the refresh is due, and waits for the end of the pause
		},
		"after a wish": func(t *testing.T, l *survivor) {
			l.wait(24*time.Hour - 4*time.Minute)
			mustGet(t, l.cache, vault, sdk)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				l := newSurvivor(simulator.Options{})
				defer func() { l.cache.Close() }()
				mustGet(t, l.cache, vault, tokencache.Need{})
				prepare(t, l)
				calls := l.total()
				for range 10 {
					l.restart(true)
					mustGet(t, l.cache, vault, sdk)
				}
				if extra := l.total() - calls; extra > 0 {
					t.Errorf("ten restarts cost %d calls", extra)
				}
			})
		})
	}
}
