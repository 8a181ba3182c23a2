package agent_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

func reject(t *testing.T, a *agent.Agent, caller grants.Caller, r api.Rejection) api.Advice {
	t.Helper()
	advice, err := a.Rejected(t.Context(), caller, r)
	if err != nil {
		t.Fatalf("%+v: %v", r, err)
	}
	for _, f := range advice.Findings {
		if f.Cause == "" || f.Detail == "" || f.Action == "" {
			t.Errorf("%+v says too little", f)
		}
	}
	return advice
}

func causes(advice api.Advice) []api.Cause {
	var all []api.Cause
	for _, f := range advice.Findings {
		all = append(all, f.Cause)
	}
	return all
}

func wantCauses(t *testing.T, what string, advice api.Advice, want ...api.Cause) {
	t.Helper()
	if got := causes(advice); !slices.Equal(got, want) {
		t.Errorf("%s: causes %v, want %v: %+v", what, got, want, advice.Findings)
	}
}

// says looks for parts of the first finding's two sentences.
func says(t *testing.T, advice api.Advice, parts ...string) {
	t.Helper()
	text := advice.Findings[0].Detail + " | " + advice.Findings[0].Action
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q lacks %q", text, part)
		}
	}
}

const nbf = `{"access_token":{"nbf":{"essential":true,"value":"946684800"}}}`

func TestRejectedForStalePermissions(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		ask(t, a, module, requestFor(vault))
		time.Sleep(time.Hour)
		note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Granted})
		time.Sleep(time.Hour)
		advice := reject(t, a, module, api.Rejection{Resource: vault + "/.default", Status: 403})
		wantCauses(t, "403", advice, api.CauseStale, api.CauseStaleClaims, api.CauseRBACDelay, api.CauseNoPermission)
		says(t, advice, "minted before the policy change of Jan 1 01:00:00 UTC", "at the latest", "with wait, or watch")
		if advice.Identity != "vision" || advice.Retry || !advice.RetryOn.Equal(advice.Permissions.CurrentBy) ||
			advice.Fetched != tokencache.NotFetched {
			t.Errorf("%+v", advice)
		}
		wantCauses(t, "401", reject(t, a, module, api.Rejection{Resource: vault, Status: 401}), api.CauseStale)
		note(t, a, revoked)
		says(t, reject(t, a, module, api.Rejection{Resource: vault, Status: 403}), "until then it is withheld")
		other := reject(t, a, module, api.Rejection{Resource: vault, Status: 403, SHA256: strings.Repeat("0", 64)})
		wantCauses(t, "another, withheld", other, api.CauseOldToken, api.CauseStale)
		if other.Retry || other.RetryOn.IsZero() {
			t.Errorf("%+v", other)
		}
	})
}

func TestRejectedForUncertainPermissions(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		for range 4 {
			ask(t, a, module, requestFor(vault))
			time.Sleep(12 * time.Hour)
		}
		reject(t, a, module, api.Rejection{Resource: vault, Status: 403})
		held := a.Status().Tokens[0]
		note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Changed,
			At: held.IssuedFrom.Add(-time.Minute)})
		advice := reject(t, a, module, api.Rejection{Resource: vault, Status: 403})
		says(t, advice, "may have been minted before", "probably by")
		if !advice.RetryOn.Equal(advice.Permissions.Likely) {
			t.Errorf("%+v", advice)
		}
	})
}

func TestRejectedForPermissions(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		answer := ask(t, a, module, requestFor(vault))
		report := api.Rejection{Resource: vault, Status: 403, SHA256: strings.ToUpper(answer.Token.Text.SHA256())}
		young := reject(t, a, module, report)
		wantCauses(t, "young", young, api.CauseRBACDelay, api.CauseNoPermission)
		says(t, young, "up to 10 minutes", "until Jan 1 00:10:00 UTC")
		if !young.RetryOn.Equal(time.Now().Add(10 * time.Minute)) {
			t.Errorf("%+v", young)
		}
		if none := young.Findings[1]; !strings.Contains(none.Detail, guid3) ||
			!strings.Contains(none.Detail, "no policy change is on record") {
			t.Errorf("%+v", none)
		}
		time.Sleep(3 * time.Hour)
		old := reject(t, a, module, report)
		wantCauses(t, "old", old, api.CauseStaleClaims, api.CauseRBACDelay, api.CauseNoPermission)
		says(t, old, "groups g1; roles r1",
			"perceptctl policy-changed --all-resources --identity vision --effect changed")
		if on := a.Status().Tokens[0].Refused; !on.Equal(time.Now()) {
			t.Errorf("refused on %v", on)
		}
		time.Sleep(22 * time.Hour)
		if on := a.Status().Tokens[0].Refused; !on.IsZero() {
			t.Errorf("a newer token counts as refused on %v", on)
		}
	})
}

func TestManyGroups(t *testing.T) {
	t.Parallel()
	inAzure(t, func(_ *agent.Options, z *azure) {
		z.claims = func(c *tokencache.Claims) {
			c.Groups = nil
			for i := range 20 {
				c.Groups = append(c.Groups, fmt.Sprintf("group%d", i))
			}
		}
	}, func(t *testing.T, a *agent.Agent, _ *azure) {
		ask(t, a, module, requestFor(vault))
		time.Sleep(time.Hour)
		says(t, reject(t, a, module, api.Rejection{Resource: vault, Status: 403}), "group7 and 12 more; roles r1")
	})
}

func TestRejectedOtherTokens(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, _ *azure) {
		none := reject(t, a, user, api.Rejection{Resource: vault, Status: 401})
		wantCauses(t, "none held", none, api.CauseUnknownToken)
		if !none.Retry || none.Identity != "device" {
			t.Errorf("%+v", none)
		}
		first := ask(t, a, user, agent.Request{Request: grants.Request{Resource: vault, Identity: "vision"}})
		time.Sleep(25 * time.Hour)
		ask(t, a, user, agent.Request{Request: grants.Request{Resource: vault, Identity: "vision"}})
		old := reject(t, a, user, api.Rejection{Resource: vault, Identity: "vision", Status: 401,
			SHA256: first.Token.Text.SHA256()})
		wantCauses(t, "old", old, api.CauseOldToken)
		says(t, old, "received on Jan ", "ask for a token again")
		if !old.Retry || !old.RetryOn.IsZero() || a.Status().Tokens[0].Refused != (time.Time{}) {
			t.Errorf("%+v", old)
		}
		toStorage := ask(t, a, user, agent.Request{Request: grants.Request{Resource: storage, Identity: "speech"}})
		ofDevice := ask(t, a, user, agent.Request{Request: grants.Request{Resource: vault, Identity: "device"}})
		mixed := reject(t, a, user, api.Rejection{Resource: vault, Identity: "vision", Status: 401,
			SHA256: toStorage.Token.Text.SHA256()})
		wantCauses(t, "another resource's", mixed, api.CauseWrongAudience, api.CauseWrongIdentity)
		says(t, mixed, "the one for "+storage)
		mixed = reject(t, a, user, api.Rejection{Resource: vault, Identity: "vision", Status: 403,
			SHA256: ofDevice.Token.Text.SHA256()})
		wantCauses(t, "another identity's", mixed, api.CauseWrongIdentity)
		says(t, mixed, `that of identity "device"`, `token of identity "vision"`)
		// Nobody learns that a token is one that it was not granted.
		foreign := reject(t, a, module,
			api.Rejection{Resource: vault, Status: 403, SHA256: ofDevice.Token.Text.SHA256()})
		wantCauses(t, "a token that the caller may not have", foreign, api.CauseOldToken)
	})
}

func TestRejectedForClaims(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		change func(*tokencache.Claims)
		status int
		want   []api.Cause
		says   string
	}{
		{"as it should be", nil, 401, []api.Cause{api.CauseWrongAudience}, "its audience is " + vault},
		{"opaque", func(c *tokencache.Claims) { *c = tokencache.Claims{} }, 401, []api.Cause{api.CauseWrongAudience},
			"its audience is not told"},
		{"opaque", func(c *tokencache.Claims) { *c = tokencache.Claims{} }, 403,
			[]api.Cause{api.CauseRBACDelay, api.CauseNoPermission}, "up to 10 minutes"},
		{"audience", func(c *tokencache.Claims) { c.Audience = vault + "/" }, 401, []api.Cause{api.CauseWrongAudience},
			"asked for as " + vault + ": another spelling | name"},
		{"audience", func(c *tokencache.Claims) { c.Audience = vault + "/" }, 403,
			[]api.Cause{api.CauseWrongAudience, api.CauseRBACDelay, api.CauseNoPermission}, "a slash at the end"},
		{"a GUID tells nothing", func(c *tokencache.Claims) { c.Audience = guid1 }, 403,
			[]api.Cause{api.CauseRBACDelay, api.CauseNoPermission}, ""},
		{"client", func(c *tokencache.Claims) { c.ClientID = guid2 }, 401, []api.Cause{api.CauseWrongIdentity},
			"client ID is " + guid2},
		{"object, in another case", func(c *tokencache.Claims) { c.ObjectID = strings.ToLower(guid3) }, 403,
			[]api.Cause{api.CauseRBACDelay, api.CauseNoPermission}, ""},
		{"object", func(c *tokencache.Claims) { c.ObjectID = guid2 }, 403,
			[]api.Cause{api.CauseWrongIdentity, api.CauseRBACDelay, api.CauseNoPermission}, "object ID is " + guid2},
		{"not yet valid", func(c *tokencache.Claims) { c.NotBefore = c.NotBefore.Add(time.Hour) }, 401,
			[]api.Cause{api.CauseClock}, "valid from Jan 1 00:55:00 UTC"},
	} {
		inAzure(t, func(_ *agent.Options, z *azure) { z.claims = row.change },
			func(t *testing.T, a *agent.Agent, _ *azure) {
				ask(t, a, module, requestFor(vault))
				advice := reject(t, a, module, api.Rejection{Resource: vault, Status: row.status})
				wantCauses(t, row.name, advice, row.want...)
				says(t, advice, row.says)
			})
	}
}

func TestRejectedForTheClock(t *testing.T) {
	t.Parallel()
	inAzure(t, func(o *agent.Options, _ *azure) { o.Clock.Synchronised = func() bool { return false } },
		func(t *testing.T, a *agent.Agent, _ *azure) {
			ask(t, a, module, requestFor(vault))
			advice := reject(t, a, module, api.Rejection{Resource: vault, Status: 401})
			wantCauses(t, "not synchronised", advice, api.CauseClock)
			says(t, advice, "not known to be right")
		})
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		ask(t, a, module, requestFor(vault))
		z.breakDown(&tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"})
		time.Sleep(24*time.Hour - time.Minute)
		advice := reject(t, a, module, api.Rejection{Resource: vault, Status: 401})
		wantCauses(t, "nearly expired", advice, api.CauseClock)
		says(t, advice, "expires in 1m0s")
		if !advice.RetryOn.Equal(time.Now().Add(time.Minute)) {
			t.Errorf("%+v", advice)
		}
	})
}

// A challenge is worth one fetch, which is nobody else's loss.
func TestRejectedWithChallenge(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		answer := ask(t, a, module, requestFor(vault))
		report := api.Rejection{Resource: vault, Status: 401, Claims: nbf}
		time.Sleep(time.Hour)
		before := a.Status().Tokens[0]
		same := reject(t, a, module, report)
		wantCauses(t, "the same again", same, api.CauseRevoked)
		says(t, same, "issued after Jan 1 00:00:00 UTC", "takes no claims", "azidentity sends none",
			"brought the same token", "wait for a newer token", "at the latest when this one expires")
		if same.Fetched != tokencache.Unchanged || same.Retry || !same.RetryOn.Equal(before.ExpiresOn) ||
			z.fetches() != 2 {
			t.Errorf("%+v after %d calls", same, z.fetches())
		}
		after := a.Status().Tokens[0]
		if after.Permissions != before.Permissions || after.SHA256 != answer.Token.Text.SHA256() ||
			after.State != tokencache.Fresh {
			t.Errorf("it moved %+v to %+v", before, after)
		}
		says(t, reject(t, a, module, report), "made less than 30s ago")
		if z.fetches() != 2 {
			t.Errorf("%d calls", z.fetches())
		}
		time.Sleep(30 * time.Second)
		z.breakDown(&tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"})
		failed := reject(t, a, module, report)
		says(t, failed, "failed: no token of identity", "connection refused")
		if failed.Fetched != tokencache.Failed {
			t.Errorf("%+v", failed)
		}
		z.breakDown(nil)
		note(t, a, api.PolicyChangeRequest{Resource: vault, Effect: tokencache.Granted})
		time.Sleep(time.Minute)
		held := reject(t, a, module, report)
		says(t, held, "still spreading")
		wantCauses(t, "spreading", held, api.CauseRevoked, api.CauseStale)
		if held.Fetched != tokencache.NotFetched {
			t.Errorf("%+v", held)
		}
	})
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		for range 4 {
			ask(t, a, module, requestFor(vault))
			time.Sleep(12 * time.Hour)
		}
		ask(t, a, module, requestFor(vault))
		known := reject(t, a, module, api.Rejection{Resource: vault, Status: 403,
			Claims: `{"access_token":{"nbf":{"value":1},"acrs":{"value":"c1"},"xms_cc":null}}`})
		wantCauses(t, "403", known, api.CauseRevoked, api.CauseStaleClaims, api.CauseRBACDelay, api.CauseNoPermission)
		says(t, known, "probably on", `it also asks for "acrs", "xms_cc"`)
		z.breakDown(&tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "connection refused"})
		time.Sleep(12*time.Hour + time.Second)
		z.breakDown(nil)
		newer := reject(t, a, module, api.Rejection{Resource: vault, Status: 401, Claims: `{"access_token":{}}`})
		wantCauses(t, "a newer one", newer, api.CauseRevoked)
		says(t, newer, "disabled or its sessions were revoked", "brought a newer token", "ask for the token again")
		if newer.Fetched != tokencache.Newer || !newer.Retry || !newer.RetryOn.IsZero() ||
			newer.SHA256 != a.Status().Tokens[0].SHA256 {
			t.Errorf("%+v", newer)
		}
	})
}

func TestBadReports(t *testing.T) {
	t.Parallel()
	inAzure(t, nil, func(t *testing.T, a *agent.Agent, z *azure) {
		for _, row := range []struct {
			report api.Rejection
			reason api.Code
			says   string
		}{
			{api.Rejection{Resource: vault}, api.CodeBadRequest, "401 or 403"},
			{api.Rejection{Resource: vault, Status: 500}, api.CodeBadRequest, "401 or 403"},
			{api.Rejection{Resource: vault, Status: 401, SHA256: "zz"}, api.CodeBadRequest, "64 hexadecimal digits"},
			{api.Rejection{Resource: vault, Status: 401, SHA256: "abcd"}, api.CodeBadRequest, "64 hexadecimal digits"},
			{api.Rejection{Resource: vault, Status: 401, Claims: "[]"}, api.CodeBadRequest, "not a JSON object"},
			{api.Rejection{Resource: vault, Status: 401, Claims: "null"}, api.CodeBadRequest, "not a JSON object"},
			{api.Rejection{Resource: vault, Status: 401, Claims: `{"access_token":1}`}, api.CodeBadRequest,
				"not an object of claims"},
			{api.Rejection{Resource: vault, Status: 401, Claims: strings.Repeat("x", 1<<20)}, api.CodeBadRequest,
				"larger than"},
			{api.Rejection{Resource: vault, Status: 401, Identity: "device"}, api.CodeNotGranted, "no [[grant]]"},
			{api.Rejection{Resource: "vault", Status: 401}, api.CodeBadRequest, "no App ID URI"},
		} {
			if _, err := a.Rejected(t.Context(), module, row.report); codeOf(err) != row.reason ||
				!strings.Contains(err.Error(), row.says) {
				t.Errorf("%.100v: %v, want %q", row.report, err, row.says)
			}
		}
		ask(t, a, user, requestFor(vault))
		for range 5 {
			reject(t, a, module, api.Rejection{Resource: vault, Status: 403})
		}
		for range 10 {
			_, err := a.Rejected(t.Context(), module, api.Rejection{Resource: vault, Status: 403})
			var refusal *agent.Error
			if !errors.As(err, &refusal) || refusal.Code != api.CodeBusy || refusal.RetryAfter != 10*time.Second {
				t.Fatalf("%v", err)
			}
		}
		reject(t, a, user, api.Rejection{Resource: vault, Status: 403}) // each for itself
		time.Sleep(10 * time.Second)
		reject(t, a, module, api.Rejection{Resource: vault, Status: 403})
		if _, err := a.Rejected(t.Context(), module,
			api.Rejection{Resource: vault, Status: 403}); codeOf(err) != api.CodeBusy {
			t.Error(err)
		}
		reject(t, a, user, api.Rejection{Resource: vault, Status: 401, Claims: nbf})
		rules := edge()
		rules.Grants = rules.Grants[:1] // forgets what the others reported
		if _, err := a.Apply(rules); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Apply(edge()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Rejected(t.Context(), module,
			api.Rejection{Resource: vault, Status: 403}); codeOf(err) != api.CodeBusy {
			t.Error("a reload lets a caller begin anew")
		}
		ask(t, a, user, requestFor(vault))
		calls := z.fetches()
		for i := range 5 {
			advice := reject(t, a, user, api.Rejection{Resource: vault, Status: 401, Claims: nbf})
			if (advice.Fetched != tokencache.NotFetched) != (i == 0) {
				t.Errorf("report %d: %+v", i, advice)
			}
		}
		if z.fetches() != calls+1 {
			t.Errorf("%d calls", z.fetches()-calls)
		}
		a.Close()
		time.Sleep(time.Minute)
		if _, err := a.Rejected(t.Context(), module, api.Rejection{Resource: vault, Status: 403}); !isStopping(err) {
			t.Error(err)
		}
	})
}
