package tokencache_test

import (
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

func TestDiffers(t *testing.T) {
	t.Parallel()
	p := func(oid, tid, client string) tokencache.Principal {
		return tokencache.Principal{ObjectID: oid, TenantID: tid, ClientID: client}
	}
	for _, row := range []struct {
		name string
		a, b tokencache.Principal
		want bool
	}{
		{"the same", p("o", "t", "c"), p("o", "t", "c"), false},
		{"in another case", p("00ab", "", ""), p("00AB", "", ""), false},
		{"another object", p("o", "t", "c"), p("x", "t", "c"), true},
		{"another tenant", p("o", "t", "c"), p("o", "x", "c"), true},
		{"another client of one object", p("o", "t", "c"), p("o", "t", "x"), false},
		{"another client, no object", p("", "t", "c"), p("", "t", "x"), true},
		{"another client, one object", p("o", "", "c"), p("", "", "x"), true},
		{"no claims", p("o", "t", "c"), p("", "", ""), false},
		{"no claims in common", p("o", "", ""), p("", "t", "c"), false},
		{"only the tenant in common", p("o", "t", ""), p("", "t", "c"), false},
	} {
		if got := row.a.Differs(row.b); got != row.want || row.b.Differs(row.a) != row.want {
			t.Errorf("%s: %v", row.name, got)
		}
	}
}

// registry is a back end that gives, for each key, the tokens of whom a test names.
type registry struct {
	mu     sync.Mutex
	answer func(tokencache.Key) tokencache.Fetched
	calls  map[tokencache.Key][]time.Time
	events []tokencache.Event
}

func (r *registry) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.calls == nil {
		r.calls = make(map[tokencache.Key][]time.Time)
	}
	r.calls[key] = append(r.calls[key], time.Now())
	return r.answer(key), nil
}

func (r *registry) gives(answer func(tokencache.Key) tokencache.Fetched) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = answer
}

// during has nothing be asked while change is made to what the answers are made of, or look taken at what was asked.
func (r *registry) during(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

// asked returns when that key was asked for.
func (r *registry) asked(key tokencache.Key) []time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls[key])
}

func (r *registry) observe(e tokencache.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// switches returns those that people were told of.
func (r *registry) switches() (all []tokencache.Switch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Switch != nil {
			all = append(all, *e.Switch)
		}
	}
	return all
}

// tokenOf is one of that object, issued then for 24 hours, as the back end gives it now.
func tokenOf(object string, key tokencache.Key, issued time.Time) tokencache.Fetched {
	issued = issued.Truncate(time.Second)
	expires := issued.Add(24 * time.Hour)
	return tokencache.Fetched{
		Token: tokencache.Token{
			Text: tokencache.NewSecret(fmt.Sprintf("canary|%s|%s|%s|%d", object, key.Selector.ID, key.Resource,
				issued.Unix())),
			ExpiresOn: expires,
			Claims:    tokencache.Claims{ObjectID: object, TenantID: "t", IssuedAt: issued.Add(-5 * time.Minute)},
		},
		Left: time.Until(expires), Counted: true, Nominal: 24*time.Hour + 5*time.Minute,
	}
}

// always gives the tokens of that object, issued then.
func always(object string, issued time.Time) func(tokencache.Key) tokencache.Fetched {
	return func(key tokencache.Key) tokencache.Fetched { return tokenOf(object, key, issued) }
}

// registered runs f with a cache on a registry.
func registered(t *testing.T, f func(t *testing.T, r *registry, c *tokencache.Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &registry{}
		c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Observe: r.observe, Roll: func() float64 { return 0.5 }})
		defer c.Close()
		f(t, r, c)
	})
}

func refreshed(t *testing.T, c *tokencache.Cache, key tokencache.Key, want tokencache.Outcome) {
	t.Helper()
	if got, err := c.Refresh(t.Context(), key, true); err != nil || got != want {
		t.Fatalf("refresh of %v: %v, %v, want %v", key, got, err, want)
	}
}

func holds(t *testing.T, c *tokencache.Cache, key tokencache.Key, object string) tokencache.Answer {
	t.Helper()
	got := mustGet(t, c, key, tokencache.Need{})
	if got.Token.Claims.ObjectID != object {
		t.Fatalf("%v has a token of %q, want %q", key, got.Token.Claims.ObjectID, object)
	}
	return got
}

var storage = tokencache.Key{Resource: "https://storage.azure.com"}

// A principal that was never seen replaces the one before at once, whatever the dates; the other keys of its selector
// are asked for within minutes, and no other selector's.
func TestAnotherPrincipalReplaces(t *testing.T) {
	t.Parallel()
	for name, issued := range map[string]time.Duration{"issued earlier": -5 * time.Hour, "issued later": time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
				other := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"},
					Resource: vault.Resource}
				began := time.Now()
				r.gives(always("a", began))
				for _, key := range []tokencache.Key{vault, storage, other} {
					holds(t, c, key, "a")
				}
				time.Sleep(2 * time.Hour)
				r.gives(always("b", began.Add(issued)))
				refreshed(t, c, vault, tokencache.Newer)
				holds(t, c, vault, "b")
				time.Sleep(5*time.Minute + time.Second)
				synctest.Wait()
				holds(t, c, storage, "b")
				if n := len(r.asked(other)); n != 1 {
					t.Errorf("%d calls for the key of another selector", n)
				}
				told := r.switches()
				if len(told) != 1 || told[0].From.ObjectID != "a" || told[0].To.ObjectID != "b" {
					t.Errorf("told of %+v", told)
				}
				if got := c.Principals(); len(got) != 2 || got[0].Current.ObjectID != "b" || len(got[0].Former) != 1 ||
					got[1].Current.ObjectID != "a" {
					t.Errorf("principals %+v", got)
				}
			})
		})
	}
}

// The other keys are confirmed spread over minutes, and not sooner than the calls' limits allow.
func TestConfirmationsAreSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &registry{}
		c := tokencache.New(tokencache.Options{Fetch: r.Fetch})
		defer c.Close()
		began := time.Now()
		r.gives(always("a", began))
		keys := []tokencache.Key{vault}
		for i := range 60 {
			keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)})
		}
		for _, key := range keys {
			holds(t, c, key, "a")
		}
		time.Sleep(time.Hour)
		r.gives(always("b", time.Now()))
		refreshed(t, c, vault, tokencache.Newer)
		time.Sleep(5*time.Minute + 15*time.Second)
		synctest.Wait()
		minutes := make(map[int]int)
		for _, key := range keys[1:] {
			holds(t, c, key, "b")
			asked := r.asked(key)
			if len(asked) != 2 {
				t.Fatalf("%d calls for %v", len(asked), key)
			}
			minutes[int(time.Since(asked[1])/time.Minute)]++
		}
		for minute, n := range minutes {
			if n > 30 {
				t.Errorf("%d of 60 in minute %d", n, minute)
			}
		}
	})
}

// A replica that lags goes on giving the former principal's tokens: they replace nothing, however they are dated,
// unless they were issued since the switch, or the back end insists on them.
func TestFormerPrincipal(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		after time.Duration // the switch; when the former principal's token was issued
		then  func(t *testing.T, r *registry, c *tokencache.Cache, former,
			current func(tokencache.Key) tokencache.Fetched)
	}{
		{"issued before the switch", -time.Minute,
			func(t *testing.T, r *registry, c *tokencache.Cache, former,
				current func(tokencache.Key) tokencache.Fetched) {
				refreshed(t, c, vault, tokencache.Former)
				time.Sleep(9 * time.Minute)
				refreshed(t, c, vault, tokencache.Former)
				holds(t, c, vault, "b")
			}},
		{"issued after the switch", 10 * time.Minute,
			func(t *testing.T, r *registry, c *tokencache.Cache, former,
				current func(tokencache.Key) tokencache.Fetched) {
				refreshed(t, c, vault, tokencache.Newer)
				holds(t, c, vault, "a")
			}},
		{"twice, ten minutes apart", -time.Minute,
			func(t *testing.T, r *registry, c *tokencache.Cache, former,
				current func(tokencache.Key) tokencache.Fetched) {
				refreshed(t, c, vault, tokencache.Former)
				holds(t, c, vault, "b")
				time.Sleep(10*time.Minute + time.Second) // the schedule asks by itself
				synctest.Wait()
				holds(t, c, vault, "a")
			}},
		{"twice, and the current one's in between", -time.Minute,
			func(t *testing.T, r *registry, c *tokencache.Cache, former,
				current func(tokencache.Key) tokencache.Fetched) {
				refreshed(t, c, vault, tokencache.Former)
				time.Sleep(5 * time.Minute)
				r.gives(current)
				refreshed(t, c, vault, tokencache.Unchanged)
				time.Sleep(6 * time.Minute)
				r.gives(former)
				refreshed(t, c, vault, tokencache.Former)
				holds(t, c, vault, "b")
			}},
		{"twice, and the current one's for another key in between", -time.Minute,
			func(t *testing.T, r *registry, c *tokencache.Cache, former,
				current func(tokencache.Key) tokencache.Fetched) {
				refreshed(t, c, vault, tokencache.Former)
				time.Sleep(5 * time.Minute)
				r.gives(current)
				refreshed(t, c, storage, tokencache.Unchanged)
				r.gives(former)
				time.Sleep(6 * time.Minute)
				refreshed(t, c, vault, tokencache.Former)
				holds(t, c, vault, "b")
			}},
		{"for a key that holds nothing", -time.Minute,
			func(t *testing.T, r *registry, c *tokencache.Cache, former,
				current func(tokencache.Key) tokencache.Fetched) {
				key := tokencache.Key{Resource: "api://third"}
				r.gives(func(k tokencache.Key) tokencache.Fetched {
					if k == key {
						return former(k)
					}
					return current(k)
				})
				holds(t, c, key, "a") // better than nothing
				for _, s := range c.Status() {
					if s.Former != (s.Key == key) {
						t.Errorf("%v: former %v", s.Key, s.Former)
					}
				}
				time.Sleep(time.Hour)
				holds(t, c, vault, "b") // and no switch
				r.gives(current)
				time.Sleep(70 * time.Minute) // it is asked for once an hour
				synctest.Wait()
				holds(t, c, key, "b")
			}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
				began := time.Now()
				r.gives(always("a", began))
				holds(t, c, vault, "a")
				holds(t, c, storage, "a")
				time.Sleep(time.Hour)
				current := always("b", began) // issued before what was held
				r.gives(current)
				refreshed(t, c, vault, tokencache.Newer)
				refreshed(t, c, storage, tokencache.Newer)
				former := always("a", time.Now().Add(row.after))
				time.Sleep(20 * time.Minute)
				r.gives(former)
				row.then(t, r, c, former, current)
			})
		})
	}
}

// A life that is not counted tells the issue only by a wall clock that is known to be right.
func TestFormerPrincipalWithoutAClock(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		counted, known bool
		want           tokencache.Outcome
	}{{true, false, tokencache.Newer}, {false, true, tokencache.Newer}, {false, false, tokencache.Former}} {
		t.Run(fmt.Sprintf("counted %v, known %v", row.counted, row.known), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r, w := &registry{}, &tokencachetest.Clock{Trusted: row.known}
				c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: w.AfterUptime()})
				defer c.Close()
				for _, object := range []string{"a", "b"} {
					r.gives(always(object, time.Now()))
					refreshed(t, c, vault, tokencache.Newer)
					time.Sleep(time.Hour)
				}
				r.gives(func(key tokencache.Key) tokencache.Fetched {
					f := tokenOf("a", key, time.Now())
					f.Counted = row.counted
					return f
				})
				refreshed(t, c, vault, row.want)
			})
		})
	}
}

// A token from before the switch, whose life the back end counts wrongly, is known to be no new one.
func TestFormerTokenIsNotIssuedAnew(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		static := func(object string) func(tokencache.Key) tokencache.Fetched {
			return func(key tokencache.Key) tokencache.Fetched {
				f := tokenOf(object, key, began)
				f.Left = 24 * time.Hour
				return f
			}
		}
		r.gives(static("a"))
		holds(t, c, vault, "a")
		time.Sleep(time.Hour)
		r.gives(always("b", began))
		refreshed(t, c, vault, tokencache.Newer)
		time.Sleep(time.Hour)
		r.gives(static("a"))
		refreshed(t, c, vault, tokencache.Former)
	})
}

// A missing claim is no other principal: the dates decide as ever.
func TestMissingClaimsAreNoSwitch(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		opaque := func(key tokencache.Key) tokencache.Fetched {
			f := tokenOf("", key, began.Add(-time.Hour))
			f.Token.Claims.TenantID = ""
			return f
		}
		r.gives(always("a", began))
		holds(t, c, vault, "a")
		r.gives(opaque)
		refreshed(t, c, vault, tokencache.Older)
		time.Sleep(time.Hour)
		r.gives(always("a", time.Now()))
		refreshed(t, c, vault, tokencache.Newer)
		if told := r.switches(); len(told) != 0 {
			t.Errorf("told of %+v", told)
		}
	})
}

// What was learnt of the rollovers was of another principal's tokens; a policy change stays in force and judges the
// token by its issue.
func TestSwitchKeepsPolicyChanges(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		for range 5 { // rollovers are seen
			r.gives(always("a", time.Now()))
			refreshed(t, c, vault, tokencache.Newer)
			time.Sleep(time.Hour)
		}
		if only(t, c).Seen == 0 {
			t.Fatal("no rollover was seen")
		}
		issued := time.Now()
		time.Sleep(time.Hour)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		r.gives(always("b", issued))
		refreshed(t, c, vault, tokencache.Newer)
		got := only(t, c)
		if got.Seen != 0 || got.Before != nil {
			t.Errorf("%d rollovers are known of the new principal, before %v", got.Seen, got.Before)
		}
		if !got.Permissions.Withheld {
			t.Errorf("its token, issued before the revocation, is %+v", got.Permissions)
		}
		if n := len(c.Snapshot().Rollovers); n != 0 {
			t.Errorf("%d rollovers of the key are kept", n)
		}
	})
}

// People are told of a switch at most once an hour, and then how often it was besides.
func TestSwitchesAreToldOnceAnHour(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		for i := range 8 {
			r.gives(always(fmt.Sprint("p", i), began))
			refreshed(t, c, vault, tokencache.Newer)
			time.Sleep(20 * time.Minute)
		}
		told := r.switches()
		if len(told) != 3 || told[0].Untold != 0 || told[1].Untold != 2 || told[2].Untold != 2 {
			t.Errorf("told of %+v", told)
		}
	})
}

// A restart forgets neither whom tokens speak for, nor who did before, nor that people were told.
func TestPrincipalsOutliveARestart(t *testing.T) {
	t.Parallel()
	for _, boot := range []string{"one", "another"} {
		t.Run(boot, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &registry{}
				clock := tokencache.Clock{}.OrRuntime()
				c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: clock, BootID: "one"})
				began := time.Now()
				for _, object := range []string{"a", "b"} {
					r.gives(always(object, began))
					refreshed(t, c, vault, tokencache.Newer)
					time.Sleep(time.Minute)
				}
				kept := c.Snapshot()
				c.Close()
				if boot != "one" {
					clock = tokencache.Clock{}.OrRuntime()
				}
				c = tokencache.New(tokencache.Options{Fetch: r.Fetch, Observe: r.observe, Clock: clock, BootID: boot,
					Snapshot: &kept})
				defer c.Close()
				holds(t, c, vault, "b")
				if got := c.Principals(); len(got) != 1 || got[0].Current.ObjectID != "b" || len(got[0].Former) != 1 ||
					got[0].Since == nil {
					t.Errorf("principals %+v", got)
				}
				r.gives(always("a", began.Add(30*time.Second))) // before the switch
				refreshed(t, c, vault, tokencache.Former)
				time.Sleep(time.Minute)
				r.gives(always("c", began))
				refreshed(t, c, vault, tokencache.Newer)
				if n := len(r.switches()); n != 0 {
					t.Errorf("told of %d switches, within an hour of the last", n)
				}
			})
		})
	}
}

// A daemon that crashes every few minutes, or a device that boots as often, takes a former principal back when the back
// end insists, no sooner than ten minutes after the first answer; puts that to the test as one that stays up does; and
// tells once an hour.
func TestFormerPrincipalThroughRestarts(t *testing.T) {
	t.Parallel()
	for _, reboots := range []bool{false, true} {
		t.Run(fmt.Sprintf("reboots %v", reboots), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &registry{}
				clock, boots := tokencache.Clock{}.OrRuntime(), 0
				c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Observe: r.observe, Clock: clock,
					BootID: "boot 0"})
				defer func() { c.Close() }()
				// crash is after a while, and there is no word of it.
				crash := func(after time.Duration) {
					time.Sleep(after)
					kept := c.Snapshot()
					c.Close()
					if reboots {
						clock, boots = tokencache.Clock{}.OrRuntime(), boots+1
					}
					id := fmt.Sprint("boot ", boots)
					c = tokencache.New(tokencache.Options{
						Fetch: r.Fetch, Observe: r.observe, Clock: clock, BootID: id, Snapshot: &kept,
						On: tokencache.OnAtBoot(id, clock.Boot(), kept.Taken()),
					})
				}
				began := time.Now()
				former, current := always("a", began.Add(-time.Hour)), always("b", began)
				r.gives(former)
				refreshed(t, c, vault, tokencache.Newer)
				time.Sleep(time.Minute)
				r.gives(current)
				refreshed(t, c, vault, tokencache.Newer) // the switch
				time.Sleep(20 * time.Minute)
				r.gives(former)
				for range 3 {
					refreshed(t, c, vault, tokencache.Former)
					holds(t, c, vault, "b")
					crash(3 * time.Minute)
				}
				time.Sleep(time.Minute + time.Second)
				_, _ = c.Refresh(t.Context(), vault, true)
				holds(t, c, vault, "a")

				r.gives(current) // it was a replica
				for range 26 {
					crash(3 * time.Minute)
				}
				holds(t, c, vault, "b")
				if told := r.switches(); len(told) > 2 {
					t.Errorf("told %d times: %+v", len(told), told)
				}
			})
		})
	}
}

// A memory from before principals were kept tells them by its tokens.
func TestPrincipalsOfAnOldSnapshot(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		r.gives(always("a", time.Now()))
		holds(t, c, vault, "a")
		time.Sleep(time.Minute)
		kept := c.Snapshot()
		kept.Principals = nil
		late := kept.Keys[0]
		late.Key, late.ReceivedBoot, late.Claims.ObjectID = storage, late.ReceivedBoot+time.Second, "b"
		late.Token.Claims.ObjectID = "b"
		kept.Keys = append([]tokencache.SnapshotEntry{late}, kept.Keys...)
		next := tokencache.New(tokencache.Options{Fetch: r.Fetch, Snapshot: &kept})
		defer next.Close()
		if got := next.Principals(); len(got) != 1 || got[0].Current.ObjectID != "b" || len(got[0].Former) != 1 ||
			got[0].Former[0].ObjectID != "a" {
			t.Errorf("principals %+v", got)
		}
	})
}

// However many selectors and principals there were, what is remembered of them is bounded.
func TestPrincipalsAreBounded(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		for i := range 2 * tokencache.MaxKeys {
			key := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: fmt.Sprint(i)},
				Resource: "api://x"}
			r.gives(always("a", began))
			holds(t, c, key, "a")
			time.Sleep(time.Second)
		}
		for i := range 40 {
			r.gives(always(fmt.Sprint("p", i), began))
			refreshed(t, c, vault, tokencache.Newer)
			time.Sleep(time.Second)
		}
		m := c.Snapshot()
		if n := len(m.Principals); n != tokencache.MaxKeys {
			t.Errorf("%d selectors", n)
		}
		for _, p := range m.Principals {
			if len(p.Former) > 8 {
				t.Errorf("%d former principals", len(p.Former))
			}
		}
		if n := len(m.Tombstones); n > 2*tokencache.MaxKeys {
			t.Errorf("%d bygones", n)
		}
	})
}

func TestOddTokensAreTold(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			f := tokenOf("a", vault, began) // the same for all
			f.Token.Claims.Audience = "https://one"
			return f
		})
		holds(t, c, vault, "a")
		holds(t, c, storage, "a")
		time.Sleep(time.Hour)
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			f := tokenOf("a", key, time.Now())
			f.Token.Claims.Audience = "https://two"
			return f
		})
		refreshed(t, c, vault, tokencache.Newer)
		time.Sleep(time.Minute)
		refreshed(t, c, vault, tokencache.Newer)
		var twins, audiences int
		synctest.Wait()
		r.during(func() {
			for _, e := range r.events {
				if e.Twin != nil && *e.Twin == vault && e.Key == storage {
					twins++
				}
				if e.AudienceBefore == "https://one" && e.Audience != "" && e.Audience != e.AudienceBefore {
					audiences++
				}
			}
		})
		if twins != 1 || audiences != 1 {
			t.Errorf("told %d times of one token for two keys, %d times of another audience", twins, audiences)
		}
	})
}

// In a world of replicas that lag for up to half an hour the tokens are the new principal's soon after every switch,
// and then stay so; and calls are bounded.
func TestRandomSwitches(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.IntRange(0, 1<<30), 40, 120).Draw(rt, "steps")
		var failed string
		t.Run("", func(t *testing.T) {
			registered(t, func(t *testing.T, r *registry,
				c *tokencache.Cache) {
				failed = randomSwitches(t, r, c, steps)
			})
		})
		if failed != "" {
			rt.Fatal(failed)
		}
	})
}

// randomSwitches plays steps, and returns what went wrong, or "".
func randomSwitches(t *testing.T, r *registry, c *tokencache.Cache, steps []int) string {
	keys := []tokencache.Key{vault, storage, {Resource: "api://third"}}
	const lag = 30 * time.Minute
	type reign struct {
		object      string
		from, known time.Time // known: to the daemon; zero: not yet
	}
	reigns := []reign{{"p0", time.Now(), time.Now()}}
	issued := make(map[string]time.Time) // by principal and key: replicas keep what they issued
	r.gives(func(key tokencache.Key) tokencache.Fetched {
		answers := fnv.New32() // which replica does: not by the order of calls
		fmt.Fprint(answers, time.Now().UnixNano(), key)
		who := reigns[len(reigns)-1]
		if len(reigns) > 1 && time.Since(who.from) < lag && answers.Sum32()%3 == 0 {
			who = reigns[len(reigns)-2] // the replica has not heard of it
		}
		id := who.object + key.Resource
		if on, there := issued[id]; !there || time.Since(on) > 22*time.Hour {
			issued[id] = time.Now()
			if last := reigns[len(reigns)-1]; who.object != last.object {
				issued[id] = last.from.Add(-time.Minute) // a replica that lags has what was issued before
			}
		}
		return tokenOf(who.object, key, issued[id])
	})
	for i, step := range steps {
		key := keys[step%len(keys)]
		switch action := step / 8 % 6; action {
		case 0:
			if last := reigns[len(reigns)-1]; !last.known.IsZero() && time.Since(last.from) > 2*lag {
				r.during(func() {
					reigns = append(reigns,
						reign{object: fmt.Sprint("p", len(reigns)), from: time.Now()})
				})
			}
		case 1:
			_, _ = c.Refresh(t.Context(), key, true)
		default:
			time.Sleep(time.Duration(step/64%90) * time.Minute)
		}
		synctest.Wait()
		got, err := c.Get(t.Context(), key, tokencache.Need{})
		if err != nil {
			return fmt.Sprintf("step %d: %v", i, err)
		}
		now := &reigns[len(reigns)-1]
		if now.known.IsZero() && slices.ContainsFunc(c.Principals(),
			func(p tokencache.Principals) bool { return p.Current.ObjectID == now.object }) {
			r.during(func() { now.known = time.Now() })
		}
		// Replicas that lag may have brought the one before back: that is put to the test an hour later.
		const takes = 2*time.Hour + 30*time.Minute
		settled := !now.known.IsZero() && time.Since(now.from) > lag+takes && time.Since(now.known) > takes
		if object := got.Token.Claims.ObjectID; settled && object != now.object {
			return fmt.Sprintf("step %d: %v has a token of %s, %v after the switch to %s", i, key, object,
				time.Since(now.from), now.object)
		}
	}
	// Replicas that lag may bring one back, and it goes again.
	if told := r.switches(); len(told) > 3*(len(reigns)-1) {
		return fmt.Sprintf("told of %d switches, and there were %d", len(told), len(reigns)-1)
	}
	if strings.Contains(fmt.Sprint(c.Status(), c.Principals()), "canary") {
		return "token text is told"
	}
	return ""
}

// A token of a former principal is asked for anew once an hour, also after a restart, and when what is on record
// changes after that.
func TestSearchForThePresentPrincipalOutlivesARestart(t *testing.T) {
	t.Parallel()
	for _, note := range []bool{false, true} {
		t.Run(fmt.Sprintf("noted and withdrawn %v", note), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &registry{}
				options := tokencache.Options{Fetch: r.Fetch, Clock: tokencache.Clock{}.OrRuntime(), BootID: "one"}
				c := tokencache.New(options)
				began := time.Now()
				former, current := always("a", began.Add(-time.Hour)), always("b", began)
				r.gives(former)
				refreshed(t, c, vault, tokencache.Newer)
				time.Sleep(time.Minute)
				r.gives(current)
				refreshed(t, c, vault, tokencache.Newer) // the switch
				key := tokencache.Key{Resource: "api://third"}
				r.gives(former)
				holds(t, c, key, "a") // better than nothing
				kept := c.Snapshot()
				c.Close()
				options.Snapshot = &kept
				c = tokencache.New(options)
				defer c.Close()
				if note {
					notedAndWithdrawn(t, c)
				}
				r.gives(current)
				time.Sleep(67 * time.Minute)
				synctest.Wait()
				holds(t, c, key, "b")
			})
		})
	}
}

// The one call that confirms a token after a boot is made though the daemon is restarted meanwhile, and what is on
// record changes.
func TestConfirmationAfterABootOutlivesARestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &registry{}
		r.gives(always("a", time.Now()))
		c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: tokencache.Clock{}.OrRuntime(), BootID: "one"})
		time.Sleep(time.Minute)
		holds(t, c, vault, "a")
		clock := tokencache.Clock{}.OrRuntime()
		for range 3 {
			kept := c.Snapshot()
			c.Close()
			time.Sleep(time.Second)
			c = tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: clock, BootID: "two", Snapshot: &kept})
			notedAndWithdrawn(t, c)
		}
		r.gives(always("b", time.Now()))
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		holds(t, c, vault, "b")
		kept := c.Snapshot()
		c.Close()
		before := len(r.asked(vault))
		c = tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: clock, BootID: "two", Snapshot: &kept})
		defer c.Close()
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		if n := len(r.asked(vault)) - before; n != 0 {
			t.Errorf("%d calls after a restart: it was confirmed in this boot", n)
		}
	})
}

// notedAndWithdrawn has every key's next fetch planned anew.
func notedAndWithdrawn(t *testing.T, c *tokencache.Cache) {
	t.Helper()
	note(t, c, "x", tokencache.Granted, time.Time{})
	if _, there := c.Withdraw("x"); !there {
		t.Fatal("it is not on record")
	}
}

// simulatedOf is what a simulated back end gives, which says of itself that it is one.
func simulatedOf(object string, issued time.Time) func(tokencache.Key) tokencache.Fetched {
	return func(key tokencache.Key) tokencache.Fetched {
		f := tokenOf(object, key, issued)
		f.Token.Text = tokencache.NewSecret(fmt.Sprintf("simulated|%s|%s|%d", object, key.Resource, issued.Unix()))
		f.Token.Claims.Issuer = "https://sts.simulated.invalid/t/"
		return f
	}
}

// What a simulated back end gave goes when a real one answers, for whichever key, however the two are dated and
// whatever they say of themselves; and nothing of it is remembered.
func TestRealTokensReplaceSimulatedOnes(t *testing.T) {
	t.Parallel()
	for _, object := range []string{"a", "simulator", ""} {
		t.Run("object "+object, func(t *testing.T) {
			t.Parallel()
			registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
				other := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"},
					Resource: vault.Resource}
				began := time.Now()
				r.gives(simulatedOf("simulator", began))
				for _, key := range []tokencache.Key{vault, storage, other} {
					holds(t, c, key, "simulator")
				}
				time.Sleep(time.Hour)
				note(t, c, "x", tokencache.Granted, time.Time{}) // which spreads
				r.gives(always(object, began.Add(-10*time.Hour)))
				refreshed(t, c, vault, tokencache.Newer)
				time.Sleep(20 * time.Second) // calls have their limits
				synctest.Wait()
				for _, key := range []tokencache.Key{vault, storage, other} {
					if got := holds(t, c, key, object); got.Token.Claims.Simulated() {
						t.Errorf("%v is simulated", key)
					}
				}
				for _, s := range c.Status() {
					if s.Former || s.Fetches > 2 {
						t.Errorf("%v: former %v, %d calls", s.Key, s.Former, s.Fetches)
					}
				}
				for _, p := range c.Principals() {
					if p.Current.Simulated || p.Current.ObjectID != object || len(p.Former) != 0 || p.Since != nil {
						t.Errorf("%+v", p)
					}
				}
				if told := r.switches(); len(told) != 0 {
					t.Errorf("told of %+v", told)
				}
			})
		})
	}
}

// A simulated token takes the place of no real one, and makes nobody a former principal. A key that holds nothing takes
// it, and is asked for anew once an hour.
func TestSimulatedTokensReplaceNoRealOnes(t *testing.T) {
	t.Parallel()
	for _, object := range []string{"a", "simulator", ""} {
		t.Run("object "+object, func(t *testing.T) {
			t.Parallel()
			registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
				began := time.Now()
				r.gives(always(object, began))
				holds(t, c, vault, object)
				before := c.Principals()
				time.Sleep(time.Hour)
				r.gives(simulatedOf("simulator", time.Now()))
				for range 3 { // it may insist
					refreshed(t, c, vault, tokencache.Simulated)
					time.Sleep(20 * time.Minute)
				}
				if got := holds(t, c, vault, object); got.Token.Claims.Simulated() {
					t.Error("it is simulated")
				}
				if now := c.Principals(); fmt.Sprint(now) != fmt.Sprint(before) || len(r.switches()) != 0 {
					t.Errorf("principals %+v, told of %+v", now, r.switches())
				}
				if object == "" {
					return // nobody is known to be the principal
				}
				refreshed(t, c, storage, tokencache.Simulated)
				holds(t, c, storage, "simulator")
				refreshed(t, c, storage, tokencache.Unchanged)
				for _, s := range c.Status() {
					if s.Former {
						t.Errorf("%v is called a former principal's", s.Key)
					}
				}
				r.gives(always(object, began))
				time.Sleep(67 * time.Minute)
				synctest.Wait()
				if got := holds(t, c, storage, object); got.Token.Claims.Simulated() {
					t.Error("it is simulated")
				}
			})
		})
	}
}

// Without what was simulated a memory tells of the real tokens alone.
func TestWithoutSimulated(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		other := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"},
			Resource: vault.Resource}
		began := time.Now()
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			if key == other {
				return always("a", began)(key)
			}
			return simulatedOf("simulator", time.Now())(key)
		})
		for range 2 { // so that there are rollovers
			for _, key := range []tokencache.Key{vault, other} {
				if _, err := c.Refresh(t.Context(), key, true); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Hour)
		}
		kept := c.Snapshot()
		left, dropped := kept.WithoutSimulated()
		if dropped != 1 || len(left.Keys) != 1 || left.Keys[0].Key != other || len(left.Principals) != 1 ||
			left.Principals[0].Selector != other.Selector || len(left.Rollovers) != 0 {
			t.Errorf("dropped %d, left %+v", dropped, left)
		}
		if len(kept.Keys) != 2 || len(kept.Principals) != 2 || len(kept.Rollovers) == 0 {
			t.Errorf("what was kept has become %+v", kept)
		}
	})
}

// A token of a former principal that is taken for want of another is called so, and not a newer one.
func TestForgottenForAFormerPrincipal(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		for _, object := range []string{"a", "b"} {
			r.gives(always(object, began))
			refreshed(t, c, vault, tokencache.Newer)
			time.Sleep(time.Minute)
		}
		r.gives(always("a", began))
		forgotten(t, c, vault, tokencache.Former)
		holds(t, c, vault, "a")
	})
}

// A back end that gives each token for a new principal is asked no more than a few times an hour for a key, and people
// are told once an hour.
func TestEndlessSwitchesAreBounded(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		n := 0
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			n++
			return tokenOf(fmt.Sprint("p", n), key, time.Now())
		})
		var keys []tokencache.Key
		for i := range 20 {
			keys = append(keys, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)})
			mustGet(t, c, keys[i], tokencache.Need{})
		}
		time.Sleep(20 * time.Hour)
		synctest.Wait()
		for _, key := range keys {
			if n := len(r.asked(key)); n > 3*20 {
				t.Errorf("%d calls for %v", n, key)
			}
		}
		if told := len(r.switches()); told > 21 {
			t.Errorf("told of %d switches", told)
		}
	})
}
