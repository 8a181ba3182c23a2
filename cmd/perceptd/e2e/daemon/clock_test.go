package daemon

import (
	"encoding/json"
	"regexp"
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
	moments := []time.Time{first.StartedOn, first.Now, noted.RecordedOn, noted.Now, list.Now, after.Config.LoadedOn,
		after.Now, last.Config.ErrorOn, last.Now}
	for i, at := range moments[1:] {
		if !at.After(moments[i]) {
			t.Errorf("moment %d is not after the one before it: %v", i+1, moments)
		}
	}
	if len(list.Changes) != 1 || !(list.Changes[0].EndsOn.Sub(list.Now) < noted.EndsOn.Sub(noted.RecordedOn)) {
		t.Errorf("the change does not come nearer to its end: %+v", list)
	}
}

// Wherever the device is, every time in an answer is in UTC and whole seconds, which jq's fromdate reads too.
func TestTimesAreInUTC(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor(), "TZ=Asia/Kolkata")
	var all []string
	ask := func(socket, method, path, body string, want int) {
		t.Helper()
		status, text, err := d.Ask(socket, method, path, body)
		if err != nil || status != want {
			t.Fatal(path, status, text, err)
		}
		all = append(all, text)
	}
	at := time.Now().Add(-time.Minute).In(time.FixedZone("", 3600)).Format(time.RFC3339Nano)
	ask(d.Admin(), "POST", api.PathPolicyChanges, `{"all_resources":true,"effect":"changed","at":"`+at+`"}`, 200)
	ask(d.Token(), "GET", api.PathToken+"?resource="+harness.VaultURI, "", 200)
	ask(d.Token(), "POST", api.PathRejected, `{"resource":"`+harness.VaultURI+`","status":403}`, 200)
	ask(d.Token(), "GET", api.PathWhoAmI, "", 200)
	if status, _ := d.Reload(t, "nonsense"); status != 422 {
		t.Fatal(status)
	}
	if status, text, err := d.Get(d.Token(), api.PathToken+"?resource=https://not.granted"); status != 403 {
		t.Fatal(status, text, err)
	}
	ask(d.Admin(), "GET", api.PathPolicyChanges, "", 200)
	ask(d.Admin(), "GET", api.PathStatus, "", 200)
	answers := strings.Join(all, "")
	for _, field := range []string{"at", "noted_on", "ends_on", "now", "expires_on", "received_on", "changed",
		"current_by", "retry_on",
		"started_on", "loaded_on", "error_on", "last_fetch", "minted_from", "refused", "on"} {
		values := regexp.MustCompile(`"`+field+`":("[^"]*"|\d+)`).FindAllStringSubmatch(answers, -1)
		if len(values) == 0 {
			t.Errorf("no answer has %q", field)
		}
		for _, value := range values {
			if !regexp.MustCompile(`^"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"$`).MatchString(value[1]) {
				t.Errorf("%q is %s", field, value[1])
			}
		}
	}
	for _, other := range regexp.MustCompile(
		`"[^"]*":"\d{4}-\d\d-\d\dT[^"]*[^Z]"|"\w+":1[0-9]{9}\b`).FindAllString(answers, -1) {
		t.Errorf("in another form: %s", other)
	}
}
