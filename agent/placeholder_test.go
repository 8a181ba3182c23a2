package agent

import (
	"context"
	"errors"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// On the wire a placeholder is not a revocation, though it may withhold as much.
func TestPlaceholdersAreNoRevocations(t *testing.T) {
	t.Parallel()
	for _, withhold := range []bool{true, false} {
		a, err := New(Options{
			Fetch: func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
				return tokencache.Fetched{}, errors.New("none")
			},
			Rules: Rules{Rules: grants.Rules{Identities: []grants.Identity{{Name: "edge"}}},
				WithholdLost: withhold},
			LostRecord: errors.New("it is not JSON"),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		all := a.Changes()
		if len(all) != 1 || all[0].Effect != api.EffectUnknown || all[0].Record != api.RecordLost ||
			all[0].Withholds != withhold || all[0].Mend == "" {
			t.Errorf("%+v", all)
		}
	}
}
