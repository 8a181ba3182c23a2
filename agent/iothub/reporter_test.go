package iothub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
	"perceptd/agent/iothub/link"
)

// reportedTo is a hub's reported properties, and the status that is reported to it.
type reportedTo struct {
	*reporter

	mu      sync.Mutex // protects what follows
	status  api.Status
	has     map[string]any
	version int64
	sent    []string
	sentOn  []time.Duration // since the start
	fail    func(n int) error
}

// newReported starts a reporter whose wait is of the middle of all.
func newReported(t *testing.T, set func(*reporterOptions)) *reportedTo {
	t.Helper()
	h := &reportedTo{has: map[string]any{}, version: 1, fail: func(int) error { return nil }}
	h.status = api.Status{
		Version: "1", Source: api.SourceStatus{Kind: "managed-identity", Endpoint: "arc"},
		Config: api.ConfigStatus{SHA256: "abc"}, Clock: api.ClockStatus{Known: true, By: "kernel"},
		Tokens: []api.TokenStatus{token("device", "https://vault.azure.net")},
	}
	begun := time.Now()
	o := reporterOptions{
		Status: func() api.Status {
			h.mu.Lock()
			defer h.mu.Unlock()
			s := h.status
			s.Tokens, s.Now = slices.Clone(s.Tokens), time.Now()
			s.Requests.Served = int64(time.Since(begun) / time.Second)
			return s
		},
		Send: func(_ context.Context, patch json.RawMessage) (int64, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.sent = append(h.sent, string(patch))
			h.sentOn = append(h.sentOn, time.Since(begun))
			if err := h.fail(len(h.sent)); err != nil {
				return 0, err
			}
			var change map[string]any
			if err := json.Unmarshal(patch, &change); err != nil {
				t.Error(err)
			}
			h.has = merged(h.has, change)
			h.version++
			return h.version, nil
		},
		Roll: func() float64 { return 0.5 }, Log: zap.NewNop(), Changed: func() {},
	}
	if set != nil {
		set(&o)
	}
	h.reporter = newReporter(o)
	t.Cleanup(h.close)
	return h
}

func token(identity, resource string) api.TokenStatus {
	now := time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC)
	return api.TokenStatus{
		Identity: identity, Resource: resource, State: api.StateFresh, ExpiresIn: 86400,
		IssuedFrom: now, ExpiresOn: now.Add(24 * time.Hour), LastOutcome: api.OutcomeNewer,
		Permissions: api.Permissions{State: api.PermissionsCurrent},
	}
}

// connect has the reporter know what the hub has.
func (h *reportedTo) connect() {
	h.mu.Lock()
	text, _ := json.Marshal(h.has)
	version := h.version
	h.mu.Unlock()
	h.connected(text, version)
}

// change changes the status, and says so.
func (h *reportedTo) change(f func(*api.Status)) {
	h.mu.Lock()
	f(&h.status)
	h.mu.Unlock()
	h.notice()
}

// messages waits for some time and returns what was sent meanwhile.
func (h *reportedTo) messages(wait time.Duration) []string {
	h.mu.Lock()
	before := len(h.sent)
	h.mu.Unlock()
	time.Sleep(wait)
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.sent[before:])
}

func TestReportsWhatChanges(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newReported(t, nil)
		if sent := h.messages(time.Hour); len(sent) != 0 {
			t.Errorf("it reports before it is known what the hub has: %q", sent)
		}
		h.connect()
		sent := h.messages(time.Hour)
		if len(sent) != 1 || !strings.Contains(sent[0], `"summary":{"aside":`) &&
			!strings.Contains(sent[0], `"stale":0`) {
			t.Fatalf("%q", sent)
		}
		h.change(func(s *api.Status) { s.Tokens[0].Permissions.State = api.PermissionsStale })
		h.acknowledge(api.DesiredStatus{Version: 7, Applied: 7}, true)
		h.change(func(s *api.Status) { s.Tokens[0].Permissions.Withheld = true })
		sent = h.messages(time.Hour)
		if len(sent) != 1 {
			t.Fatalf("changes that come together are %d messages: %q", len(sent), sent)
		}
		for _, want := range []string{`"desired":{"status":"applied","version":7}`, `"stale":1`, `"withheld":1`,
			`"requests"`} {
			if !strings.Contains(sent[0], want) {
				t.Errorf("%s lacks %s", sent[0], want)
			}
		}
		if strings.Contains(sent[0], `"config"`) {
			t.Errorf("what has not changed is sent: %s", sent[0])
		}
		if sent := h.messages(24 * time.Hour); len(sent) != 0 {
			t.Errorf("without news it sends %q", sent)
		}
		h.connect()
		if sent := h.messages(time.Hour); len(sent) != 0 {
			t.Errorf("after a connect without news it sends %q", sent)
		}
		if on, refused := h.reporter.status(); on.IsZero() || refused != "" {
			t.Error(on, refused)
		}
	})
}

// That tokens are renewed, and that fewer lack a change, is gathered for an hour. What matters goes out at once, with
// it.
func TestReportsGatherRenewals(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newReported(t, func(o *reporterOptions) { o.Roll = func() float64 { return 0 } })
		const tokens = 40
		h.change(func(s *api.Status) {
			s.Tokens = nil
			for i := range tokens {
				one := token("device", fmt.Sprintf("https://resource-%d.example", i))
				one.Permissions.State = api.PermissionsStale
				s.Tokens = append(s.Tokens, one)
			}
		})
		h.connect()
		if sent := h.messages(time.Hour); len(sent) != 1 || !strings.Contains(sent[0], `"stale":40`) {
			t.Fatalf("%q", sent)
		}
		current := func(i int) {
			h.change(func(s *api.Status) {
				s.Tokens[i].Permissions.State = api.PermissionsCurrent
				s.Tokens[i].ExpiresOn = s.Tokens[i].ExpiresOn.Add(24 * time.Hour)
			})
		}
		for i := range 30 {
			current(i)
			if sent := h.messages(time.Minute); len(sent) != 0 {
				t.Errorf("token %d of one change is a message of its own: %q", i, sent)
			}
		}
		if sent := h.messages(time.Hour); len(sent) != 1 || !strings.Contains(sent[0], `"stale":10`) {
			t.Errorf("what was gathered: %q", sent)
		}
		current(30)
		h.change(func(s *api.Status) { s.Trouble = []string{"the disk is full"} })
		if sent := h.messages(time.Minute); len(sent) != 1 || !strings.Contains(sent[0], `"stale":9`) ||
			!strings.Contains(sent[0], `"trouble":1`) {
			t.Errorf("trouble, with what was gathered: %q", sent)
		}
		for i := 31; i < tokens; i++ {
			current(i)
		}
		if sent := h.messages(time.Minute); len(sent) != 1 || !strings.Contains(sent[0], `"stale":0`) {
			t.Errorf("the last that lacked the change: %q", sent)
		}
		current(0) // renewed once more
		if sent := h.messages(59 * time.Minute); len(sent) != 0 {
			t.Errorf("a renewal: %q", sent)
		}
		h.change(func(s *api.Status) { s.Tokens[0].Permissions.State = api.PermissionsStale })
		if sent := h.messages(10 * time.Second); len(sent) != 1 || !strings.Contains(sent[0], `"stale":1`) {
			t.Errorf("a new change: %q", sent)
		}
	})
}

// Reports are far apart, and those of a fleet are spread.
func TestReportsAreApart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newReported(t, func(o *reporterOptions) { o.Spread = 10 * time.Minute })
		h.connect()
		for n := range 3600 {
			h.change(func(s *api.Status) { s.Config.SHA256 = fmt.Sprint(n) })
			time.Sleep(time.Second)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if n := len(h.sent); n < 10 || n > 12 {
			t.Errorf("%d reports in an hour of changes, spread over ten minutes each", n)
		}
		for i := 1; i < len(h.sentOn); i++ {
			if apart := h.sentOn[i] - h.sentOn[i-1]; apart < 30*time.Second {
				t.Errorf("two reports are %v apart", apart)
			}
		}
	})
}

func TestReportsThatFail(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]error{
		"throttled": &link.RefusedError{What: "reported properties", Status: 429},
		"failed":    &link.RefusedError{What: "reported properties", Status: 500},
		"bad":       &link.RefusedError{What: "reported properties", Status: 400},
		"lost":      context.DeadlineExceeded,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := newReported(t, nil)
				fails := true
				h.fail = func(int) error {
					if fails {
						return fail
					}
					return nil
				}
				h.connect()
				sent := h.messages(24 * time.Hour)
				if len(sent) < 20 || len(sent) > 24*60*60/(15*60/2) {
					t.Errorf("%d tries in a day", len(sent))
				}
				if _, refused := h.reporter.status(); refused != fail.Error() {
					t.Errorf("%q", refused)
				}
				h.change(func(*api.Status) { fails = false })
				h.messages(time.Hour)
				h.mu.Lock()
				defer h.mu.Unlock()
				if summary := h.has["percept"].(map[string]any)["summary"].(map[string]any); summary["tokens"] != 1.0 {
					t.Error(summary)
				}
				if _, refused := h.reporter.status(); refused != "" {
					t.Errorf("%q", refused)
				}
			})
		})
	}
}

// However reports fail, they are no closer than others are.
func TestReportsThatFailAreApart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newReported(t, func(o *reporterOptions) { o.Roll = func() float64 { return 0 } })
		h.fail = func(n int) error {
			switch n % 3 {
			case 1:
				return &link.RefusedError{What: "reported properties", Status: 429}
			case 2:
				return context.DeadlineExceeded
			}
			return nil
		}
		h.connect()
		for n := range 600 {
			h.change(func(s *api.Status) { s.Config.SHA256 = fmt.Sprint(n) })
			time.Sleep(time.Second)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if len(h.sentOn) < 15 {
			t.Errorf("%d reports in ten minutes of changes", len(h.sentOn))
		}
		for i := 1; i < len(h.sentOn); i++ {
			if apart := h.sentOn[i] - h.sentOn[i-1]; apart < 30*time.Second {
				t.Errorf("two reports are %v apart", apart)
			}
		}
	})
}

// Where others of the device take the room, reports are short until there may be room again.
func TestReportsGetRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		room := 8 << 10
		h := newReported(t, func(o *reporterOptions) {
			send := o.Send
			o.Send = func(ctx context.Context, patch json.RawMessage) (int64, error) {
				if len(patch) > room {
					return 0, &link.RefusedError{What: "reported properties", Status: 400}
				}
				return send(ctx, patch)
			}
		})
		h.change(func(s *api.Status) {
			for n := range 90 {
				s.Tokens = append(s.Tokens, token("device", fmt.Sprintf("https://resource-%d.example", n)))
			}
		})
		h.connect()
		leftOut := func() float64 {
			h.mu.Lock()
			defer h.mu.Unlock()
			percept, _ := h.has["percept"].(map[string]any)
			summary, _ := percept["summary"].(map[string]any)
			count, _ := summary["leftOut"].(float64)
			return count
		}
		if h.messages(time.Hour); leftOut() == 0 {
			t.Error("the hub has all, and has no room for it")
		}
		room = maxReport
		if h.messages(25 * time.Hour); leftOut() != 0 {
			t.Errorf("a day after there was room again %v tokens are left out", leftOut())
		}
	})
}

// Whatever the hub has, what it takes of messages and loses, at the end it has what it should.
func TestHubHasWhatItShould(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		faults := rapid.SliceOfN(rapid.SampledFrom([]string{"", "lost", "lost, taken", "429", "offline"}), 0,
			12).Draw(rt, "faults")
		stale := rapid.SampledFrom([]string{
			`{}`, `{"percept":{"schema":0,"old":{"a":1},"tokens":"x"}}`, `{"percept":7,"other":1}`, `{"percept":null}`,
			`{"percept":{"schema":1,"tokens":[{"identity":"device"}],"desired":{"version":3,"status":"applied"}}}`,
		}).Draw(rt, "what the hub has")
		synctest.Test(t, func(t *testing.T) {
			h := newReported(t, nil)
			if err := json.Unmarshal([]byte(stale), &h.has); err != nil {
				t.Fatal(err)
			}
			maps.DeleteFunc(h.has, func(_ string, value any) bool { return value == nil })
			send := h.options.Send
			h.options.Send = func(ctx context.Context, patch json.RawMessage) (int64, error) {
				fault := ""
				if len(faults) > 0 {
					fault, faults = faults[0], faults[1:]
				}
				switch fault {
				case "lost":
					return 0, context.DeadlineExceeded
				case "lost, taken":
					_, _ = send(ctx, patch)
					return 0, context.DeadlineExceeded
				case "429":
					return 0, &link.RefusedError{Status: 429}
				case "offline":
					time.AfterFunc(time.Minute, h.connect)
					return 0, link.ErrOffline
				}
				return send(ctx, patch)
			}
			h.connect()
			for n := range 6 {
				h.change(func(s *api.Status) {
					s.Config.Error = strings.Repeat("x", n%3)
					s.Tokens[0].Permissions.Withheld = n%2 == 1
				})
				time.Sleep(17 * time.Minute)
			}
			time.Sleep(24 * time.Hour)
			synctest.Wait()
			h.mu.Lock()
			defer h.mu.Unlock()
			has, _ := h.has["percept"].(map[string]any)
			delete(has, "requests")
			status := h.status
			status.Now = time.Now()
			want := decoded(describe(&status, readReport(has).Desired, readReport(has), maxReport))
			if patch := mergePatch(has, want); patch != nil {
				t.Errorf("the hub lacks %v; it has %v", patch, has)
			}
			if want["schema"] != 1.0 {
				t.Error(want)
			}
		})
	})
}

// drawReported draws a status with as many tokens as can be, and texts of a back end that means ill.
func drawReported(rt *rapid.T) *api.Status {
	text := rapid.SampledFrom(append(rapid.SliceOfN(rapid.StringN(0, 300, 900), 1, 6).Draw(rt, "texts"), "",
		"\xff\xfe\x00\u2028\"\\<>&", strings.Repeat("\"", 1500), strings.Repeat("é", 1500)))
	s := &api.Status{
		Version: text.Draw(rt, "version"), Source: api.SourceStatus{Kind: text.Draw(rt, "kind")},
		Config:  api.ConfigStatus{SHA256: strings.Repeat("a", 64), Error: text.Draw(rt, "fault")},
		Trouble: []string{"a"},
	}
	for n := range rapid.IntRange(0, 300).Draw(rt, "tokens") {
		t := token(text.Draw(rt, "identity"), fmt.Sprint(n)+text.Draw(rt, "resource"))
		if rapid.Bool().Draw(rt, "failing") {
			t.ExpiresIn, t.LastOutcome, t.LastError = 0, api.OutcomeFailed, text.Draw(rt, "error")
		}
		s.Tokens = append(s.Tokens, t)
	}
	deny := api.DenyStatus{Lost: text.Draw(rt, "lost")}
	for range rapid.IntRange(0, 200).Draw(rt, "rules") {
		deny.Rules = append(deny.Rules, api.DenyRule{
			ID: text.Draw(rt, "id"), DenyTarget: api.DenyTarget{Module: text.Draw(rt, "module")}, Idle: "x",
		})
	}
	s.Deny = &deny
	return s
}

// The hub takes what is reported, whatever texts and how many resources there are.
func TestReportsFit(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		s := drawReported(rt)
		ack := &desiredAck{Version: 1 << 50, Status: "refused", Reason: strings.Repeat("\"", 9000),
			Idle: make([]string, 100)}
		for _, limit := range []int{maxReport, minReport * 4} {
			r := describe(s, ack, nil, limit)
			text, err := json.Marshal(map[string]any{"percept": r})
			if err != nil {
				rt.Fatal(err)
			}
			if err := hubtest.CheckReported(text); err != nil {
				rt.Fatal(err)
			}
			if len(text) > limit+64 {
				rt.Errorf("%d bytes, limit %d", len(text), limit)
			}
			if len(r.Tokens)+r.Summary.LeftOut != len(s.Tokens) ||
				len(r.Deny.Rules)+r.Deny.LeftOut != len(s.Deny.Rules) {
				rt.Errorf("%d and %d of %d tokens", len(r.Tokens), r.Summary.LeftOut, len(s.Tokens))
			}
			calm := slices.ContainsFunc(r.Tokens, func(t tokenReport) bool { return !t.isTrouble() })
			troubled := 0
			for _, t := range r.Tokens {
				if t.isTrouble() {
					troubled++
				}
			}
			if calm && troubled != r.Summary.Errors {
				rt.Errorf("%d of %d tokens in trouble are there, beside calm ones", troubled, r.Summary.Errors)
			}
		}
	})
}

func TestReportIsSteady(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 28, 8, 0, 30, 0, time.UTC)
	s := api.Status{Now: now, Tokens: []api.TokenStatus{token("device", "https://vault.azure.net")}}
	s.Tokens[0].LastOutcome, s.Tokens[0].Failures = api.OutcomeFailed, 3
	s.Tokens[0].LastError = "dial tcp 127.0.0.1:40342: connection refused (try 3)"
	skew := int64(2)
	s.Clock.Skew = &skew
	first := describe(&s, nil, nil, maxReport)
	if e := first.Tokens[0]; e.Error != s.Tokens[0].LastError || e.ErrorSince != "2026-11-28T08:00:00Z" {
		t.Errorf("%+v", e)
	}
	s.Now = now.Add(time.Hour)
	s.Tokens[0].LastError = "dial tcp 127.0.0.1:51713: connection refused (try 17)"
	s.Tokens[0].ExpiresOn = s.Tokens[0].ExpiresOn.Add(70 * time.Second)
	skew = -7
	if patch := mergePatch(decoded(first), decoded(describe(&s, nil, first, maxReport))); patch != nil {
		t.Errorf("it reports %v, which is no news", patch)
	}
	s.Tokens[0].LastError = "refused by the back end"
	second := describe(&s, nil, first, maxReport)
	if e := second.Tokens[0]; e.Error != "refused by the back end" || e.ErrorSince != "2026-11-28T08:00:00Z" {
		t.Errorf("%+v", e)
	}
	s.Tokens[0].Failures, s.Tokens[0].State = 1, api.StateFailing
	if e := describe(&s, nil, second, maxReport).Tokens[0]; e.Error != "" || e.State != api.StateFresh {
		t.Errorf("a first failure is reported: %+v", e)
	}
	skew = 40
	if c := describe(&s, nil, second, maxReport).Clock; c.Skew != 40 {
		t.Errorf("%+v", c)
	}
}

func TestReporterEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newReported(t, func(o *reporterOptions) {
			o.Send = func(ctx context.Context, _ json.RawMessage) (int64, error) {
				<-ctx.Done()
				return 0, errors.New("late")
			}
		})
		h.connect()
		time.Sleep(time.Hour)
		h.close()
	})
}

func FuzzMergePatch(f *testing.F) {
	f.Add(`{"a":{"b":1,"c":[1]},"d":"x"}`, `{"a":{"b":2},"e":{}}`)
	f.Add(`{"a":1}`, `{"a":{"b":{}}}`)
	f.Fuzz(func(t *testing.T, before, after string) {
		var has, want map[string]any
		if json.Unmarshal([]byte(before), &has) != nil || json.Unmarshal([]byte(after), &want) != nil ||
			strings.Contains(after, "null") { // which no report has
			return
		}
		patch := mergePatch(has, want)
		got := merged(has, patch)
		if left := mergePatch(got, want); left != nil {
			t.Errorf("%s and %v make %v, which lacks %v", before, patch, got, left)
		}
		if patch != nil {
			if again := merged(doubted(has, patch), mergePatch(doubted(has, patch), want)); mergePatch(again,
				want) != nil {
				t.Errorf("after a doubt: %v", again)
			}
		}
	})
}
