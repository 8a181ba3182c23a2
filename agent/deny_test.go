package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
	"perceptd/tokencache/tokencachetest"
)

const thisHub = "hub.azure-devices.net/edge-1"

// thisMethod is that hub, where it calls a direct method.
var thisMethod = api.DenySide{Origin: api.DenyMethod, Hub: thisHub}

func tighten(a *agent.Agent, hub string, targets []api.DenyRequest, version int64) error {
	_, err := a.TightenTwinDeny(hub, targets, version)
	return err
}

func denyModule(name string) api.DenyRequest {
	return api.DenyRequest{DenyTarget: api.DenyTarget{Module: name}, Note: "stolen"}
}

func mustDeny(t *testing.T, a *agent.Agent, origin api.DenyOrigin, r api.DenyRequest) api.DenyRule {
	t.Helper()
	by, side := "uid 0 (pid 1)", api.DenySide{Origin: origin}
	if origin == api.DenyMethod {
		by, side = "iothub "+thisHub+" method percept.deny", thisMethod
	}
	rule, err := a.Deny(by, side, r)
	if err != nil {
		t.Fatal(err)
	}
	return rule
}

func askFor(a *agent.Agent, caller grants.Caller, resource string) api.Code {
	_, err := a.Token(context.Background(), caller, agent.Request{Request: grants.Request{Resource: resource}})
	return codeOf(err)
}

func TestDenyTakesAwayAndLiftGivesBack(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		if code := askFor(a, module, vault); code != "" {
			t.Fatal(code)
		}
		rule := mustDeny(t, a, api.DenyLocal, denyModule("vision"))
		_, err := a.Token(context.Background(), module, agent.Request{Request: grants.Request{Resource: vault}})
		if codeOf(err) != api.CodeDenied {
			t.Fatalf("%v", err)
		}
		for _, want := range []string{"module vision", "stolen", "perceptctl deny lift " + rule.ID,
			"an administrator of this device"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q lacks %q", err, want)
			}
		}
		if code := askFor(a, user, vault); code != "" {
			t.Errorf("another caller: %v", code)
		}
		d, refusal := a.Decide(module, grants.Request{Resource: vault})
		if d.Allowed || refusal == nil || refusal.Code != api.CodeDenied || d.Reason != refusal.Detail {
			t.Errorf("the check says %+v, %v", d, refusal)
		}
		if _, err := a.Rejected(context.Background(), module,
			api.Rejection{Resource: vault, Status: 401}); codeOf(err) !=
			api.CodeDenied {
			t.Errorf("advice: %v", err)
		}
		if counts := a.Counts(); counts.Denied != 1 || len(a.Status().Denials) != 1 {
			t.Errorf("counted %+v", counts)
		}
		if logs.FilterMessage("token denied").FilterField(zap.String("message_id",
			agent.MessageDeniedByRule)).Len() == 0 {
			t.Error("the audit has no line")
		}
		if again := mustDeny(t, a, api.DenyLocal, denyModule("vision")); again.ID != rule.ID {
			t.Errorf("the same rule is there twice: %+v", again)
		}
		if _, err := a.LiftDeny("m", thisMethod, rule.ID); codeOf(err) != api.CodeBadRequest {
			t.Errorf("a method lifts what a person set: %v", err)
		}
		if _, err := a.LiftDeny("uid 0", api.DenySide{Origin: api.DenyLocal}, rule.ID); err != nil {
			t.Fatal(err)
		}
		if _, err := a.LiftDeny("uid 0", api.DenySide{Origin: api.DenyLocal},
			rule.ID); codeOf(err) != api.CodeUnknownDenyRule {
			t.Errorf("%v", err)
		}
		if code := askFor(a, module, vault); code != "" {
			t.Errorf("after the lift: %v", code)
		}
	})
}

// A caller that waits, and one that watches, are woken by a rule at once.
func TestDenyWakesThoseThatWait(t *testing.T) {
	t.Parallel()
	source := new(tokencachetest.Source)
	fail(source, errors.New("down"))
	bubble(t, edge(), source, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		_, changed, err := a.Peek(module, agent.Request{Request: grants.Request{Resource: storage}})
		if err != nil {
			t.Fatal(err)
		}
		asked := time.Now()
		ended := make(chan api.Code, 1)
		go func() {
			_, err := a.Token(context.Background(), module,
				agent.Request{Request: grants.Request{Resource: vault}, Wait: time.Hour})
			ended <- codeOf(err)
		}()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		mustDeny(t, a, api.DenyLocal, denyModule("vision"))
		synctest.Wait()
		select {
		case code := <-ended:
			if code != api.CodeDenied {
				t.Errorf("the waiting request: %v", code)
			}
		default:
			t.Errorf("a request still waits, %v after the rule", time.Since(asked))
		}
		select {
		case <-changed:
		default:
			t.Error("a watcher was not woken")
		}
		if _, _, err := a.Peek(module, agent.Request{Request: grants.Request{Resource: storage}}); codeOf(err) !=
			api.CodeDenied {
			t.Errorf("then it sees %v", err)
		}
	})
}

// A request that waits for the back end while a rule comes gets nothing of what that brings.
func TestDenyDuringAFetch(t *testing.T) {
	t.Parallel()
	source := new(tokencachetest.Source)
	source.Latency = time.Minute
	bubble(t, edge(), source, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		ended := make(chan api.Code, 1)
		go func() { ended <- askFor(a, module, vault) }()
		synctest.Wait()
		mustDeny(t, a, api.DenyLocal, api.DenyRequest{DenyTarget: api.DenyTarget{All: true}})
		if code := <-ended; code != api.CodeDenied {
			t.Errorf("%v", code)
		}
	})
}

func TestTwinDeny(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		check := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		denied := func(want bool, when string) {
			t.Helper()
			if code := askFor(a, module, vault); (code == api.CodeDenied) != want {
				t.Fatalf("%s: %q", when, code)
			}
		}
		local := mustDeny(t, a, api.DenyLocal, denyModule("other"))
		byMethod, err := a.Deny("iothub "+thisHub+" method percept.deny", thisMethod, denyModule("third"))
		check(err)
		check(tighten(a, thisHub, []api.DenyRequest{denyModule("vision")}, 4))
		denied(true, "a notification adds")
		check(tighten(a, thisHub, nil, 5))
		denied(true, "a notification lifts nothing")
		check(a.SetTwinDeny(thisHub, nil, 5))
		denied(false, "a full read lifts")
		check(a.SetTwinDeny(thisHub, []api.DenyRequest{denyModule("vision")}, 1))
		denied(true, "a full read of a version that began again")
		rules := a.DenyStatus().Rules
		if len(rules) != 3 || rules[0].Twin != 1 || rules[0].Origin != api.DenyTwin {
			t.Fatalf("%+v", rules)
		}
		_, err = a.LiftDeny("uid 0", api.DenySide{Origin: api.DenyLocal}, rules[0].ID)
		if codeOf(err) != api.CodeBadRequest || !strings.Contains(err.Error(), "desired properties") {
			t.Errorf("a twin's rule is lifted by hand: %v", err)
		}

		check(a.SetHubAside("uid 0 (pid 1)"))
		denied(false, "root set the hub aside")
		check(a.SetTwinDeny(thisHub, []api.DenyRequest{{DenyTarget: api.DenyTarget{All: true}}}, 9))
		denied(false, "a later twin of the same hub")
		if _, err := a.Deny("iothub "+thisHub+" method percept.deny", thisMethod, denyModule("vision")); codeOf(err) !=
			api.CodeHubSetAside {
			t.Errorf("a method denies: %v", err)
		}
		if rules := a.DenyStatus().Rules; !rules[0].SetAside || !a.IsHubSetAside("") {
			t.Errorf("%+v", rules)
		}
		check(a.HeedHub("uid 0 (pid 1)"))
		denied(true, "the hub is heeded again")

		const other = "new.azure-devices.net/edge-1"
		check(a.SetHubAside("uid 0 (pid 1)"))
		check(tighten(a, other, []api.DenyRequest{denyModule("vision")}, 1))
		denied(true, "another hub was not set aside")
		check(a.SetTwinDeny(other, nil, 1))
		denied(false, "the former hub's rules go with the first full read")
		if left := a.DenyStatus().Rules; len(left) != 1 || left[0].ID != local.ID || a.IsHubSetAside("") {
			t.Errorf("%+v are left, with %s that the former hub set", left, byMethod.ID)
		}
	})
}

// What root set aside is heeded again once this device has another identity at the hub, and its twin was read: that is
// in the journal, once, with who had set what aside. The methods' rules of the former identity go with it.
func TestMoveEndsTheSettingAside(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, to string
		aside    bool
		lines    int
	}{
		{"the same identity", thisHub, true, 0},
		{"another", "new.azure-devices.net/edge-1", true, 1},
		{"another, with nothing set aside", "new.azure-devices.net/edge-1", false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			core, logs := observer.New(zap.InfoLevel)
			a, err := agent.New(agent.Options{
				Fetch: new(tokencachetest.Source).Fetch, Rules: edge(), Log: zap.New(core)})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			if err := a.SetTwinDeny(thisHub, []api.DenyRequest{denyModule("vision")}, 1); err != nil {
				t.Fatal(err)
			}
			if _, err := a.Deny("iothub "+thisHub, thisMethod, denyModule("log")); err != nil {
				t.Fatal(err)
			}
			if c.aside {
				if err := a.SetHubAside("uid 0 (pid 1)"); err != nil {
					t.Fatal(err)
				}
			}
			for version := range int64(2) {
				if err := a.SetTwinDeny(c.to, nil, version+2); err != nil {
					t.Fatal(err)
				}
			}
			heeded := logs.FilterField(zap.String("message_id", agent.MessageHubHeeded)).All()
			if len(heeded) != c.lines {
				t.Fatalf("%d lines, not %d", len(heeded), c.lines)
			}
			for _, line := range heeded {
				if fields := line.ContextMap(); fields["set_aside_by"] != "uid 0 (pid 1)" ||
					fields["by"] != "IoT Hub "+c.to ||
					fmt.Sprint(fields["set_aside"]) != "["+thisHub+"]" {
					t.Errorf("%v", fields)
				}
			}
			stays := c.to == thisHub
			if left := a.DenyStatus().Rules; (len(left) == 1) != stays || a.IsHubSetAside("") != (c.aside && stays) {
				t.Errorf("%+v are left", left)
			}
		})
	}
}

// Whatever a twin denies, and however often that changes: nobody is allowed what the grants alone would not allow, and
// while a notification only adds, nobody is allowed more than before it.
func TestNoDenyRuleAllowsAnything(t *testing.T) {
	t.Parallel()
	a, err := agent.New(agent.Options{Fetch: new(tokencachetest.Source).Fetch, Rules: edge()})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	target := func(t *rapid.T) api.DenyRequest {
		pick := func(name string, of ...string) string { return rapid.SampledFrom(append(of, "")).Draw(t, name) }
		r := api.DenyRequest{DenyTarget: api.DenyTarget{
			Module: pick("module", "vision", "gone"), Unit: pick("unit", "camera"),
			User:     pick("user", "1000", "root", "0"),
			Identity: pick("identity", "device", "vision"), Resource: pick("resource", vault, storage+"/"),
		}}
		if r.DenyTarget == (api.DenyTarget{}) {
			r.All = true
		}
		return r
	}
	var asked []grants.Request
	for _, resource := range []string{vault, storage} {
		for _, identity := range []string{"", "device", "vision", "speech"} {
			asked = append(asked, grants.Request{Resource: resource, Identity: identity})
		}
	}
	allowed := func() (all []string) {
		for _, caller := range []grants.Caller{module, user, root} {
			for _, r := range asked {
				if d, refusal := a.Decide(caller, r); refusal == nil {
					all = append(all, fmt.Sprint(caller, r, d.Identity))
				}
			}
		}
		return all
	}
	byGrants := allowed()
	version := int64(0)
	without := func(all, from []string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(one string) bool { return slices.Contains(from, one) })
	}
	rapid.Check(t, func(t *rapid.T) {
		version++
		if err := a.SetTwinDeny(thisHub, rapid.SliceOfN(rapid.Custom(target), 0, 3).Draw(t, "twin"),
			version); err != nil {
			t.Fatal(err)
		}
		before := allowed()
		if more := without(before, byGrants); len(more) > 0 {
			t.Fatalf("the twin allows %q", more)
		}
		version++
		added := rapid.SliceOfN(rapid.Custom(target), 0, 3).Draw(t, "notification")
		if err := tighten(a, thisHub, added, version); err != nil {
			t.Fatal(err)
		}
		if more := without(allowed(), before); len(more) > 0 {
			t.Fatalf("the notification allows %q", more)
		}
	})
}

// The status marks the tokens that nobody gets.
func TestDeniedTokensAreMarked(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		for _, resource := range []string{vault, storage} {
			if code := askFor(a, module, resource); code != "" {
				t.Fatal(code)
			}
		}
		mustDeny(t, a, api.DenyLocal, denyModule("vision"))
		mustDeny(t, a, api.DenyLocal, api.DenyRequest{DenyTarget: api.DenyTarget{Resource: storage + "/"}})
		for _, token := range a.Status().Tokens {
			if token.Denied != (token.Resource == storage) {
				t.Errorf("%s: %v", token.Resource, token.Denied)
			}
		}
	})
}

func TestTwinDenyIsTakenWhole(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		many := make([]api.DenyRequest, deny.MaxRules+1)
		for i := range many {
			many[i] = denyModule("m" + strings.Repeat("x", i%60) + "y" + strings.Repeat("z", i/60))
		}
		for name, targets := range map[string][]api.DenyRequest{
			"names nothing": {denyModule("vision"), {}},
			"module name":   {denyModule("vision"), denyModule("a b")},
			"more than 64":  many,
		} {
			if err := a.SetTwinDeny(thisHub, targets, 3); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %v", name, err)
			}
			if len(targets) > 2 { // what has room denies
				continue
			}
			if err := tighten(a, thisHub, targets, 3); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("a notification, %s: %v", name, err)
			}
		}
		if rules := a.DenyStatus().Rules; len(rules) != 0 {
			t.Errorf("%+v", rules)
		}
		if err := a.SetTwinDeny(thisHub, many[1:], 3); err != nil {
			t.Error(err)
		}
	})
}

// A rule for what is not configured is idle until a reload configures it.
func TestIdleDenyRuleWakesUp(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		rule := mustDeny(t, a, api.DenyLocal, api.DenyRequest{DenyTarget: api.DenyTarget{Identity: "camera"}})
		if rule.Idle == "" {
			t.Error("the rule is not idle")
		}
		rules := edge()
		rules.Identities[1].Name = "camera"
		for i := range rules.Grants {
			if rules.Grants[i].Identity == "vision" {
				rules.Grants[i].Identity = "camera"
			}
		}
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		if code := askFor(a, module, vault); code != api.CodeDenied {
			t.Errorf("%q", code)
		}
		if left := a.DenyStatus().Rules; left[0].Idle != "" {
			t.Errorf("%+v", left)
		}
	})
}
