package iothub

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
)

// 200 calls at once are all answered, also while the hub is slow to acknowledge, and the device is there afterwards.
func TestManyMethodsAtOnce(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	j.hub.Faults.PubackDelay.Store(int64(time.Millisecond))
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			status, answer, err := j.hub.InvokeMethod(j.ctx, joinedID, api.MethodStatus, nil)
			var got api.StatusAnswer
			if err != nil || status != 200 || json.Unmarshal(answer, &got) != nil || len(got.Tokens) != 3 {
				t.Errorf("%d %.200s %v", status, answer, err)
			}
		})
	}
	all.Wait()
	status, answer, err := j.hub.InvokeMethod(j.ctx, joinedID, "Percept.Unknown", []byte(`{"a":[1]}`))
	if err != nil || status != 404 || !strings.Contains(string(answer), `"code":"unknown_method"`) {
		t.Errorf("%d %s %v", status, answer, err)
	}
	if n := j.hub.Counters(joinedID).Connects; n != 1 {
		t.Errorf("%d connections", n)
	}
}

// Events reach the hub, each in its turn, with the properties by which they are routed.
func TestEventsReachTheHub(t *testing.T) {
	t.Parallel()
	j := join(t, func(o *Options) {
		o.Events = true
		o.Status = func() api.Status {
			s := failing(0)
			s.Deny.Lost = "the file is damaged"
			return s
		}
	})
	if err := j.hub.WaitEvents(j.ctx, joinedID, func(all []hubtest.Event) bool { return len(all) == 2 }); err != nil {
		t.Fatal(err)
	}
	var kinds []api.HubEventType
	for _, e := range j.hub.Events(joinedID) {
		var body api.HubEvent
		if err := json.Unmarshal(e.Body, &body); err != nil {
			t.Fatal(err)
		}
		p := e.Properties
		if p["type"] != string(body.Type) || p["severity"] != "error" || p["identity"] != body.Identity ||
			p["resource"] != body.Resource || p["$.ct"] != "application/json" || p["$.ce"] != "utf-8" ||
			p["$.ctime"] == "" || p["$.mid"] == "" {
			t.Errorf("%s with %v", e.Body, p)
		}
		kinds = append(kinds, body.Type)
	}
	if fmt.Sprint(kinds) != fmt.Sprint([]api.HubEventType{api.HubEventTokenTrouble, api.HubEventDenyRulesLost}) {
		t.Errorf("%v", kinds)
	}
}

// blocks returns the code blocks of a kind in a page of docs.
func blocks(t *testing.T, page, kind string) (all []string) {
	t.Helper()
	text, err := os.ReadFile("../../docs/" + page)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range regexp.MustCompile("(?s)```"+kind+"\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		all = append(all, strings.TrimSpace(block[1]))
	}
	if len(all) == 0 {
		t.Fatalf("%s has no block of %s", page, kind)
	}
	return all
}

// ask asks the hub as a service does.
func (j *joined) ask(t *testing.T, method, path, body string) []byte {
	t.Helper()
	status, answer, err := j.hub.Ask(j.ctx, method, path, body)
	if err != nil || status != 200 {
		t.Fatalf("%s %s %s: %d %s %v", method, path, body, status, answer, err)
	}
	return answer
}

// The queries in the docs find a device whose tokens lack a policy change, and fail, and are denied.
func TestDocumentedQueries(t *testing.T) {
	t.Parallel()
	j := join(t, func(o *Options) {
		o.ReportEvery, o.ReportSpread = time.Nanosecond, time.Nanosecond
		o.Status = func() api.Status {
			s := failing(600)
			s.Tokens[0].Permissions.State = api.PermissionsStale
			s.Deny.Rules = []api.DenyRule{{ID: "rule-1", Origin: api.DenyLocal, DenyTarget: api.DenyTarget{All: true}}}
			return s
		}
	})
	isThere := func(reported map[string]any) bool { return reported["percept"] != nil }
	if err := j.hub.WaitReported(j.ctx, joinedID, isThere); err != nil {
		t.Fatal(err)
	}
	j.ask(t, "PATCH", "/twins/"+joinedID, `{"tags":{"ring":1}}`)
	for _, query := range append(blocks(t, "fleet.md", "sql"), blocks(t, "iothub.md", "sql")...) {
		body, err := json.Marshal(map[string]string{"query": query})
		if err != nil {
			t.Fatal(err)
		}
		var found []map[string]any
		if err := json.Unmarshal(j.ask(t, "POST", "/devices/query", string(body)), &found); err != nil {
			t.Fatal(err)
		}
		if ofModules := strings.Contains(query, "devices.modules"); ofModules != (len(found) == 0) ||
			!ofModules && found[0]["deviceId"] != joinedID {
			t.Errorf("%s: %v", query, found)
		}
	}
}

// The configuration in docs/fleet.md sets what a device takes, and when it is deleted that is gone.
func TestDocumentedConfiguration(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	j.await(t, "the first twin", func(s api.HubStatus) bool { return s.Desired.Version == 1 })
	j.ask(t, "PATCH", "/twins/"+joinedID, `{"tags":{"site":"north"}}`)
	at := time.Now().UTC().Format(time.RFC3339) // one that is long ago would be over
	shown := regexp.MustCompile(`"at": "[^"]+"`).ReplaceAllString(blocks(t, "fleet.md", "json")[0], `"at": "`+at+`"`)
	j.ask(t, "PUT", "/configurations/vault-rotation", shown)
	s := j.await(t, "the configuration", func(s api.HubStatus) bool { return s.Desired.Version == 2 }).Desired
	if s.Applied != 2 || s.Refused != "" || fmt.Sprint(j.changes()) != "[granted "+vault+"]" {
		t.Errorf("%+v, %v", s, j.changes())
	}
	status, answer, err := j.hub.Ask(j.ctx, "DELETE", "/configurations/vault-rotation", "")
	if err != nil || status > 204 {
		t.Fatalf("%d %s %v", status, answer, err)
	}
	j.await(t, "its end", func(s api.HubStatus) bool { return s.Desired.Applied == 3 })
	if len(j.changes()) != 0 {
		t.Errorf("%v", j.changes())
	}
}
