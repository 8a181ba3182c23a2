package iothub

import (
	"fmt"
	"strings"
	"testing"

	"go.uber.org/zap"

	"perceptd/agent/api"
)

// TestTwinDeniesMoreThanFits shows that of more entries than there is room for those that fit deny, one for everything
// always, and that the others are counted in the status and the acknowledgement, and are in the log, until there is
// room.
func TestTwinDeniesMoreThanFits(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		list := func(prefix string, n int, more string) string {
			var rules []string
			for i := range n {
				rules = append(rules, fmt.Sprintf(`{"module":"%s%d"}`, prefix, i))
			}
			return `{"deny":[` + strings.Join(rules, ",") + more + `]}`
		}
		const loud = "the twin denies more than there is room for: entries of percept.deny deny nothing; deny more " +
			"with " +
			"fewer entries, or everything with one"
		expect := func(what string, noRoom, lines int) {
			t.Helper()
			if got := w.describe().NoRoom; got != noRoom {
				t.Errorf("%s: %d have no room", what, got)
			}
			found := w.logs.FilterMessage(loud).All()
			if len(found) != lines || noRoom > 0 && found[lines-1].ContextMap()["no_room"] != int64(noRoom) {
				t.Errorf("%s: %v", what, found)
			}
		}
		if s := w.reads(1, list("a", 200, "")); s.Refused == "" || s.Denies != 2*api.MaxDenyRules {
			t.Errorf("a document of 200 entries: %+v", s)
		}
		expect("a document of 200 entries", 200-2*api.MaxDenyRules, 1)
		w.notified(2, denyVision)
		expect("a notification", 1, 2)
		w.expect(t, "a notification without room", false)
		if s := w.reads(3, denyVision); s.Refused != "" {
			t.Errorf("%+v", s)
		}
		expect("a sound document", 0, 2)
		w.expect(t, "a sound document", true)
		w.reads(4, list("b", 200, `,{"all":true}`))
		expect("200 entries and all", 200-(2*api.MaxDenyRules-1), 3)
		if _, code := w.served(t, logger); code != api.CodeDenied {
			t.Errorf("what denies everything had no room: %q", code)
		}
		w.reads(5, `{}`)
		w.expect(t, "nothing", false)
		w.reads(6, list("c", 200, ""))
		expect("200 entries again", 200-2*api.MaxDenyRules, 4)
		w.notified(7, `{"deny":[{"all":true}]}`)
		if _, code := w.served(t, logger); code != api.CodeDenied {
			t.Errorf("a notification that denies everything found no room: %q", code)
		}
		if w.describe().NoRoom != 0 {
			t.Error("what had no room is of no account once everything is denied")
		}
	})
}

// The acknowledgement says how many entries have no room.
func TestNoRoomIsAcknowledged(t *testing.T) {
	t.Parallel()
	r := &reporter{wake: make(chan struct{}, 1), options: reporterOptions{Log: zap.NewNop()}}
	r.acknowledge(api.DesiredStatus{Version: 7, Refused: "why", Denies: 128, NoRoom: 72}, true)
	if ack := r.ack.bounded(); ack.NoRoom != 72 || ack.Denies != 128 || ack.Status != ackRefused {
		t.Errorf("%+v", ack)
	}
}
