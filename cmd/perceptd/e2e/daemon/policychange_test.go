package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A day in a minute, on a back end that rolls over at half life.
func fastDays() string {
	return fmt.Sprintf(`[source]
kind = "simulated"
rollover = "half-life"
spread = "5m"
speed = 1440.0

[[identity]]
name = "device"

[[grant]]
caller = { uid = %d }
identity = "device"
resources = [%q]
prefetch = true
`, os.Getuid(), harness.VaultURI)
}

// fetch gets a path and returns the answer's status, header and body.
func fetch(ctx context.Context, client *http.Client, path string) (int, http.Header, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		return 0, nil, "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, nil, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, response.Header, string(text), err
}

// watched is an event on /v1/watch.
type watched struct {
	name string
	api.WatchEvent
}

// watch reads the events on a token until ctx ends, and closes the channel then.
func watch(ctx context.Context, t testing.TB, client *http.Client, path string) <-chan watched {
	t.Helper()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != 200 {
		t.Fatalf("watch: %s", response.Status)
	}
	events := make(chan watched, 100)
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(events)
		defer response.Body.Close()
		var event watched
		for lines := bufio.NewScanner(response.Body); lines.Scan(); {
			name, value, _ := strings.Cut(lines.Text(), ": ")
			switch name {
			case "event":
				event.name = value
			case "data":
				if err := json.Unmarshal([]byte(value), &event.WatchEvent); err != nil {
					t.Errorf("%v: %s", err, value)
				}
			case "":
				if event.name != "" {
					events <- event
				}
				event = watched{}
			}
		}
	})
	t.Cleanup(reading.Wait)
	return events
}

// await returns the first event that is what the caller looks for.
func await(t testing.TB, events <-chan watched, what string, found func(watched) bool) watched {
	t.Helper()
	for event := range events {
		if found(event) {
			return event
		}
	}
	t.Fatalf("the stream ended before %s", what)
	return watched{}
}

// answered is what a request that waits got in the end.
type answered struct {
	status int
	header http.Header
	body   string
	err    error
}

// With the real azidentity: a change of permissions at the back end is noted, told to whoever watches,
// waits or looks, and over when the back end hands out the first token that carries it.
func TestPolicyChangeIsSeen(t *testing.T) {
	t.Parallel()
	manager, told := harness.ListenAsSystemd(t)
	d := harness.LaunchDaemon(t, fastDays(), "NOTIFY_SOCKET="+manager)
	client := harness.Over(t, d.Token())
	events := watch(t.Context(), t, client, api.PathWatch+"?resource="+harness.VaultURI)
	before := await(t, events, "the first token", func(e watched) bool { return e.SHA256 != "" })
	if before.Permissions.State != api.PermissionsCurrent {
		t.Errorf("before: %+v", before)
	}

	const group = "00000000-0000-0000-0002-000000004711"
	harness.SimulatorDo(t, nil, "permissions", "--at", "http://"+d.Status(t).Source.Address, "--identity", "device",
		"--groups", group)
	noted := harness.RecordChange(t, d,
		`{"resource":"`+harness.VaultURI+`","effect":"changed","note":"joined the group"}`)
	if noted.Touched != 1 || noted.Waiting != 1 {
		t.Errorf("noted %+v", noted)
	}
	waiting := make(chan answered, 1)
	go func() {
		var a answered
		path := fmt.Sprintf("%s?resource=%s&issued_after=%d&wait=5m", api.PathToken, harness.VaultURI, noted.At.Unix())
		a.status, a.header, a.body, a.err = fetch(t.Context(), client, path)
		waiting <- a
	}()
	stale := await(t, events, "the news that the token is stale",
		func(e watched) bool { return e.name == api.EventPermissions })
	if p := stale.Permissions; p.State != api.PermissionsStale || !p.Changed.Equal(noted.At) ||
		!p.CurrentBy.After(p.Changed) || stale.SHA256 != before.SHA256 {
		t.Errorf("stale: %+v", stale)
	}
	harness.AwaitMessages(t, told, "1 token, 1 stale, next refresh ")
	checkStale(t, d, client, noted)

	current := await(t, events, "the current token", func(e watched) bool {
		return e.Permissions.State == api.PermissionsCurrent && e.SHA256 != before.SHA256
	})
	if current.name != api.EventToken {
		t.Errorf("current: %+v", current)
	}
	got := <-waiting
	var token api.Token
	if got.err != nil || got.status != 200 || json.Unmarshal([]byte(got.body), &token) != nil {
		t.Fatalf("waiting: %+v", got)
	}
	if got.header.Get(api.PermissionsHeader) != "current" || token.Permissions.State != api.PermissionsCurrent ||
		token.SHA256 == before.SHA256 {
		t.Errorf("waiting: %v, %+v", got.header, token.Permissions)
	}
	if groups, _ := harness.Claims(t, token.AccessToken)["groups"].([]any); len(groups) != 1 || groups[0] != group {
		t.Errorf("the token carries %v", groups)
	}
	harness.AwaitMessages(t, told, "1 token, next refresh ")
	s := d.Status(t)
	if key := s.Tokens[0]; key.Permissions.State != api.PermissionsCurrent || key.Before == nil ||
		!slices.Equal(key.Claims.Groups, []string{group}) || s.Changes[0].Waiting != 0 {
		t.Errorf("status: %+v, %+v", key, s.Changes)
	}
	if !strings.Contains(d.Text(), "the token is current") {
		t.Error("the log says nothing of it")
	}
	if strings.Contains(d.Text(), token.AccessToken) {
		t.Error("token text in the log")
	}
}

// checkStale looks at what a caller and a technician are told while the token is stale.
func checkStale(t testing.TB, d *harness.Daemon, client *http.Client, noted api.PolicyChange) {
	t.Helper()
	status, header, body, err := fetch(t.Context(), client, api.PathToken+"?resource="+harness.VaultURI)
	want := fmt.Sprintf("stale; changed=%d; current-by=", noted.At.Unix())
	if err != nil || status != 200 || !strings.HasPrefix(header.Get(api.PermissionsHeader), want) {
		t.Errorf("a stale token is served and labelled: %d %q %.200s %v",
			status, header.Get(api.PermissionsHeader), body, err)
	}
	s := d.Status(t)
	if len(s.Tokens) != 1 || s.Tokens[0].Permissions.State != api.PermissionsStale || len(s.Changes) != 1 ||
		s.Changes[0].ID != noted.ID {
		t.Errorf("status: %+v, %+v", s.Tokens, s.Changes)
	}
	explain := exec.Command(harness.Binary(t, "perceptctl"), "--socket", d.Token(), "explain", harness.VaultURI)
	if explained, err := explain.CombinedOutput(); err != nil || !strings.Contains(string(explained), "stale") {
		t.Errorf("explain: %v\n%s", err, explained)
	}
}

// Whether a token carries a change is decided by the daemon alone: with a longer propagation delay than is usual,
// explain says of a change a quarter of an hour before the token what the label says.
func TestExplainAgreesWithTheLabel(t *testing.T) {
	t.Parallel()
	config := "[tokens]\nspread = \"30m\"\n\n" + strings.Replace(harness.SimulatedFor(), "prefetch = true\n", "", 1)
	d := harness.LaunchDaemon(t, config)
	at := time.Now().Add(-15 * time.Minute).UTC().Format(time.RFC3339)
	noted := harness.RecordChange(t, d, `{"all_resources":true,"effect":"changed","at":"`+at+`"}`)
	if status, body, err := d.Get(d.Token(), harness.VaultToken); err != nil || status != 200 {
		t.Fatalf("%d %s %v", status, body, err)
	}
	token := d.Status(t).Tokens[0]
	if want := []api.TokenChange{{ID: noted.ID, State: api.PermissionsUncertain}}; !slices.Equal(token.Changes, want) {
		t.Errorf("the status says %+v, want %+v", token.Changes, want)
	}
	explained, err := exec.Command(harness.Binary(t, "perceptctl"), "--socket", d.Token(), "explain",
		harness.VaultURI).CombinedOutput()
	flat := strings.Join(strings.Fields(string(explained)), " ")
	if err != nil || !strings.Contains(flat, "is uncertain") || !strings.Contains(flat, "cannot be told") ||
		strings.Contains(flat, "and carries it") {
		t.Errorf("explain: %v\n%s", err, explained)
	}
}
