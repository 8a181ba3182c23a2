package grants_test

import (
	"testing"

	"perceptd/agent/grants"
)

func TestCallersNameThemselves(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		caller grants.Caller
		want   string
	}{
		{grants.Caller{Module: "vision", UID: 0, PID: 7}, "module vision (uid 0, pid 7)"},
		{grants.Caller{Module: "vision", Container: image(imageID), PID: 7},
			"module vision (container abababababab, uid 0, pid 7)"},
		{grants.Caller{Container: image(imageID), UID: 5, PID: 7},
			"container cam (container abababababab, uid 5, pid 7)"},
		{grants.Caller{Unit: "cam.service", UID: 5, PID: 7}, "unit cam.service (uid 5, pid 7)"},
		{grants.Caller{Unit: "cam.service", UID: 5, PID: 7, Nested: true},
			"unit cam.service (uid 5 in a pid namespace of its own, pid 7)"},
		{grants.Caller{UID: 5, PID: 7}, "uid 5 (pid 7)"},
		{grants.Caller{UID: grants.NoID, GID: 44}, "gid 44"},
		{grants.Caller{UID: grants.NoID, GID: grants.NoID, Unit: "cam.service"}, "unit cam.service"},
		{grants.Caller{UID: grants.NoID, GID: grants.NoID, PID: 7}, "pid 7"},
		{grants.Caller{UID: grants.NoID, GID: grants.NoID}, "somebody"},
	} {
		if got := row.caller.String(); got != row.want {
			t.Errorf("%q, want %q", got, row.want)
		}
	}
}
