package iothub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
	"perceptd/agent/iothub/link"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	vault   = "https://vault.azure.net"
	storage = "https://storage.azure.com"
	device  = "hub.azure-devices.net/percept-7"
)

// theDevice is device.
var theDevice = link.Identity{Hub: "hub.azure-devices.net", Device: "percept-7"}

// edge is a device with two identities, whose tokens are prefetched.
func edge() agent.Rules {
	return agent.Rules{Rules: grants.Rules{
		Identities: []grants.Identity{
			{Name: "device", Default: true},
			{Name: "vision", ClientID: "00000000-0000-0000-0000-000000000001"},
		},
		Grants: []grants.Grant{
			{Caller: grants.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault, storage},
				Prefetch: true},
			{Caller: grants.Match{Module: "log"}, Identity: "device", Resources: []string{vault}, Prefetch: true},
		},
	}}
}

// afar is an agent as direct methods reach it.
type afar struct {
	*methods
	source *tokencachetest.Source
	logs   *observer.ObservedLogs
}

// newAfar returns an agent that has its tokens. It runs in a bubble's virtual time.
func newAfar(t *testing.T) afar {
	core, logs := observer.New(zapcore.DebugLevel)
	source := &tokencachetest.Source{Life: 24 * time.Hour}
	a, err := agent.New(agent.Options{Fetch: source.Fetch, Rules: edge(), Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		for _, entry := range logs.All() {
			if strings.Contains(fmt.Sprint(entry.Message, entry.ContextMap()), tokencachetest.Canary) {
				t.Errorf("token text in the log: %v", entry)
			}
		}
	})
	synctest.Wait()
	status := func() api.Status {
		s := a.Status()
		s.Now = api.Time(time.Now())
		return s
	}
	return afar{newMethods(a, status, agent.BoundedLog(zap.New(core))), source, logs}
}

// bubble runs f in virtual time with an agent that has its tokens.
func bubble(t *testing.T, f func(t *testing.T, a afar)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newAfar(t)) })
}

// ask calls a method and returns its status and answer as they go out. No answer has the text of a token, or is longer
// than IoT Hub takes.
func (a afar) ask(t *testing.T, name, payload string) (int, string) {
	t.Helper()
	status, answer := a.serve(t.Context(), theDevice, name, json.RawMessage(payload))
	text, err := json.Marshal(answer)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), tokencachetest.Canary) {
		t.Errorf("token text in the answer: %s", text)
	}
	if len(text) > api.MaxMethodAnswer {
		t.Errorf("the answer of %s is %d bytes long", name, len(text))
	}
	return status, string(text)
}

// refusal checks an error's status and code, and what it says.
func (a afar) refusal(t *testing.T, name, payload string, status int, code api.Code, says string) {
	t.Helper()
	got, text := a.ask(t, name, payload)
	var e api.MethodError
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatal(err)
	}
	if got != status || e.Error.Code != code || !strings.Contains(e.Error.Message, says) {
		t.Errorf("%s of %.99q: %d %s, want %d %s that says %q", name, payload, got, text, status, code, says)
	}
}

func TestMethodsAreFound(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		for _, name := range []string{"percept.status", "PERCEPT.STATUS", "Percept.Status"} {
			if status, text := a.ask(t, name, "null"); status != 200 || !strings.Contains(text, `"tokens":[{`) {
				t.Errorf("%s: %d %s", name, status, text)
			}
		}
		a.refusal(t, "reboot", "", 404, api.CodeUnknownMethod, "there are percept.status, percept.explain, ")
		a.refusal(t, "", "", 404, api.CodeUnknownMethod, "there is no direct method")
		a.refusal(t, "a\nline", "", 404, api.CodeUnknownMethod, `no direct method "a\nline"`)
		lines := a.logs.FilterMessage("direct method answered").All()
		by := lines[len(lines)-1].ContextMap()["by"]
		if by != `iothub `+device+` method "a\nline"` {
			t.Errorf("%v", by)
		}
	})
}

func TestMethodPayloadsAreStrict(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		for _, row := range []struct{ name, payload, says string }{
			{api.MethodStatus, `{"all":true}`, `unknown field "all": there is none to give`},
			{api.MethodExplain, `{"resources":[]}`, `unknown field "resources": there are resource, identity`},
			{api.MethodStatus, `[]`, "it is no JSON object"},
			{api.MethodStatus, `7`, "it is no JSON object"},
			{api.MethodStatus, `"{}"`, "it is no JSON object"},
			{api.MethodStatus, `{} {}`, "something comes after the JSON object"},
			{api.MethodStatus, `{`, "does not end"},
			{api.MethodStatus, strings.Repeat(" ", maxPayload+1), "longer than 131072 bytes"},
			{api.MethodExplain, `{}`, "names no resource"},
			{api.MethodExplain, `{"resource":7}`, `field "resource" is a number`},
			{api.MethodPolicyChanged, ``, "names a resource"},
			{api.MethodPolicyChanged, `{"effect":"granted","all_resources":true,"at":"yesterday"}`, "a time in it"},
			{api.MethodRefresh, `{"identity":["vision"]}`, `field "identity" is a list, and must be a text`},
			{api.MethodDeny, `{"module":3}`, `field "module" is a number, and must be a text`},
			{api.MethodDeny, `{"all":"yes"}`, `field "all" is a text, and must be true or false`},
			{api.MethodDeny, `{"module":{}}`, `field "module" is an object, and must be a text`},
			{api.MethodDeny, `{"module":"a1","module":"a2"}`, `field "module" is there twice`},
			{api.MethodDeny, `{"Module":"a1"}`, `unknown field "Module": there are `},
			{api.MethodDeny, `{"module":"a1","MODULE":"a2"}`, `unknown field "MODULE": there are `},
			{api.MethodRefresh, `{"identity":""}`, "its identity is empty"},
			{api.MethodRefresh, `{"identity":"vision","Resource":null}`, `unknown field "Resource"`},
			{api.MethodExplain, `{"resource":"vault.azure.net","identity":""}`, "its identity is empty"},
			{api.MethodPolicyChanged, `{"resource":"vault.azure.net","identity":"","effect":"revoked"}`,
				"its identity is empty"},
			{api.MethodPolicyChanged, `{"all_resources":true,"effect":"revoked","at":null}`, "its at is empty"},
			{api.MethodPolicyChanged, `{"resource":"vault.azure.net","effect":""}`, "its effect is empty"},
		} {
			a.refusal(t, row.name, row.payload, 400, api.CodeBadRequest, row.says)
		}
		for _, payload := range []string{"", "null", " null\n", "{}", " {} "} {
			if status, text := a.ask(t, api.MethodStatus, payload); status != 200 {
				t.Errorf("%q: %d %s", payload, status, text)
			}
		}
	})
}

func TestExplainMethod(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		for payload, stories := range map[string]int{
			`{"resource":"https://vault.azure.net"}`:                      2,
			`{"resource":"vault.azure.net"}`:                              2,
			`{"resource":"https://VAULT.azure.net/","identity":"vision"}`: 1,
			`{"resource":"https://vault.azure.net/.default"}`:             2,
		} {
			status, text := a.ask(t, api.MethodExplain, payload)
			var answer explanations
			if err := json.Unmarshal([]byte(text), &answer); err != nil {
				t.Fatal(err)
			}
			if status != 200 || len(answer.Explanations) != stories || answer.LeftOut != nil {
				t.Errorf("%s: %d %s", payload, status, text)
				continue
			}
			story := answer.Explanations[stories-1]
			if story.Summary != "vision's token for "+vault+" is current, as far as perceptd was told: no policy "+
				"change for it is on record." || len(story.Sections) < 5 {
				t.Errorf("%s: %+v", payload, story)
			}
		}
		a.refusal(t, api.MethodExplain, `{"resource":"https://graph.microsoft.com"}`, 404, api.CodeNotCached,
			"tokens are cached for: "+vault+", "+storage)
		a.refusal(t, api.MethodExplain, `{"resource":"https://vault.azure.net","identity":"nobody"}`, 400,
			api.CodeUnknownIdentity, `no identity "nobody"`)
	})
}

func TestPolicyChangedMethod(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		payload := `{"resource":"vault.azure.net","identity":"vision","effect":"revoked","note":"ticket 12"}`
		status, text := a.ask(t, api.MethodPolicyChanged, payload)
		var answer api.PolicyChangeAnswer
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			t.Fatal(err)
		}
		if status != 200 || answer.ID == "" || answer.Resource != vault || answer.Touched != 1 || answer.Now.IsZero() {
			t.Errorf("%d %s", status, text)
		}
		if changes := a.agent.Changes(); len(changes) != 1 || changes[0].ID != answer.ID {
			t.Errorf("on record: %+v", changes)
		}
		noted := a.logs.FilterMessage("policy change noted").All()
		if len(noted) != 1 || noted[0].ContextMap()["by"] != "iothub "+device+" method percept.policyChanged" {
			t.Errorf("%v", noted)
		}
		future := time.Now().Add(time.Hour).Format(time.RFC3339)
		for _, row := range []struct {
			payload string
			status  int
			code    api.Code
		}{
			{`{"resource":"https://other.example","effect":"granted"}`, 400, api.CodeBadRequest},
			{`{"resource":"https://vault.azure.net","identity":"x","effect":"granted"}`, 400, api.CodeUnknownIdentity},
			{`{"all_resources":true,"effect":"granted","at":"` + future + `"}`, 422, api.CodeFutureChange},
		} {
			a.refusal(t, api.MethodPolicyChanged, row.payload, row.status, row.code, "")
		}
	})
}

// What is done and not on the disk is in the answer all the same.
func TestPolicyChangedMethodThatIsNotKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		source := &tokencachetest.Source{Life: 24 * time.Hour}
		a, err := agent.New(agent.Options{Fetch: source.Fetch, Rules: edge(),
			SaveRecord: func(tokencache.Record) error { return errors.New("the disk is full") }})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		m := newMethods(a, a.Status, zap.NewNop())
		status, answer := m.serve(t.Context(), theDevice, api.MethodPolicyChanged,
			json.RawMessage(`{"all_resources":true,"effect":"changed"}`))
		e, ok := answer.(api.MethodError)
		if status != 507 || !ok || e.Error.Code != api.CodeNotKept || e.PolicyChange == nil || e.PolicyChange.ID == "" {
			t.Errorf("%d %+v", status, answer)
		}
	})
}

func TestRefreshMethod(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		before := a.source.Count()
		status, text := a.ask(t, api.MethodRefresh, `{"identity":"vision","now":false}`)
		if status != 200 || strings.Count(text, `"identity":"vision"`) != 2 || a.source.Count() != before+2 {
			t.Errorf("%d %s", status, text)
		}
		a.source.Set(func(s *tokencachetest.Source) { s.Latency = time.Hour })
		begun := time.Now()
		status, text = a.ask(t, api.MethodRefresh, `{"resource":"storage.azure.com"}`)
		took := time.Since(begun)
		if status != 200 || took > refreshTime || !strings.Contains(text, `"outcome":"failed"`) {
			t.Errorf("%v: %d %s", took, status, text)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // the connection is gone
		if status, answer := a.serve(ctx, theDevice, api.MethodRefresh, nil); status != 200 ||
			time.Since(begun) > refreshTime {
			t.Errorf("%d %+v", status, answer)
		}
	})
}

// Refreshes that hang take no more than their places.
func TestMethodsThatHangAreBounded(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		a.source.Set(func(s *tokencachetest.Source) { s.Latency = time.Hour })
		answered := make(chan int, 20)
		for range 10 {
			go func() {
				status, _ := a.serve(t.Context(), theDevice, api.MethodRefresh, nil)
				answered <- status
			}()
		}
		synctest.Wait()
		var at []int
		for range 6 {
			at = append(at, <-answered)
		}
		if slices.ContainsFunc(at, func(status int) bool { return status != 429 }) || len(answered) != 0 {
			t.Errorf("%v, and %d more", at, len(answered))
		}
		if status, text := a.ask(t, api.MethodStatus, ""); status != 200 {
			t.Errorf("%d %s", status, text)
		}
		time.Sleep(refreshTime)
		synctest.Wait()
		if len(answered) != 4 {
			t.Errorf("%d answers at the end of their time", len(answered))
		}
	})
}

func TestMethodsAreRateLimited(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		counts := make(map[int]int)
		for range 1000 {
			status, answer := a.serve(t.Context(), theDevice, api.MethodStatus, nil)
			if counts[status]++; status == 429 {
				e := answer.(api.MethodError).Error
				if e.RetryAfter != 1 || e.Code != api.CodeBusy {
					t.Fatalf("%+v", e)
				}
			}
		}
		if counts[200] != 200 || counts[429] != 800 {
			t.Errorf("%v", counts)
		}
		lines := a.logs.FilterMessage("direct method answered").Len()
		if lines != 50 {
			t.Errorf("%d lines in the journal", lines)
		}
		time.Sleep(time.Second)
		if status, _ := a.serve(t.Context(), theDevice, api.MethodStatus, nil); status != 200 {
			t.Errorf("a second later: %d", status)
		}
		last := a.logs.FilterMessage("direct method answered").All()[lines].ContextMap()
		if fmt.Sprint(last["left_out"]) != "950" || last["message_id"] != MessageMethod ||
			last["by"] != "iothub "+device+" method percept.status" {
			t.Errorf("%v", last)
		}
	})
}

// A method that panics answers 500, and the log has where it was and not what it had in its hands.
func TestMethodsThatPanic(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		a.status = func() api.Status { panic(tokencachetest.Canary) }
		a.refusal(t, api.MethodStatus, "", 500, api.CodeInternal, "its log says where")
		if n := a.logs.FilterMessage("direct method panicked").Len(); n != 1 {
			t.Errorf("%d lines", n)
		}
	})
}

// crowded is the status of a device with as many tokens, changes and denials as there can be, each as long as can be.
func crowded() api.Status {
	long := strings.Repeat("x", 1000)
	s := api.Status{Now: time.Unix(1_800_000_000, 0), Hub: &api.HubStatus{}}
	for i := range 256 {
		id := fmt.Sprintf("%08x", i)
		s.Changes = append(s.Changes, api.PolicyChange{ID: id, Effect: api.EffectRevoked, Resource: long})
		s.Trouble = append(s.Trouble, id+long)
		s.Hub.Desired.Idle = append(s.Hub.Desired.Idle, id+long)
		s.Denials = append(s.Denials, api.Denial{Caller: id, Reason: long})
		token := api.TokenStatus{Identity: "i" + id, Resource: vault + "/" + long, ExpiresIn: 3600 * 20,
			Claims: &api.TokenClaims{ObjectID: id, Groups: slices.Repeat([]string{long}, 200)}}
		if token.Permissions.State = api.PermissionsCurrent; i == 200 {
			token.LastOutcome, token.ExpiresIn, token.Resource = api.OutcomeFailed, 0, vault
			token.LastError = long
		}
		token.Changes = []api.TokenChange{{ID: id, State: api.PermissionsCurrent}}
		s.Tokens = append(s.Tokens, token)
		s.Identities = append(s.Identities, api.IdentityStatus{Name: "i" + id})
	}
	return s
}

func TestAnswersAreBounded(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		a.status = crowded
		status, text := a.ask(t, api.MethodStatus, "")
		var answer api.StatusAnswer
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			t.Fatal(err)
		}
		if status != 200 || len(text) < 100<<10 || len(answer.Tokens)+answer.LeftOut["tokens"] != 256 ||
			len(answer.Trouble)+answer.LeftOut["trouble"] != 256 || len(answer.Hub.Desired.Idle) == 256 {
			t.Errorf("%d, %d bytes: %v", status, len(text), answer.LeftOut)
		}
		failed := func(token api.TokenStatus) bool { return token.LastError != "" }
		if !slices.ContainsFunc(answer.Tokens, failed) || strings.Contains(text, `"groups"`) {
			t.Errorf("the token with trouble is left out, or claims are not: %.999s", text)
		}
		if again := crowded(); len(again.Tokens) != 256 || len(again.Hub.Desired.Idle) != 256 {
			t.Error("the status was changed")
		}
		status, text = a.ask(t, api.MethodExplain, `{"resource":"https://vault.azure.net"}`)
		if status != 200 || !strings.Contains(text, `"explanations":[{`) {
			t.Errorf("%d %.999s", status, text)
		}
	})
}

// FuzzMethodPayload calls every method with payloads that are none: there is an answer, and a payload that is no JSON
// object is refused.
func FuzzMethodPayload(f *testing.F) {
	for _, payload := range []string{
		``, `null`, `{}`, `[]`, `{"resource":"https://vault.azure.net"}`, `{"lift":"x"}`, `{"all":true}`,
		`{"effect":"changed","all_resources":true}`, `{"identity":"vision"}`, "{\"a\":\"\xff\"}", `{{{{{{{{`,
	} {
		f.Add(payload)
	}
	source := &tokencachetest.Source{Life: 24 * time.Hour}
	a, err := agent.New(agent.Options{Fetch: source.Fetch, Rules: edge()})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(a.Close)
	f.Fuzz(func(t *testing.T, payload string) {
		m := newMethods(a, a.Status, zap.NewNop())
		for _, method := range theMethods {
			if method.name == api.MethodRefresh { // calls of the back end have their own pace
				_, _ = readPayload[api.RefreshRequest](&methodCall{payload: []byte(payload)})
				continue
			}
			status, answer := m.serve(t.Context(), theDevice, method.name, json.RawMessage(payload))
			text, err := json.Marshal(answer)
			if err != nil || len(text) > api.MaxMethodAnswer || status < 200 || status > 599 || status == 500 {
				t.Errorf("%s of %q: %d %s %v", method.name, payload, status, text, err)
			}
			trimmed := strings.Trim(payload, " \t\r\n")
			isObject := strings.HasPrefix(trimmed, "{")
			if status == 200 && !isObject && trimmed != "" && trimmed != "null" {
				t.Errorf("%s takes %q", method.name, payload)
			}
		}
		for _, rule := range a.DenyStatus().Rules {
			if _, err := a.LiftDeny("iothub "+device, api.DenySide{Origin: api.DenyMethod, Hub: device},
				rule.ID); err != nil {
				t.Error(err)
			}
		}
		for _, change := range a.Changes() {
			if _, err := a.WithdrawChange("test", change.ID); err != nil {
				t.Error(err)
			}
		}
	})
}

// lastRule returns the ID of the deny rule that was set last.
func (a afar) lastRule() string {
	rules := a.agent.DenyStatus().Rules
	if len(rules) == 0 {
		return ""
	}
	return rules[0].ID
}

// token asks for a token as the module vision does.
func (a afar) token(t *testing.T) error {
	t.Helper()
	_, err := a.agent.Token(t.Context(), grants.Caller{Module: "vision", UID: grants.NoID, GID: grants.NoID},
		agent.Request{Request: grants.Request{Resource: vault}})
	return err
}

func TestDenyMethod(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		if err := a.token(t); err != nil {
			t.Fatal(err)
		}
		status, text := a.ask(t, "percept.DENY", `{"module":"vision","resource":"vault.azure.net","note":"stolen"}`)
		var rule api.DenyAnswer
		if err := json.Unmarshal([]byte(text), &rule); err != nil {
			t.Fatal(err)
		}
		if status != 200 || rule.ID == "" || rule.Module != "vision" || rule.Resource != vault ||
			rule.Origin != api.DenyMethod || !strings.HasPrefix(rule.By, "iothub "+device) || rule.Now.IsZero() {
			t.Errorf("%d %s", status, text)
		}
		var refusal *agent.Error
		if err := a.token(t); !errors.As(err, &refusal) || refusal.Code != api.CodeDenied {
			t.Errorf("the token of what is denied: %v", err)
		}
		for _, empty := range []string{"", "null", "{}"} {
			if status, text := a.ask(t, api.MethodDeny, empty); status != 200 || !strings.Contains(text, rule.ID) {
				t.Errorf("%q: %d %s", empty, status, text)
			}
		}
		for _, name := range []string{"module", "unit", "user", "identity", "resource", "all", "lift"} {
			for _, empty := range []string{`""`, "null", "false"} {
				says := "its " + name + " is empty"
				if empty != "null" && (name == "all") != (empty == "false") {
					says = "field"
				}
				a.refusal(t, api.MethodDeny, `{"`+name+`":`+empty+`}`, 400, api.CodeBadRequest, says)
			}
		}
		a.refusal(t, api.MethodDeny, `{"lift":"`+rule.ID+`","module":"vision"}`, 400, api.CodeBadRequest, "one of them")
		a.refusal(t, api.MethodDeny, `{"lift":"nothing"}`, 404, api.CodeUnknownDenyRule,
			`no deny rule "nothing" is on record; percept.deny without a payload lists the rules`)
		a.refusal(t, api.MethodDeny, `{"note":"why"}`, 400, api.CodeBadRequest, "")
		a.refusal(t, api.MethodDeny, `{"modul":"vision"}`, 400, api.CodeBadRequest,
			`unknown field "modul": there are all, module, unit, user, identity, resource, note, lift`)
		if status, text := a.ask(t, api.MethodDeny, `{"lift":"`+rule.ID+`"}`); status != 200 ||
			!strings.Contains(text, rule.ID) {
			t.Errorf("%d %s", status, text)
		}
		if err := a.token(t); err != nil {
			t.Errorf("after the rule is lifted: %v", err)
		}
		if _, err := a.agent.Deny("uid 0 (pid 7)", api.DenySide{Origin: api.DenyLocal},
			api.DenyRequest{DenyTarget: api.DenyTarget{Module: "log"}}); err != nil {
			t.Fatal(err)
		}
		status, text = a.ask(t, api.MethodDeny, `{"lift":"`+a.lastRule()+`"}`)
		if status != 400 || a.lastRule() == "" {
			t.Errorf("it lifts what a person on the device denies: %d %s", status, text)
		}
	})
}

// While root has set the hub aside, what changes anything is refused, and what shows something answers.
func TestMethodsWhileTheHubIsSetAside(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		if err := a.agent.SetHubAside("uid 0 (pid 7)"); err != nil {
			t.Fatal(err)
		}
		for name, payload := range map[string]string{
			api.MethodDeny:          `{"all":true}`,
			api.MethodPolicyChanged: `{"all_resources":true,"effect":"revoked"}`,
			api.MethodRefresh:       ``,
		} {
			a.refusal(t, name, payload, 403, api.CodeHubSetAside, "root on this device has set aside")
		}
		if len(a.agent.Changes()) != 0 || a.lastRule() != "" || a.token(t) != nil {
			t.Error("something was changed")
		}
		for name, payload := range map[string]string{
			api.MethodStatus: "", api.MethodExplain: `{"resource":"vault.azure.net"}`,
		} {
			if status, text := a.ask(t, name, payload); status != 200 {
				t.Errorf("%s: %d %s", name, status, text)
			}
		}
		if err := a.agent.HeedHub("uid 0 (pid 7)"); err != nil {
			t.Fatal(err)
		}
		if status, text := a.ask(t, api.MethodDeny, `{"all":true}`); status != 200 || a.token(t) == nil {
			t.Errorf("%d %s", status, text)
		}
	})
}

// However often other methods are called, a denial gets through.
func TestDenialsAreNotStarved(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		for i := range 2000 {
			name := []string{api.MethodStatus, api.MethodExplain, "unknown"}[i%3]
			a.serve(t.Context(), theDevice, name, nil)
		}
		if status, _ := a.serve(t.Context(), theDevice, "unknown", nil); status != 429 {
			t.Errorf("%d", status)
		}
		if status, text := a.ask(t, api.MethodDeny, `{"all":true}`); status != 200 || a.token(t) == nil {
			t.Errorf("%d %s", status, text)
		}
		if status, text := a.ask(t, api.MethodDeny, `{"lift":"`+a.lastRule()+`"}`); status != 200 || a.token(t) != nil {
			t.Errorf("%d %s", status, text)
		}
	})
}

// A caller in the cloud is told what to call, and not what to type on the device.
func TestMethodsThatAreFull(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, a afar) {
		for i := range 64 {
			if status, text := a.ask(t, api.MethodDeny, fmt.Sprintf(`{"module":"m%d"}`, i)); status != 200 {
				t.Fatalf("%d %s", status, text)
			}
		}
		a.refusal(t, api.MethodDeny, `{"module":"more"}`, 422, api.CodeTooManyDenyRules,
			"lift some, or deny more with one rule; percept.deny without a payload lists them")
		a.refusal(t, api.MethodPolicyChanged, `{"effect":"granted"}`, 400, api.CodeBadRequest,
			"a policy change names a resource, or says all_resources, and not both")
	})
}

// methodCodes returns the codes that methods answer with, by status.
func methodCodes() map[int][]api.Code {
	codes := map[int][]api.Code{500: {api.CodeInternal}}
	for _, code := range []api.Code{api.CodeBadRequest, api.CodeUnknownIdentity, api.CodeUnknownMethod,
		api.CodeNotCached, api.CodeFutureChange, api.CodeTooManyChanges, api.CodeBusy, api.CodeUnreachable,
		api.CodeNotKept, api.CodeHubSetAside, api.CodeUnknownDenyRule, api.CodeTooManyDenyRules} {
		codes[api.StatusOf[code]] = append(codes[api.StatusOf[code]], code)
	}
	return codes
}

// percept.deny acts while the disk hangs, however many calls of it there were, and is answered in time.
func TestDenyByMethodWhileTheDiskHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		source := &tokencachetest.Source{Life: 24 * time.Hour}
		a, err := agent.New(agent.Options{Fetch: source.Fetch, Rules: edge(),
			Deny: agent.DenyStore{Save: func(deny.Record) error { <-release; return nil }}})
		if err != nil {
			t.Fatal(err)
		}
		m := newMethods(a, a.Status, zap.NewNop())
		var calls sync.WaitGroup
		for i := range 16 {
			calls.Go(func() {
				payload := json.RawMessage(fmt.Sprintf(`{"module":"m%d"}`, i))
				if status, answer := m.serve(t.Context(), theDevice, api.MethodDeny, payload); status != 507 {
					t.Errorf("%d, %+v", status, answer)
				}
			})
		}
		began := time.Now()
		calls.Wait()
		synctest.Wait() // it is known by now how long the disk takes
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("sixteen calls take %v", took)
		}
		began = time.Now()
		m.serve(t.Context(), theDevice, api.MethodDeny, json.RawMessage(`{"module":"vision"}`))
		status, _ := m.serve(t.Context(), theDevice, api.MethodDeny, nil)
		if rules := a.DenyStatus().Rules; status != 200 || len(rules) != 17 || time.Since(began) > 0 {
			t.Errorf("after %v the list is answered with %d, and %d rules are in force", time.Since(began), status,
				len(rules))
		}
		close(release)
		a.Close()
	})
}
