package attest

import (
	"testing"

	"perceptd/agent"
)

// Everything below a user's slice is that user's, whatever it has made of itself; nothing else is anybody's.
func TestSessionOwners(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]uint32{
		"/user.slice/user-1000.slice/session-3.scope":                                 1000,
		"/user.slice/user-1000.slice/user@1000.service/app.slice/a.service":           1000,
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-x.scope/any": 1000,
		"/user.slice/user-0.slice/session-1.scope":                                    0,
		"/user.slice/user-1000.slice":                                                 agent.NoID,
		"/system.slice/user.slice/user-1000.slice/a":                                  agent.NoID,
		"/system.slice/cron.service":                                                  agent.NoID,
		"/user.slice/user-99999999999.slice/session-3.scope":                          agent.NoID,
		"": agent.NoID,
	} {
		at := location{path: path}
		if got := at.owner(); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
}
