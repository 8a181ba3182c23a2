package agent_test

import (
	"fmt"
	"testing"

	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/grants"
	"perceptd/tokencache/tokencachetest"
)

// A service, container or module has processes of several users: none learns what another was denied, or how often.
func TestDenialsOfOneUser(t *testing.T) {
	t.Parallel()
	const shared, secret = "https://shared.example", "https://secret-project.example"
	for name, caller := range map[string]grants.Caller{
		"service":   {Unit: "cron.service"},
		"module":    {Module: "speech"},
		"container": {Container: &grants.Container{ID: "0123456789ab", Name: "cam", Digest: "sha256:x"}},
		"user":      {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			one, other := caller, caller
			one.UID, other.UID = 7, 8
			bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
				for _, ask := range []struct {
					caller   grants.Caller
					resource string
				}{{one, shared}, {one, secret}, {other, shared}, {one, shared}} {
					if _, err := a.Token(t.Context(), ask.caller, requestFor(ask.resource)); err == nil {
						t.Fatal("a token")
					}
				}
				shown := func(caller grants.Caller) (text string) {
					for _, d := range a.DenialsOf(caller) {
						text += fmt.Sprintf("%s %d times, ", d.Resource, d.Count)
					}
					return text
				}
				if got := shown(other); got != shared+" 1 times, " {
					t.Errorf("to one: %s", got)
				}
				if got := shown(one); got != shared+" 2 times, "+secret+" 1 times, " {
					t.Errorf("to the other: %s", got)
				}
				if all := a.Status().Denials; len(all) != 3 {
					t.Errorf("the status: %+v", all)
				}
			})
		})
	}
}
