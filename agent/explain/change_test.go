package explain

import (
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
)

// TestWithdrawal shows that a change of the twin is withdrawn in IoT Hub, and no other.
func TestWithdrawal(t *testing.T) {
	t.Parallel()
	change := func(id string) TokenChange {
		return TokenChange{PolicyChange: api.PolicyChange{ID: id, Effect: api.EffectRevoked}}
	}
	const here, there = "perceptctl policy-changes withdraw ", TwinWithdrawal
	for want, changes := range map[string][]TokenChange{
		here + "ID (perceptctl policy-changes lists them)": nil,
		here + "1f0c2a34 77aa00ff":                         {change("1f0c2a34"), change("77aa00ff")},
		there + " (twin-1f0c2a34)":                         {change("twin-1f0c2a34")},
		here + "1f0c2a34; " + there + " (twin-77aa00ff)":   {change("twin-77aa00ff"), change("1f0c2a34")},
	} {
		if got := (explainer{}).withdrawal(revocations(changes)); got != want {
			t.Errorf("%q\nwant %q", got, want)
		}
		if strings.Contains((explainer{}).withdrawal(changes), here+"twin-") {
			t.Error("a change of the twin is not withdrawn here")
		}
	}
	aside := explainer{deny: &api.DenyStatus{HubSetAsideOn: time.Unix(1e9, 0)}}
	if got := aside.withdrawal([]TokenChange{change("twin-77aa00ff")}); got != here+"twin-77aa00ff" {
		t.Errorf("while the hub is set aside: %q", got)
	}
}
