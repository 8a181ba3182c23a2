package agent_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// While no configuration is in force every kind of request for a token is refused with the reason, and so is its
// decision; the tokens that are held are kept for when one is.
func TestNoRules(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		if _, err := a.Token(t.Context(), module, requestFor(vault)); err != nil {
			t.Fatal(err)
		}
		const why = "/etc/percept/config.toml cannot be read: permission denied; chmod 0644 it, then perceptctl reload"
		if _, err := a.Apply(agent.Rules{NoRules: why}); err != nil {
			t.Fatal(err)
		}
		waiting := requestFor(vault)
		waiting.Wait = time.Minute
		_, token := a.Token(t.Context(), module, requestFor(vault))
		_, wait := a.Token(t.Context(), module, waiting)
		_, _, watch := a.Peek(module, requestFor(vault))
		_, rejected := a.Rejected(t.Context(), module, api.Rejection{Resource: vault, Status: 403})
		d, decided := a.Decide(module, grants.Request{Resource: vault})
		for form, err := range map[string]error{
			"token": token, "wait": wait, "watch": watch, "rejected": rejected, "check": decided,
			"whoami": a.WhyNothing(module),
		} {
			if codeOf(err) != api.CodeNoConfiguration || !strings.Contains(err.Error(), why) {
				t.Errorf("%s: %v", form, err)
			}
		}
		if d.Allowed || !strings.Contains(d.Reason, why) || decided.RetryAfter == 0 || a.WhyNoRules() != why {
			t.Errorf("%+v, %+v", d, decided)
		}
		status := a.Status()
		if status.Ready || len(status.Trouble) != 1 || !strings.Contains(status.Trouble[0], why) {
			t.Errorf("ready %v, trouble %q", status.Ready, status.Trouble)
		}
		if n := a.Counts(); n.Failed != 2 || n.Denied != 0 {
			t.Errorf("%+v", n)
		}
		calls := b.Count()
		if _, err := a.Apply(edge()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Token(t.Context(), module, requestFor(vault)); err != nil || b.Count() != calls {
			t.Errorf("once there is one: %v, and %d calls to the source", err, b.Count()-calls)
		}
	})
}

// What the audit, the counts and the status say of a faulty grant names its place and fault; its token is kept for when
// it is mended, and never handed out until then.
func TestFaultyGrant(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		if _, err := a.Token(t.Context(), module, requestFor(vault)); err != nil {
			t.Fatal(err)
		}
		calls := b.Count()
		rules := edge()
		rules.Grants = rules.Grants[:2]
		rules.Grants[0].Fault, rules.Grants[0].Place = `unknown key "prefech"`, "config.toml:23"
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		const says = `grant 1 (config.toml:23) decides about module vision (uid 0, pid 7), is faulty and gives ` +
			`nothing: unknown key "prefech"`
		_, token := a.Token(t.Context(), module, requestFor(vault))
		_, _, watch := a.Peek(module, requestFor(vault))
		_, rejected := a.Rejected(t.Context(), module, api.Rejection{Resource: vault, Status: 403})
		_, decided := a.Decide(module, grants.Request{Resource: vault})
		for form, err := range map[string]error{
			"token": token, "watch": watch, "rejected": rejected, "check": decided,
		} {
			if codeOf(err) != api.CodeFaultyGrant || !strings.HasPrefix(err.Error(), says) {
				t.Errorf("%s: %v", form, err)
			}
		}
		if n := a.Counts().Denied; n != 1 {
			t.Errorf("%d are denied", n)
		}
		line := logs.FilterMessage("token denied").All()[0].ContextMap()
		if reason, _ := line["reason"].(string); !strings.HasPrefix(reason, says) ||
			line["message_id"] != agent.MessageDenied {
			t.Errorf("%v", line)
		}
		shown := a.Status()
		if d := shown.Denials[0]; d.Code != api.CodeFaultyGrant || !strings.HasPrefix(d.Reason, says) || d.Count != 3 {
			t.Errorf("%+v", d)
		}
		for _, status := range shown.Tokens {
			t.Errorf("the status shows a token that nobody may have: %+v", status)
		}
		if got, err := a.Token(t.Context(), user, agent.Request{Request: grants.Request{Resource: vault}}); err != nil {
			t.Errorf("another caller: %v, %v", got.Identity, err)
		}
		calls = b.Count() - calls
		if _, err := a.Apply(edge()); err != nil {
			t.Fatal(err)
		}
		before := b.Count()
		if _, err := a.Token(t.Context(), module, requestFor(vault)); err != nil || b.Count() != before || calls != 1 {
			t.Errorf("once it is mended: %v, %d calls", err, b.Count()-before)
		}
	})
}

// A caller that waits for a token while its grant becomes faulty does not get it.
func TestGrantBecomesFaultyWhileWaiting(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	b.Latency = 5 * time.Second
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		answered := make(chan error, 1)
		go func() {
			_, err := a.Token(t.Context(), module, requestFor(vault))
			answered <- err
		}()
		time.Sleep(time.Second)
		rules := edge()
		rules.Identities[1].Fault = "x"
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := <-answered; codeOf(err) != api.CodeFaultyGrant {
			t.Errorf("%v", err)
		}
	})
}

// A revocation of an identity stays on record while that is faulty, and withholds its older token once it is mended.
func TestRevocationOfIdleIdentityStays(t *testing.T) {
	t.Parallel()
	b := new(tokencachetest.Source)
	bubble(t, edge(), b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		if _, err := a.Token(t.Context(), module, requestFor(vault)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		change := api.PolicyChangeRequest{Resource: vault, Identity: "vision", Effect: tokencache.Revoked}
		if _, err := a.RecordChange("test", change); err != nil {
			t.Fatal(err)
		}
		rules := edge()
		rules.Identities[1] = grants.Identity{Name: "vision", Fault: "client_id is a number: it must be a text"}
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		if all := a.Changes(); len(all) != 1 || all[0].Identity != "client_id "+guid1 {
			t.Errorf("%+v", all)
		}
		if _, err := a.RecordChange("test", change); codeOf(err) != api.CodeFaultyGrant ||
			!strings.Contains(err.Error(), "for all identities") {
			t.Errorf("another one, of whose selector nothing is known: %v", err)
		}
		if _, err := a.Refresh(t.Context(), "vision", "", false); codeOf(err) != api.CodeFaultyGrant {
			t.Errorf("refreshed: %v", err)
		}
		status := a.Status()
		if i := status.Identities[1]; i.Fault == "" || i.Selector != "not understood" || i.Principal != nil {
			t.Errorf("%+v", i)
		}
		if _, err := a.Apply(edge()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Token(t.Context(), module, requestFor(vault)); codeOf(err) != api.CodeRevoked {
			t.Errorf("once it is mended: %v", err)
		}
	})
}

// A revocation counts for what a faulty [[resource]] names beside its resource.
func TestRevocationByIdleAlternate(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*agent.Rules){
		"idle":           func(r *agent.Rules) { r.IdleAlternates = map[string][]string{vault: {storage}} },
		"not understood": func(r *agent.Rules) { r.AnyAlternate = true },
	} {
		rules := edge()
		change(&rules)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := new(tokencachetest.Source)
			bubble(t, rules, b, func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
				if _, err := a.Token(t.Context(), module, requestFor(storage)); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				if _, err := a.RecordChange("test",
					api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Revoked}); err != nil {
					t.Fatal(err)
				}
				if _, err := a.Token(t.Context(), module, requestFor(storage)); codeOf(err) != api.CodeRevoked {
					t.Errorf("%v", err)
				}
				if _, err := a.Apply(edge()); err != nil {
					t.Fatal(err)
				}
				if _, err := a.Token(t.Context(), module, requestFor(storage)); err != nil {
					t.Errorf("once it is mended, and names no alternate: %v", err)
				}
			})
		})
	}
}

// A policy change can be noted for a resource that a grant may name which is not understood.
func TestChangeForWhatMayBeNamed(t *testing.T) {
	t.Parallel()
	const other = "https://cognitiveservices.azure.com"
	rules := edge()
	rules.Grants[0] = grants.Grant{Fault: "x", Unclear: grants.AllKinds, AnyResource: true}
	bubble(t, rules, new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		change := api.PolicyChangeRequest{Resource: other, Effect: tokencache.Revoked}
		if c, err := a.RecordChange("test", change); err != nil || c.Resource != other {
			t.Errorf("%+v, %v", c, err)
		}
		if _, err := a.Apply(edge()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.RecordChange("test", change); codeOf(err) != api.CodeBadRequest || len(a.Changes()) != 1 {
			t.Errorf("under sound rules: %v, %+v", err, a.Changes())
		}
	})
}
