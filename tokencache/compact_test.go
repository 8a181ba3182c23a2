package tokencache_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

var (
	camera  = tokencache.Selector{Kind: tokencache.ClientID, ID: "camera"}
	speech  = tokencache.Selector{Kind: tokencache.ClientID, ID: "speech"}
	byEntra = func(f *tokencache.Fetched) { // dates it
		f.Token.Claims.IssuedAt = f.Token.ExpiresOn.Add(-24*time.Hour - 5*time.Minute)
	}
)

// put notes a change for one identity and resource.
func put(t *testing.T, c *tokencache.Cache, id string, effect tokencache.Effect, s tokencache.Selector,
	resource string) {
	t.Helper()
	time.Sleep(time.Second)
	if _, err := c.RecordChange(tokencache.PolicyChange{ID: id, Selector: s, Resource: resource,
		Effect: effect}); err != nil {
		t.Fatalf("%s: %v", id, err)
	}
}

func onRecord(c *tokencache.Cache, id string) *tokencache.PolicyChange {
	for _, p := range c.Record().Changes {
		if p.ID == id {
			return &p
		}
	}
	return nil
}

func api(i int) string { return fmt.Sprint("api://", i) }

// What every token held meets makes room, the oldest first; a change that one of them lacks does not.
func TestRoomByWhatIsMet(t *testing.T) {
	t.Parallel()
	bubble(t, &tokencachetest.Source{Edit: byEntra}, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		put(t, c, "unmet", tokencache.Changed, vault.Selector, vault.Resource)
		put(t, c, "revoked", tokencache.Revoked, camera, "")
		for i := range tokencache.MaxChanges - 2 {
			put(t, c, fmt.Sprint(i), tokencache.Changed, camera, api(i))
		}
		put(t, c, "new", tokencache.Changed, vault.Selector, vault.Resource)
		if onRecord(c, "0") != nil || onRecord(c, "1") == nil || onRecord(c, "unmet") == nil ||
			onRecord(c, "revoked") == nil {
			t.Error("another than the oldest that is met has made room")
		}
	})
}

// Where nothing is met, a change takes in an earlier one of what it is about, or of a part of that. Else the two oldest
// of one identity and resource are one, and no token of another resource is judged by it. Where no two are, what is no
// revocation is refused, and nothing has changed.
func TestRoomForAGrant(t *testing.T) {
	t.Parallel()
	stale := func(t *testing.T, c *tokencache.Cache, key tokencache.Key) bool {
		t.Helper()
		for _, s := range c.Status() {
			if s.Key == key {
				return s.Permissions.State != tokencache.Current
			}
		}
		t.Fatalf("no token for %v", key)
		return false
	}
	bubble(t, &tokencachetest.Source{Edit: byEntra}, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		mustGet(t, c, storage, sdk)
		for i := range tokencache.MaxChanges {
			put(t, c, fmt.Sprint(i), []tokencache.Effect{tokencache.Granted, tokencache.Changed}[i%2], vault.Selector,
				vault.Resource)
		}
		put(t, c, "same", tokencache.Granted, vault.Selector, vault.Resource+"/")
		if p := onRecord(c, "same"); p == nil || p.Joined != 1 || p.Resource != vault.Resource+"/" ||
			p.Effect != tokencache.Granted || onRecord(c, "0") != nil {
			t.Errorf("of the same: %+v", p)
		}
		put(t, c, "other", tokencache.Granted, camera, "")
		if p := onRecord(c, "1"); p == nil || p.Joined != 1 || p.Resource != vault.Resource ||
			p.Effect != tokencache.Changed || onRecord(c, "2") != nil || onRecord(c, "other") == nil {
			t.Errorf("of another: %+v", p)
		}
		if !stale(t, c, vault) || stale(t, c, storage) {
			t.Error("the changes are of one resource alone")
		}
		if n := len(c.Record().Changes); n != tokencache.MaxChanges {
			t.Errorf("%d on record", n)
		}
	})
	bubble(t, &tokencachetest.Source{Edit: byEntra}, func(t *testing.T, c *tokencache.Cache) {
		mustGet(t, c, vault, sdk)
		put(t, c, "unmet", tokencache.Granted, vault.Selector, vault.Resource)
		for i := range tokencache.MaxChanges - 1 {
			put(t, c, fmt.Sprint(i), tokencache.Revoked, camera, api(i))
		}
		before := c.Record()
		if _, err := c.RecordChange(tokencache.PolicyChange{ID: "x", Selector: camera,
			Effect: tokencache.Granted}); !errors.Is(err, tokencache.ErrTooManyChanges) {
			t.Errorf("too many: %v", err)
		}
		after := c.Record()
		if after.Generation != before.Generation || !slices.Equal(before.Changes, after.Changes) {
			t.Error("what was refused has changed the record")
		}
		put(t, c, "wider", tokencache.Granted, vault.Selector, "")
		if p := onRecord(c, "wider"); p == nil || p.Joined != 1 || p.Resource != "" || onRecord(c, "unmet") != nil {
			t.Errorf("%+v", p)
		}
	})
}

// However many revocations are noted of one resource, those of another stay what they are, and no token is withheld
// that none of them is about.
func TestRoomWithholdsNothingElse(t *testing.T) {
	t.Parallel()
	for _, effect := range []tokencache.Effect{tokencache.Granted, tokencache.Revoked} {
		bubble(t, &tokencachetest.Source{Edit: byEntra}, func(t *testing.T, c *tokencache.Cache) {
			mustGet(t, c, vault, sdk)
			mustGet(t, c, storage, sdk)
			for i := range tokencache.MaxChanges {
				put(t, c, fmt.Sprint(i), effect, vault.Selector, vault.Resource)
			}
			put(t, c, "third", tokencache.Revoked, vault.Selector, "api://third")
			put(t, c, "fourth", tokencache.Revoked, vault.Selector, "api://fourth")
			for _, s := range c.Status() {
				if s.Key == storage && s.Permissions != (tokencache.Permissions{State: tokencache.Current}) {
					t.Errorf("%v of another resource: %+v", effect, s.Permissions)
				}
			}
			if p := onRecord(c, "0"); p == nil || p.Joined != 2 || p.Resource != vault.Resource ||
				onRecord(c, "third") == nil || onRecord(c, "fourth") == nil {
				t.Errorf("%+v", p)
			}
		})
	}
}

// A change that is to go before others are joined with it is not joined.
func TestRoomLeavesAloneWhatIsToStayAlone(t *testing.T) {
	t.Parallel()
	bubble(t, &tokencachetest.Source{Edit: byEntra}, func(t *testing.T, c *tokencache.Cache) {
		if _, err := c.RecordChange(tokencache.PolicyChange{ID: "alone", AllIdentities: true,
			Effect: tokencache.Revoked, Alone: true}); err != nil {
			t.Fatal(err)
		}
		for i := range tokencache.MaxChanges + 20 {
			put(t, c, fmt.Sprint(i), tokencache.Revoked,
				tokencache.Selector{Kind: tokencache.ClientID, ID: fmt.Sprint(i)}, api(i))
		}
		if p := onRecord(c, "alone"); p == nil || p.Joined != 0 {
			t.Errorf("%+v", p)
		}
	})
}

// A revocation is never refused, and nothing that was withheld is handed out for its sake.
func TestRoomForARevocation(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		fill  func(i int) (tokencache.Effect, tokencache.Selector, string)
		check func(t *testing.T, c *tokencache.Cache)
	}{
		{"one of the same identity and resource is taken in",
			func(i int) (tokencache.Effect, tokencache.Selector, string) {
				if i == 100 {
					return tokencache.Revoked, vault.Selector, vault.Resource + "/"
				}
				return tokencache.Revoked, camera, api(i)
			}, func(t *testing.T, c *tokencache.Cache) {
				if p := onRecord(c, "new"); p == nil || p.Joined != 1 || p.Resource != vault.Resource ||
					onRecord(c, "100") != nil {
					t.Errorf("%+v", p)
				}
			}},
		{"the oldest of one identity are joined", func(i int) (tokencache.Effect, tokencache.Selector, string) {
			if i%2 == 0 {
				return tokencache.Revoked, speech, api(i)
			}
			return tokencache.Revoked, camera, api(i)
		}, func(t *testing.T, c *tokencache.Cache) {
			p := onRecord(c, "0")
			if p == nil || p.Joined != 1 || p.Resource != "" || p.Selector != speech || p.AllIdentities ||
				onRecord(c, "2") != nil || onRecord(c, "1") == nil {
				t.Errorf("%+v", p)
			}
			put(t, c, "newer", tokencache.Revoked, vault.Selector, "api://another")
			if p := onRecord(c, "0"); p == nil || p.Joined != 1 {
				t.Errorf("the next joins others first, which are older by now: %+v", p)
			}
		}},
		{"those of no one identity are joined for all", func(i int) (tokencache.Effect, tokencache.Selector, string) {
			return tokencache.Revoked, tokencache.Selector{Kind: tokencache.ClientID, ID: fmt.Sprint(i)}, api(i)
		}, func(t *testing.T, c *tokencache.Cache) {
			if p := onRecord(c, "0"); p == nil || p.Joined != 1 || p.Resource != "" || !p.AllIdentities ||
				onRecord(c, "1") != nil {
				t.Errorf("%+v", p)
			}
		}},
		{"what withholds nothing is joined first", func(i int) (tokencache.Effect, tokencache.Selector, string) {
			switch i {
			case 300:
				return tokencache.Changed, vault.Selector, vault.Resource
			case 301:
				return tokencache.Granted, vault.Selector, ""
			}
			return tokencache.Revoked, camera, api(i)
		}, func(t *testing.T, c *tokencache.Cache) {
			p := onRecord(c, "300")
			if p == nil || p.Joined != 1 || p.Effect != tokencache.Changed || p.Resource != "" ||
				onRecord(c, "301") != nil || onRecord(c, "0") == nil {
				t.Errorf("%+v", p)
			}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, &tokencachetest.Source{Edit: byEntra}, func(t *testing.T, c *tokencache.Cache) {
				key := tokencache.Key{Selector: speech, Resource: api(0)}
				for _, k := range []tokencache.Key{vault, key} {
					mustGet(t, c, k, sdk)
				}
				for i := range tokencache.MaxChanges {
					effect, s, resource := row.fill(i)
					put(t, c, fmt.Sprint(i), effect, s, resource)
				}
				_, withheldBefore := c.Get(t.Context(), key, sdk)
				put(t, c, "new", tokencache.Revoked, vault.Selector, vault.Resource)
				if n := len(c.Record().Changes); n != tokencache.MaxChanges {
					t.Errorf("%d on record", n)
				}
				row.check(t, c)
				if _, err := c.Get(t.Context(), vault, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
					t.Errorf("the revocation is not in force: %v", err)
				}
				if _, err := c.Get(t.Context(), key, sdk); errors.As(withheldBefore, new(*tokencache.WithheldError)) &&
					err == nil {
					t.Error("what an older one withheld is handed out")
				}
			})
		})
	}
}

// What was joined ends, and is withdrawn, as one.
func TestJoinedIsWithdrawnAsOne(t *testing.T) {
	t.Parallel()
	bubble(t, &tokencachetest.Source{Edit: byEntra}, func(t *testing.T, c *tokencache.Cache) {
		key := tokencache.Key{Selector: speech, Resource: api(7)} // none of the joined names it
		mustGet(t, c, key, sdk)
		for i := range tokencache.MaxChanges {
			put(t, c, fmt.Sprint(i), tokencache.Revoked, speech, "urn:"+fmt.Sprint(i))
		}
		mustGet(t, c, key, sdk)
		put(t, c, "new", tokencache.Revoked, camera, "")
		if _, err := c.Get(t.Context(), key, sdk); !errors.As(err, new(*tokencache.WithheldError)) {
			t.Errorf("joined for the whole identity: %v", err)
		}
		if was, ok := c.Withdraw("0"); !ok || was.Joined != 1 {
			t.Errorf("%+v, %v", was, ok)
		}
		mustGet(t, c, key, sdk)
	})
}

// A change that the token lacks which was held last makes no room: the back end may give that token again.
func TestRoomWhileATokenIsMissing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began, r := time.Now(), &registry{}
		left, broken := time.Hour, false
		c := tokencache.New(tokencache.Options{Fetch: func(ctx context.Context, key tokencache.Key) (tokencache.Fetched,
			error) {
			f, err := r.Fetch(ctx, key)
			if broken {
				return tokencache.Fetched{}, down
			}
			return f, err
		}})
		defer c.Close()
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			f := tokenOf("a", key, began)
			f.Left = left
			return f
		})
		mustGet(t, c, vault, sdk)
		time.Sleep(10 * time.Minute)
		note(t, c, "x", tokencache.Changed, time.Time{})
		r.during(func() { broken = true })
		time.Sleep(2 * time.Hour) // it seems to be over
		for i := range tokencache.MaxChanges {
			if _, err := c.RecordChange(tokencache.PolicyChange{ID: fmt.Sprint(i),
				Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "another"},
				Effect:   tokencache.Granted}); err != nil {
				t.Fatal(err)
			}
		}
		r.during(func() { left, broken = 21*time.Hour, false })
		time.Sleep(20 * time.Minute)
		if a, err := c.Get(t.Context(), vault, tokencache.Need{}); err == nil &&
			a.Permissions.State == tokencache.Current {
			t.Errorf("a token from before the change is %v", a.Permissions.State)
		}
		if !slices.ContainsFunc(c.Changes(), func(n tokencache.RecordedChange) bool { return n.ID == "x" }) {
			t.Error("the change is off the record")
		}
	})
}
