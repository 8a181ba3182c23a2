package agent_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// A policy change is about every spelling of its resource; requests and grants are exact, and a denial says what is
// granted.
func TestSpellings(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		ask(t, a, module, requestFor(vault))
		time.Sleep(time.Hour)
		for _, resource := range []string{vault + "/", "HTTPS://VAULT.azure.net", vault + ":443/.default"} {
			noted := note(t, a, api.PolicyChangeRequest{Resource: resource, Effect: tokencache.Revoked})
			if noted.Resource != vault || noted.Touched != 1 || noted.Waiting != 1 {
				t.Errorf("%s: %+v", resource, noted)
			}
			if _, err := a.Token(t.Context(), module, requestFor(vault)); codeOf(err) != api.CodeRevoked {
				t.Errorf("%s: %v", resource, err)
			}
			if _, err := a.WithdrawChange("test", noted.ID); err != nil {
				t.Error(err)
			}
			ask(t, a, module, requestFor(vault))
		}
		says := "grant 1 names " + vault + ", which differs in the slash at the end alone: ask for that one"
		if _, err := a.Token(t.Context(), module,
			requestFor(vault+"/")); codeOf(err) != api.CodeNotGranted || !strings.Contains(err.Error(), says) {
			t.Errorf("a request: %v", err)
		}
		if d, _ := a.Decide(module, grants.Request{Resource: vault + "/"}); d.Allowed ||
			!strings.Contains(fmt.Sprint(d.Evaluations), "decides, and names "+vault+", which") {
			t.Errorf("a decision: %+v", d)
		}
	})
}

// A revocation finds room on a full record, and the status says what stands for others until it is withdrawn.
func TestFullRecordIsTold(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		for range tokencache.MaxChanges {
			note(t, a, api.PolicyChangeRequest{Resource: vault, Identity: "vision", Effect: tokencache.Revoked})
		}
		if trouble := a.Status().Trouble; len(trouble) != 0 {
			t.Errorf("before: %q", trouble)
		}
		note(t, a, api.PolicyChangeRequest{Resource: storage, Identity: "vision", Effect: tokencache.Revoked})
		if n := len(z.record()); n != tokencache.MaxChanges {
			t.Errorf("%d kept", n)
		}
		var joined api.PolicyChange
		for _, c := range a.Changes() {
			if c.Joined > 0 {
				joined = c
			}
		}
		trouble := a.Status().Trouble
		if len(trouble) != 1 || !strings.Contains(trouble[0],
			joined.ID+` stands for 1 more, and is about identity "vision" and `+vault+" ") {
			t.Errorf("%q", trouble)
		}
		if _, err := a.WithdrawChange("test", joined.ID); err != nil || len(a.Status().Trouble) != 0 {
			t.Errorf("withdrawn: %v, %q", err, a.Status().Trouble)
		}
	})
}
