package iothub

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent/api"
)

// docsTime is when the examples of docs/iothub.md are.
var docsTime = time.Date(2026, 11, 28, 9, 0, 0, 0, time.UTC)

// section returns the text of docs/iothub.md below a heading, up to the next one of its rank.
func section(t *testing.T, heading string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/iothub.md")
	if err != nil {
		t.Fatal(err)
	}
	_, below, found := strings.Cut(string(text), "\n"+heading+"\n")
	if !found {
		t.Fatalf("docs/iothub.md has no %q", heading)
	}
	rank := heading[:strings.Index(heading, " ")+1]
	below, _, _ = strings.Cut(below, "\n"+rank)
	return below
}

// example is a call of a method and what is answered, as docs/iothub.md shows it.
type example struct {
	method, payload string
	answer          any
}

var exampleForm = regexp.MustCompile("(?s)```sh\naz iot hub invoke-device-method ([^`]*?)```\n\n```json\n(.*?)```\n")

func examples(t *testing.T) (all []example) {
	t.Helper()
	flag := func(text, name string) string {
		_, after, _ := strings.Cut(text, "--"+name+" ")
		if quoted, is := strings.CutPrefix(after, "'"); is {
			value, _, _ := strings.Cut(quoted, "'")
			return value
		}
		return strings.Fields(after + " ")[0]
	}
	for _, found := range exampleForm.FindAllStringSubmatch(section(t, "## Direct methods"), -1) {
		e := example{method: flag(found[1], "method-name")}
		if strings.Contains(found[1], "--method-payload") {
			e.payload = flag(found[1], "method-payload")
		}
		if err := json.Unmarshal([]byte(found[2]), &e.answer); err != nil {
			t.Fatalf("%s: %v", found[2], err)
		}
		all = append(all, e)
	}
	return all
}

// holds checks that all that the example shows is in an answer. IDs and digests are like no others, and "…" stands for
// any text.
func holds(shown, is any) error {
	switch shown := shown.(type) {
	case map[string]any:
		is, _ := is.(map[string]any)
		for name, value := range shown {
			if err := holds(value, is[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	case []any:
		is, _ := is.([]any)
		if len(is) < len(shown) {
			return fmt.Errorf("has %d, and not %d", len(is), len(shown))
		}
		for i, value := range shown {
			if err := holds(value, is[i]); err != nil {
				return fmt.Errorf("%d: %w", i, err)
			}
		}
		return nil
	case string:
		text, isText := is.(string)
		begin, _, cut := strings.Cut(shown, "…")
		id := regexp.MustCompile(`\b[0-9a-f]{8,64}\b`)
		if isText && (cut && strings.HasPrefix(text, begin) ||
			id.ReplaceAllString(shown, "ID") == id.ReplaceAllString(text, "ID")) {
			return nil
		}
	default:
		if shown == is {
			return nil
		}
	}
	return fmt.Errorf("is %v, and not %v", is, shown)
}

// TestDocumentedMethods calls the methods as docs/iothub.md does, one after the other.
func TestDocumentedMethods(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(docsTime))
		a := newAfar(t)
		shown := make(map[string]bool)
		for _, e := range examples(t) {
			shown[e.method] = true
			if strings.Contains(e.payload, `"ID"`) {
				e.payload = strings.ReplaceAll(e.payload, `"ID"`, `"`+a.lastRule()+`"`)
			}
			status, text := a.ask(t, e.method, e.payload)
			var payload any
			if err := json.Unmarshal([]byte(text), &payload); err != nil {
				t.Fatal(err)
			}
			if err := holds(e.answer, map[string]any{"status": float64(status), "payload": payload}); err != nil {
				t.Errorf("%s %s: %v in\n%s", e.method, e.payload, err, text)
			}
		}
		for _, method := range theMethods {
			if !shown[method.name] {
				t.Errorf("docs/iothub.md shows no call of %s", method.name)
			}
		}
	})
}

// The page's table of statuses has each that a method answers with, with its codes.
func TestDocumentedStatuses(t *testing.T) {
	t.Parallel()
	text := section(t, "### Statuses")
	for _, status := range slices.Sorted(maps.Keys(methodCodes())) {
		_, row, found := strings.Cut(text, fmt.Sprintf("\n| %d | ", status))
		row, _, _ = strings.Cut(row, "\n")
		for _, code := range methodCodes()[status] {
			if !found || !strings.Contains(row, "`"+string(code)+"`") {
				t.Errorf("the row of %d does not name %s", status, code)
			}
		}
	}
}

// The page shows an event as it is sent, and has a row for each type, with its severities.
func TestDocumentedEvents(t *testing.T) {
	t.Parallel()
	text := section(t, "## Events")
	_, shown, _ := strings.Cut(text, "```json\n")
	shown, _, _ = strings.Cut(shown, "```")
	trouble := failing(0)
	trouble.Now = docsTime
	_, events := watched{}.next(trouble, 0)
	var got, want any
	if err := errors.Join(json.Unmarshal([]byte(shown), &want),
		json.Unmarshal(messageOf("id", events[0]).body, &got)); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v: %s, and the page has %v", err, messageOf("id", events[0]).body, want)
	}
	for _, kind := range []api.HubEventType{
		api.HubEventTokenTrouble, api.HubEventTokenTroubleEnded, api.HubEventCurrent, api.HubEventDenials,
		api.HubEventClockTrouble, api.HubEventClockTroubleEnded, api.HubEventDenyRuleSet, api.HubEventDenyRuleLifted,
		api.HubEventDenyRulesLost, api.HubEventDenyRulesKnown, api.HubEventSetAside, api.HubEventHeeded,
		api.HubEventSuppressed,
	} {
		if !strings.Contains(text, "\n| `"+string(kind)+"` | `") {
			t.Errorf("%s has no row", kind)
		}
	}
	for _, number := range []int{denialsBurst, maxQueued, eventsAtOnce, eventsHour, int(clockPatience.Minutes())} {
		if !strings.Contains(text, fmt.Sprintf(" %d ", number)) {
			t.Errorf("the page does not name %d", number)
		}
	}
}

// TestDocumentedReport shows that the report in docs/iothub.md is what is made of such a status, whole, and that the
// table below it has each of its properties.
func TestDocumentedReport(t *testing.T) {
	t.Parallel()
	text := section(t, "## Reported properties")
	_, shown, _ := strings.Cut(text, "```json\n")
	shown, _, _ = strings.Cut(shown, "```")
	var want map[string]any
	if err := json.Unmarshal([]byte(shown), &want); err != nil {
		t.Fatal(err)
	}
	stale := token("vision", "https://vault.azure.net")
	stale.IssuedFrom = stale.IssuedFrom.Add(-5 * time.Minute)
	stale.Permissions = api.Permissions{State: api.PermissionsStale, CurrentBy: stale.ExpiresOn}
	stale.Rollover.Expected = stale.ExpiresOn
	status := api.Status{
		Version: "1.0.0", Now: docsTime, Source: api.SourceStatus{Kind: "managed-identity", Endpoint: "arc"},
		Clock: api.ClockStatus{Known: true, By: "kernel"}, Config: api.ConfigStatus{SHA256: "9f2c…"},
		Trouble: []string{"no token of device"},
		Tokens: []api.TokenStatus{{
			Identity: "device", Resource: "https://storage.azure.com", State: api.StateMissing,
			LastOutcome: api.OutcomeFailed, LastError: "the back end cannot be reached",
		}, stale},
		Deny: &api.DenyStatus{Rules: []api.DenyRule{{
			ID: "twin-d6e0c5bb9d1e1754", DenyTarget: api.DenyTarget{Module: "vision"}, Origin: api.DenyTwin,
			Since: docsTime.Add(-time.Minute),
		}}},
		Requests: api.RequestCounts{Served: 1204, Denied: 3, Failed: 1},
	}
	r := describe(&status, &desiredAck{Version: 12, Status: ackApplied}, nil, maxReport)
	r.Requests = &requestsCount{status.Requests, minute(status.Now)}
	got := decoded(r)
	if patch := mergePatch(want, got); patch != nil {
		t.Errorf("the page's report differs by %v", patch)
	}
	for name := range got {
		if !strings.Contains(text, "| `"+name+"`") && !strings.Contains(text, ", `"+name+"`") {
			t.Errorf("the table lacks %s", name)
		}
	}
}

func TestDocumentedReportSpread(t *testing.T) {
	t.Parallel()
	row := regexp.MustCompile("(?m)^\\| `report_spread` \\| `(.*?)` \\|").
		FindStringSubmatch(section(t, "## The keys of `[iothub]`"))
	if row == nil {
		t.Fatal("it has no default")
	}
	if got, err := time.ParseDuration(row[1]); err != nil || got != defaultReportSpread {
		t.Errorf("%v is shown, it is %v", got, defaultReportSpread)
	}
}
