package agent_test

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

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// azure is the simulated back end as a source, behind a network that may be down and a disk that may be
// full.
type azure struct {
	*simulator.Backend
	clock tokencache.Clock
	logs  *observer.ObservedLogs

	mu     sync.Mutex
	broken error
	calls  int
	claims func(*tokencache.Claims) // what a token tells otherwise; nil: nothing
	kept   [][]tokencache.PolicyChange
	full   error // why nothing can be kept
}

func (z *azure) breakDown(err error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.broken = err
}

func (z *azure) fill(err error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.full = err
}

func (z *azure) fetches() int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.calls
}

func (z *azure) record() []tokencache.PolicyChange {
	z.mu.Lock()
	defer z.mu.Unlock()
	if len(z.kept) == 0 {
		return nil
	}
	return z.kept[len(z.kept)-1]
}

func (z *azure) keep(record tokencache.Record) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.full != nil {
		return z.full
	}
	z.kept = append(z.kept, record.Changes)
	return nil
}

func (z *azure) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	z.mu.Lock()
	z.calls++
	broken, claims := z.broken, z.claims
	z.mu.Unlock()
	if broken != nil {
		return tokencache.Fetched{}, broken
	}
	by := map[tokencache.SelectorKind]simulator.SelectBy{
		tokencache.SystemAssigned: simulator.SystemAssigned, tokencache.ClientID: simulator.ByClientID,
		tokencache.ResourceID: simulator.ByResourceID,
	}
	minted, err := z.Token(simulator.Selection{By: by[key.Selector.Kind], ID: key.Selector.ID}, key.Resource)
	if err != nil {
		return tokencache.Fetched{}, err
	}
	f := tokencache.Fetched{
		Token: tokencache.Token{
			Text: tokencache.NewSecret(canary + minted.Text), ExpiresOn: minted.ExpiresOn, NotBefore: minted.NotBefore,
			Claims: tokencache.Claims{
				Audience: key.Resource, ClientID: minted.Identity.ClientID, ObjectID: minted.Identity.ObjectID,
				IssuedAt: minted.IssuedAt, NotBefore: minted.NotBefore,
				Groups: minted.Permissions.Groups, Roles: minted.Permissions.Roles, WIDs: minted.Permissions.WIDs,
			},
		},
		Left: time.Until(minted.ExpiresOn),
	}
	if claims != nil {
		claims(&f.Token.Claims)
	}
	return f, nil
}

// inAzure runs f in virtual time with an agent on a back end that rolls over at half life.
func inAzure(t *testing.T, change func(*agent.Options, *azure), f func(t *testing.T, a *agent.Agent, z *azure)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.DebugLevel)
		z := &azure{logs: logs, Backend: simulator.New(simulator.Options{
			Rollover: simulator.AtHalfLife,
			Identities: []simulator.Identity{
				{Name: "device", SystemAssigned: true, ClientID: guid2, ObjectID: guid2},
				{Name: "vision", ClientID: guid1, ObjectID: guid3,
					Permissions: simulator.Permissions{Groups: []string{"g1"}, Roles: []string{"r1"}}},
				{Name: "speech", ResourceID: arm, ClientID: guid3, ObjectID: guid1},
			},
		})}
		o := agent.Options{Fetch: z.Fetch, Rules: edge(), Log: zap.New(core), SaveRecord: z.keep,
			Clock: tokencache.Clock{}.OrRuntime()}
		if change != nil {
			change(&o, z)
		}
		z.clock = o.Clock
		a, err := agent.New(o)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			said := fmt.Sprintf("%+v", a.Status())
			a.Close()
			for _, entry := range logs.All() {
				said += fmt.Sprint(entry.Message, entry.ContextMap())
			}
			if strings.Contains(said, canary) {
				t.Errorf("token text in the log or the status: %s", said)
			}
		}()
		f(t, a, z)
	})
}

// requestFor asks for a token for resource, and leaves the identity to the grants.
func requestFor(resource string) agent.Request {
	return agent.Request{Request: grants.Request{Resource: resource}}
}

// waitFor asks for a token for resource, and waits for it.
func waitFor(resource string, wait time.Duration) agent.Request {
	return agent.Request{Request: grants.Request{Resource: resource}, Wait: wait}
}

func ask(t *testing.T, a *agent.Agent, caller grants.Caller, r agent.Request) agent.Answer {
	t.Helper()
	answer, err := a.Token(t.Context(), caller, r)
	if err != nil {
		t.Fatalf("%v for %v: %v", r, caller, err)
	}
	return answer
}

func note(t *testing.T, a *agent.Agent, c api.PolicyChangeRequest) api.PolicyChange {
	t.Helper()
	noted, err := a.RecordChange("uid 0 (pid 7)", c)
	if err != nil {
		t.Fatal(err)
	}
	return noted
}

var revoked = api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Revoked, Note: "left the team"}

func TestPolicyChange(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		before := ask(t, a, module, requestFor(vault))
		if before.Permissions.State != tokencache.Current || before.Advertise != agent.DefaultSDKLife {
			t.Errorf("before: %+v, told %v", before.Permissions, before.Advertise)
		}
		time.Sleep(time.Hour)
		noted := note(t, a, api.PolicyChangeRequest{Resource: vault + "/.default", Identity: "vision",
			Effect: tokencache.Granted, Note: "sees secrets"})
		if len(noted.ID) != 8 || noted.Identity != "vision" || noted.Resource != vault || noted.Touched != 1 ||
			noted.Waiting != 1 || noted.EndsOn.IsZero() {
			t.Errorf("noted %+v", noted)
		}
		lacking := ask(t, a, module, requestFor(vault))
		if lacking.Permissions.State != tokencache.Stale || lacking.Advertise != 25*time.Minute ||
			lacking.Token.Text != before.Token.Text {
			t.Errorf("after: %+v, told %v", lacking.Permissions, lacking.Advertise)
		}
		if s := a.Status(); stale(s) != 1 || len(s.Changes) != 1 || s.Changes[0] != noted || len(s.Trouble) != 0 {
			t.Errorf("status %+v", s)
		}
		if kept := z.record(); len(kept) != 1 || kept[0] != a.Recorded()[0].PolicyChange {
			t.Errorf("kept %+v", kept)
		}
		lines := z.logs.FilterMessage("policy change noted").All()
		if len(lines) != 1 {
			t.Fatalf("%v", z.logs.All())
		}
		for field, want := range map[string]any{"by": "uid 0 (pid 7)", "id": noted.ID, "effect": "granted",
			"identity": "vision", "resource": vault, "note": "sees secrets"} {
			if got := lines[0].ContextMap()[field]; got != want {
				t.Errorf("log: %s is %v", field, got)
			}
		}
		time.Sleep(12 * time.Hour) // half of the life is over
		after := ask(t, a, module, requestFor(vault))
		if after.Permissions.State != tokencache.Current || after.Advertise != agent.DefaultSDKLife ||
			stale(a.Status()) != 0 {
			t.Errorf("rolled over: %+v, told %v", after.Permissions, after.Advertise)
		}
		current := z.logs.FilterMessageSnippet("the token is current").All()
		if len(current) != 1 || current[0].ContextMap()["identity"] != "vision" ||
			!strings.HasPrefix(fmt.Sprint(current[0].ContextMap()["after"]), "11h0m") {
			t.Errorf("log %v", current)
		}
		time.Sleep(4 * 24 * time.Hour) // it ends by itself, and that is kept at the next fetch
		ask(t, a, module, requestFor(vault))
		time.Sleep(24 * time.Hour)
		if n := len(a.Changes()); n != 0 || len(z.record()) != 0 {
			t.Errorf("%d changes, kept %v", n, z.record())
		}
	})
}

func TestWithdrawnChange(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		ask(t, a, module, requestFor(vault))
		time.Sleep(time.Hour)
		kept := note(t, a, api.PolicyChangeRequest{AllResources: true, Effect: tokencache.Changed})
		gone := note(t, a, revoked)
		if gone.ID == kept.ID || kept.Identity != "" || kept.Resource != "" {
			t.Errorf("%+v and %+v", kept, gone)
		}
		was, err := a.WithdrawChange("iothub", gone.ID)
		if err != nil || was.ID != gone.ID || was.Touched != 1 || was.EndsOn.IsZero() {
			t.Errorf("%+v, %v", was, err)
		}
		if got := ask(t, a, module, requestFor(vault)); got.Permissions.State != tokencache.Stale ||
			got.Permissions.Withheld {
			t.Errorf("%+v", got.Permissions)
		}
		if record := z.record(); len(record) != 1 || record[0].ID != kept.ID {
			t.Errorf("kept %+v", record)
		}
		if line := z.logs.FilterMessage("policy change withdrawn").All(); len(line) != 1 ||
			line[0].ContextMap()["by"] != "iothub" || line[0].ContextMap()["identity"] != "all" {
			t.Errorf("%v", line)
		}
		if line := z.logs.FilterMessage("policy change noted").All(); line[0].ContextMap()["resource"] != "all" {
			t.Errorf("%v", line)
		}
		for _, id := range []string{gone.ID, "", strings.Repeat("x", 1<<20)} {
			if _, err := a.WithdrawChange("iothub", id); codeOf(err) != api.CodeUnknownChange ||
				len(err.Error()) > 300 {
				t.Errorf("%.20q: %.400v", id, err)
			}
		}
	})
}

func TestBadChanges(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		for _, row := range []struct {
			says   string
			reason api.Code
			change api.PolicyChangeRequest
		}{
			{"and not both", api.CodeBadRequest, api.PolicyChangeRequest{Effect: tokencache.Changed}},
			{"and not both", api.CodeBadRequest, api.PolicyChangeRequest{Resource: vault, AllResources: true,
				Effect: tokencache.Changed}},
			{"granted, revoked or changed", api.CodeBadRequest, api.PolicyChangeRequest{Resource: vault}},
			{"granted, revoked or changed", api.CodeBadRequest,
				api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Unknown}},
			{"no App ID URI", api.CodeBadRequest,
				api.PolicyChangeRequest{Resource: "vault", Effect: tokencache.Changed}},
			{"the grants name " + storage + ", " + vault + "; name one of these, or note it for all resources",
				api.CodeBadRequest,
				api.PolicyChangeRequest{Resource: vault + "/x", Effect: tokencache.Revoked}},
			{"the year 2200", api.CodeBadRequest, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed,
				At: time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)}},
			{"the year 1969", api.CodeBadRequest, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed,
				At: time.Date(1969, 1, 1, 0, 0, 0, 0, time.UTC)}},
			{"257 bytes", api.CodeBadRequest, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed,
				Note: strings.Repeat("a", 257)}},
			{"UTF-8", api.CodeBadRequest, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed,
				Note: "\xff"}},
			{"cannot be printed", api.CodeBadRequest,
				api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed, Note: "a\nb"}},
			{`named "robot"`, api.CodeUnknownIdentity,
				api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed, Identity: "robot"}},
			{"3h0m0s ahead, on Jan 1 03:00:00 UTC: this device's clock is synchronised and says Jan 1 00:00:00 UTC",
				api.CodeFutureChange,
				api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed,
					At: time.Now().Add(3 * time.Hour)}},
		} {
			noted, err := a.RecordChange("test", row.change)
			if codeOf(err) != row.reason || !strings.Contains(err.Error(), row.says) || noted.ID != "" {
				t.Errorf("%+v: %v, want %q", row.change, err, row.says)
			}
			var refusal *agent.Error
			if errors.As(err, &refusal) && row.reason == api.CodeUnknownIdentity &&
				!slices.Equal(refusal.Choices, []string{"device", "speech", "vision"}) {
				t.Errorf("choices %q", refusal.Choices)
			}
		}
		if n := len(a.Changes()); n != 0 || len(z.record()) != 0 {
			t.Errorf("%d changes on record", n)
		}
		ask(t, a, module, requestFor(vault))
		time.Sleep(time.Second)
		changed := api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed}
		for i := range tokencache.MaxChanges + 3 { // of one identity and resource, so that there is always room
			if _, err := a.RecordChange("test", changed); err != nil {
				t.Fatalf("change %d: %v", i, err)
			}
		}
		if n := len(z.record()); n != tokencache.MaxChanges {
			t.Errorf("%d kept", n)
		}
	})
}

// A full record of changes of which no two are of one identity and resource has room for nothing but a revocation, and
// for one change for all resources in the place of others.
func TestTooManyChanges(t *testing.T) {
	t.Parallel()
	full := func(o *agent.Options, _ *azure) {
		record := tokencache.Record{Lineage: "l", Generation: 1}
		for i := range tokencache.MaxChanges - 1 {
			record.Changes = append(record.Changes, tokencache.PolicyChange{
				ID: fmt.Sprint(i), AllIdentities: true, Resource: fmt.Sprint("api://",
					i), Effect: tokencache.Revoked, At: time.Now(), RecordedAt: time.Now(),
			})
		}
		o.Record = &record
	}
	inAzure(t, full, func(t *testing.T, a *agent.Agent, _ *azure) {
		ask(t, a, module, requestFor(vault))
		time.Sleep(time.Second)
		note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed}) // which the token lacks
		for range 3 {
			_, err := a.RecordChange("test", api.PolicyChangeRequest{Resource: storage, Effect: tokencache.Changed})
			if codeOf(err) != api.CodeTooManyChanges || !strings.Contains(err.Error(), "withdraw some") ||
				!strings.Contains(err.Error(), "note one change for all resources") {
				t.Error(err)
			}
		}
		if noted := note(t, a, api.PolicyChangeRequest{AllResources: true,
			Effect: tokencache.Changed}); noted.Joined != 1 {
			t.Errorf("%+v", noted)
		}
		note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Revoked})
		if n := len(a.Changes()); n != tokencache.MaxChanges {
			t.Errorf("%d in force", n)
		}
	})
}

func TestManyResourcesInAnError(t *testing.T) {
	t.Parallel()
	for n, says := range map[int]string{0: "the grants name none;", 8: "api://7;", 11: "api://17 and 3 more;"} {
		inAzure(t, func(o *agent.Options, _ *azure) {
			o.Rules.Grants = nil
			var all []string
			for i := range n {
				all = append(all, fmt.Sprintf("api://%d", 10+i))
			}
			if n == 8 {
				all[7] = "api://7"
			}
			if n > 0 {
				o.Rules.Grants = []grants.Grant{{Caller: grants.Match{Module: "m"}, Identity: "vision", Resources: all}}
			}
		}, func(t *testing.T, a *agent.Agent, _ *azure) {
			if _, err := a.RecordChange("test", revoked); codeOf(err) != api.CodeBadRequest ||
				!strings.Contains(err.Error(), says) {
				t.Errorf("%v, want %q", err, says)
			}
		})
	}
}

// A change dated so far back that no token can lack it is on record until the cache looks.
func TestVeryOldChange(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		noted := note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed,
			At: time.Now().AddDate(-1, 0, 0)})
		if noted.ID == "" || noted.EndsOn.After(time.Now()) {
			t.Errorf("%+v", noted)
		}
		ask(t, a, module, requestFor(vault))
		synctest.Wait()
		if n := len(a.Changes()); n != 0 {
			t.Errorf("%d changes", n)
		}
	})
}

// The name of a change's identity is what the configuration calls it now.
func TestChangeOfIdentityThatIsGone(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		note(t, a, api.PolicyChangeRequest{Resource: vault, Identity: "vision", Effect: tokencache.Changed})
		rules := edge()
		rules.Identities[1].Name = "camera"
		for i := range rules.Grants {
			rules.Grants[i].Identity = strings.Replace(rules.Grants[i].Identity, "vision", "camera", 1)
		}
		if _, err := a.Apply(rules); err != nil || a.Changes()[0].Identity != "camera" {
			t.Errorf("renamed: %+v, %v", a.Changes(), err)
		}
		rules.Identities[1].ClientID = guid2
		if _, err := a.Apply(rules); err != nil || a.Changes()[0].Identity != "client_id "+guid1 {
			t.Errorf("gone: %+v, %v", a.Changes(), err)
		}
	})
}

func TestFullDiskForChanges(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		ask(t, a, module, requestFor(vault))
		time.Sleep(time.Hour)
		z.fill(errors.New("no space left on device"))
		noted, err := a.RecordChange("test", revoked)
		if codeOf(err) != api.CodeNotKept || noted.ID == "" ||
			!strings.Contains(err.Error(),
				"in force, and not on the disk: no space left on device; the next start does not know of it; look at "+
					"the disk") {
			t.Errorf("%+v, %v", noted, err)
		}
		if _, err := a.Token(t.Context(), module, requestFor(vault)); codeOf(err) != api.CodeRevoked {
			t.Errorf("not in force: %v", err)
		}
		if trouble := a.Status().Trouble; len(trouble) != 1 ||
			!strings.Contains(trouble[0], "not kept on the disk: no space left") {
			t.Errorf("trouble %q", trouble)
		}
		other, err := a.RecordChange("test", api.PolicyChangeRequest{Resource: storage, Effect: tokencache.Changed})
		if codeOf(err) != api.CodeNotKept {
			t.Error(err)
		}
		if was, err := a.WithdrawChange("test", other.ID); codeOf(err) != api.CodeNotKept || was.ID != other.ID ||
			!strings.Contains(err.Error(),
				"withdrawn, and not on the disk: no space left on device; the next start does not know of it") {
			t.Errorf("%+v, %v", was, err)
		}
		time.Sleep(5 * time.Minute)
		z.fill(nil)
		time.Sleep(61 * time.Second)
		if record := z.record(); len(record) != 1 || record[0] != a.Recorded()[0].PolicyChange {
			t.Errorf("kept %+v", record)
		}
		if trouble := a.Status().Trouble; len(trouble) != 0 {
			t.Errorf("trouble %q", trouble)
		}
		failures := z.logs.FilterMessage("the policy changes could not be kept").Len()
		if again := z.logs.FilterMessage("the policy changes are kept again").Len(); again != 1 || failures < 7 ||
			failures > 10 {
			t.Errorf("%d failures, %d times kept again", failures, again)
		}
		z.fill(errors.New("full again"))
		if _, err := a.RecordChange("test", revoked); codeOf(err) != api.CodeNotKept {
			t.Error(err)
		}
		z.fill(nil)
		a.Close() // does not wait for the minute to be over
		if n := len(z.record()); n != 2 {
			t.Errorf("%d kept at the end", n)
		}
	})
}

// Whoever saves at the same moment, the last list is what is kept in the end.
func TestManySaves(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		var all sync.WaitGroup
		for i := range 40 {
			all.Go(func() {
				if i%4 == 0 {
					z.fill(errors.New("full"))
				}
				noted, err := a.RecordChange("test", revoked)
				z.fill(nil)
				if err != nil && codeOf(err) != api.CodeNotKept {
					t.Error(err)
				}
				if i%2 == 0 {
					_, _ = a.WithdrawChange("test", noted.ID)
				}
			})
		}
		all.Wait()
		time.Sleep(2 * time.Minute)
		var want []tokencache.PolicyChange
		for _, c := range a.Recorded() {
			want = append(want, c.PolicyChange)
		}
		if len(want) != 20 || !slices.Equal(z.record(), want) {
			t.Errorf("%d on record, %d kept", len(want), len(z.record()))
		}
	})
}

func TestRecordFromBefore(t *testing.T) {
	t.Parallel()
	var before []tokencache.PolicyChange
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		note(t, a, revoked)
		note(t, a, api.PolicyChangeRequest{Resource: vault, Identity: "speech", Effect: tokencache.Granted})
		before = z.record()
	})
	inAzure(t, func(o *agent.Options, _ *azure) { o.Record = &tokencache.Record{Changes: before} },
		func(t *testing.T, a *agent.Agent, z *azure) {
			changes := a.Recorded()
			if len(changes) != 2 || changes[0].PolicyChange != before[0] || changes[1].PolicyChange != before[1] {
				t.Errorf("%+v\nwant %+v", changes, before)
			}
			// The first fetch waits for nothing: there is no token to go on with.
			if _, err := a.Token(t.Context(), module, requestFor(vault)); codeOf(err) != api.CodeRevoked {
				t.Errorf("in force: %v", err)
			}
			synctest.Wait()
			// so that it is known to be writable
			if record := z.record(); len(z.kept) != 1 || !slices.Equal(record, before) {
				t.Errorf("the start has kept %d times what is on record: %v", len(z.kept), record)
			}
		})
}

// What the cache changes by itself is kept too: the date that people are told of a change, when the clock is set right.
func TestUnsureChange(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	ahead := -20 * 365 * 24 * time.Hour
	inAzure(t, func(o *agent.Options, _ *azure) {
		o.Clock.Wall = func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			return time.Now().Round(0).Add(ahead)
		}
		o.Clock.Synchronised = func() bool {
			mu.Lock()
			defer mu.Unlock()
			return ahead == 0
		}
	}, func(t *testing.T, a *agent.Agent, z *azure) {
		ask(t, a, module, requestFor(vault))
		truly := time.Now()
		noted := note(t, a, revoked)
		if !noted.Unsure || len(z.record()) != 1 || z.record()[0].Vouched || !z.record()[0].At.Equal(truly.Add(ahead)) {
			t.Errorf("%+v, kept %+v", noted, z.record())
		}
		moment := z.record()[0].Moment
		mu.Lock()
		ahead = 0
		mu.Unlock()
		time.Sleep(25 * time.Hour)
		if got := z.record(); len(got) != 1 || got[0].At.Sub(truly).Abs() > time.Second || got[0].Moment != moment {
			t.Errorf("kept %+v", got)
		}
	})
}

func TestLostRecord(t *testing.T) {
	t.Parallel()
	lost := errors.New("/var/lib/percept/policy-changes.json: it is not\n JSON; it is now " +
		"/var/lib/percept/policy-changes.json.unreadable-x " + strings.Repeat("é", 200))
	inAzure(t, func(o *agent.Options, _ *azure) { o.LostRecord = lost }, func(t *testing.T, a *agent.Agent, z *azure) {
		answer := ask(t, a, module, requestFor(vault))
		if answer.Permissions.State != tokencache.Uncertain {
			t.Errorf("%+v", answer.Permissions)
		}
		s := a.Status()
		if len(s.Changes) != 1 || s.Changes[0].Effect != tokencache.Unknown || s.Changes[0].Identity != "" ||
			len(s.Changes[0].Note) > 256 {
			t.Fatalf("%+v", s.Changes)
		}
		id := s.Changes[0].ID
		for _, want := range []string{"could not be read", "policy-changes.json.unreadable-x",
			"every token from before counts as uncertain", "enter the changes of the last two days again",
			"perceptctl policy-changes withdraw " + id} {
			if len(s.Trouble) != 1 || !strings.Contains(s.Trouble[0], want) {
				t.Errorf("trouble %q lacks %q", s.Trouble, want)
			}
		}
		if record := z.record(); len(record) != 1 || record[0].ID != id {
			t.Errorf("kept %+v", record)
		}
		if _, err := a.WithdrawChange("test", id); err != nil || len(a.Status().Trouble) != 0 {
			t.Errorf("%v, trouble %q", err, a.Status().Trouble)
		}
		if answer := ask(t, a, module, requestFor(vault)); answer.Permissions.State != tokencache.Current {
			t.Errorf("%+v", answer.Permissions)
		}
	})
	full := make([]tokencache.PolicyChange, tokencache.MaxChanges)
	for i := range full {
		full[i] = tokencache.PolicyChange{ID: fmt.Sprint(i), AllIdentities: true, Effect: tokencache.Revoked,
			At: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)}
	}
	unread := func(o *agent.Options, _ *azure) {
		o.UnreadRecord, o.Copies = lost, []tokencache.Snapshot{{Record: tokencache.Record{Lineage: "l", Changes: full}}}
		o.LoadRecord = func() (*tokencache.Record, error) { return nil, lost }
	}
	inAzure(t, unread, func(t *testing.T, a *agent.Agent, _ *azure) {
		lost := func(c api.PolicyChange) bool { return c.Effect == tokencache.Unknown }
		if all := a.Changes(); len(all) != tokencache.MaxChanges || !slices.ContainsFunc(all, lost) {
			t.Errorf("a full record has no room for that: %d changes", len(all))
		}
	})
}

func TestWithheld(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		for range 3 { // what the back end does is learnt
			ask(t, a, module, requestFor(vault))
			time.Sleep(12 * time.Hour)
		}
		ask(t, a, module, requestFor(vault))
		note(t, a, revoked)
		_, err := a.Token(t.Context(), module, requestFor(vault))
		if codeOf(err) != api.CodeRevoked {
			t.Fatal(err)
		}
		for _, want := range []string{`identity "vision" on ` + vault, "were revoked on Jan 2 12:00:00 UTC",
			"still hands out a token from before", "at the latest, probably by", "cannot be recalled",
			"wait, or watch"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q lacks %q", err, want)
			}
		}
		if a.Counts().Failed != 1 || stale(a.Status()) == 0 {
			t.Errorf("%+v", a.Status())
		}
		answer, err := a.Token(t.Context(), module, waitFor(vault, 48*time.Hour))
		if err != nil || answer.Permissions.State != tokencache.Current {
			t.Errorf("waited for: %+v, %v", answer.Permissions, err)
		}
	})
}

func TestIssuedAfter(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		wanted := requestFor(vault)
		wanted.IssuedAfter = time.Now().Add(-time.Hour)
		first := ask(t, a, module, wanted)
		time.Sleep(time.Hour)
		wanted.IssuedAfter = time.Now()
		_, err := a.Token(t.Context(), module, wanted)
		var refusal *agent.Error
		if !errors.As(err, &refusal) || refusal.Code != api.CodeNotYet || refusal.RetryAfter != 5*time.Minute ||
			!strings.Contains(err.Error(), "minted before Jan 1 01:00:00 UTC") {
			t.Errorf("%v", err)
		}
		before := time.Now()
		wanted.Wait = 30 * time.Second
		if _, err := a.Token(t.Context(), module, wanted); codeOf(err) != api.CodeNotYet ||
			time.Since(before) != wanted.Wait {
			t.Errorf("after %v: %v", time.Since(before), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		before = time.Now()
		if _, err := a.Token(ctx, module, wanted); codeOf(err) != api.CodeNotYet ||
			time.Since(before) != 10*time.Second {
			t.Errorf("after %v: %v", time.Since(before), err)
		}
		calls := z.fetches()
		wanted.Wait = 24 * time.Hour
		second, err := a.Token(t.Context(), module, wanted)
		if err != nil || second.Token.Text == first.Token.Text || z.fetches()-calls > 8 {
			t.Errorf("%v after %d calls", err, z.fetches()-calls)
		}
		note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed})
		wanted.IssuedAfter, wanted.Wait = time.Now(), time.Second
		_, err = a.Token(t.Context(), module, wanted)
		if codeOf(err) != api.CodeNotYet || !errors.As(err, &refusal) || refusal.RetryAfter < 30*time.Second {
			t.Error(err)
		}
		if counts := a.Counts(); counts.Failed != 4 || counts.Served != 2 {
			t.Errorf("counts %+v", counts)
		}
	})
}

// A caller that waits sees that the back end is back, though nothing is fetched unless somebody asks.
func TestWaitingForTheNetwork(t *testing.T) {
	t.Parallel()
	inAzure(t, func(_ *agent.Options, z *azure) {
		z.broken = &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"}
	}, func(t *testing.T, a *agent.Agent, z *azure) {
		if _, err := a.Token(t.Context(), module,
			waitFor(vault, 5*time.Second)); codeOf(err) != api.CodeUnreachable {
			t.Error(err)
		}
		mended := time.AfterFunc(time.Minute, func() { z.breakDown(nil) })
		defer mended.Stop()
		before := time.Now()
		if _, err := a.Token(t.Context(), module, waitFor(vault, time.Hour)); err != nil ||
			time.Since(before) > 3*time.Minute {
			t.Errorf("after %v: %v", time.Since(before), err)
		}
		for _, r := range []agent.Request{
			{Request: grants.Request{Resource: storage, Identity: "device"}, Wait: time.Hour},
			waitFor("x", time.Hour),
		} {
			before = time.Now()
			if _, err := a.Token(t.Context(), module, r); err == nil || time.Now() != before {
				t.Errorf("%v: %v after %v", r, err, time.Since(before))
			}
		}
		a.Close()
		if _, err := a.Token(t.Context(), module, waitFor(vault, time.Hour)); !isStopping(err) {
			t.Error(err)
		}
	})
}

func TestPeek(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		request := requestFor(vault + "/.default")
		sight, news, err := a.Peek(module, request)
		if err != nil || sight.Identity != "vision" || sight.SHA256 != "" || z.fetches() != 0 {
			t.Fatalf("%+v, %v", sight, err)
		}
		answer := ask(t, a, module, request)
		<-news
		sight, news, err = a.Peek(module, request)
		if err != nil || sight.SHA256 != answer.Token.Text.SHA256() || sight.Permissions.State != tokencache.Current {
			t.Errorf("%+v, %v", sight, err)
		}
		time.Sleep(time.Hour)
		note(t, a, revoked)
		<-news
		sight, news, _ = a.Peek(module, request)
		if !sight.Permissions.Withheld {
			t.Errorf("%+v", sight)
		}
		<-news // the rollover
		if sight, _, _ = a.Peek(module, request); sight.Permissions.State != tokencache.Current ||
			sight.SHA256 == answer.Token.Text.SHA256() {
			t.Errorf("%+v", sight)
		}
		if _, _, err := a.Peek(root, request); codeOf(err) != api.CodeNotGranted {
			t.Error(err)
		}
		a.Close()
		if _, _, err := a.Peek(module, request); !isStopping(err) {
			t.Error(err)
		}
	})
}

const blob = "https://acc.blob.core.windows.net"

// While the token of a resource is not current, that of an alternate will do for those who have both.
func TestAlternates(t *testing.T) {
	t.Parallel()
	inAzure(t, func(o *agent.Options, _ *azure) {
		o.Rules.Alternates = map[string][]string{storage: {blob}}
		o.Rules.Grants[0].Resources = append(o.Rules.Grants[0].Resources, blob)
	}, func(t *testing.T, a *agent.Agent, _ *azure) {
		own := ask(t, a, module, requestFor(storage))
		ask(t, a, user, agent.Request{Request: grants.Request{Resource: storage, Identity: "vision"}})
		time.Sleep(time.Hour)
		noted := note(t, a, api.PolicyChangeRequest{Resource: blob, Effect: tokencache.Changed}) // by any of its names
		if noted.Waiting != 1 {
			t.Errorf("%+v", noted)
		}
		time.Sleep(20 * time.Minute)
		ask(t, a, module, requestFor(storage)) // has the alternate fetched
		time.Sleep(time.Minute)
		other := ask(t, a, module, requestFor(storage))
		if other.Resource != blob || other.Permissions.State != tokencache.Current ||
			other.Token.Claims.Audience != blob || other.Advertise != agent.DefaultSDKLife {
			t.Errorf("%s, %+v", other.Resource, other.Permissions)
		}
		got := ask(t, a, user, agent.Request{Request: grants.Request{Resource: storage, Identity: "vision"}})
		if got.Resource != storage ||
			got.Token.Text != own.Token.Text {
			t.Errorf("a caller without both grants got the token for %s", got.Resource)
		}
		advice, err := a.Rejected(t.Context(), module,
			api.Rejection{Resource: storage, Status: 401, SHA256: other.Token.Text.SHA256()})
		if err != nil || advice.Findings[0].Cause != api.CauseWrongAudience ||
			!strings.Contains(advice.Findings[0].Detail, "an alternate of "+storage) || advice.Claims.Audience != blob {
			t.Errorf("%+v, %v", advice, err)
		}
	})
}

func TestSpreadAndAlternatesAreApplied(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		rules := edge()
		for _, row := range []struct {
			change func()
			want   []string
		}{
			{func() { rules.Spread = time.Hour }, []string{"spread is 1h0m0s, was 10m0s"}},
			{func() { rules.Spread = time.Nanosecond }, []string{"spread is 0s, was 1h0m0s"}},
			{func() { rules.Spread = 0 }, []string{"spread is 10m0s, was 0s"}},
			{func() { rules.Alternates = map[string][]string{storage: {blob, "api://b"}} },
				[]string{"resource " + storage + ": alternates " + blob + ", api://b"}},
			{func() { rules.Alternates = map[string][]string{vault: {blob}} },
				[]string{"resource " + vault + ": alternates " + blob,
					"resource " + storage + ": no alternates any more"}},
			{func() {}, nil},
		} {
			row.change()
			if got, err := a.Apply(rules); err != nil || !slices.Equal(got, row.want) {
				t.Errorf("%q, %v, want %q", got, err, row.want)
			}
		}
	})
}

// stale returns how many valid tokens do not carry every policy change.
func stale(s api.Status) (n int) {
	for _, token := range s.Tokens {
		if token.ExpiresIn > 0 && token.Permissions.State != tokencache.Current {
			n++
		}
	}
	return n
}
