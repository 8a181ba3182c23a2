package iothub

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// twinned is an agent with the desired properties of a twin, without a link. It runs in a bubble's virtual time.
type twinned struct {
	afar
	*desired
}

const twinnedHub = device

func newTwinned(t *testing.T) twinned {
	time.Sleep(time.Until(docsTime))
	a := newAfar(t)
	return twinned{a, &desired{
		agent: a.methods.agent, level: zap.NewAtomicLevelAt(zapcore.InfoLevel), configured: zapcore.InfoLevel,
		log: a.methods.log, changed: func() {},
	}}
}

// twin runs a test of a twin in a bubble.
func twin(t *testing.T, f func(t *testing.T, w twinned)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { f(t, newTwinned(t)) })
}

// reads has the twin be read with that percept; none: it has none.
func (w twinned) reads(version int64, percept string) api.DesiredStatus {
	return w.readsAfter(w.heard, version, percept)
}

// readsAfter is reads, where the twin was asked for when so many notifications had come.
func (w twinned) readsAfter(asked, version int64, percept string) api.DesiredStatus {
	w.read(document{twinnedHub, version, desiredOf(percept), asked})
	return w.describe()
}

func (w twinned) notified(version int64, percept string) {
	w.tighten(document{hub: twinnedHub, version: version, text: desiredOf(percept)}, w.heard+1)
}

func desiredOf(percept string) json.RawMessage {
	if percept == "" {
		return json.RawMessage(`{"$version":1}`)
	}
	return json.RawMessage(`{"another":7,"percept":` + percept + `}`)
}

// vision and logger are who asks for tokens.
var vision, logger = grants.Caller{Module: "vision"}, grants.Caller{Module: "log",
	Container: &grants.Container{ID: "c"}}

// served reports whether a caller is served, and which code it is refused with otherwise.
func (w twinned) served(t *testing.T, caller grants.Caller) (bool, api.Code) {
	_, err := w.desired.agent.Token(t.Context(), caller, agent.Request{Request: grants.Request{Resource: vault}})
	if refusal, is := errors.AsType[*agent.Error](err); is {
		return false, refusal.Code
	}
	return err == nil, ""
}

// expect checks that vision is denied, or is served, and that all others are served.
func (w twinned) expect(t *testing.T, what string, visionIsDenied bool) {
	t.Helper()
	if is, code := w.served(t, vision); is == visionIsDenied || visionIsDenied && code != api.CodeDenied {
		t.Errorf("%s: vision is served: %v %s", what, is, code)
	}
	if is, code := w.served(t, logger); !is {
		t.Errorf("%s: log is not served: %s", what, code)
	}
}

const denyVision = `{"deny":[{"module":"vision"}]}`

// What the twin denies is denied until it does so no more, in whichever way that is said.
func TestTwinDenies(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		w.expect(t, "at first", false)
		version := int64(0)
		for _, lifted := range []string{"", "null", `{}`, `{"deny":[]}`, `{"logLevel":"info"}`,
			`{"deny":[{"module":"other"}]}`} {
			for _, denied := range []string{denyVision, `{"deny":[{"module":"vision","resource":"VAULT.azure.net/"}]}`,
				`{"deny":[{"identity":"vision","note":"n"},{"user":"nobody-of-this-name"}]}`} {
				version += 2
				if s := w.reads(version, denied); s.Refused != "" || s.Applied != version {
					t.Errorf("%s: %+v", denied, s)
				}
				w.expect(t, denied, true)
				w.reads(version+1, lifted)
				w.expect(t, denied+" is lifted by "+lifted, false)
			}
		}
		w.reads(version+2, `{"deny":[{"all":true}]}`)
		if is, code := w.served(t, logger); is || code != api.CodeDenied {
			t.Errorf("all: %v %s", is, code)
		}
	})
}

// A notification denies at once, and does nothing else: nothing is lifted or replaced before the twin was read.
func TestNotifications(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		w.reads(4, "")
		w.notified(5, `{"deny":[{"module":"vision"}],"logLevel":"error","prefetch":[{"resource":"api://x"}]}`)
		w.expect(t, "notified", true)
		if s := w.describe(); s.Version != 4 || w.level.Level() != zapcore.InfoLevel {
			t.Errorf("more than denied: %+v %v", s, w.level.Level())
		}
		for i, percept := range []string{"", "null", `{}`, `{"deny":null}`, `{"deny":[]}`,
			`{"deny":[{"module":"other"}]}`,
			`{"deny":{}}`, `[]`, `7`} {
			w.notified(6+int64(i), percept)
			w.expect(t, percept, true)
		}
		w.reads(20, "")
		w.expect(t, "read", false)
		w.notified(20, denyVision)
		w.notified(19, denyVision)
		w.expect(t, "an old one", false)

		// What else is wrong in it, or in another entry, changes nothing of that.
		w.notified(21, `{"denied":7,"logLevel":"loud","policyChanges":{},"deny":[{"modul":"log"},{"module":"vision"}]}`)
		w.expect(t, "among others", true)
	})
}

// A full read is the truth, also when the version began at 1 again, and whichever hub's the twin is.
func TestVersionsBeginAgain(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		w.reads(40, denyVision)
		if s := w.reads(1, ""); s.Version != 1 || s.Applied != 1 {
			t.Errorf("%+v", s)
		}
		w.expect(t, "anew", false)
		w.notified(2, denyVision)
		w.expect(t, "notified", true)
		w.reads(2, denyVision)
		w.reads(40, "")
		w.expect(t, "lifted", false)
		// Another hub's version says nothing about this one's.
		other := "other.test/percept-7"
		w.tighten(document{other, 2, desiredOf(denyVision), 0}, w.heard+1)
		w.expect(t, "another hub", true)
		w.read(document{other, 2, desiredOf(""), w.heard})
		w.expect(t, "another hub's twin", false)
		// Nor must what a new twin denies be lost because the document is wrong.
		w.read(document{other, 30, desiredOf(""), w.heard})
		w.read(document{other, 1, desiredOf(`{"logLevel":7,"deny":[{"module":"vision"}]}`), w.heard})
		w.expect(t, "refused, anew", true)
	})
}

// When the twin was read is not when what it said was put in force again, and what was applied of another identity's
// twin is no version of this one's.
func TestWhenTheTwinWasRead(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		read := w.reads(3, denyVision)
		time.Sleep(time.Hour)
		w.again()
		if s := w.describe(); s.Applied != 3 || !s.ReadOn.Equal(read.ReadOn) {
			t.Errorf("%+v, and when it was read %+v", s, read)
		}
		if s := w.reads(3, denyVision); !s.ReadOn.Equal(read.ReadOn.Add(time.Hour)) {
			t.Errorf("read again: %+v", s)
		}
		const other = "hub.test/percept-8"
		if s := w.describeOf(other); s.Version != 0 || !s.ReadOn.IsZero() {
			t.Errorf("of another identity: %+v", s)
		}
		w.read(document{other, 7, desiredOf(`{"logLevel":"loud"}`), w.heard})
		if s := w.describeOf(other); s.Version != 7 || s.Applied != 0 || s.Refused == "" {
			t.Errorf("of another identity: %+v", s)
		}
	})
}

// hostile are values of percept, and documents, that a device may be sent.
func hostile() map[string]json.RawMessage {
	all := map[string]json.RawMessage{
		"ten megabytes": json.RawMessage(`{"percept":{"logLevel":"` + strings.Repeat("x", 10<<20) + `"}}`),
		"deep": json.RawMessage(`{"percept":` + strings.Repeat(`[`, 100_000) + strings.Repeat(`]`, 100_000) +
			`}`),
		"deep objects": json.RawMessage(strings.Repeat(`{"percept":`, 20_000) + "1" + strings.Repeat("}", 20_000)),
		"a deep list":  desiredOf(`{"prefetch":` + strings.Repeat(`[`, 5000) + strings.Repeat(`]`, 5000) + `}`),
		"cut off":      json.RawMessage(`{"percept":{"deny":[{"module":"log"}`),
		"nothing":      nil,
		"no UTF-8":     json.RawMessage("\xff\xfe"),
		"many keys":    desiredOf(`{` + strings.Repeat(`"k":1,`, 9000) + `"k":1}`),
	}
	for name, row := range documents {
		if row.says != "" {
			all[name] = desiredOf(row.percept)
		}
	}
	return all
}

// A document that is wrong changes nothing but that its sound deny entries deny, and says where it is wrong; what was
// in force stays so until one is right.
func TestRefusedDocuments(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		at := time.Now().Add(-time.Minute).UTC().Format(time.RFC3339)
		right := `{"deny":[{"module":"vision"}],"logLevel":"warn","prefetch":[{"resource":"` + vault + `"}],` +
			`"policyChanges":[{"allResources":true,"identity":"device","at":"` + at + `","effect":"changed"}]}`
		if s := w.reads(1, right); s.Refused != "" || len(s.Idle) > 0 {
			t.Fatalf("%+v", s)
		}
		before := w.desired.agent.Changes()
		version := int64(1)
		for name, text := range hostile() {
			version++
			w.read(document{twinnedHub, version, text, w.heard})
			s := w.describe()
			if s.Version != version || s.Refused == "" || len(s.Refused) > 512 || s.Applied != 1 || len(s.Idle) > 0 {
				t.Errorf("%s: %+v", name, s)
			}
			if is, code := w.served(t, vision); is || code != api.CodeDenied {
				t.Errorf("%s: vision is served again: %s", name, code)
			}
			if now := w.desired.agent.Changes(); len(now) != 1 || now[0].ID != before[0].ID ||
				w.level.Level() != zapcore.WarnLevel {
				t.Errorf("%s: on record %+v, level %v", name, now, w.level.Level())
			}
		}
		version++
		w.reads(version, `{"logLevel":"loud","deny":[{"module":7},{"module":"log","note":"sound"}]}`)
		for name, caller := range map[string]grants.Caller{"vision": vision, "log": logger} {
			if is, code := w.served(t, caller); is || code != api.CodeDenied {
				t.Errorf("%s: %v %s", name, is, code)
			}
		}
		if s := w.reads(version+1, ""); s.Refused != "" || s.Applied != version+1 {
			t.Errorf("%+v", s)
		}
		w.expect(t, "right at last", false)
		if len(w.desired.agent.Changes()) > 0 || w.level.Level() != zapcore.InfoLevel {
			t.Errorf("on record %+v, level %v", w.desired.agent.Changes(), w.level.Level())
		}
	})
}

// Where a document is refused, and what is right in its deny is in force all the same, status and journal say so.
func TestRefusedDocumentsThatDeny(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		w.reads(1, "")
		ahead := `"policyChanges":[{"allResources":true,"at":"` + time.Now().Add(time.Hour).UTC().Format(time.RFC3339) +
			`","effect":"revoked"}]`
		for i, row := range []struct {
			percept string
			denies  int
		}{
			{`{"logLevel":"loud","deny":[{"module":"vision"},{"modul":"log"},{"unit":"camera.service"}]}`, 2},
			{`{"logLevel":"loud","deny":[{"module":7}]}`, 0},
			{`{"logLevel":"loud"}`, 0},
			{`{"deny":[{"module":"vision"}],` + ahead + `}`, 1},
			{`{` + ahead + `}`, 0},
		} {
			version := int64(2*i + 2)
			lines := w.logs.Len()
			if s := w.reads(version, row.percept); s.Refused == "" || s.Denies != row.denies {
				t.Errorf("%s: %+v", row.percept, s)
			}
			w.expect(t, row.percept, row.denies > 0)
			said := "nothing of them is in force"
			if row.denies > 0 {
				said = "only what is right in percept.deny is in force"
			}
			if all := w.logs.All()[lines:]; !slices.ContainsFunc(all, func(e observer.LoggedEntry) bool {
				return strings.HasSuffix(e.Message, said)
			}) {
				t.Errorf("%s: the journal does not say that %s", row.percept, said)
			}
			if s := w.reads(version+1, ""); s.Denies != 0 {
				t.Errorf("%+v", s)
			}
		}
		// While root has set the hub aside nothing of it is in force.
		if err := w.desired.agent.SetHubAside("uid 0"); err != nil {
			t.Fatal(err)
		}
		if s := w.reads(20, `{"logLevel":"loud","deny":[{"module":"vision"}]}`); s.Denies != 0 {
			t.Errorf("set aside: %+v", s)
		}
	})
}

// What stands beside percept by mistake is acknowledged as a note, and percept in another case is refused.
func TestKeysInTheWrongPlace(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		text := json.RawMessage(`{"deny":[{"module":"vision"}],"percept":{"deny":[{"module":"none"}]}}`)
		w.read(document{twinnedHub, 1, text, w.heard})
		if s := w.describe(); s.Applied != 1 || len(s.Idle) != 2 ||
			!strings.HasPrefix(s.Idle[0], "deny: it stands beside percept") ||
			!strings.HasPrefix(s.Idle[1], "percept.deny[0]: ") {
			t.Errorf("%+v", s)
		}
		w.expect(t, "beside percept", false)
		text = json.RawMessage(`{"Percept":{"deny":[{"module":"log"}]},"percept":{"deny":[{"module":"vision"}]}}`)
		w.read(document{twinnedHub, 2, text, w.heard})
		if s := w.describe(); s.Applied != 1 || !strings.HasPrefix(s.Refused, "Percept: ") || s.Denies != 1 {
			t.Errorf("%+v", s)
		}
		w.expect(t, "another case beside percept", true)
	})
}

// A device that is told the same hostile documents for ever keeps nothing of them, and writes a line for each version.
func TestHostileDocumentsAreForgotten(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		w.reads(1, "")
		lines := w.logs.Len()
		for range 50 {
			w.reads(2, `{"logLevel":"loud"}`)
			w.notified(3, `{"logLevel":"loud"}`)
		}
		if n := w.logs.Len() - lines; n != 1 {
			t.Errorf("%d lines", n)
		}
		for version := range int64(200) {
			w.reads(3+version, fmt.Sprintf(`{"deny":[{"module":"m%d"}],"logLevel":7}`, version))
		}
		if n := len(w.desired.agent.DenyStatus().Rules); n > 2*api.MaxDenyRules {
			t.Errorf("%d rules are kept", n)
		}
	})
}

// While root has set the hub aside nothing of the twin is in force, and what is said is so when it is heeded again.
func TestTwinThatIsSetAside(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		a := w.desired.agent
		percept := `{"deny":[{"module":"vision"}],"logLevel":"error","policyChanges":[{"allResources":true,` +
			`"identity":"device",` +
			`"at":"` + time.Now().Add(-time.Minute).UTC().Format(time.RFC3339) + `","effect":"changed"}]}`
		w.reads(1, percept)
		w.expect(t, "heeded", true)
		id := a.Changes()[0].ID
		if _, err := a.WithdrawChange("uid 0", id); err == nil {
			t.Error("a change of the twin's is withdrawn while the hub is heeded")
		}
		if err := a.SetHubAside("uid 0"); err != nil {
			t.Fatal(err)
		}
		w.expect(t, "set aside", false)
		w.notice()
		if s := w.describe(); s.Refused == "" || w.level.Level() != zapcore.InfoLevel {
			t.Errorf("%+v, level %v", s, w.level.Level())
		}
		if _, err := a.WithdrawChange("uid 0", id); err != nil || len(a.Changes()) > 0 {
			t.Errorf("%v, %+v", err, a.Changes())
		}
		w.notified(2, `{"deny":[{"module":"log"},{"module":"vision"}]}`)
		w.expect(t, "notified", false)
		w.reads(2, percept)
		w.expect(t, "read", false)
		if len(a.Changes()) > 0 {
			t.Errorf("on record %+v", a.Changes())
		}
		if err := a.HeedHub("uid 0"); err != nil {
			t.Fatal(err)
		}
		w.expect(t, "heeded again", true)
		w.notice()
		if s := w.describe(); s.Refused != "" || s.Applied != 2 || w.level.Level() != zapcore.ErrorLevel ||
			len(a.Changes()) != 1 {
			t.Errorf("%+v, level %v, on record %+v", s, w.level.Level(), a.Changes())
		}
		// The twin of another hub is not set aside.
		if err := a.SetHubAside("uid 0"); err != nil {
			t.Fatal(err)
		}
		w.notice()
		w.read(document{"other.test/percept-7", 1, desiredOf(percept), w.heard})
		if s := w.describe(); s.Refused != "" || s.Applied != 1 || w.level.Level() != zapcore.ErrorLevel {
			t.Errorf("%+v, level %v", s, w.level.Level())
		}
		w.expect(t, "another hub", true)
	})
}

// After a connect the twin's versions may begin at 1 again, and a notification without one says nothing of how old it
// is: what these deny is denied, also where the twin cannot be read.
func TestNotificationsOfANewTwin(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		w.reads(57, `{}`)
		w.notified(3, denyVision)
		w.expect(t, "an old notification", false)
		w.notified(0, denyVision)
		w.expect(t, "one without a version", true)
		w.reads(58, `{}`)
		w.expect(t, "the twin is read", false)
		w.desired.connecting()
		w.notified(3, denyVision)
		w.expect(t, "connected anew", true)
		w.reads(3, denyVision)
		w.expect(t, "the new twin is read", true)
		w.notified(2, `{"deny":[{"module":"log"}]}`)
		if served, _ := w.served(t, logger); !served {
			t.Error("an old notification of the new twin is heeded")
		}
	})
}

// Root can set aside a hub of which no document was read whole yet, and the one before stays set aside.
func TestSettingAsideAHubOfWhichNothingIsReadWhole(t *testing.T) {
	const other = "other.test/percept-7"
	deny := `{"deny":[{"module":"vision"}],"logLevel":7}`
	for name, say := range map[string]func(w twinned){
		"a document that is wrong": func(w twinned) { w.read(document{other, 1, desiredOf(deny), w.heard}) },
		"a notification": func(w twinned) {
			w.tighten(document{hub: other, version: 1, text: desiredOf(deny)}, w.heard+1)
		},
		"a method": func(w twinned) {
			by, what := "iothub "+other+" method percept.deny",
				api.DenyRequest{DenyTarget: api.DenyTarget{Module: "vision"}}
			if _, err := w.desired.agent.Deny(by, api.DenySide{Origin: api.DenyMethod, Hub: other}, what); err != nil {
				panic(err)
			}
		},
	} {
		for _, aside := range []bool{false, true} { // the hub before
			t.Run(fmt.Sprint(name, " ", aside), func(t *testing.T) {
				twin(t, func(t *testing.T, w twinned) {
					a := w.desired.agent
					w.reads(1, `{}`)
					if aside {
						_ = a.SetHubAside("uid 0")
						w.notice()
					}
					say(w)
					w.expect(t, name, true)
					if on := a.DenyStatus(); on.IsHubSetAside() {
						t.Errorf("%s: it counts as set aside", name)
					}
					if err := a.SetHubAside("uid 0"); err != nil {
						t.Error(err)
					}
					w.notice()
					w.again() // as a reload does: what the hub before said lifts nothing of this one's
					w.expect(t, name+", and root set the hub aside", false)
					now := a.DenyStatus()
					if !now.IsHubSetAside() || !now.Rules[0].SetAside {
						t.Errorf("%s: %+v", name, now)
					}
					w.read(document{other, 2, desiredOf(denyVision), w.heard})
					w.expect(t, name+", and the twin is read whole", false)
					if err := a.HeedHub("uid 0"); err != nil {
						t.Error(err)
					}
					w.expect(t, name+", and root heeds it", true)
				})
			})
		}
	}
}

// What the twin names and this device does not have is idle, and keeps nothing else from being in force.
func TestIdleEntries(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		s := w.reads(1, `{"deny":[{"module":"none"},{"module":"vision"},{"resource":"api://none"},`+
			`{"identity":"none"}],`+
			`"prefetch":[{"resource":"api://none"},{"resource":"`+vault+`","identity":"none"}],`+
			`"policyChanges":[{"resource":"api://none","at":"2026-11-28T08:00:00Z","effect":"revoked"},`+
			`{"allResources":true,"identity":"none","at":"2026-11-28T08:00:00Z","effect":"revoked"}]}`)
		if s.Refused != "" || s.Applied != 1 || len(s.Idle) != 7 {
			t.Errorf("%+v", s)
		}
		for i, begins := range []string{"percept.deny[0]: ", "percept.deny[2]: ", "percept.deny[3]: ",
			"percept.policyChanges[0]: ",
			"percept.policyChanges[1]: ", "percept.prefetch[0]: ", "percept.prefetch[1]: "} {
			if i < len(s.Idle) && !strings.HasPrefix(s.Idle[i], begins) {
				t.Errorf("%q does not begin with %s", s.Idle[i], begins)
			}
		}
		w.expect(t, "beside what is idle", true)
	})
}

// outcomes returns which of all requests that there may be are answered with a token.
func (w twinned) outcomes(t *testing.T) (all []bool) {
	for _, caller := range []grants.Caller{vision, logger, {Module: "other"}, {UID: 1000, GID: 1000},
		{Unit: "camera.service", UID: 1000}, {UID: grants.NoID, GID: grants.NoID, Nested: true}} {
		for _, resource := range []string{vault, storage, "api://x", "https://a.b", "https://VAULT.azure.net"} {
			for _, identity := range []string{"", "vision", "device", "none"} {
				_, err := w.desired.agent.Token(t.Context(), caller,
					agent.Request{Request: grants.Request{Resource: resource, Identity: identity}})
				all = append(all, err == nil)
			}
		}
	}
	return all
}

// The hub narrows what the configuration grants and never widens it: whatever documents and notifications come, no
// request succeeds that would have failed without them.
func TestTwinNeverWidens(t *testing.T) {
	t.Parallel()
	after := func(documents []string) (all []bool) {
		synctest.Test(t, func(t *testing.T) {
			w := newTwinned(t)
			for i, percept := range documents {
				w.notified(int64(i)+1, percept)
				if i%2 == 0 {
					w.reads(int64(i)+1, percept)
				}
				synctest.Wait()
			}
			all = w.outcomes(t)
		})
		return all
	}
	without := after(nil)
	if !slices.Contains(without, true) || !slices.Contains(without, false) {
		t.Fatalf("without a twin: %v", without)
	}
	if narrowed := after([]string{denyVision}); slices.Equal(narrowed, without) {
		t.Fatalf("with a twin that denies: %v", narrowed)
	}
	// Half of the documents are right, and about what there is.
	entry := rapid.SampledFrom([]string{
		`"deny":[{"module":"vision"}]`, `"deny":[{"all":true}]`,
		`"deny":[{"resource":"vault.azure.net"},{"user":"1000"}]`,
		`"deny":[{"identity":"device","module":"log"}]`, `"deny":[]`, `"logLevel":"debug"`,
		`"prefetch":[{"resource":"a.b"}]`,
		`"prefetch":[{"resource":"` + storage + `","identity":"device"},{"resource":"` + vault + `"}]`,
		`"policyChanges":[{"allResources":true,"at":"2026-11-28T08:59:00Z","effect":"revoked"}]`,
		`"policyChanges":[{"resource":"` + vault + `","at":"2026-11-28T08:59:00Z","effect":"granted"}]`,
	})
	key := func(entry string) string { return entry[:strings.Index(entry, ":")] }
	right := rapid.Custom(func(t *rapid.T) string {
		return "{" + strings.Join(rapid.SliceOfNDistinct(entry, 0, 4, key).Draw(t, "entries"), ",") + "}"
	})
	rapid.Check(t, func(t *rapid.T) {
		documents := rapid.SliceOfN(rapid.OneOf(right, rapid.Custom(drawn)), 1, 3).Draw(t, "documents")
		for i, with := range after(documents) {
			if with && !without[i] {
				t.Fatalf("request %d of outcomes is answered", i)
			}
		}
	})
}

// What a notification denies is denied until the twin was read that has it: nothing older lifts it.
func TestOlderDocumentsLiftNothing(t *testing.T) {
	t.Parallel()
	for name, older := range map[string]func(w twinned){
		"a reload": func(w twinned) { w.again() },
		"the timer, where something of the last document is idle": func(w twinned) {
			if w.unfinished() {
				w.again()
			}
		},
		"a read that was asked for before": func(w twinned) {
			w.readsAfter(w.heard-1, 4,
				`{"deny":[{"module":"unknown"}]}`)
		},
		"a read before, of a version that began at 1 again": func(w twinned) { w.readsAfter(w.heard-1, 1, "") },
		"another notification": func(w twinned) {
			w.notified(6,
				`{"deny":[{"module":"other"}]}`)
		},
		"a document that is refused": func(w twinned) { w.readsAfter(w.heard-1, 4, `{"logLevel":7}`) },
		"heeding the hub that was set aside": func(w twinned) {
			_ = w.desired.agent.SetHubAside("root")
			w.notice()
			_ = w.desired.agent.HeedHub("root")
			w.notice()
		},
	} {
		t.Run(name, func(t *testing.T) {
			twin(t, func(t *testing.T, w twinned) {
				w.reads(4, `{"deny":[{"module":"unknown"}]}`)
				w.notified(5, denyVision)
				w.expect(t, "notified", true)
				older(w)
				w.expect(t, "after something older", true)
				w.reads(5, "")
				w.expect(t, "read", false)
			})
		})
	}
}

// Whatever comes in which order: a rule of a notification goes only with a read that was asked for after it, and after
// a last read exactly what the twin denies is denied.
func TestDenialsInAnyOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.SampledFrom([]string{
			"deny", "lift", "notified", "asked", "answered", "again", "timer", "aside", "heed",
		}), 1, 24).Draw(rt, "steps")
		synctest.Test(t, func(t *testing.T) {
			w := newTwinned(t)
			type read struct {
				version, asked int64
				percept        string
			}
			version, percept := int64(1), "" // the twin's
			var waiting []func()             // notifications on their way, the oldest first
			var reads []read                 // answers on their way
			sure := false                    // vision must be denied: a notification said so, and no later read did not
			ask := func() { reads = append(reads, read{version, w.heard, percept}) }
			answer := func() {
				if len(reads) == 0 {
					return
				}
				r := reads[0]
				reads = reads[1:]
				w.readsAfter(r.asked, r.version, r.percept)
				if r.asked >= w.heard {
					sure = r.percept != ""
				}
			}
			for _, step := range steps {
				switch step {
				case "deny", "lift":
					version++
					if percept = ""; step == "deny" {
						percept = denyVision
					}
					at, said := version, percept
					waiting = append(waiting, func() {
						late := at <= w.describe().Version
						w.notified(at, said)
						sure = sure || said != "" && !late
					})
				case "notified":
					if len(waiting) > 0 {
						waiting[0]()
						waiting = waiting[1:]
						ask() // as the link does
					}
				case "asked":
					ask()
				case "answered":
					answer()
				case "again":
					w.again()
				case "timer":
					if w.unfinished() {
						w.again()
					}
				case "aside":
					_ = w.desired.agent.SetHubAside("root")
					w.notice()
				case "heed":
					_ = w.desired.agent.HeedHub("root")
					w.notice()
				}
				if served, _ := w.served(t, vision); served && sure && !w.desired.agent.IsHubSetAside("") {
					t.Fatalf("%q: vision is served after %q", steps, step)
				}
			}
			_ = w.desired.agent.HeedHub("root")
			w.reads(version, percept)
			w.expect(t, fmt.Sprintf("%q, read", steps), percept != "")
		})
	})
}

// A twin that is read whole is in force, however many rules of before and of notifications there are.
func TestFullTwinTakesThePlaceOfFullOnes(t *testing.T) {
	many := func(prefix string, more string) string {
		rules := []string{more}
		for i := range deny.MaxRules - 1 {
			rules = append(rules, fmt.Sprintf(`{"module":"%s%d"}`, prefix, i))
		}
		return `{"deny":[` + strings.Join(rules, ",") + `]}`
	}
	twin(t, func(t *testing.T, w twinned) {
		w.reads(1, many("a", `{"module":"x"}`))
		w.notified(2, many("b", `{"module":"y"}`))
		w.notified(3, many("c", `{"module":"vision"}`))
		if s := w.reads(3, many("c", `{"module":"vision"}`)); s.Refused != "" || s.Applied != 3 {
			t.Errorf("%+v", s)
		}
		w.expect(t, "read", true)
		if n := len(w.desired.agent.DenyStatus().Rules); n != deny.MaxRules {
			t.Errorf("%d rules", n)
		}
	})
}

// A full read that was asked for before the last one changes nothing, whatever its version: it neither denies nor
// lifts.
func TestOlderReadsAreDropped(t *testing.T) {
	for name, older := range map[string]document{
		"lifts":                          {twinnedHub, 3, desiredOf(""), 4},
		"denies":                         {twinnedHub, 3, desiredOf(`{"deny":[{"module":"log"}]}`), 4},
		"is refused":                     {twinnedHub, 3, desiredOf(`{"logLevel":7}`), 4},
		"has a version that began anew":  {twinnedHub, 9, desiredOf(""), 4},
		"is of another hub, before that": {"hub.test/other", 9, desiredOf(""), 4},
	} {
		t.Run(name, func(t *testing.T) {
			twin(t, func(t *testing.T, w twinned) {
				before := w.readsAfter(5, 4, denyVision)
				time.Sleep(time.Minute)
				w.read(older)
				if s := w.describe(); !reflect.DeepEqual(s, before) {
					t.Errorf("it is said to be %+v, and was %+v", s, before)
				}
				w.expect(t, "after the older read", true)
				if rules := w.desired.agent.DenyStatus().Rules; len(rules) != 1 {
					t.Errorf("denied are %+v", rules)
				}
				w.readsAfter(5, 4, "") // as late as the last one
				w.expect(t, "after a later read", false)
			})
		})
	}
}

// A twin is not acknowledged before what it denies and its policy changes are on the disk, however long that takes; and
// then it is the last one.
func TestNothingIsAcknowledgedBeforeItIsOnTheDisk(t *testing.T) {
	t.Parallel()
	change := `"policyChanges":[{"allResources":true,"at":"` + docsTime.UTC().Format(time.RFC3339) +
		`","effect":"changed"}]`
	for hanging, percept := range map[string]string{"deny rules": denyVision, "policy changes": "{" + change + "}"} {
		t.Run(hanging, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(docsTime.Add(time.Hour)))
				hang := make(chan struct{})
				free := sync.OnceFunc(func() { close(hang) })
				save := func(what string) error {
					if what == hanging {
						<-hang
					}
					return nil
				}
				source := &tokencachetest.Source{Life: 24 * time.Hour}
				a, err := agent.New(agent.Options{
					Fetch: source.Fetch, Rules: edge(),
					Deny:       agent.DenyStore{Save: func(deny.Record) error { return save("deny rules") }},
					SaveRecord: func(tokencache.Record) error { return save("policy changes") },
				})
				if err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				reported := newReported(t, nil)
				h := &Hub{
					desired: &desired{agent: a, level: zap.NewAtomicLevel(), log: zap.NewNop()},
					changed: func() {}, reporter: reported.reporter, twinOf: twinnedHub,
					decided: make(chan struct{}, 1), closing: make(chan struct{}),
				}
				h.desired.changed = h.desiredChanged
				h.running.Go(h.acknowledge)
				defer h.running.Wait()
				defer close(h.closing)
				defer free()
				reported.connect()
				reported.messages(time.Hour)
				for version := range int64(3) {
					h.desired.read(document{twinnedHub, version + 2, desiredOf(percept), version})
					if s := h.desired.describe(); s.Applied != version+2 {
						t.Fatalf("it is not in force: %+v", s)
					}
					for _, message := range reported.messages(24 * time.Hour) {
						if strings.Contains(message, `"desired"`) {
							t.Errorf("version %d is acknowledged, and not on the disk: %s", version+2, message)
						}
					}
				}
				free()
				sent := strings.Join(reported.messages(time.Hour), "\n")
				if want := `"desired":{"status":"applied","version":4}`; !strings.Contains(sent, want) {
					t.Errorf("on the disk, and reported is %s", sent)
				}
			})
		})
	}
}

// A disk that hangs holds up no denial.
func TestDenialsWaitForNoDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		source := &tokencachetest.Source{Life: 24 * time.Hour}
		a, err := agent.New(agent.Options{
			Fetch: source.Fetch, Rules: edge(),
			Deny: agent.DenyStore{Save: func(deny.Record) error { <-hang; return nil }},
		})
		if err != nil {
			t.Fatal(err)
		}
		var reading sync.WaitGroup
		defer a.Close()
		defer reading.Wait()
		defer close(hang)
		d := &desired{agent: a, level: zap.NewAtomicLevel(), log: zap.NewNop(), changed: func() {}}
		denied := func(module string) bool {
			return slices.ContainsFunc(a.DenyStatus().Rules, func(r api.DenyRule) bool { return r.Module == module })
		}
		d.tighten(document{hub: twinnedHub, version: 2, text: desiredOf(`{"deny":[{"module":"other"}]}`)}, 1)
		synctest.Wait()
		d.tighten(document{hub: twinnedHub, version: 3, text: desiredOf(denyVision)}, 2)
		if !denied("other") || !denied("vision") {
			t.Error("a denial waits for the disk")
		}
		reading.Go(func() { d.read(document{twinnedHub, 4, desiredOf(`{"deny":[{"module":"log"}]}`), 2}) })
		synctest.Wait()
		if !denied("log") || denied("vision") {
			t.Error("a read waits for the disk")
		}
	})
}
