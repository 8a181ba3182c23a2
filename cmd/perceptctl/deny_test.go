package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

// narrowRules is the list of deny rules within 60 columns.
const narrowRules = `set aside: root set aside what IoT Hub denies, at 11:00 (1h
           ago); to heed it again: sudo perceptctl deny
           heed-hub

ID        SINCE         DENIED
9b2e7c10  11:00         module vision, id…://vault.azure.net
  by IoT Hub, twin version 1234567: camera 4 was stolen
77aa00ff  Nov 21 12:00  unit a-service-wi…ong-name@1.service
  by IoT Hub, direct method
  idle: no grant names it
1f0c2a34  11:59         everything
  by uid 1000 (pid 123456)
`

// TestDenyOnANarrowTerminal shows what is denied, and how the hub is connected, within 60 columns.
func TestDenyOnANarrowTerminal(t *testing.T) {
	t.Parallel()
	rules := []api.DenyRule{
		{ID: "9b2e7c10", Origin: api.DenyTwin, Twin: 1234567, Since: noon.Add(-time.Hour), Note: "camera 4 was stolen",
			DenyTarget: api.DenyTarget{Module: "vision", Identity: "device", Resource: "https://vault.azure.net"}},
		{ID: "77aa00ff", Origin: api.DenyMethod, Since: noon.Add(-48 * time.Hour),
			DenyTarget: api.DenyTarget{Unit: "a-service-with-a-long-name@1.service"}, Idle: "no grant names it"},
		{ID: "1f0c2a34", Origin: api.DenyLocal, By: "uid 1000 (pid 123456)", Since: noon.Add(-time.Minute),
			DenyTarget: api.DenyTarget{All: true}},
	}
	denied := api.DenyStatus{Rules: rules, HubSetAsideOn: noon.Add(-time.Hour)}
	status := api.Status{
		Version: "1.2.3", Now: noon, StartedOn: noon.Add(-time.Hour), Ready: true, Deny: &denied,
		Source: api.SourceStatus{Kind: "managed-identity", Endpoint: "arc"},
		Config: api.ConfigStatus{LoadedOn: noon.Add(-time.Hour)},
		Tokens: []api.TokenStatus{aToken("device", "https://vault.azure.net", 9*time.Hour)},
		Hub: &api.HubStatus{
			Hub: "a-hub-with-a-long-name.azure-devices.net", Device: "edge-17", Module: "percept",
			Transport: "websocket",
			Since:     noon.Add(-time.Hour), Failure: api.HubFailureNetwork, LastErrorOn: noon.Add(-time.Minute),
			LastError: "dial tcp 203.0.113.7:443: connect: no route to host", NextTry: noon.Add(time.Minute),
			Desired: api.DesiredStatus{Version: 13, Applied: 12, ReadOn: noon.Add(-2 * time.Hour),
				Refused: "deny[0]: it " +
					"names nothing"},
		},
	}
	d := startDaemon(t)
	for path, answer := range map[string]any{
		api.PathStatus: status, api.PathGrants: api.Grants{Grants: []api.Grant{{Caller: "module vision",
			Identity: "device", Resources: []string{"https://vault.azure.net"}}}},
		"GET " + api.PathDeny:    api.DenyRules{Now: noon, DenyStatus: denied},
		"POST " + api.PathDeny:   api.DenyAnswer{Now: noon, DenyRule: rules[2]},
		api.PathDenyHub:          api.DenyRules{Now: noon, DenyStatus: denied},
		api.PathDenyLost:         api.DenyRules{Now: noon, DenyStatus: denied},
		"DELETE " + api.PathDeny: api.DenyAnswer{Now: noon, DenyRule: rules[2]},
		api.PathWhoAmI:           api.WhoAmI{Proved: true, Now: noon},
	} {
		body, err := json.Marshal(answer)
		if err != nil {
			t.Fatal(err)
		}
		d.answer(path, fakeAnswer{status: http.StatusOK, body: string(body)})
	}
	for _, args := range [][]string{
		{"deny"}, {"deny", "--all"}, {"deny", "lift", "1f0c2a34"}, {"deny", "lift", "--from-hub"}, {"deny", "heed-hub"},
		{"deny", "forget-lost"}, {"status"}, {"doctor"}, {"explain", "https://vault.azure.net"},
	} {
		shown, stderr, _ := onTerminal(t, t.Context(), 60, args, d.environ("TERM=dumb", "TZ=UTC", "LANG=C.UTF-8"))
		if shown == "" || stderr != "" {
			t.Errorf("%q: %q, and on standard error %q", args, shown, stderr)
		}
		checkWidth(t, shown, 60, false)
		if args[0] == "deny" && len(args) == 1 && shown != narrowRules {
			t.Errorf("%s\nwant\n%s", shown, narrowRules)
		}
	}
}

// TestWhatDeniesEverythingComesFirst shows that rules which came later do not hide the one that denies everything.
func TestWhatDeniesEverythingComesFirst(t *testing.T) {
	t.Parallel()
	d := &api.DenyStatus{Rules: []api.DenyRule{
		{ID: "1", DenyTarget: api.DenyTarget{Module: "a"}, Idle: "it is not here"},
		{ID: "2", DenyTarget: api.DenyTarget{Module: "b"}},
		{ID: "3", DenyTarget: api.DenyTarget{Module: "c"}},
		{ID: "4", DenyTarget: api.DenyTarget{All: true}, Since: noon, Origin: api.DenyTwin, Twin: 12},
	}}
	s := screen{Screen: term.Screen{Width: 80}, zone: time.UTC}
	status := s.denyInForce(api.Status{Now: noon, Deny: d})
	if !strings.HasPrefix(status, "denied: everything, since 12:00 ") {
		t.Errorf("status: %s", status)
	}
	all := s.examineAllDenied(noon, d)
	if len(all) != 1 || all[0].Verdict != fail || !strings.Contains(all[0].Is, "everything, since 12:00") ||
		!strings.Contains(all[0].Next, "deny lift --from-hub") {
		t.Errorf("doctor: %+v", all)
	}
	others := examineDeny(noon, d, nil)
	if len(others) != 1 || !strings.HasSuffix(others[0].Is, ": module b; module c; module a (idle)") {
		t.Errorf("doctor, of the others: %+v", others)
	}
	d.Rules[3].SetAside = true
	if all := s.examineAllDenied(noon, d); all != nil {
		t.Errorf("set aside: %+v", all)
	}
}

// TestDenialOfARuleThatIsGone shows that doctor sends nobody to a rule that was lifted since.
func TestDenialOfARuleThatIsGone(t *testing.T) {
	t.Parallel()
	status := api.Status{Now: noon, Deny: &api.DenyStatus{Rules: []api.DenyRule{{ID: "here"},
		{ID: "aside", SetAside: true}}}}
	for _, reason := range []string{"deny rule here: root denies it", "deny rule gone: root denies it",
		"deny rule aside: the twin denies it"} {
		status.Denials = append(status.Denials, api.Denial{Code: api.CodeDenied, Caller: "uid 7", On: noon,
			Reason: reason})
	}
	for i, f := range examineDenials(status) {
		if gone := i > 0; gone != strings.HasSuffix(f.Is, "; lifted since") || gone != (f.Next == "") {
			t.Errorf("%+v", f)
		}
	}
	s := screen{Screen: term.Screen{Width: 120}, zone: time.UTC}
	if text := s.denials(status); strings.Count(text, "; lifted since") != 2 {
		t.Error(text)
	}
}
