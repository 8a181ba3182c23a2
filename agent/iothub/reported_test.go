package iothub

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
)

// What passes is no news, and all else is.
func TestSteadyText(t *testing.T) {
	t.Parallel()
	for _, text := range []struct {
		before, now string
		news        bool
	}{
		{"", "", false},
		{"", "500", true},
		{"500", "", true},
		{"127.0.0.1:40342 answered 403: no access", "127.0.0.1:40342 answered 500: no access", true},
		{"127.0.0.1:40342 answered 403: no access", "127.0.0.1:51713 answered 403: no access", false},
		{"AADSTS700016: no application", "AADSTS70021: no application", true},
		{"unreachable: no answer within 1m30s", "unreachable: no answer within 15s", false},
		{"unreachable: no answer within 1.5s, try 3", "unreachable: no answer within 20ms, try 12", false},
		{"the token expired on 2026-11-28T08:00:00Z", "the token expired on 2026-11-29 09:30:12.5", false},
		{"Trace ID: 0f8fad5b-d9cb-469f-a165-70867728950e", "Trace ID: 7c9e6679-7425-40de-944b-e07fc1f90ae7", false},
		{"no identity vision", "no identity vision2", true},
	} {
		want := text.before
		if text.news {
			want = text.now
		}
		if got := steadyText(text.now, text.before); got != want {
			t.Errorf("%q after %q is reported as %q", text.now, text.before, got)
		}
	}
}

// That rules are gone with a lost record is a scalar for queries, and in words beside the rules, until root has ended
// it.
func TestMissingRulesAreReported(t *testing.T) {
	t.Parallel()
	gone := &api.DenyStatus{Missing: "rules of this device may be gone"}
	r := describe(&api.Status{Deny: gone}, nil, nil, maxReport)
	if !r.Summary.Missing || r.Summary.Lost || r.Deny.Missing != gone.Missing {
		t.Errorf("%+v %+v", r.Summary, r.Deny)
	}
	if r = describe(&api.Status{Deny: &api.DenyStatus{}}, nil, r, maxReport); r.Summary.Missing ||
		r.Deny.Missing != "" {
		t.Errorf("%+v %+v", r.Summary, r.Deny)
	}
}

// checkTexts reports a status with hostile texts and returns what a hub says of it.
func checkTexts(identity, resource, failure, origin string, more int) error {
	now := time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC)
	s := api.Status{
		Now: now, Version: origin, Source: api.SourceStatus{Kind: origin, Endpoint: failure},
		Clock: api.ClockStatus{By: origin}, Config: api.ConfigStatus{Error: failure},
		Deny: &api.DenyStatus{Lost: failure, Rules: []api.DenyRule{{
			ID: identity, By: failure,
			DenyTarget: api.DenyTarget{Module: origin, Identity: identity, Resource: resource},
		}}},
	}
	for n := range more {
		s.Tokens = append(s.Tokens, api.TokenStatus{
			Identity: identity, Resource: fmt.Sprint(resource, n), State: api.StateMissing,
			LastOutcome: api.OutcomeFailed, LastError: failure,
		})
	}
	ack := &desiredAck{
		Version: 1 << 52, Status: ackRefused, Reason: failure, Idle: []string{origin, failure, resource},
	}
	var before *report
	for range 2 {
		r := describe(&s, ack, before, maxReport)
		text, err := json.Marshal(map[string]any{"percept": r})
		if err != nil {
			return err
		}
		if len(text) > maxReport+64 {
			return fmt.Errorf("%d bytes are reported", len(text))
		}
		if !utf8.Valid(text) {
			return fmt.Errorf("%q is no UTF-8", text)
		}
		if err := hubtest.CheckReported(text); err != nil {
			return err
		}
		// What the hub has is read as what was reported, and reported again as it is.
		var has map[string]any
		if err := json.Unmarshal(text, &has); err != nil {
			return err
		}
		if before = readReport(has["percept"]); before == nil {
			return fmt.Errorf("%s is not read back", text)
		}
		if patch := mergePatch(decoded(before), decoded(describe(&s, ack, before, maxReport))); patch != nil {
			return fmt.Errorf("without news %v is sent", patch)
		}
		s.Now = s.Now.Add(time.Hour)
	}
	return nil
}

// TestEscapedSize compares with encoding/json, for every rune that can be printed.
func TestEscapedSize(t *testing.T) {
	t.Parallel()
	for _, table := range unicode.PrintRanges {
		check := func(low, high, stride uint32) {
			for r := rune(low); r <= rune(high); r += rune(stride) {
				if got, want := escapedSize(r), sizeOf(string(r))-len(`""`); got != want {
					t.Errorf("%q: %d, want %d", r, got, want)
				}
			}
		}
		for _, many := range table.R16 {
			check(uint32(many.Lo), uint32(many.Hi), uint32(many.Stride))
		}
		for _, many := range table.R32 {
			check(many.Lo, many.Hi, many.Stride)
		}
	}
	check := func(text string, most int, want string) {
		if got := clean(text, most); got != want {
			t.Errorf("%q within %d bytes: %q", text, most, got)
		}
	}
	check("abcdef", 8, "abcdef")
	check("abcdef", 7, "ab…")
	check("\"\"\"", 8, "\"\"\"")
	check("\"\"\"", 7, "\"…")
	check("a\x00\xff\u2028é", 20, "a   é")
	check("é<", 10, "é<")
	check("é<", 9, "é…")
}

func FuzzReportedTexts(f *testing.F) {
	f.Add("device", "https://vault.azure.net", "127.0.0.1:40342 answered 403: no", "managed-identity", 3)
	f.Add("\xff\xfe", "\x00\u2028\"\\", "<script>&\u202e\ufffd", "a\xc3", 256)
	f.Fuzz(func(t *testing.T, identity, resource, failure, origin string, more int) {
		if more < 0 || more > 256 {
			return
		}
		if err := checkTexts(identity, resource, failure, origin, more); err != nil {
			t.Error(err)
		}
	})
}
