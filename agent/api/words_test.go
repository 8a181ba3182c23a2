package api

import (
	"testing"
)

// Programs that talk to perceptd compare these words: none may change.
func TestWords(t *testing.T) {
	t.Parallel()
	for want, got := range map[string]string{
		"current": string(PermissionsCurrent), "stale": string(PermissionsStale),
		"uncertain": string(PermissionsUncertain),

		"granted": string(EffectGranted), "revoked": string(EffectRevoked), "changed": string(EffectChanged),
		"unknown": string(EffectUnknown),

		"newer": string(OutcomeNewer), "unchanged": string(OutcomeUnchanged), "older": string(OutcomeOlder),
		"former":    string(OutcomeFormer),
		"simulated": string(OutcomeSimulated), "failed": string(OutcomeFailed), "held": string(OutcomeHeld),

		"fresh": string(StateFresh), "refresh": string(StateRefresh), "failing": string(StateFailing),
		"fetching": string(StateFetching),
		"missing":  string(StateMissing), "idle": string(StateIdle),

		"unlearnt": string(RolloverUnlearnt), "regular": string(RolloverRegular),
		"irregular": string(RolloverIrregular),

		"throttled": string(CodeThrottled), "unreachable": string(CodeUnreachable),
		"malformed_answer":   string(CodeMalformedAnswer),
		"identity_not_found": string(CodeIdentityNotFound), "refused": string(CodeRefused),
	} {
		if got != want {
			t.Errorf("%q is written as %q", want, got)
		}
	}
}
