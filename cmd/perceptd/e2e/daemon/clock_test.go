package daemon

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// With speed all that the daemon tells of times goes by the clock that runs fast: what is an hour off comes nearer.
func TestTimesGoByTheFastClock(t *testing.T) {
	t.Parallel()
	fast := strings.Replace(harness.SimulatedFor(), `kind = "simulated"`, "kind = \"simulated\"\nspeed = 100000", 1)
	d := harness.LaunchDaemon(t, fast)
	changes := func(method, body string) (a struct {
		api.PolicyChangeAnswer
		Changes []api.PolicyChange
	}) {
		t.Helper()
		status, text, err := d.Ask(d.Admin(), method, api.PathPolicyChanges, body)
		if err != nil || status != 200 || json.Unmarshal([]byte(text), &a) != nil {
			t.Fatal(status, text, err)
		}
		return a
	}
	first := d.Status(t)
	noted := changes("POST", `{"all_resources":true,"effect":"changed"}`)
	list := changes("GET", "")
	if status, body := d.Reload(t, fast); status != 200 {
		t.Fatal(status, body)
	}
	after := d.Status(t)
	if status, _ := d.Reload(t, "nonsense"); status != 422 {
		t.Fatal(status)
	}
	last := d.Status(t)
	moments := []time.Time{first.StartedOn, first.Now, noted.NotedOn, noted.Now, list.Now, after.Config.LoadedOn, after.Now, *last.Config.ErrorOn, last.Now}
	for i, at := range moments[1:] {
		if !at.After(moments[i]) {
			t.Errorf("moment %d is not after the one before it: %v", i+1, moments)
		}
	}
	if len(list.Changes) != 1 || !(list.Changes[0].EndsOn.Sub(list.Now) < noted.EndsOn.Sub(noted.NotedOn)) {
		t.Errorf("the change does not come nearer to its end: %+v", list)
	}
}
