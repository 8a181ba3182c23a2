package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// plain is a back end with one token for each resource, which lives for 24 hours. It was issued when that was first
// asked for, or when another client did. Its clock is right.
type plain struct {
	mu     sync.Mutex
	issued map[string]time.Time
	counts bool // it counts the life that a token has left
	static bool // and always says that this is 24 hours
}

func (p *plain) issue(resource string, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.issueLocked(resource, at)
}

func (p *plain) issueLocked(resource string, at time.Time) {
	if p.issued == nil {
		p.issued = make(map[string]time.Time)
	}
	p.issued[resource] = at.Truncate(time.Second)
}

func (p *plain) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	const life = 24 * time.Hour
	p.mu.Lock()
	defer p.mu.Unlock()
	if at, there := p.issued[key.Resource]; !there || !time.Now().Before(at.Add(life)) {
		p.issueLocked(key.Resource, time.Now())
	}
	at := p.issued[key.Resource]
	f := tokencache.Fetched{
		Token: tokencache.Token{
			Text: tokencache.NewSecret(fmt.Sprint(key.Resource, at.Unix())), ExpiresOn: at.Add(life),
			Claims: tokencache.Claims{IssuedAt: at.Add(-5 * time.Minute)},
		},
		Left: time.Until(at.Add(life)).Truncate(time.Second), Counted: p.counts,
	}
	if p.static {
		f.Left = life
	}
	return f, nil
}

// after is c's successor, by that clock and in that boot, which begins with what was kept.
func after(c *tokencache.Cache, fetch func(context.Context, tokencache.Key) (tokencache.Fetched, error),
	clock tokencache.Clock, boot string) *tokencache.Cache {
	m, record := c.Snapshot(), c.Record()
	c.Close()
	return tokencache.New(tokencache.Options{
		Fetch: fetch, Clock: clock, BootID: boot, Snapshot: &m, Record: record,
		On: tokencache.OnAtBoot(boot, clock.Boot(), m.Taken(), record.Instant),
	})
}

// mustBeWithheld checks that the vault's token is not handed out.
func mustBeWithheld(t *testing.T, c *tokencache.Cache) {
	t.Helper()
	if a, err := c.Get(t.Context(), vault, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
		t.Errorf("a token from before the revocation is served as %v, %v", a.Permissions.State, err)
	}
}

// A token that was received before a revocation and dropped, as its grant was taken away, is from before it when it
// comes again, also after a reboot, and whatever the clock said that counted as right.
func TestDroppedTokenComesAgain(t *testing.T) {
	t.Parallel()
	for _, reboot := range []bool{false, true} {
		t.Run(fmt.Sprint("reboot ", reboot), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, p := &tokencachetest.Clock{Trusted: true}, new(plain)
				c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
				defer func() { c.Close() }()
				mustGet(t, c, vault, sdk)
				time.Sleep(time.Minute)
				w.Set(20*time.Minute, true)
				note(t, c, "x", tokencache.Revoked, time.Time{})
				c.Retain(func(k tokencache.Key) bool { return k != vault })
				time.Sleep(time.Minute)
				if reboot {
					c = after(c, p.Fetch, w.AfterBoot(), "two")
				}
				c.Retain(func(tokencache.Key) bool { return true })
				time.Sleep(12 * time.Minute)
				mustBeWithheld(t, c)
			})
		})
	}
}

// A token that nothing dates is current by what its life may have been at most. It stays so over a restart.
func TestRestartKeepsWhatShowsATokenCurrent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, p := &tokencachetest.Clock{Trusted: true}, new(plain)
		clock := w.AfterBoot()
		c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: clock, BootID: "one"})
		defer func() { c.Close() }()
		w.Set(0, false)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		time.Sleep(23 * time.Hour)
		w.Set(0, true)
		if _, err := c.Get(t.Context(), vault, sdk); err != nil && !errors.As(err, new(*tokencache.WithheldError)) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Hour)
		w.Set(0, false)
		for _, want := range []bool{false, true} { // it comes again
			c.Retain(func(tokencache.Key) bool { return want })
		}
		mustGet(t, c, vault, sdk)
		c = after(c, p.Fetch, clock, "one")
		if got := mustGet(t, c, vault, sdk).Permissions.State; got != tokencache.Current {
			t.Errorf("after a restart it is %v", got)
		}
	})
}

// An upgrade from a release that had no on-time, in the same boot, withholds no token for a revocation that it had met,
// but until the back end has counted once, which is at once.
func TestUpgradeWithARevocationThatWasMet(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, p := new(tokencachetest.Clock), &plain{counts: true}
		clock := w.AfterBoot()
		c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: clock, BootID: "one"})
		defer func() { c.Close() }()
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Hour)
		noted := clock.Boot()
		note(t, c, "x", tokencache.Revoked, time.Time{})
		for range 40 {
			time.Sleep(time.Hour)
			_, _ = c.Get(t.Context(), vault, sdk)
		}
		mustGet(t, c, vault, sdk)
		m, r := c.Snapshot(), c.Record()
		c.Close()
		m.On, r.On = 0, 0
		for i := range m.Keys {
			k := &m.Keys[i]
			k.ReceivedOnTime, k.IssuedFrom, k.IssuedTo, k.Blind, k.Given = k.ReceivedBoot, 0, 0, false, 0
		}
		for i := range r.Changes {
			q := &r.Changes[i]
			q.Moment, q.By, q.Issuer, q.Vouched = noted, noted, tokencache.Window{}, false
		}
		m.Record = r
		c = tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: clock, BootID: "one", Snapshot: &m, Record: r,
			On: tokencache.OnAtBoot("one", clock.Boot(), m.Taken(), r.Instant)})
		time.Sleep(time.Minute)
		if got := mustGet(t, c, vault, sdk).Permissions.State; got != tokencache.Current {
			t.Errorf("a minute after the upgrade it is %v", got)
		}
	})
}

// A revocation is noted by a clock that counts as right and is behind, and the device boots before the back end's
// counting has shown it. A token from shortly before is withheld all the same; one that is issued when the change has
// spread is current.
func TestRevocationByAClockThatIsBehindBeforeAReboot(t *testing.T) {
	t.Parallel()
	for _, reboot := range []bool{false, true} {
		t.Run(fmt.Sprint("reboot ", reboot), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, p := &tokencachetest.Clock{Trusted: true, Behind: 20 * time.Minute}, &plain{counts: true}
				c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
				defer func() { c.Close() }()
				time.Sleep(time.Hour)
				p.issue(vault.Resource, time.Now().Add(-5*time.Minute))
				note(t, c, "x", tokencache.Revoked, time.Time{})
				time.Sleep(3 * time.Minute)
				w.Set(0, true)
				if reboot {
					c = after(c, p.Fetch, w.AfterBoot(), "two")
				}
				time.Sleep(2 * time.Minute)
				if a, err := c.Get(t.Context(), vault, sdk); err == nil {
					t.Errorf("a token from before the revocation is served as %v", a.Permissions.State)
				}
				p.issue(storage.Resource, time.Now().Add(12*time.Minute))
				time.Sleep(13 * time.Minute)
				if got := mustGet(t, c, storage, sdk).Permissions.State; got != tokencache.Current {
					t.Errorf("a token from after the spreading is %v", got)
				}
			})
		})
	}
}

// A number of seconds that comes with the same token again, hours later, counts nothing. From then on nothing that was
// received after a revocation is from after it by that number, in this boot or the next.
func TestStaticCountsAndARevocation(t *testing.T) {
	t.Parallel()
	for _, reboot := range []bool{false, true} {
		t.Run(fmt.Sprint("reboot ", reboot), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, p := new(tokencachetest.Clock), &plain{counts: true, static: true}
				c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
				defer func() { c.Close() }()
				mustGet(t, c, storage, sdk)
				p.issue(vault.Resource, time.Now().Add(3*time.Hour)) // by another client
				time.Sleep(13 * time.Hour)
				if _, err := c.Refresh(t.Context(), storage, true); err != nil {
					t.Fatal(err)
				}
				if c.ClockStatus().Counted {
					t.Error("it still counts")
				}
				if reboot {
					c = after(c, p.Fetch, w.AfterBoot(), "two")
				}
				note(t, c, "x", tokencache.Revoked, time.Time{})
				time.Sleep(11 * time.Minute)
				if a, err := c.Get(t.Context(), vault, sdk); err == nil {
					t.Errorf("a token from ten hours before the revocation is served as %v", a.Permissions.State)
				}
				time.Sleep(3 * time.Hour)
				mustBeWithheld(t, c)
			})
		})
	}
}

// What such numbers have shown before it is void: a token that passed as current is withheld.
func TestCurrentByAStaticCount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, p := new(tokencachetest.Clock), &plain{counts: true, static: true}
		c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterBoot(), BootID: "one"})
		defer c.Close()
		p.issue(vault.Resource, time.Now().Add(-10*time.Hour))
		note(t, c, "x", tokencache.Revoked, time.Time{})
		time.Sleep(11 * time.Minute)
		mustGet(t, c, vault, sdk) // nothing has shown it yet
		time.Sleep(2 * time.Hour)
		if _, err := c.Refresh(t.Context(), vault, true); err != nil {
			t.Fatal(err)
		}
		mustBeWithheld(t, c)
	})
}

// A back end that counts again is believed again: when four answers in a row have shown it, over six hours, and none
// that does not came in between, for whatever key. Until then its numbers show nothing.
func TestStaticCountsEnd(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		answers string // each from another hour on: c counts, s does not; a capital letter is for the other key
		every   time.Duration
		want    bool
	}{
		{"four, and the first that they are held against", "ccccc", 2 * time.Hour, true},
		{"three", "cccc", 2 * time.Hour, false},
		{"four in too short a time", "ccccc", 80 * time.Minute, false},
		{"more in that time", "cccccc", 80 * time.Minute, true},
		{"one that does not between", "cccsccc", 2 * time.Hour, false},
		{"one that does not between, for another key", "SccScSccc", time.Hour, false},
		{"four after one that does not", "csccccc", 2 * time.Hour, true},
		{"never", "sssssss", 2 * time.Hour, false},
		{"too close to tell", "cccccccccccc", 50 * time.Second, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, p := new(tokencachetest.Clock), &plain{counts: true, static: true}
				c := tokencache.New(tokencache.Options{Fetch: p.Fetch, Clock: w.AfterUptime(), BootID: "one"})
				defer func() { c.Close() }()
				refresh := func(key tokencache.Key) {
					if _, err := c.Refresh(t.Context(), key, true); err != nil {
						t.Fatal(err)
					}
				}
				p.issue(vault.Resource, time.Now())
				refresh(vault)
				time.Sleep(2 * time.Minute)
				refresh(vault) // the same number
				c = after(c, p.Fetch, w.AfterUptime(), "one")
				for i, answer := range row.answers {
					key := vault
					if answer == 'S' {
						key = storage
					}
					p.mu.Lock()
					p.static = answer != 'c'
					p.mu.Unlock()
					if c.ClockStatus().Counted {
						t.Errorf("believed after %d answers", i)
					}
					refresh(key)
					time.Sleep(row.every)
				}
				if got := c.ClockStatus().Counted; got != row.want {
					t.Errorf("believed %v", got)
				}
				if !row.want {
					return
				}
				// What was received before is not dated by it, and what comes now is.
				note(t, c, "x", tokencache.Revoked, time.Time{})
				time.Sleep(11 * time.Minute)
				mustBeWithheld(t, c)
				p.issue(vault.Resource, time.Now())
				refresh(vault)
				if got := mustGet(t, c, vault, sdk).Permissions.State; got != tokencache.Current {
					t.Errorf("a token from after the spreading is %v", got)
				}
			})
		})
	}
}
