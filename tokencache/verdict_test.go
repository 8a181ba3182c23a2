package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

const jitter = tokencache.DefaultPropagationDelay

// note puts a change for all identities and resources on record.
func note(t *testing.T, c *tokencache.Cache, id string, effect tokencache.Effect,
	at time.Time) tokencache.PolicyChange {
	t.Helper()
	p, err := c.RecordChange(tokencache.PolicyChange{ID: id, AllIdentities: true, At: at, Effect: effect})
	if err != nil {
		t.Fatal(err)
	}
	return p.PolicyChange
}

func policyState(t *testing.T, c *tokencache.Cache) tokencache.PermissionState {
	t.Helper()
	return mustGet(t, c, vault, sdk).Permissions.State
}

// Whether a token carries a change follows from when it was issued, as far as it shows that.
func TestVerdictByIssueTime(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		dated bool          // the token has an iat, five minutes before it was issued
		life  time.Duration // from iat or issue to expiry
		at    time.Duration // of the change, from the issue
		want  tokencache.PermissionState
	}{
		{"issued before", true, 24 * time.Hour, time.Minute, tokencache.Stale},
		{"issued at the same moment", true, 24 * time.Hour, 0, tokencache.Uncertain},
		{"issued while it spread", true, 24 * time.Hour, -5 * time.Minute, tokencache.Uncertain},
		{"issued just before the spreading was over", true, 24 * time.Hour, -jitter, tokencache.Uncertain},
		{"issued after the spreading", true, 24 * time.Hour, -jitter - 5*time.Second, tokencache.Current},
		{"a life of 28 hours", true, 28 * time.Hour, -jitter - 5*time.Second, tokencache.Current},
		{"an odd life: maybe not dated back", true, 24*time.Hour + 17*time.Minute, -jitter - 5*time.Second,
			tokencache.Uncertain},
		{"an odd life: dated after the spreading in any case", true, 24*time.Hour + 17*time.Minute,
			-jitter - 6*time.Minute, tokencache.Current},
		{"an odd life: issued before in any case", true, 24*time.Hour + 17*time.Minute, time.Minute, tokencache.Stale},
		{"opaque: received before", false, 24 * time.Hour, time.Minute, tokencache.Stale},
		{"opaque: perhaps a token of 28 hours from before", false, 24 * time.Hour, -4 * time.Hour,
			tokencache.Uncertain},
		{"opaque: younger than any life allows otherwise", false, 24 * time.Hour, -5 * time.Hour, tokencache.Current},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := &tokencachetest.Source{Life: row.life}
			if row.dated {
				s.Edit = func(f *tokencache.Fetched) {
					f.Token.Claims.IssuedAt = f.Token.ExpiresOn.Add(-row.life - 5*time.Minute)
				}
			}
			synctest.Test(t, func(t *testing.T) {
				c := tokencache.New(tokencache.Options{Fetch: s.Fetch,
					Clock: (&tokencachetest.Clock{Trusted: true}).AfterUptime()})
				defer c.Close()
				mustGet(t, c, vault, sdk)
				issued := time.Now().Round(0)
				time.Sleep(max(0, row.at) + time.Second)
				note(t, c, "x", tokencache.Changed, issued.Add(row.at))
				if got := policyState(t, c); got != row.want {
					t.Errorf("%v, want %v", got, row.want)
				}
			})
		})
	}
}

// permissions changes what new tokens of d carry.
func (d *device) permit(t *testing.T, role string) {
	t.Helper()
	if _, err := d.backend.ChangePermissions("device", simulator.Permissions{Roles: []string{role}}); err != nil {
		t.Fatal(err)
	}
}

// has reports whether an answer's token carries the role.
func has(a tokencache.Answer, role string) bool { return slices.Contains(a.Token.Claims.Roles, role) }

// A stale token is served, labelled, until the first current one is there, a moment after the rollover.
func TestChangedServesAndProbes(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife, PropagationDelay: 8 * time.Minute},
		func(t *testing.T, d *device, c *tokencache.Cache) {
			serveThrough(t, c, 30*time.Hour, time.Minute) // two rollovers
			next, _ := d.backend.RolloverAt(simulator.Selection{}, vault.Resource)
			serveThrough(t, c, time.Until(next)+time.Hour, time.Minute)
			d.permit(t, "New")
			changed := time.Now()
			note(t, c, "x", tokencache.Granted, time.Time{})
			answer := mustGet(t, c, vault, sdk)
			p := answer.Permissions
			if p.State != tokencache.Stale || !p.Changed.Equal(changed) || p.Withheld || has(answer, "New") {
				t.Fatalf("right after the change: %+v", p)
			}
			rolls, _ := d.backend.RolloverAt(simulator.Selection{}, vault.Resource)
			if early := rolls.Sub(p.Likely).Abs(); early > time.Minute {
				t.Errorf("expected on %v, the rollover is on %v", p.Likely, rolls)
			}
			before := d.count()
			time.Sleep(time.Until(rolls) - time.Second)
			if got := policyState(t, c); got != tokencache.Stale {
				t.Errorf("just before the rollover: %v", got)
			}
			time.Sleep(time.Minute)
			if answer := mustGet(t, c, vault,
				sdk); answer.Permissions != (tokencache.Permissions{State: tokencache.Current}) || !has(answer, "New") {
				t.Errorf("a minute after the rollover: %+v, %v", answer.Permissions, answer.Token.Claims.Roles)
			}
			t.Logf("%d calls in %v", d.count()-before, time.Since(changed))
			if got := c.Changes(); len(got) != 1 || got[0].Touched != 1 || got[0].Waiting != 0 {
				t.Errorf("on record: %+v", got)
			}
			if got := only(t, c).Ended; got.State != tokencache.Stale || !got.From.Equal(changed) ||
				got.To.Sub(rolls).Abs() > time.Minute || got.Withheld {
				t.Errorf("it was stale until %v: %+v", rolls, got)
			}
			if got := only(t, c); got.Before == nil || slices.Contains(got.Before.Roles, "New") ||
				!slices.Contains(got.Claims.Roles, "New") {
				t.Errorf("evidence: before %+v, after %+v", got.Before, got.Claims)
			}
		})
}

// While a change spreads, the back end is left alone: whoever asked it just when its token had rolled
// over would get one without the change, for a day.
func TestNothingIsFetchedWhileAChangeSpreads(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife, PropagationDelay: 8 * time.Minute},
		func(t *testing.T, d *device, c *tokencache.Cache) {
			mustGet(t, c, vault, sdk)
			time.Sleep(11 * time.Hour)
			rolls, _ := d.backend.RolloverAt(simulator.Selection{}, vault.Resource)
			time.Sleep(time.Until(rolls) - time.Minute)
			d.permit(t, "New")
			note(t, c, "x", tokencache.Changed, time.Time{})
			before := d.count()
			synctest.Wait()
			if until := only(t, c).HeldUntil; time.Until(until) < jitter || time.Until(until) > jitter+time.Minute {
				t.Errorf("held for %v", time.Until(until))
			}
			var held *tokencache.PostponedError
			if _, err := c.Refresh(t.Context(), vault, false); !errors.As(err, &held) || held.For < jitter ||
				held.Error() == "" {
				t.Errorf("a refresh: %v", err)
			}
			if _, err := c.Get(t.Context(), vault,
				tokencache.Need{IssuedAfter: time.Now()}); !errors.As(err, new(*tokencache.NotYetError)) {
				t.Errorf("a caller who wants a younger token: %v", err)
			}
			mustGet(t, c, vault, tokencache.Need{MinTTL: 23 * time.Hour}) // a soft wish
			time.Sleep(jitter)
			if d.count() != before {
				t.Fatalf("%d calls while the change was spreading", d.count()-before)
			}
			time.Sleep(10 * time.Second)
			if answer := mustGet(t, c, vault, sdk); !has(answer, "New") ||
				answer.Permissions.State != tokencache.Current {
				t.Errorf("after the spreading: %v, %v", answer.Token.Claims.Roles, answer.Permissions.State)
			}
		})
}

// Nor is a call that failed just before tried again.
func TestNoTryAgainWhileAChangeSpreads(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		d.set(down)
		time.Sleep(14 * time.Hour)
		note(t, c, "x", tokencache.Changed, time.Time{})
		before := d.count()
		time.Sleep(jitter)
		if spent := d.count() - before; spent != 0 {
			t.Errorf("%d calls while the change was spreading", spent)
		}
		d.set(nil)
		time.Sleep(10 * time.Second)
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("after the spreading: %v", got)
		}
	})
}

func TestRefreshInsists(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		note(t, c, "x", tokencache.Changed, time.Time{})
		if outcome, err := c.Refresh(t.Context(), vault, true); err != nil || outcome != tokencache.Newer ||
			s.Count() != 2 {
			t.Errorf("%v, %v, %d calls", outcome, err, s.Count())
		}
	})
}

// A token that expires while a change spreads is fetched all the same.
func TestExpiryWhileAChangeSpreads(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{PropagationDelay: 8 * time.Minute}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(24*time.Hour - 3*time.Minute)
		d.permit(t, "New")
		note(t, c, "x", tokencache.Changed, time.Time{})
		serveThrough(t, c, 5*time.Minute, time.Second)
		if answer := mustGet(t, c, vault, sdk); has(answer, "New") || answer.Permissions.State != tokencache.Uncertain {
			t.Errorf("%v, %v", answer.Token.Claims.Roles, answer.Permissions.State)
		}
		serveThrough(t, c, 24*time.Hour, time.Minute)
		if answer := mustGet(t, c, vault, sdk); !has(answer, "New") || answer.Permissions.State != tokencache.Current {
			t.Errorf("a day later: %v, %v", answer.Token.Claims.Roles, answer.Permissions.State)
		}
	})
}

// However many probes are due and however slow the back end is, a caller's miss finds a free place.
func TestProbesDelayNoCaller(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Reuse: true}
	s.Edit = func(f *tokencache.Fetched) {
		f.Token.Claims.IssuedAt = f.Token.ExpiresOn.Add(-24*time.Hour - 5*time.Minute)
	}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		for i := range 50 {
			mustGet(t, c, tokencache.Key{Resource: fmt.Sprintf("api://%d", i)}, sdk)
		}
		note(t, c, "x", tokencache.Changed, time.Time{})
		time.Sleep(jitter)
		s.Set(func(s *tokencachetest.Source) { s.Latency = 10 * time.Second })
		for i := range 20 {
			time.Sleep(7 * time.Second)
			before := time.Now()
			mustGet(t, c, tokencache.Key{Resource: fmt.Sprintf("api://new-%d", i)}, sdk)
			if took := time.Since(before); took > 10*time.Second {
				t.Fatalf("caller %d waited %v for a call of 10 s", i, took)
			}
		}
		if s.Count() < 50+20+20 {
			t.Errorf("%d calls: nothing was probed beside the callers", s.Count())
		}
	})
}

// Tokens that live shorter than a change takes to spread are refreshed in time all the same.
func TestShortLivesWhileAChangeSpreads(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Life: time.Hour, Rollover: simulator.AtHalfLife},
		func(t *testing.T, d *device, c *tokencache.Cache) {
			c.SetPropagationDelay(24 * time.Hour)
			mustGet(t, c, vault, sdk)
			note(t, c, "x", tokencache.Changed, time.Time{})
			before := d.count()
			for range 24 * 60 {
				time.Sleep(time.Minute)
				if got := mustGet(t, c, vault, tokencache.Need{}); got.Left < 4*time.Minute {
					t.Fatalf("%v left at %v", got.Left, time.Now())
				}
			}
			if spent := d.count() - before; spent < 24 || spent > 60 {
				t.Errorf("%d calls in a day", spent)
			}
		})
}

func TestRevokedWithholds(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Hour)
		d.permit(t, "Less")
		revoked := note(t, c, "r", tokencache.Revoked, time.Time{})
		withheld := func() *tokencache.WithheldError {
			t.Helper()
			_, err := c.Get(t.Context(), vault, sdk)
			var why *tokencache.WithheldError
			if !errors.As(err, &why) {
				t.Fatalf("at %v: %v", time.Now(), err)
			}
			return why
		}
		why := withheld()
		if p := why.Permissions; !p.Withheld || p.State != tokencache.Stale || !why.Revoked.Equal(revoked.At) ||
			p.CurrentBy.Sub(revoked.At) < 24*time.Hour || !strings.Contains(why.Error(), "withheld until") {
			t.Errorf("%+v: %v", why, why)
		}
		if err := errors.Join(refreshError(c.Refresh(t.Context(), vault, true))); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Hour)
		note(t, c, "g", tokencache.Granted, time.Time{})
		note(t, c, "c", tokencache.Changed, time.Time{})
		if got := withheld(); !got.Revoked.Equal(revoked.At) || !got.Permissions.Changed.After(revoked.At) {
			t.Errorf("after a later change: %+v", got)
		}
		if _, ok := c.Withdraw("nobody's"); ok {
			t.Error("withdrew what is not there")
		}
		if got, ok := c.Withdraw("r"); !ok || got.ID != "r" {
			t.Errorf("withdrew %+v, %v", got, ok)
		}
		if got := policyState(t, c); got != tokencache.Stale {
			t.Errorf("after the withdrawal: %v", got)
		}
		note(t, c, "r2", tokencache.Revoked, revoked.At)
		withheld()
		time.Sleep(12 * time.Hour)
		if answer := mustGet(t, c, vault, sdk); answer.Permissions.State != tokencache.Current || !has(answer, "Less") {
			t.Errorf("after the rollover: %+v", answer.Permissions)
		}
	})
}

func refreshError(_ tokencache.Outcome, err error) error { return err }

// Once a fetch after the spreading has shown which token the back end holds, its expiry is the limit.
func TestCurrentBy(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, d *device, c *tokencache.Cache) {
		expires := mustGet(t, c, vault, sdk).Token.ExpiresOn
		time.Sleep(20 * time.Hour)
		changed := note(t, c, "x", tokencache.Changed, time.Time{})
		by := mustGet(t, c, vault, sdk).Permissions.CurrentBy
		if late := by.Sub(changed.At.Add(jitter + 24*time.Hour)); late < 0 || late > time.Minute {
			t.Errorf("before anyone has looked: by %v", by)
		}
		time.Sleep(jitter + time.Minute)
		if by := mustGet(t, c, vault, sdk).Permissions.CurrentBy; by.Sub(expires).Abs() > 2*time.Second {
			t.Errorf("after a look: by %v, the token expires on %v", by, expires)
		}
		time.Sleep(time.Until(expires) + 2*time.Second)
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("at the expiry: %v", got)
		}
	})
}

// A change goes off the record by itself; long before, every token that lacks it has expired.
func TestChangesEnd(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		ends := c.Changes()[0].EndsOn
		if in := time.Until(ends); in < 2*24*time.Hour || in > 3*24*time.Hour {
			t.Errorf("ends in %v", in)
		}
		time.Sleep(28*time.Hour + 15*time.Minute)
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("after the longest life: %v", got)
		}
		time.Sleep(time.Until(ends) - time.Minute)
		serveThrough(t, c, 30*time.Second, time.Second)
		if got := c.Changes(); len(got) != 1 {
			t.Fatalf("a minute before its end: %+v", got)
		}
		serveThrough(t, c, 10*time.Minute, time.Minute)
		if got := c.Changes(); len(got) != 0 {
			t.Errorf("after its end: %+v", got)
		}
	})
}

func TestChangesTouch(t *testing.T) {
	t.Parallel()
	other := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "x"}, Resource: vault.Resource}
	storage := tokencache.Key{Resource: "https://storage.azure.com"}
	blob := tokencache.Key{Resource: "https://account.blob.core.windows.net"}
	keys := []tokencache.Key{vault, other, storage, blob}
	for _, row := range []struct {
		name   string
		change tokencache.PolicyChange
		want   []tokencache.Key
	}{
		{"everything", tokencache.PolicyChange{AllIdentities: true}, keys},
		{"one identity", tokencache.PolicyChange{Selector: other.Selector}, []tokencache.Key{other}},
		{"one resource", tokencache.PolicyChange{AllIdentities: true, Resource: vault.Resource},
			[]tokencache.Key{vault, other}},
		{"both", tokencache.PolicyChange{Resource: vault.Resource}, []tokencache.Key{vault}},
		{"a resource and its alternate", tokencache.PolicyChange{Resource: storage.Resource},
			[]tokencache.Key{storage, blob}},
		{"the alternate and its resource", tokencache.PolicyChange{Resource: blob.Resource},
			[]tokencache.Key{storage, blob}},
		{"another spelling is the same resource",
			tokencache.PolicyChange{AllIdentities: true,
				Resource: "https://VAULT.azure.net:443/"}, []tokencache.Key{vault, other}},
		{"another spelling of an alternate", tokencache.PolicyChange{Resource: blob.Resource + "/"},
			[]tokencache.Key{storage, blob}},
		{"another path is another resource",
			tokencache.PolicyChange{AllIdentities: true, Resource: vault.Resource + "/x"}, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, &tokencachetest.Source{}, func(t *testing.T, c *tokencache.Cache) {
				c.SetAlternates(map[string][]string{storage.Resource: {blob.Resource}})
				for _, key := range keys {
					mustGet(t, c, key, sdk)
				}
				time.Sleep(time.Minute)
				row.change.ID, row.change.Effect = "x", tokencache.Changed
				if _, err := c.RecordChange(row.change); err != nil {
					t.Fatal(err)
				}
				for _, key := range keys {
					want := tokencache.Current
					if slices.Contains(row.want, key) {
						want = tokencache.Stale
					}
					if got := mustGet(t, c, key, sdk).Permissions.State; got != want {
						t.Errorf("%v is %v, want %v", key, got, want)
					}
				}
			})
		})
	}
}

// An alternate's token, issued after the change, is served while the resource's own is stale, and only to
// callers for whom it will do.
func TestAlternates(t *testing.T) {
	t.Parallel()
	storage := tokencache.Key{Resource: "https://storage.azure.com"}
	const blob = "https://account.blob.core.windows.net"
	days(t, simulator.Options{PropagationDelay: 8 * time.Minute}, func(t *testing.T, d *device, c *tokencache.Cache) {
		c.SetAlternates(map[string][]string{storage.Resource: {blob}})
		both := tokencache.Need{MinTTL: 5 * time.Minute, Alternates: []string{blob}}
		get := func(need tokencache.Need) tokencache.Answer {
			t.Helper()
			return mustGet(t, c, storage, need)
		}
		get(both)
		time.Sleep(time.Hour)
		if got := c.Status(); len(got) != 1 {
			t.Fatalf("alternates are fetched without need: %+v", got)
		}
		d.permit(t, "New")
		note(t, c, "x", tokencache.Revoked, time.Time{})
		if _, err := c.Get(t.Context(), storage, both); !errors.As(err, new(*tokencache.WithheldError)) {
			t.Fatalf("while the change spreads: %v", err)
		}
		time.Sleep(jitter + time.Minute)
		answer := get(both)
		if answer.Resource != blob || answer.Permissions.State != tokencache.Current || !has(answer, "New") {
			t.Errorf("%s, %v, %v", answer.Resource, answer.Permissions, answer.Token.Claims.Roles)
		}
		if _, err := c.Get(t.Context(), storage, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
			t.Errorf("a caller without a grant for the alternate: %v", err)
		}
		time.Sleep(23 * time.Hour)
		if answer := get(both); answer.Resource != storage.Resource || !has(answer, "New") {
			t.Errorf("after the resource's own rollover: %s", answer.Resource)
		}
	})
}

func TestAlternatesThatMayNotBe(t *testing.T) {
	t.Parallel()
	bubble(t, &tokencachetest.Source{}, func(t *testing.T, c *tokencache.Cache) {
		c.Retain(func(k tokencache.Key) bool { return k == vault })
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Second)
		note(t, c, "x", tokencache.Changed, time.Time{})
		if got := mustGet(t, c, vault,
			tokencache.Need{Alternates: []string{"api://other"}}); got.Resource != vault.Resource {
			t.Errorf("%+v", got)
		}
		if got := c.Status(); len(got) != 1 {
			t.Errorf("%d keys", len(got))
		}
	})
}

// A change for one of the URIs that a resource goes by is about all of them, by as many steps as it takes.
func TestChangeIsAboutAllAlternates(t *testing.T) {
	t.Parallel()
	const (
		store, other, apart = "https://storage.azure.com", "api://other", "api://apart"
		blob, files         = "https://a.blob.core.windows.net", "https://a.file.core.windows.net"
	)
	all := []string{store, blob, files, other}
	for _, changed := range all {
		bubble(t, &tokencachetest.Source{}, func(t *testing.T, c *tokencache.Cache) {
			c.SetAlternates(map[string][]string{store: {blob + "/", files}, other: {files}, apart: {"api://another"}})
			for _, r := range append(all, apart) {
				mustGet(t, c, tokencache.Key{Resource: r}, sdk)
			}
			time.Sleep(time.Minute)
			if _, err := c.RecordChange(tokencache.PolicyChange{ID: "x", AllIdentities: true, Resource: changed,
				Effect: tokencache.Revoked}); err != nil {
				t.Fatal(err)
			}
			for _, r := range all {
				if a, err := c.Get(t.Context(), tokencache.Key{Resource: r},
					tokencache.Need{Alternates: all}); !errors.As(err, new(*tokencache.WithheldError)) {
					t.Errorf("of %s, asked for %s: the token for %s is served as %v, %v", changed, r, a.Resource,
						a.Permissions.State, err)
				}
			}
			mustGet(t, c, tokencache.Key{Resource: apart}, sdk)
			c.SetAlternates(map[string][]string{store: {blob}})
			if _, err := c.Get(t.Context(), tokencache.Key{Resource: files}, sdk); (err != nil) != (changed == files) {
				t.Errorf("of %s, when %s is no alternate any more: %v", changed, files, err)
			}
		})
	}
}

// Where every other key is to be prefetched, looking for alternates drops neither the key that is asked for nor its
// answer.
func TestAlternatesWhereThereIsNoRoom(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		var keys []tokencache.Key
		for i := range tokencache.MaxKeys {
			keys = append(keys, tokencache.Key{Resource: fmt.Sprint("api://", i)})
		}
		if err := c.Prefetch(keys); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Minute)
		note(t, c, "x", tokencache.Changed, time.Time{})
		need := tokencache.Need{MinTTL: time.Minute, Alternates: []string{"api://one", "api://two", "api://three"}}
		for range 3 {
			mustGet(t, c, vault, need)
		}
		need.MinTTLRequired, need.MinTTL = true, 25*time.Hour // which nobody can have
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := c.Get(ctx, vault, need); !errors.As(err, new(*tokencache.ShortLifeError)) {
			t.Errorf("%v", err)
		}
		if n := len(c.Status()); n > tokencache.MaxKeys+2 {
			t.Errorf("%d keys", n)
		}
	})
}

func TestIssuedAfter(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife}, func(t *testing.T, d *device, c *tokencache.Cache) {
		answer := mustGet(t, c, vault, sdk)
		need := tokencache.Need{IssuedAfter: answer.ReceivedOn.Add(-time.Minute)}
		mustGet(t, c, vault, need)
		need.IssuedAfter = answer.ReceivedOn.Add(time.Minute)
		time.Sleep(time.Hour)
		before := d.count()
		for range 10 {
			_, err := c.Get(t.Context(), vault, need)
			var notYet *tokencache.NotYetError
			if !errors.As(err, &notYet) || !notYet.Want.Equal(need.IssuedAfter) ||
				time.Until(notYet.ExpiresOn) < 22*time.Hour || notYet.Error() == "" {
				t.Fatal(err)
			}
		}
		if spent := d.count() - before; spent != 1 {
			t.Errorf("%d calls for ten callers", spent)
		}
		time.Sleep(12 * time.Hour)
		mustGet(t, c, vault, need)
	})
}

// What Peek returns is true until its channel closes.
func TestPeek(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife}, func(t *testing.T, d *device, c *tokencache.Cache) {
		look := func() (tokencache.TokenInfo, <-chan struct{}) {
			t.Helper()
			sight, changed, err := c.Peek(vault)
			if err != nil {
				t.Fatal(err)
			}
			return sight, changed
		}
		closed := func(changed <-chan struct{}) bool {
			synctest.Wait()
			select {
			case <-changed:
				return true
			default:
				return false
			}
		}
		nothing, changed := look()
		if nothing.SHA256 != "" || nothing.Left != 0 || d.count() != 0 {
			t.Errorf("before the first fetch: %+v", nothing)
		}
		mustGet(t, c, vault, sdk)
		if !closed(changed) {
			t.Error("silent about the first token")
		}
		first, changed := look()
		if first.SHA256 == "" || first.Left < 23*time.Hour || first.Permissions.State != tokencache.Current {
			t.Errorf("%+v", first)
		}
		time.Sleep(time.Hour)
		if closed(changed) {
			t.Error("woken for nothing")
		}
		note(t, c, "x", tokencache.Changed, time.Time{})
		if !closed(changed) {
			t.Error("silent about a policy change")
		}
		stale, changed := look()
		if stale.SHA256 != first.SHA256 || stale.Permissions.State != tokencache.Stale {
			t.Errorf("%+v", stale)
		}
		<-changed
		if current, _ := look(); current.SHA256 == first.SHA256 || current.Permissions.State != tokencache.Current {
			t.Errorf("after the rollover: %+v", current)
		}
		d.set(down)
		for held, changed := look(); held.SHA256 != ""; held, changed = look() { // until it has expired
			<-changed
		}
		_, changed = look()
		c.Retain(func(tokencache.Key) bool { return false })
		if !closed(changed) {
			t.Error("silent about the end")
		}
		if _, _, err := c.Peek(vault); !errors.Is(err, tokencache.ErrDropped) {
			t.Errorf("a dropped key: %v", err)
		}
	})
}

// Whoever looks keeps the key fresh, even when it had been idle.
func TestPeekKeepsTheKeyWanted(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(10 * time.Hour)
		for range 40 {
			time.Sleep(2 * time.Hour)
			if _, _, err := c.Peek(vault); err != nil {
				t.Fatal(err)
			}
		}
		if got := only(t, c); got.Left <= 0 || d.count() < 10 {
			t.Errorf("%v left after %d calls", got.Left, d.count())
		}
	})
}

func TestNoteRefuses(t *testing.T) {
	t.Parallel()
	bubble(t, &tokencachetest.Source{}, func(t *testing.T, c *tokencache.Cache) {
		_, err := c.RecordChange(tokencache.PolicyChange{ID: "x", At: time.Now().Add(time.Hour),
			Effect: tokencache.Revoked})
		var future *tokencache.FutureError
		if !errors.As(err, &future) || future.Ahead != time.Hour ||
			!strings.Contains(err.Error(), "1h0m0s in the future") {
			t.Errorf("dated in the future: %v", err)
		}
	})
}

// A change that happens "now" by a clock that is years behind has its moment in on-time: nothing is taken for current
// by that clock, and people are told of its true time once the clock is known.
func TestUnsureChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &tokencachetest.Clock{Behind: 20 * 365 * 24 * time.Hour}
		d := &device{backend: simulator.New(simulator.Options{Rollover: simulator.AtHalfLife})}
		c := tokencache.New(tokencache.Options{Fetch: d.Fetch, Clock: w.AfterUptime()})
		defer c.Close()
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Hour)
		d.permit(t, "New")
		truly := time.Now()
		noted := note(t, c, "x", tokencache.Changed, time.Time{})
		if noted.Vouched || noted.Moment != tokencachetest.Uptime+time.Hour+1 ||
			noted.Issuer != (tokencache.Window{}) || !c.Changes()[0].Unsure {
			t.Fatalf("%+v", noted)
		}
		if got := policyState(t, c); got != tokencache.Stale {
			t.Errorf("a token from before: %v", got)
		}
		time.Sleep(12 * time.Hour)
		answer := mustGet(t, c, vault, sdk)
		if !has(answer, "New") || answer.Permissions.State != tokencache.Uncertain {
			t.Errorf("a token from after, with the clock unknown: %v", answer.Permissions.State)
		}
		w.Set(0, true)
		time.Sleep(10 * time.Minute)
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("with the clock known: %v", got)
		}
		if got := c.Changes()[0]; got.Unsure || got.At.Sub(truly).Abs() > time.Second || got.Moment != noted.Moment {
			t.Errorf("dated %v, it was %v: %+v", got.At, truly, got)
		}
	})
}

// A date ahead of a clock that is not known to be right may be true.
func TestFutureChangeOnAnUnknownClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &tokencachetest.Clock{Behind: 24 * time.Hour}
		d := &device{backend: simulator.New(simulator.Options{})}
		c := tokencache.New(tokencache.Options{Fetch: d.Fetch, Clock: w.AfterUptime()})
		defer c.Close()
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Minute)
		if p := note(t, c, "x", tokencache.Revoked, time.Now()); p.Vouched ||
			p.Moment != tokencachetest.Uptime+time.Minute+1 {
			t.Errorf("%+v", p)
		}
		if got := only(t, c); got.Permissions.State != tokencache.Stale || !got.Permissions.Withheld ||
			got.HeldUntil.IsZero() {
			t.Errorf("%+v", got.Permissions)
		}
	})
}

// A change that was kept by a clock years ahead has happened by now: it does not last until then.
func TestKeptChangeDatedAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &device{backend: simulator.New(simulator.Options{Rollover: simulator.AtHalfLife, Aged: 6 * time.Hour})}
		ahead := tokencache.PolicyChange{ID: "x", AllIdentities: true, At: time.Now().AddDate(5, 0, 0),
			Effect: tokencache.Revoked, Vouched: true}
		c := tokencache.New(tokencache.Options{Fetch: d.Fetch,
			Record: tokencache.Record{Changes: []tokencache.PolicyChange{ahead}}})
		defer c.Close()
		if _, err := c.Get(t.Context(), vault, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
			t.Errorf("a token from before: %v", err)
		}
		time.Sleep(13 * time.Hour)
		if got := policyState(t, c); got != tokencache.Current {
			t.Errorf("a token from after: %v", got)
		}
	})
}

// Without a record of policy changes nothing from before can be told to be current or stale.
func TestLostRecord(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			d := &device{backend: simulator.New(simulator.Options{Rollover: simulator.AtHalfLife, Aged: 6 * time.Hour})}
			c := tokencache.New(tokencache.Options{Fetch: d.Fetch,
				Clock: (&tokencachetest.Clock{Trusted: known}).AfterUptime()})
			defer c.Close()
			note(t, c, "lost", tokencache.Unknown, time.Time{})
			if got := policyState(t, c); got != tokencache.Uncertain {
				t.Errorf("clock known %v: a token from before: %v", known, got)
			}
			time.Sleep(13 * time.Hour)
			want := tokencache.Current
			if !known {
				want = tokencache.Uncertain // until the clock is known, or the back end has shown it
			}
			if got := policyState(t, c); got != want {
				t.Errorf("clock known %v: a token from after: %v", known, got)
			}
		})
	}
}

func TestSetSpread(t *testing.T) {
	t.Parallel()
	days(t, simulator.Options{Rollover: simulator.AtHalfLife}, func(t *testing.T, d *device, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		time.Sleep(time.Minute)
		note(t, c, "x", tokencache.Changed, time.Time{})
		c.SetPropagationDelay(2 * time.Hour)
		if got := time.Until(only(t, c).HeldUntil); got < 2*time.Hour || got > 2*time.Hour+time.Minute {
			t.Errorf("held for %v", got)
		}
		c.SetPropagationDelay(0)
		if got := time.Until(only(t, c).HeldUntil); got < jitter || got > jitter+time.Minute {
			t.Errorf("held for %v", got)
		}
	})
}

// A caller that waits for a fetch begun before a revocation gets nothing that the revocation withholds.
func TestRevokedWhileACallerWaits(t *testing.T) {
	t.Parallel()
	s := &tokencachetest.Source{Latency: 10 * time.Second}
	s.Edit = func(f *tokencache.Fetched) {
		f.Token.Claims.IssuedAt = f.Token.ExpiresOn.Add(-24*time.Hour - 5*time.Minute)
	}
	bubble(t, s, func(t *testing.T, c *tokencache.Cache) {
		answered := make(chan error, 1)
		go func() {
			_, err := c.Get(context.WithoutCancel(t.Context()), vault, sdk)
			answered <- err
		}()
		time.Sleep(5 * time.Second)
		note(t, c, "x", tokencache.Revoked, time.Time{})
		if err := <-answered; !errors.As(err, new(*tokencache.WithheldError)) {
			t.Error(err)
		}
	})
}

// A token without a date shows that it is from after a change only when no life that is known could reach back before
// it: that takes the longer, the shorter the lives are that the back end gives, and the promise allows for it.
func TestPromiseForTokensWithoutADate(t *testing.T) {
	t.Parallel()
	for _, life := range []time.Duration{time.Hour, 8 * time.Hour, 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			var expires time.Time
			n := 0
			c := tokencache.New(tokencache.Options{Fetch: func(context.Context, tokencache.Key) (tokencache.Fetched,
				error) {
				if !expires.After(time.Now()) {
					n, expires = n+1, time.Now().Round(0).Add(life)
				}
				return tokencache.Fetched{
					Token: tokencache.Token{Text: tokencache.NewSecret(fmt.Sprint("opaque ", n)), ExpiresOn: expires},
					Left:  time.Until(expires), Counted: true,
				}, nil
			}})
			defer c.Close()
			mustGet(t, c, vault, sdk)
			time.Sleep(life / 3)
			note(t, c, "x", tokencache.Revoked, time.Time{})
			soonest := time.Now().Add(60 * 24 * time.Hour) // of what was promised
			for begun := time.Now(); ; time.Sleep(time.Minute) {
				_, err := c.Get(t.Context(), vault, sdk)
				var withheld *tokencache.WithheldError
				if !errors.As(err, &withheld) {
					break
				}
				if withheld.Until.Before(soonest) {
					soonest = withheld.Until
				}
				if time.Now().After(soonest) || time.Since(begun) > 60*time.Hour {
					t.Fatalf("lives of %v: withheld after %v, and %v was promised", life, time.Since(begun),
						soonest.Sub(begun))
				}
			}
		})
	}
}

// A fetch that is due and waits for the end of a pause is put off when a policy change comes meanwhile.
func TestQueuedFetchIsHeld(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &device{backend: simulator.New(simulator.Options{})}
		var mu sync.Mutex
		var asked []time.Time
		throttles := false
		c := tokencache.New(tokencache.Options{Roll: func() float64 { return 0.5 },
			Fetch: func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
				mu.Lock()
				defer mu.Unlock()
				if key == vault {
					asked = append(asked, time.Now())
				} else if throttles {
					return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Throttled,
						RetryAfter: 5 * time.Minute}
				}
				return d.Fetch(ctx, key)
			}})
		defer c.Close()
		mustGet(t, c, storage, sdk)
		time.Sleep(time.Minute)
		mustGet(t, c, vault, sdk)
		mu.Lock()
		throttles = true
		mu.Unlock()
		// one was refreshed in vain two minutes ago, and the other is due since a minute
		time.Sleep(12*time.Hour + time.Minute)
		noted := time.Now()
		note(t, c, "x", tokencache.Granted, time.Time{})
		time.Sleep(time.Hour)
		mu.Lock()
		defer mu.Unlock()
		if asked[1].Before(noted.Add(jitter)) {
			t.Errorf("asked %v after the change", asked[1].Sub(noted))
		}
	})
}
