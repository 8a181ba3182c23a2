package agent_test

import (
	"testing"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/explain"
	"perceptd/agent/grants"
	"perceptd/tokencache/tokencachetest"
)

// TestScreensCoverWhatIsDenied shows that what people read of a deny rule is about the tokens that it denies, and no
// others: in any spelling, and by every name that a resource has.
func TestScreensCoverWhatIsDenied(t *testing.T) {
	t.Parallel()
	const blob, queue, file = "https://blob.storage.azure.net", "https://queue.storage.azure.net", "api://Files/x"
	rules := edge()
	for i := range rules.Grants {
		rules.Grants[i].Resources = []string{vault, storage, blob, queue, file}
	}
	rules.Alternates = map[string][]string{storage: {blob}, queue: {blob, file}}
	names := deny.Names{Rules: rules.Rules, LookupUser: func(string) (uint32, bool, error) { return 1000, true, nil }}
	spelled := []string{
		"", vault, "HTTPS://Vault.Azure.Net:443//", vault + "/.default", storage, storage + "/", blob, blob + ":443",
		queue,
		queue + "/.default", file, "API://files/x/", "api://files/X", "https://elsewhere.example", guid1,
	}
	others := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		a, err := agent.New(agent.Options{Fetch: new(tokencachetest.Source).Fetch, Rules: rules, Log: zap.NewNop()})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		target := api.DenyTarget{
			Module:   rapid.SampledFrom([]string{"", "", "vision"}).Draw(t, "module"),
			Identity: rapid.SampledFrom([]string{"", "", "device", "vision", "gone"}).Draw(t, "identity"),
			Resource: rapid.SampledFrom(spelled).Draw(t, "resource"),
		}
		if target == (api.DenyTarget{}) {
			target.All = true
		}
		if _, err := a.Deny("uid 0 (pid 1)", api.DenySide{Origin: api.DenyLocal},
			api.DenyRequest{DenyTarget: target}); err != nil {
			t.Fatal(err)
		}
		said := a.DenyStatus().Rules[0]
		list := deny.Compile(deny.Record{Rules: []deny.Rule{{ID: "a", Target: target}}}, names)
		for _, identity := range rules.Identities {
			for _, resource := range spelled[1:] {
				denied := list.Denies(&grants.Caller{Module: "vision"}, &identity, resource) != nil
				if got := explain.Covers(said, identity.Name, resource); got != denied {
					t.Fatalf("%v (%v): %s for %s is denied: %v, and said to be: %v", target, said.Resources,
						identity.Name, resource, denied, got)
				}
				others[denied]++
			}
		}
	})
	if others[true] == 0 || others[false] == 0 {
		t.Errorf("drawn: %v", others)
	}
}
