package main

import (
	"strings"
	"testing"

	"perceptd/agent/api"
)

// A token that is not there, though no fetch of its key has failed, is told of with a reason: its call was turned away.
func TestMissingTokenHasAReason(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		failures        int
		failed          string
		is, explanation string
	}{
		{0, "", "there is none yet", "has not been asked for one since"},
		{0, "unreachable: connection refused", "unreachable: connection refused", "has not been asked for one since"},
		{3, "refused: no", "refused: no", "did not give one"},
	} {
		token := api.TokenStatus{State: api.StateMissing, Failures: row.failures, LastError: row.failed}
		all := examineTokens(api.Status{Tokens: []api.TokenStatus{token}})
		if len(all) != 1 || all[0].Is != row.is {
			t.Errorf("%+v: %+v", row, all)
		}
		if got := (explainer{token: token}).summary(); !strings.Contains(got, row.explanation) {
			t.Errorf("%+v: %s", row, got)
		}
	}
}
