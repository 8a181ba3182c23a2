package agent_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache/tokencachetest"
)

func messages(logs *observer.ObservedLogs, id string) []map[string]any {
	var all []map[string]any
	for _, entry := range logs.All() {
		if fields := entry.ContextMap(); fields["message_id"] == id {
			all = append(all, fields)
		}
	}
	return all
}

// One line for the first token of a caller, identity and resource, with what is needed to know who got what.
func TestFirstGrantsAreAudited(t *testing.T) {
	t.Parallel()
	bubble(t, kinds(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		caller := grants.Caller{Unit: "cam.service", UID: 5, GID: 6, PID: 7}
		for range 5 {
			caller.PID++ // it forks, and stays who it is
			if _, err := a.Token(t.Context(), caller, requestFor(vault)); err != nil {
				t.Fatal(err)
			}
		}
		all := messages(logs, agent.MessageGranted)
		if len(all) != 1 {
			t.Fatalf("%d lines: %v", len(all), all)
		}
		for name, want := range map[string]any{
			"caller": "unit cam.service (uid 5, pid 8)", "unit": "cam.service", "uid": uint32(5), "gid": uint32(6),
			"identity": "id1",
			"resource": vault, "decision": "granted", "reason": "grant 2 (config.toml:10)",
		} {
			if all[0][name] != want {
				t.Errorf("%s is %v, want %v", name, all[0][name], want)
			}
		}
	})
}

// A module whose container is another is told once, with what it was before.
func TestChangedCallersAreAudited(t *testing.T) {
	t.Parallel()
	bubble(t, kinds(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		ask := func(id string) {
			c := image(imageID)
			c.ID = strings.Repeat(id, 64)
			if _, err := a.Token(t.Context(), grants.Caller{Module: "vision", Container: c},
				requestFor(vault)); err != nil {
				t.Fatal(err)
			}
		}
		for _, id := range []string{"a", "a", "b", "b", "b"} {
			ask(id)
		}
		changed := messages(logs, agent.MessageChanged)
		if len(changed) != 1 || changed[0]["container"] != strings.Repeat("b", 64) ||
			!strings.HasPrefix(fmt.Sprint(changed[0]["before"]), "container aaaaaaaaaaaa of image "+imageID) {
			t.Errorf("%v", changed)
		}
		if n := len(messages(logs, agent.MessageGranted)); n != 1 {
			t.Errorf("%d first grants", n)
		}
		// Flapping fills no disk.
		for i := range 1000 {
			ask(string("ab"[i%2]))
		}
		if n := len(messages(logs, agent.MessageChanged)); n > 20 {
			t.Errorf("%d lines for a caller that flaps", n)
		}
		time.Sleep(time.Minute)
		ask("a")
		if last := messages(logs, agent.MessageChanged); last[len(last)-1]["left_out"] == nil {
			t.Errorf("those left out are not counted: %v", last[len(last)-1])
		}
	})
}

// After a denial the next grant is a first one again.
func TestGrantAfterDenialIsAudited(t *testing.T) {
	t.Parallel()
	rules := kinds()
	bubble(t, rules, new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		caller := grants.Caller{Module: "vision"}
		for range 2 {
			if _, err := a.Apply(rules); err != nil {
				t.Fatal(err)
			}
			if _, err := a.Token(t.Context(), caller, requestFor(vault)); err != nil {
				t.Fatal(err)
			}
			without := rules
			without.Grants = rules.Grants[1:]
			if _, err := a.Apply(without); err != nil {
				t.Fatal(err)
			}
			if _, err := a.Token(t.Context(), caller,
				requestFor(vault)); codeOf(err) != api.CodeNotGranted {
				t.Fatal(err)
			}
		}
		granted, denied := messages(logs, agent.MessageGranted), messages(logs, agent.MessageDenied)
		if len(granted) != 2 || len(denied) != 2 || denied[0]["decision"] != "denied" ||
			denied[0]["module"] != "vision" {
			t.Errorf("granted %v, denied %v", granted, denied)
		}
	})
}

// The status has the latest denials, each kind once.
func TestDenialsAreListed(t *testing.T) {
	t.Parallel()
	bubble(t, kinds(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		for i := range 40 {
			a.Token(t.Context(), grants.Caller{UID: uint32(2000 + i), GID: 1}, requestFor(vault))
		}
		a.Peek(grants.Caller{UID: 2039, GID: 1}, requestFor(vault+"/.default"))
		a.Rejected(t.Context(), grants.Caller{UID: 2030, GID: 1},
			api.Rejection{Resource: vault, Identity: "id2", Status: 401})
		a.AuditUnattested(grants.Caller{UID: 1}, errors.New("no engine answers"))
		a.AuditUnattested(grants.Caller{UID: 1}, errors.New("no engine answers"))
		all := a.Status().Denials
		if len(all) != 16 {
			t.Fatalf("%d denials", len(all))
		}
		for i, want := range []string{
			"uid 1  no engine answers 2",
			"uid 2030 id2 " + vault + " no grant is for uid 2030: what is not granted is denied 1",
			"uid 2039  " + vault + " no grant is for uid 2039: what is not granted is denied 2",
			"uid 2038  " + vault,
		} {
			d := all[i]
			got := strings.Join(strings.Fields(fmt.Sprint(d.Caller, " ", d.Identity, " ", d.Resource, " ", d.Reason,
				" ", d.Count)), " ")
			if want = strings.Join(strings.Fields(want), " "); !strings.HasPrefix(got, want) || d.On.IsZero() {
				t.Errorf("%d is %s, want %s", i, got, want)
			}
		}
		unproved := messages(logs, agent.MessageUnattested)
		if len(unproved) != 2 || unproved[0]["reason"] != "no engine answers" {
			t.Errorf("%v", unproved)
		}
	})
}

// A caller in a loop leaves other callers' denials their lines.
func TestDenialsOfOneDriveOutNobodyElses(t *testing.T) {
	t.Parallel()
	bubble(t, kinds(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, _ *observer.ObservedLogs) {
		seen := func() map[string]int {
			all := make(map[string]int)
			for _, d := range a.Status().Denials {
				all[d.Caller]++
			}
			return all
		}
		for i := range 3 {
			a.Token(t.Context(), grants.Caller{UID: uint32(i), GID: 1}, requestFor(vault))
		}
		for i := range 100 {
			a.Token(t.Context(), grants.Caller{UID: 7, GID: 1},
				requestFor(fmt.Sprintf("https://%d.example", i)))
		}
		if all := seen(); all["uid 0"] != 1 || all["uid 1"] != 1 || all["uid 2"] != 1 || all["uid 7"] != 13 {
			t.Errorf("%v", all)
		}
		if last := a.Status().Denials[0]; last.Resource != "https://99.example" {
			t.Errorf("%+v", last)
		}
		for i := range 16 {
			a.Token(t.Context(), grants.Caller{UID: uint32(100 + i), GID: 1}, requestFor(vault))
		}
		if all := seen(); len(all) != 16 || all["uid 115"] != 1 {
			t.Errorf("%v", all)
		}
	})
}

// Containers that no engine has spoken for have no name to be told apart by.
func TestDenialsOfUnnamedContainers(t *testing.T) {
	t.Parallel()
	bubble(t, kinds(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		one, other := strings.Repeat("1f", 32), strings.Repeat("2e", 32)
		for range 100 {
			a.AuditUnattested(grants.Caller{Container: &grants.Container{ID: one}},
				errors.New("the engine does not answer"))
		}
		a.AuditUnattested(grants.Caller{Container: &grants.Container{ID: other}},
			errors.New("the engine does not answer"))
		lines := messages(logs, agent.MessageUnattested)
		if len(lines) != 11 || lines[10]["container"] != other {
			t.Errorf("%d lines, the last %v", len(lines), lines[len(lines)-1])
		}
		if all := a.Status().Denials; len(all) != 2 {
			t.Errorf("%+v", all)
		}
	})
}

func TestDenialsOfOneLeaveRoomForOthers(t *testing.T) {
	t.Parallel()
	bubble(t, kinds(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		for range 1000 {
			a.Token(t.Context(), grants.Caller{UID: 1, GID: 1}, requestFor(vault))
		}
		if n := len(messages(logs, agent.MessageDenied)); n != 10 {
			t.Errorf("%d lines for one caller", n)
		}
		a.Token(t.Context(), grants.Caller{UID: 2, GID: 2}, requestFor(vault))
		last := messages(logs, agent.MessageDenied)
		if len(last) != 11 || last[10]["uid"] != uint32(2) || last[10]["left_out"] != int64(990) {
			t.Errorf("%v", last[len(last)-1])
		}
		for i := range 3000 { // more callers than are remembered
			a.Token(t.Context(), grants.Caller{UID: uint32(5000 + i), GID: 1}, requestFor(vault))
		}
		if n := len(messages(logs, agent.MessageDenied)); n > 60 {
			t.Errorf("%d lines for many callers at once", n)
		}
	})
}
