package iothub

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"perceptd/agent/api"
)

var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// calm is the status of a device where all is well.
func calm() api.Status {
	return api.Status{
		Now: noon, Clock: api.ClockStatus{Known: true}, Deny: &api.DenyStatus{},
		Tokens: []api.TokenStatus{
			{Identity: "vision", Resource: vault, ExpiresIn: 7200,
				Permissions: api.Permissions{State: api.PermissionsCurrent}},
		},
	}
}

// with returns a status that differs from calm.
func with(change func(*api.Status)) api.Status {
	s := calm()
	change(&s)
	return s
}

func failing(left int64) api.Status {
	return with(func(s *api.Status) {
		s.Tokens[0].LastOutcome, s.Tokens[0].ExpiresIn = api.OutcomeFailed, left
		s.Tokens[0].LastError, s.Tokens[0].Failures = "unreachable: no answer", 1
	})
}

// lacking is the status where a change that was granted stands with the token as the states say.
func lacking(states ...api.PermissionState) api.Status {
	return with(func(s *api.Status) {
		for i, state := range states {
			id := fmt.Sprintf("change-%d", i)
			s.Changes = append(s.Changes, api.PolicyChange{ID: id, Effect: api.EffectGranted, At: noon})
			s.Tokens[0].Changes = append(s.Tokens[0].Changes, api.TokenChange{ID: id, State: state})
		}
	})
}

func denied(count int64) api.Status {
	return with(func(s *api.Status) {
		s.Requests.Denied = count
		s.Denials = []api.Denial{{Caller: "module camera", Identity: "vision", Resource: vault, Reason: "no grant"}}
	})
}

func ruled(rules ...api.DenyRule) api.Status {
	return with(func(s *api.Status) { s.Deny.Rules = rules })
}

// step is a status and when it was taken.
type step struct {
	after  time.Duration // the one before
	status api.Status
}

func TestEvents(t *testing.T) {
	t.Parallel()
	minute := func(s api.Status) step { return step{time.Minute, s} }
	local := api.DenyRule{ID: "rule-1", Origin: api.DenyLocal, By: "uid 0 (pid 7)",
		DenyTarget: api.DenyTarget{Module: "vision", Resource: vault}}
	twin := api.DenyRule{ID: "rule-2", Origin: api.DenyTwin, DenyTarget: api.DenyTarget{All: true}}
	unknown := with(func(s *api.Status) { s.Clock.Known = false })
	behind, fast := int64(-301), int64(40)
	for _, row := range []struct {
		name  string
		steps []step
		want  []string
	}{
		{"nothing", []step{minute(calm()), minute(calm())}, nil},
		{"trouble", []step{minute(calm()), minute(failing(0)), minute(failing(0)), minute(calm()), minute(calm())},
			[]string{"error token_trouble_begun vision unreachable: no answer", "info token_trouble_ended vision"}},
		{"trouble at the start, with a token that is good for a while", []step{minute(failing(100))},
			[]string{"warning token_trouble_begun vision unreachable: no answer"}},
		{"a single failure of a token that is good for hours", []step{minute(calm()), minute(failing(7200))}, nil},
		{"trouble with a token that no grant names any more", []step{minute(failing(0)),
			minute(with(func(s *api.Status) { s.Tokens = nil }))},
			[]string{"error token_trouble_begun vision unreachable: no answer",
				"info token_trouble_ended vision nobody is to have this token any more"}},
		{"current again", []step{minute(calm()), minute(lacking(api.PermissionsUncertain, api.PermissionsStale)),
			minute(lacking(api.PermissionsCurrent, api.PermissionsStale)), minute(lacking("", "")),
			minute(lacking(api.PermissionsCurrent, api.PermissionsCurrent))},
			[]string{"info permissions_current vision change-0 carries what was granted on 2026-11-28T12:00:00Z",
				"info permissions_current vision change-1 carries what was granted on 2026-11-28T12:00:00Z"}},
		{"current at once, or withdrawn", []step{minute(lacking(api.PermissionsCurrent)),
			minute(lacking(api.PermissionsCurrent, api.PermissionsStale)), minute(lacking(api.PermissionsCurrent))},
			nil},
		{"current, among many changes", []step{minute(lacking(api.PermissionsStale)),
			minute(with(func(s *api.Status) {
				s.Changes = []api.PolicyChange{{ID: "change-0", Effect: api.EffectRevoked, At: noon}}
				s.Tokens[0].MoreChanges = 1
			}))},
			[]string{"info permissions_current vision change-0 carries what was revoked on 2026-11-28T12:00:00Z"}},
		{"few denials", []step{minute(calm()), minute(denied(10)), {4 * time.Minute, denied(19)},
			{time.Minute, denied(28)}}, nil},
		{"denials before the start", []step{minute(denied(100)), minute(denied(101))}, nil},
		{"two bursts", []step{minute(calm()), minute(denied(12)), minute(denied(20)), minute(denied(99)),
			minute(denied(150)), {6 * time.Minute, denied(150)}, minute(denied(170))},
			[]string{"warning denials_burst vision 20 the latest: module camera: no grant",
				"warning denials_burst vision 20 the latest: module camera: no grant"}},
		{"a clock that is right soon", []step{minute(unknown), {4 * time.Minute, unknown}, {time.Minute / 2, calm()}},
			nil},
		{"a clock that is not", []step{minute(unknown), {5 * time.Minute, unknown}, minute(unknown), minute(calm())},
			[]string{"warning clock_trouble_begun the clock is not known to be right", "info clock_trouble_ended"}},
		{"a clock that is behind", []step{minute(with(func(s *api.Status) { s.Clock.Skew = &behind })),
			{5 * time.Minute, with(func(s *api.Status) { s.Clock.Skew = &behind })},
			minute(with(func(s *api.Status) { s.Clock.Skew = &fast }))},
			[]string{"warning clock_trouble_begun the clock is -301 s ahead of the back end's",
				"info clock_trouble_ended"}},
		{"deny rules", []step{minute(ruled(twin)), minute(ruled(twin, local)), minute(ruled(local)), minute(ruled())},
			[]string{"warning deny_rule_set rule-1 module vision for " + vault + ", set by uid 0 (pid 7)",
				"info deny_rule_lifted rule-1 module vision for " + vault + ", set by uid 0 (pid 7)"}},
		{"deny rules from before the start", []step{minute(ruled(local)), minute(ruled(local))}, nil},
		{"deny rules that are lost", []step{minute(ruled(local)),
			minute(with(func(s *api.Status) { s.Deny.Lost = "the file is damaged" })), minute(ruled(local))},
			[]string{"error deny_rules_lost the file is damaged", "info deny_rules_known"}},
		{"deny rules that are gone with their record",
			[]step{minute(with(func(s *api.Status) { s.Deny.Lost = "the file is damaged" })),
				minute(with(func(s *api.Status) { s.Deny.Missing = "those of this device may be gone" }))},
			[]string{"error deny_rules_lost the file is damaged",
				"warning deny_rules_known those of this device may be gone"}},
		{"the hub is set aside", []step{minute(calm()),
			minute(with(func(s *api.Status) { s.Deny.HubSetAsideOn = noon })), minute(calm())},
			[]string{"warning hub_set_aside", "info hub_heeded"}},
		{"a daemon that knows no deny rules",
			[]step{minute(with(func(s *api.Status) { s.Deny = nil })), minute(calm())}, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var w watched
			var at time.Duration
			var got []string
			for _, step := range row.steps {
				at += step.after
				var events []api.HubEvent
				w, events = w.next(step.status, at)
				for _, e := range events {
					got = append(got, eventText(e))
				}
			}
			if strings.Join(got, "\n") != strings.Join(row.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(row.want, "\n"))
			}
		})
	}
}

// eventText writes an event in a line.
func eventText(e api.HubEvent) string {
	parts := []string{string(e.Severity), string(e.Type)}
	for _, part := range []string{e.Change, e.Rule} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	if e.Identity != "" && e.Rule == "" {
		parts = append(parts[:2], append([]string{e.Identity}, parts[2:]...)...)
	}
	if e.Count != 0 {
		parts = append(parts, fmt.Sprint(e.Count))
	}
	if e.Detail != "" {
		parts = append(parts, e.Detail)
	}
	return strings.Join(parts, " ")
}

// Whatever statuses follow on each other, what begins ends before it begins again, and ends only if it has begun.
func TestEventsAlternate(t *testing.T) {
	t.Parallel()
	begins := map[api.HubEventType]api.HubEventType{ // by what ends it
		api.HubEventTokenTroubleEnded: api.HubEventTokenTrouble,
		api.HubEventClockTroubleEnded: api.HubEventClockTrouble,
		api.HubEventDenyRulesKnown:    api.HubEventDenyRulesLost,
		api.HubEventHeeded:            api.HubEventSetAside,
	}
	rapid.Check(t, func(t *rapid.T) {
		w, _ := watched{}.next(calm(), 0)
		var at time.Duration
		lasts := make(map[string]bool) // by what begins, and what it is about
		for range rapid.IntRange(1, 40).Draw(t, "statuses") {
			at += time.Duration(rapid.IntRange(0, 400).Draw(t, "seconds")) * time.Second
			var events []api.HubEvent
			w, events = w.next(drawStatus(t), at)
			for _, e := range events {
				if m := messageOf("id", e); len(m.body) > maxEventBody {
					t.Fatalf("%d bytes: %s", len(m.body), m.body)
				}
				begin, ends := begins[e.Type]
				if !ends {
					begin = e.Type
				}
				if !slices.Contains(slices.Collect(maps.Values(begins)), begin) {
					continue
				}
				name := string(begin) + " " + e.Identity
				if lasts[name] != ends {
					t.Fatalf("%s: %s, and it lasts: %t", name, e.Type, lasts[name])
				}
				lasts[name] = !ends
			}
		}
	})
}

// drawStatus draws a status of few tokens, in which anything may be so.
func drawStatus(t *rapid.T) api.Status {
	s := api.Status{Now: noon, Deny: &api.DenyStatus{}}
	s.Clock.Known = rapid.Bool().Draw(t, "clock")
	s.Requests.Denied = int64(rapid.IntRange(0, 100).Draw(t, "denied"))
	if rapid.Bool().Draw(t, "lost") {
		s.Deny.Lost = rapid.String().Draw(t, "why")
	}
	if rapid.Bool().Draw(t, "aside") {
		s.Deny.HubSetAsideOn = noon
	}
	states := []api.PermissionState{"", api.PermissionsCurrent, api.PermissionsStale, api.PermissionsUncertain}
	for i := range rapid.IntRange(0, 3).Draw(t, "changes") {
		s.Changes = append(s.Changes, api.PolicyChange{ID: fmt.Sprint(i), Effect: api.EffectRevoked, At: noon})
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "rules") {
		s.Deny.Rules = append(s.Deny.Rules, api.DenyRule{ID: fmt.Sprint("r", i), Origin: api.DenyLocal})
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "tokens") {
		token := api.TokenStatus{Identity: fmt.Sprint("identity-", i), Resource: vault}
		token.LastOutcome = rapid.SampledFrom([]api.Outcome{"", api.OutcomeNewer, api.OutcomeFailed}).Draw(t, "outcome")
		token.ExpiresIn = int64(rapid.IntRange(0, 1).Draw(t, "valid")) * 7200
		token.Failures = rapid.IntRange(0, 4).Draw(t, "failures")
		token.LastError = rapid.String().Draw(t, "error")
		for _, change := range s.Changes {
			token.Changes = append(token.Changes,
				api.TokenChange{ID: change.ID, State: rapid.SampledFrom(states).Draw(t, "standing")})
		}
		s.Tokens = append(s.Tokens, token)
	}
	return s
}

func TestMessages(t *testing.T) {
	t.Parallel()
	m := messageOf("name-1", api.HubEvent{Type: api.HubEventTokenTrouble, Severity: api.SeverityError, At: noon,
		Identity: "vision", Resource: vault, Detail: "refused:\nno \"grant\" <here>"})
	if want := `{"type":"token_trouble_begun","severity":"error","at":"2026-11-28T12:00:00Z","identity":"vision",` +
		`"resource":"https://vault.azure.net","detail":"refused: no \"grant\" <here>"}`; string(m.body) != want {
		t.Errorf("got  %s\nwant %s", m.body, want)
	}
	for name, want := range map[string]string{
		"$.ct": "application/json", "$.ce": "utf-8", "$.ctime": "2026-11-28T12:00:00.000Z",
		"type": "token_trouble_begun", "severity": "error", "identity": "vision", "resource": vault,
	} {
		if m.properties[name] != want {
			t.Errorf("%s: %q", name, m.properties[name])
		}
	}
	if len(m.properties) != 7 {
		t.Errorf("%v", m.properties)
	}
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.String()
		e := api.HubEvent{Type: api.HubEventCurrent, Severity: api.SeverityInfo, At: noon, Count: 1 << 60,
			Identity: text.Draw(t, "identity"), Resource: strings.Repeat(text.Draw(t, "resource"), 30),
			Change: text.Draw(t, "change"), Rule: text.Draw(t, "rule"),
			Detail: strings.Repeat(text.Draw(t, "detail"), 99)}
		if m := messageOf("id", e); len(m.body) > maxEventBody {
			t.Fatalf("%d bytes: %s", len(m.body), m.body)
		}
	})
}
