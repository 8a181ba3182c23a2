package agent_test

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// switching is a back end whose tokens speak for whom a test says.
type switching struct {
	object, tenant string
	issuer         string
	same           bool   // one token for all keys
	audience       string // empty: the resource
	omitted        []string
	n              int
}

func (s *switching) Fetch(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	s.n++
	text, audience := fmt.Sprint(canary, s.object, s.n), s.audience
	if s.same {
		text = canary
	}
	if audience == "" {
		audience = key.Resource
	}
	return tokencache.Fetched{
		Token: tokencache.Token{
			Text: tokencache.NewSecret(text), ExpiresOn: time.Now().Add(24 * time.Hour),
			Claims: tokencache.Claims{Issuer: s.issuer, ObjectID: s.object, TenantID: s.tenant, Audience: audience,
				Omitted: s.omitted},
		},
		Left: 24 * time.Hour, Counted: true,
	}, nil
}

func switchingAgent(t *testing.T, f func(t *testing.T, s *switching, a *agent.Agent, logs *observer.ObservedLogs)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.DebugLevel)
		s := &switching{object: "object-1", tenant: "tenant-1"}
		a, err := agent.New(agent.Options{Fetch: s.Fetch, Rules: edge(), Log: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		f(t, s, a, logs)
		if text := fmt.Sprint(logs.All(), a.Status()); strings.Contains(text, canary) {
			t.Error("token text is told")
		}
	})
}

func refresh(t *testing.T, a *agent.Agent) {
	t.Helper()
	results, err := a.Refresh(t.Context(), "vision", vault, true)
	if err != nil || len(results) != 1 || results[0].Outcome != tokencache.Newer {
		t.Fatalf("%+v, %v", results, err)
	}
}

// The journal warns of a switch once, with both object IDs, and the status shows whose the tokens are by now.
func TestSwitchOfPrincipalsIsTold(t *testing.T) {
	t.Parallel()
	switchingAgent(t, func(t *testing.T, s *switching, a *agent.Agent, logs *observer.ObservedLogs) {
		refresh(t, a)
		time.Sleep(time.Minute)
		synctest.Wait()
		s.object = "object-2"
		refresh(t, a)
		time.Sleep(time.Minute)
		synctest.Wait()
		refresh(t, a)
		told := logs.FilterField(zap.String("message_id", agent.MessagePrincipal)).All()
		if len(told) != 1 || told[0].Level != zapcore.WarnLevel {
			t.Fatalf("told %v", told)
		}
		fields := told[0].ContextMap()
		if fields["object_id"] != "object-2" || fields["object_id_before"] != "object-1" ||
			fields["tenant_id"] != "tenant-1" || fields["identity"] != "vision" {
			t.Errorf("%v", fields)
		}
		status := a.Status()
		for _, identity := range status.Identities {
			want := (*api.Principal)(nil)
			if identity.Name == "vision" {
				want = &api.Principal{ObjectID: "object-2", TenantID: "tenant-1"}
			}
			if !reflect.DeepEqual(identity.Principal, want) {
				t.Errorf("%s: %+v", identity.Name, identity.Principal)
			}
		}
		if len(status.Trouble) != 0 {
			t.Errorf("trouble %q", status.Trouble)
		}
	})
}

// Two keys with one token, and an audience that is another than before, are trouble as long as they last, and logged
// once.
func TestOddTokensAreTrouble(t *testing.T) {
	t.Parallel()
	switchingAgent(t, func(t *testing.T, s *switching, a *agent.Agent, logs *observer.ObservedLogs) {
		s.same, s.audience = true, "api://one"
		for _, identity := range []string{"device", "vision"} {
			if _, err := a.Refresh(t.Context(), identity, vault, true); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		if got := a.Status().Trouble; len(got) != 1 ||
			!strings.Contains(got[0],
				`identity "device" for https://vault.azure.net and identity "vision" for https://vault.azure.net `+
					`have one and the same token`) {
			t.Errorf("trouble %q", got)
		}
		s.same, s.audience = false, "api://two"
		refresh(t, a)
		if got := a.Status().Trouble; len(got) != 1 ||
			!strings.Contains(got[0], `for the audience "api://two", and the one before was for "api://one"`) {
			t.Errorf("trouble %q", got)
		}
		time.Sleep(time.Second)
		synctest.Wait() // what began meanwhile has read what it is given
		s.omitted = []string{"oid", "groups"}
		refresh(t, a)
		if got := a.Status().Trouble; len(got) != 1 ||
			!strings.Contains(got[0],
				`the token of identity "vision" for https://vault.azure.net has claims that are too long`) ||
			!strings.Contains(got[0], ": oid, groups;") {
			t.Errorf("trouble %q", got)
		}
		time.Sleep(time.Second)
		synctest.Wait() // what began meanwhile has read what it is given
		s.omitted = nil
		refresh(t, a)
		if got := a.Status().Trouble; len(got) != 0 {
			t.Errorf("trouble %q", got)
		}
		for what, message := range map[string]string{"one token": "two keys have one token",
			"audience": "another audience", "claims": "claims that are too long"} {
			n := 0
			for _, entry := range logs.All() {
				if strings.Contains(entry.Message, message) {
					n++
				}
			}
			if n != 1 {
				t.Errorf("%s: told %d times", what, n)
			}
		}
	})
}

// What is forgotten is on record, by its digest.
func TestForgottenTokensAreOnRecord(t *testing.T) {
	t.Parallel()
	switchingAgent(t, func(t *testing.T, s *switching, a *agent.Agent, logs *observer.ObservedLogs) {
		refresh(t, a)
		held := a.Status().Tokens[0].SHA256
		results, err := a.Forget(t.Context(), "vision", vault, true)
		if err != nil || len(results) != 1 || results[0].Outcome != tokencache.Newer || s.n != 2 {
			t.Errorf("%+v, %v after %d calls", results, err, s.n)
		}
		told := logs.FilterField(zap.String("message_id", agent.MessageForgotten)).All()
		if len(told) != 1 || told[0].ContextMap()["token_sha256"] != held ||
			told[0].ContextMap()["identity"] != "vision" {
			t.Errorf("told %v", told)
		}
		if _, err := a.Forget(t.Context(), "nobody", "", true); codeOf(err) != api.CodeUnknownIdentity {
			t.Errorf("of nobody: %v", err)
		}
	})
}
