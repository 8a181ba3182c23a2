package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

// TestHubFailures shows what doctor says of each kind of failure: what to do, and whether it needs a person at once, or
// only after a while.
func TestHubFailures(t *testing.T) {
	t.Parallel()
	for kind, want := range map[api.HubFailure]struct {
		atOnce severity
		next   string
	}{
		api.HubFailureCredentials: {fail, "perceptd --check"},
		api.HubFailureRefused:     {fail, "the device is there and enabled"},
		api.HubFailureName:        {fail, "getent hosts"},
		api.HubFailureCertificate: {fail, "ca_file"},
		api.HubFailureClock:       {note, "timedatectl"},
		api.HubFailureProxy:       {note, `transport = "websocket"`},
		api.HubFailureIdentity:    {note, "identity service"},
		api.HubFailureNetwork:     {note, "8883"},
		api.HubFailureReplaced:    {fail, "an identity of its own"},
		"":                        {note, "journalctl -u perceptd"},
		"of a newer daemon":       {note, "journalctl -u perceptd"},
	} {
		h := &api.HubStatus{Hub: "h", Device: "d", Failure: kind, LastError: "because",
			Since: noon.Add(-40 * time.Second)}
		for away, verdict := range map[time.Duration]severity{40 * time.Second: want.atOnce, 12 * time.Minute: fail} {
			h.Since = noon.Add(-away)
			all := examineHub(noon, h, nil)
			if len(all) != 1 || all[0].Verdict != verdict || !strings.Contains(all[0].Next, want.next) ||
				!strings.Contains(all[0].Is, " as h/d: because. Tokens are served without it") {
				t.Errorf("%q after %v: %+v", kind, away, all)
			}
		}
	}
	for kind := range hubAdvice {
		if kind == "" || hubAdvice[kind] == "" {
			t.Errorf("%q has no advice", kind)
		}
	}
	if all := examineHub(noon, nil, nil); all != nil {
		t.Errorf("without a hub: %+v", all)
	}
}

// TestTwinThatIsSetAside shows that what root has set aside is no fault, be it sound or not.
func TestTwinThatIsSetAside(t *testing.T) {
	t.Parallel()
	status := api.Status{Now: noon, Deny: &api.DenyStatus{HubSetAsideOn: noon.Add(-time.Hour)},
		Hub: &api.HubStatus{Connected: true, Since: noon.Add(-time.Hour),
			Desired: api.DesiredStatus{Version: 17, Applied: 16, Refused: "root on this device has set aside"}}}
	for _, f := range slices.Concat(examineHub(noon, status.Hub, status.Deny),
		examineDeny(noon, status.Deny, status.Hub)) {
		if f.Verdict == fail || f.What == "twin" || f.Next != "" && !strings.Contains(f.Next, "deny heed-hub") {
			t.Errorf("%+v", f)
		}
	}
	text := screen{Screen: term.Screen{Width: 120}, zone: time.UTC}.hub(status)
	if !strings.Contains(text, "twin version 17 is set aside; nothing is reported yet") ||
		strings.Contains(text, "stays in force") || strings.Contains(text, "refused") {
		t.Error(text)
	}
}

// TestUnreadTwin shows what status and doctor say of a twin that the hub does not let be read, which is a fault after a
// while.
func TestUnreadTwin(t *testing.T) {
	t.Parallel()
	for lasts, verdict := range map[time.Duration]severity{time.Minute: note, 12 * time.Minute: fail} {
		status := api.Status{Now: noon, Hub: &api.HubStatus{Connected: true, Since: noon.Add(-time.Hour),
			TwinError: "IoT Hub answers 429", TwinErrorSince: noon.Add(-lasts),
			Desired: api.DesiredStatus{Version: 7, Applied: 7}}}
		all := examineHub(noon, status.Hub, nil)
		if len(all) != 2 || all[1].Verdict != verdict || all[1].What != "twin" ||
			!strings.Contains(all[1].Next, "docs/fleet.md") {
			t.Errorf("after %v: %+v", lasts, all)
		}
		text := screen{Screen: term.Screen{Width: 200}, zone: time.UTC}.hub(status)
		for _, says := range []string{"twin version 7 is in force", "its twin cannot be read for " +
			explain.Duration(lasts) +
			": IoT Hub answers 429; what it says newly is not in force, but for what notifications add to deny"} {
			if !strings.Contains(text, says) {
				t.Errorf("%q is not in %s", says, text)
			}
		}
	}
}

// TestLostRecordAndTheHub shows what doctor says that the end of a lost record waits for, and that it does not say
// tokens are served meanwhile.
func TestLostRecordAndTheHub(t *testing.T) {
	t.Parallel()
	away := &api.HubStatus{Hub: "h", Device: "d", Since: noon.Add(-time.Minute), LastError: "no route"}
	lost := api.DenyStatus{Lost: "the record is lost"}
	aside := lost
	aside.HubSetAsideOn = noon
	for want, row := range map[string]struct {
		d *api.DenyStatus
		h *api.HubStatus
	}{
		"it waits for h/d, not connected for 1m: no route": {&lost, away},
		"it waits for the twin from h/d": {&lost,
			&api.HubStatus{Hub: "h", Device: "d", Connected: true}},
		"no hub will end this: none is configured":   {&lost, nil},
		"no hub will end this: what IoT Hub sets is": {&aside, away},
	} {
		if f := examineDeny(noon, row.d, row.h)[0]; f.Verdict != fail || !strings.Contains(f.Is, "lost; "+want) {
			t.Errorf("%+v", f)
		}
		for _, f := range examineHub(noon, row.h, row.d) {
			if strings.Contains(f.Is, "Tokens are served") {
				t.Errorf("%+v", f)
			}
		}
	}
}

// TestRefusedTwinThatDenies shows that status and doctor say of a refused twin that what is right in its deny is in
// force.
func TestRefusedTwinThatDenies(t *testing.T) {
	t.Parallel()
	h := api.HubStatus{Connected: true, Desired: api.DesiredStatus{Version: 17, Applied: 16, Refused: "why", Denies: 2}}
	const said = "; 2 entries of its deny are in force all the same; version 16 stays in force"
	text, _ := twinText(noon, &h, false, true)
	all := examineHub(noon, &h, nil)
	if !strings.Contains(all[1].Is, "why"+said) || !strings.Contains(text, "refused"+said) {
		t.Errorf("%q, %+v", text, all)
	}
	h.Desired.Denies = 1
	if text, _ = twinText(noon, &h, false, false); !strings.Contains(text, "why; one entry of its deny is in force") {
		t.Error(text)
	}
}

// TestTwinWithoutRoom shows that status and doctor say that entries of the twin's deny have no room.
func TestTwinWithoutRoom(t *testing.T) {
	t.Parallel()
	h := api.HubStatus{Connected: true, Desired: api.DesiredStatus{Version: 17, Applied: 17, NoRoom: 3}}
	const said = "3 entries of its deny have no room, and deny nothing"
	text, how := twinText(noon, &h, false, false)
	if all := examineHub(noon, &h, nil); len(all) != 2 || all[1].Verdict != fail || all[1].Is != said ||
		!strings.Contains(text, "; "+said) || how != term.Bad {
		t.Errorf("%q, %+v", text, all)
	}
	if text, _ = twinText(noon, &h, true, false); strings.Contains(text, "room") {
		t.Errorf("set aside: %s", text)
	}
}

// TestMissingRulesAreSaid shows that doctor has rules that are gone with a lost record as a fault, once, and that
// status has them once, with what ends that.
func TestMissingRulesAreSaid(t *testing.T) {
	t.Parallel()
	d := &api.DenyStatus{Missing: "rules of this device may be gone: FILE", Mend: "perceptctl deny forget-lost"}
	if all := examineDeny(noon, d, nil); len(all) != 1 || all[0] != (finding{fail, "deny rules", d.Missing, d.Mend}) {
		t.Errorf("%+v", all)
	}
	trouble := d.Missing + "; " + d.Mend
	if !reportedOfDeny(d, trouble) {
		t.Error("doctor says it twice")
	}
	text := screen{Screen: term.Screen{Width: 200}, zone: time.UTC}.status(
		api.Status{Now: noon, Deny: d, Trouble: []string{trouble}})
	if strings.Count(text, d.Missing) != 1 || !strings.Contains(text, d.Mend) {
		t.Error(text)
	}
}

// The times of the hub are by the device's own clock, however fast a simulated source's runs.
func TestHubBesideAFastClock(t *testing.T) {
	t.Parallel()
	s := api.Status{Now: noon.Add(15 * time.Hour), Hub: &api.HubStatus{
		Hub: "hub.test", Device: "edge", Now: noon, Since: noon.Add(-10 * time.Second), LastError: "connection refused",
		LastErrorOn: noon.Add(-9 * time.Second), Failure: api.HubFailureNetwork, NextTry: noon.Add(20 * time.Second),
	}}
	text := screen{Screen: term.Screen{Width: 200}, zone: time.UTC}.hub(s)
	for _, want := range []string{"for 10s", "next try in 20s", "9s ago"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %s", want, text)
		}
	}
	for _, f := range examineHub(hubNow(s), s.Hub, nil) {
		if f.Verdict == fail {
			t.Errorf("%+v", f)
		}
	}
}
