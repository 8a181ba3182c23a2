package agent_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	vault   = "https://vault.azure.net"
	storage = "https://storage.azure.com"
	canary  = tokencachetest.Canary
	guid1   = "00000000-0000-0000-0000-000000000001"
	guid2   = "00000000-0000-0000-0000-000000000002"
	guid3   = "0000000A-0000-0000-0000-000000000003"
	arm     = "/subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/speech"
)

func uid(n uint32) *uint32 { return &n }

// edge is a device with three identities and a few callers.
func edge() agent.Rules {
	return agent.Rules{Rules: grants.Rules{
		Identities: []grants.Identity{
			{Name: "device", Default: true},
			{Name: "vision", ClientID: guid1, ObjectID: guid3},
			{Name: "speech", ResourceID: arm},
		},
		Grants: []grants.Grant{
			{Caller: grants.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault, storage}},
			{Caller: grants.Match{UID: uid(1000), User: "edge"}, Identity: "device", Resources: []string{vault}},
			{Caller: grants.Match{UID: uid(1000), User: "edge"}, Identity: "vision",
				Resources: []string{vault, storage}},
			{Caller: grants.Match{UID: uid(1000), User: "edge"}, Identity: "speech", Resources: []string{storage}},
			{Caller: grants.Match{UID: uid(0)}, Identity: "device", Resources: []string{storage}},
		},
	}}
}

var (
	module = grants.Caller{Module: "vision", UID: 0, PID: 7}
	user   = grants.Caller{UID: 1000, PID: 8}
	root   = grants.Caller{UID: 0, PID: 9}
)

// fail has a source answer with err from now on.
func fail(s *tokencachetest.Source, err error) {
	s.Set(func(s *tokencachetest.Source) { s.Err = err })
}

// bubble runs f in virtual time with an agent under rules and whatever it logs.
func bubble(t *testing.T, rules agent.Rules, b *tokencachetest.Source,
	f func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.DebugLevel)
		a, err := agent.New(agent.Options{Fetch: b.Fetch, Rules: rules, Log: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			a.Close()
			for _, entry := range logs.All() {
				if strings.Contains(fmt.Sprint(entry.Message, entry.ContextMap()), canary) {
					t.Errorf("token text in the log: %v", entry)
				}
			}
		}()
		f(t, a, logs)
	})
}

func codeOf(err error) api.Code {
	var refusal *agent.Error
	if !errors.As(err, &refusal) {
		return ""
	}
	return refusal.Code
}

// isStopping reports whether err says that the daemon goes down, or that the identity was just removed.
func isStopping(err error) bool {
	var refusal *agent.Error
	return errors.As(err, &refusal) && refusal.Code == api.CodeUnreachable && refusal.Stopping
}

func TestWhoGetsWhat(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		caller grants.Caller
		ask    grants.Request
		want   string   // identity
		reason api.Code // or why not
	}{
		{"module, its only identity", module, grants.Request{Resource: vault}, "vision", ""},
		{"scope form", module, grants.Request{Resource: vault + "/.default"}, "vision", ""},
		{"another spelling is another resource", module, grants.Request{Resource: vault + "/"}, "", api.CodeNotGranted},
		{"module by client ID", module, grants.Request{Resource: vault, ClientID: guid1}, "vision", ""},
		{"by object ID in other case", module, grants.Request{Resource: vault, ObjectID: strings.ToLower(guid3)},
			"vision", ""},
		{"an identity that is not granted", module, grants.Request{Resource: vault, Identity: "device"}, "",
			api.CodeNotGranted},
		{"an identity that is not there", module, grants.Request{Resource: vault, ClientID: guid2}, "",
			api.CodeUnknownIdentity},
		{"names are exact", module, grants.Request{Resource: vault, Identity: "Vision"}, "", api.CodeUnknownIdentity},
		{"root in a container is not root of the host", module, grants.Request{Resource: storage, Identity: "device"},
			"", api.CodeNotGranted},
		{"root of the host is not the module", root, grants.Request{Resource: vault}, "", api.CodeNotGranted},
		{"root of the host", root, grants.Request{Resource: storage}, "device", ""},
		{"several, the default among them", user, grants.Request{Resource: vault}, "device", ""},
		{"several, the default not among them", user, grants.Request{Resource: storage}, "", api.CodeAmbiguous},
		{"several, one named", user, grants.Request{Resource: storage, Identity: "speech"}, "speech", ""},
		{"by resource ID", user, grants.Request{Resource: storage, ResourceID: strings.ToUpper(arm)}, "speech", ""},
		{"nobody", grants.Caller{UID: 4711, PID: 1}, grants.Request{Resource: vault}, "", api.CodeNotGranted},
		{"another module", grants.Caller{Module: "speech", PID: 1}, grants.Request{Resource: vault}, "",
			api.CodeNotGranted},
		{"no resource", module, grants.Request{}, "", api.CodeBadRequest},
		{"no App ID URI", module, grants.Request{Resource: "vault"}, "", api.CodeBadRequest},
	} {
		bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
			answer, err := a.Token(t.Context(), row.caller, agent.Request{Request: row.ask})
			if codeOf(err) != row.reason || (err == nil) != (row.reason == "") {
				t.Errorf("%s: error %v, want reason %q", row.name, err, row.reason)
				return
			}
			if err == nil && (answer.Identity.Name != row.want || !strings.Contains(answer.Token.Text.Reveal(),
				answer.Identity.Selector().String())) {
				t.Errorf("%s: identity %q, want %q", row.name, answer.Identity.Name, row.want)
			}
			if err == nil && answer.Advertise != agent.DefaultSDKLife {
				t.Errorf("%s: SDKs are told %v", row.name, answer.Advertise)
			}
			if err != nil && !strings.Contains(err.Error(), " ") {
				t.Errorf("%s: %q says too little", row.name, err)
			}
		})
	}
}

// A refusal repeats what was asked for, no more of it than a line shows, and tells a name from an ID.
func TestIdentityNotFound(t *testing.T) {
	t.Parallel()
	const has = "Identity not found: no [[identity]] of the configuration has the "
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		for _, row := range []struct {
			ask  grants.Request
			want string
		}{
			{grants.Request{Identity: "nobody"}, has + `name "nobody"`},
			{grants.Request{ClientID: guid2}, has + `client_id "` + guid2 + `"`},
			{grants.Request{ClientID: "vision"},
				has + `client_id "vision": that is the name of one, and not its client ID, which is ` + guid1},
			{grants.Request{ObjectID: "device"},
				has + `object_id "device": that is the name of one, and not its object ID`},
			{grants.Request{ResourceID: "x\n"}, has + `resource_id "x\n"`},
			{grants.Request{Identity: strings.Repeat("x", 1000)},
				has + `name "` + strings.Repeat("x", 150) + `"…"` + strings.Repeat("x", 150) + `"`},
		} {
			row.ask.Resource = vault
			_, err := a.Token(t.Context(), grants.Caller{Module: "vision", PID: 1}, agent.Request{Request: row.ask})
			if codeOf(err) != api.CodeUnknownIdentity || err.Error() != row.want {
				t.Errorf("%+v: %v, want %s", row.ask, err, row.want)
			}
		}
	})
}

func TestChoices(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		var refusal *agent.Error
		_, err := a.Token(t.Context(), user, requestFor(storage))
		if !errors.As(err, &refusal) || !slices.Equal(refusal.Choices, []string{"speech", "vision"}) ||
			!strings.Contains(refusal.Detail, "speech, vision") {
			t.Errorf("ambiguous: %+v", refusal)
		}
		_, err = a.Token(t.Context(), user, agent.Request{Request: grants.Request{Resource: storage, ClientID: guid2}})
		if !errors.As(err, &refusal) || !strings.HasPrefix(refusal.Detail, "Identity not found") ||
			!slices.Equal(refusal.Choices, []string{"speech", "vision"}) {
			t.Errorf("unknown: %+v", refusal)
		}
		want := api.RequestCounts{Invalid: 2}
		if got := a.Counts(); got != want {
			t.Errorf("counts %+v", got)
		}
	})
}

func TestSourceFailuresBecomeReasons(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		err  error
		want api.Code
	}{
		{&tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"}, api.CodeUnreachable},
		{&tokencache.FetchError{Kind: tokencache.Throttled, Detail: "slow down", RetryAfter: 3 * time.Second},
			api.CodeThrottled},
		{&tokencache.FetchError{Kind: tokencache.IdentityNotFound, Detail: "no such"}, api.CodeIdentityNotFound},
		{&tokencache.FetchError{Kind: tokencache.Refused, Detail: "no"}, api.CodeRefused},
		{&tokencache.FetchError{Kind: tokencache.Malformed, Detail: "html"}, api.CodeMalformedAnswer},
	} {
		b := new(tokencachetest.Source)
		b.Err = row.err
		bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
			_, err := a.Token(t.Context(), module, requestFor(vault))
			var refusal *agent.Error
			if !errors.As(err, &refusal) || refusal.Code != row.want || !strings.Contains(err.Error(), vault) {
				t.Errorf("%v: %v", row.err, err)
			}
			if row.want == api.CodeThrottled && refusal.RetryAfter != 3*time.Second {
				t.Errorf("retry after %v", refusal.RetryAfter)
			}
			if got := a.Counts(); got.Failed != 1 {
				t.Errorf("counts %+v", got)
			}
			synctest.Wait()
			if warnings := logs.FilterLevelExact(zapcore.WarnLevel).FilterMessage(
				"token fetch failed"); warnings.Len() != 1 || warnings.All()[0].ContextMap()["identity"] != "vision" {
				t.Errorf("log %v", logs.All())
			}
		})
	}
}

func TestWaitingEnds(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	b.Latency = time.Hour
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
		defer cancel()
		_, err := a.Token(ctx, module, requestFor(vault))
		if codeOf(err) != api.CodeUnreachable || !strings.Contains(err.Error(), "ask again") {
			t.Errorf("deadline: %v", err)
		}
		gone, leave := context.WithCancel(t.Context())
		leave()
		if _, err := a.Token(gone, module, requestFor(storage)); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that left got %v", err)
		}
		a.Close()
		if _, err := a.Token(t.Context(), module, requestFor(vault)); !isStopping(err) {
			t.Errorf("closed: %v", err)
		}
	})
}

func TestFirmNeed(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		_, err := a.Token(t.Context(), module, agent.Request{
			Request: grants.Request{Resource: vault}, MinTTL: 25 * time.Hour, MinTTLRequired: true,
		})
		if codeOf(err) != api.CodeShortLife {
			t.Errorf("error %v", err)
		}
	})
}

func TestAdvertisedLife(t *testing.T) {
	t.Parallel()
	rules := edge()
	rules.SDKLife = 2 * time.Hour
	bubble(t, rules, new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		answer, err := a.Token(t.Context(), module, requestFor(vault))
		if err != nil || answer.Advertise != 2*time.Hour || answer.Left != 24*time.Hour {
			t.Errorf("%v of %v, %v", answer.Advertise, answer.Left, err)
		}
	})
}

func TestApply(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		for _, resource := range []string{vault, storage} {
			if _, err := a.Token(t.Context(), module, requestFor(resource)); err != nil {
				t.Fatal(err)
			}
		}
		rules := edge()
		rules.Identities = append(rules.Identities[:2:2], grants.Identity{Name: "robot", ClientID: guid2})
		rules.Identities[1].ObjectID = ""
		rules.Grants = []grants.Grant{
			{Caller: grants.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault}},
			{Caller: grants.Match{UID: uid(3)}, Identity: "robot", Resources: []string{storage}, Prefetch: true},
		}
		rules.SDKLife = 30 * time.Minute
		changes, err := a.Apply(rules)
		if err != nil {
			t.Fatal(err)
		}
		want := []string{
			`identity "vision" changed`,
			`identity "robot" added`,
			`identity "speech" removed`,
			`granted: uid 3, identity "robot", https://storage.azure.com, prefetched`,
			`no longer granted: module vision, identity "vision", https://storage.azure.com`,
			`no longer granted: user edge (uid 1000), identity "device", https://vault.azure.net`,
			`no longer granted: user edge (uid 1000), identity "vision", https://vault.azure.net`,
			`no longer granted: user edge (uid 1000), identity "vision", https://storage.azure.com`,
			`no longer granted: user edge (uid 1000), identity "speech", https://storage.azure.com`,
			`no longer granted: uid 0, identity "device", https://storage.azure.com`,
			`sdk_life is 30m0s, was 35m0s`,
		}
		if !reflect.DeepEqual(changes, want) {
			t.Errorf("changes:\n%s", strings.Join(changes, "\n"))
		}
		synctest.Wait()
		var kept []string
		for _, token := range a.Status().Tokens {
			kept = append(kept, token.Identity+" "+token.Resource)
		}
		if want := []string{"robot " + storage, "vision " + vault}; !slices.Equal(kept, want) {
			t.Errorf("kept %v, want %v", kept, want)
		}
		if _, err := a.Token(t.Context(), module, requestFor(storage)); codeOf(err) != api.CodeNotGranted {
			t.Errorf("a removed grant still gives: %v", err)
		}
		if changes, err := a.Apply(rules); err != nil || len(changes) != 0 {
			t.Errorf("the same again: %v, %v", changes, err)
		}
		bad := rules
		bad.Identities = nil
		if _, err := a.Apply(bad); err != nil {
			t.Error(err)
		}
		if _, err := a.Token(t.Context(), module, requestFor(vault)); codeOf(err) != api.CodeFaultyGrant {
			t.Errorf("of an identity that is not there: %v", err)
		}
		if _, err := a.Apply(rules); err != nil {
			t.Error(err)
		}
		if _, err := a.Token(t.Context(), module, requestFor(vault)); err != nil {
			t.Errorf("once it is back: %v", err)
		}
	})
}

// A caller that waits for a token while its grant is taken away does not get it.
func TestApplyWhileWaiting(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	b.Latency = 5 * time.Second
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		var waiters sync.WaitGroup
		waiters.Go(func() {
			if answer, err := a.Token(t.Context(), module,
				requestFor(storage)); codeOf(err) != api.CodeNotGranted {
				t.Errorf("the grant is gone, and the caller got %v, %v", answer.Identity, err)
			}
		})
		waiters.Go(func() {
			if _, err := a.Token(t.Context(), module, requestFor(vault)); err != nil {
				t.Errorf("a grant that stays: %v", err)
			}
		})
		synctest.Wait()
		rules := edge()
		rules.Grants[0].Resources = []string{vault}
		rules.Grants[2].Resources = []string{vault}
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		waiters.Wait()
	})
}

func TestRefresh(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		for _, resource := range []string{vault, storage} {
			if _, err := a.Token(t.Context(), module, requestFor(resource)); err != nil {
				t.Fatal(err)
			}
		}
		for _, row := range []struct {
			identity, resource string
			want               []string
			reason             api.Code
		}{
			{"", "", []string{"vision " + storage, "vision " + vault}, ""},
			{"vision", "", []string{"vision " + storage, "vision " + vault}, ""},
			{"device", "", nil, ""},
			{"", vault, []string{"device " + vault, "vision " + vault}, ""},
			{"vision", vault + "/.default", []string{"vision " + vault}, ""},
			{"nobody", "", nil, api.CodeUnknownIdentity},
			{"", "https://elsewhere", nil, api.CodeBadRequest},
		} {
			time.Sleep(time.Minute)
			results, err := a.Refresh(t.Context(), row.identity, row.resource, false)
			var got []string
			for _, result := range results {
				got = append(got, result.Identity+" "+result.Resource)
				if result.Outcome != tokencache.Newer || result.Detail != "" {
					t.Errorf("%+v", result)
				}
			}
			if !slices.Equal(got, row.want) || codeOf(err) != row.reason {
				t.Errorf("refresh %q %q: %v, %v", row.identity, row.resource, got, err)
			}
		}
		fail(b, errors.New("gone"))
		time.Sleep(time.Minute)
		results, err := a.Refresh(t.Context(), "vision", vault, false)
		if err != nil || len(results) != 1 || results[0].Outcome != tokencache.Failed || results[0].Detail == "" {
			t.Errorf("failing: %+v, %v", results, err)
		}
	})
}

func TestStatus(t *testing.T) {
	t.Parallel()
	rules := edge()
	rules.Grants[0].Prefetch = true
	b := new(tokencachetest.Source)
	b.Latency = time.Second
	synctest.Test(t, func(t *testing.T) {
		changed := make(chan struct{}, 2)
		a, err := agent.New(agent.Options{Fetch: b.Fetch, Rules: rules, Changed: func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if a.Status().Ready {
			t.Error("ready before the prefetched tokens are there")
		}
		<-changed
		<-changed
		s := a.Status()
		if !s.Ready || len(s.Trouble) != 0 || len(s.Tokens) != 2 || len(s.Identities) != 3 ||
			s.Identities[1].Grants != 2 {
			t.Errorf("status %+v", s)
		}
		fail(b, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"})
		time.Sleep(20 * time.Hour)
		if s = a.Status(); len(s.Trouble) != 2 || !strings.Contains(s.Trouble[0], "good for another") ||
			!strings.Contains(s.Trouble[0], "connection refused") {
			t.Errorf("trouble %q", s.Trouble)
		}
		time.Sleep(5 * time.Hour)
		if s = a.Status(); s.Ready || len(s.Trouble) != 2 || !strings.HasPrefix(s.Trouble[0], "no token of identity") {
			t.Errorf("trouble %q", s.Trouble)
		}
		if strings.Contains(fmt.Sprintf("%+v %#v", s, s), canary) {
			t.Error("token text in the status")
		}
		if err := a.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		rules.Grants = nil
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		if s = a.Status(); len(s.Trouble) != 1 || !strings.Contains(s.Trouble[0], "every caller is denied") {
			t.Errorf("trouble %q", s.Trouble)
		}
	})
}

func TestDenialsAreLoggedAndCounted(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zapcore.DebugLevel)
	a, err := agent.New(agent.Options{Fetch: new(tokencachetest.Source).Fetch, Rules: edge(), Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	stranger := grants.Caller{Module: "stranger", PID: 5}
	for range 1000 {
		if _, err := a.Token(t.Context(), stranger, requestFor(vault)); codeOf(err) != api.CodeNotGranted {
			t.Fatal(err)
		}
	}
	denials := logs.FilterMessage("token denied")
	if n := denials.Len(); n < 10 || n > 100 {
		t.Errorf("%d lines for 1000 denials", n)
	}
	if fields := denials.All()[0].ContextMap(); fields["module"] != "stranger" || fields["resource"] != vault {
		t.Errorf("fields %v", fields)
	}
	if a.Counts().Denied != 1000 {
		t.Errorf("counts %+v", a.Counts())
	}
}

// A fault in the grants or in a setting is found, and keeps no agent from working with the rest.
func TestBadRules(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		kind, want string
		change     func(*agent.Rules)
	}{
		{"identity", "no [[identity]]", func(r *agent.Rules) { r.Identities, r.Grants = nil, nil }},
		{"grant", "names no resources", func(r *agent.Rules) { r.Grants[0].Resources = nil }},
		{"sdk_life", "sdk_life is 1m0s", func(r *agent.Rules) { r.SDKLife = time.Minute }},
		{"sdk_life", "sdk_life is 25h0m0s", func(r *agent.Rules) { r.SDKLife = 25 * time.Hour }},
		{"spread", "spread is -1ns", func(r *agent.Rules) { r.Spread = -1 }},
		{"spread", "spread is 25h0m0s", func(r *agent.Rules) { r.Spread = 25 * time.Hour }},
	} {
		rules := edge()
		row.change(&rules)
		err := rules.Validate()
		var fault *grants.RuleError
		if !errors.As(err, &fault) || fault.Kind != row.kind || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v, want %q", row.kind, err, row.want)
		}
		settled := rules.Settle()
		if again := settled.Settle(); !reflect.DeepEqual(again, settled) {
			t.Errorf("%s: settled %+v, settled again %+v", row.kind, settled, again)
		}
		a, err := agent.New(agent.Options{Rules: rules})
		if err != nil {
			t.Errorf("%s: %v", row.kind, err)
			continue
		}
		a.Close()
	}
	if err := edge().Validate(); err != nil {
		t.Error(err)
	}
}
