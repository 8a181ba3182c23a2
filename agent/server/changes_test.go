package server

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// withdraw returns the text of a DELETE request.
func withdraw(query string) string { return request("DELETE", api.PathPolicyChanges+query, "") }

func TestPolicyChanges(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(2*time.Hour).fetch)
	token, admin := d.tokens(""), d.admin()
	if got := send(t, admin, get(api.PathPolicyChanges)); got.status != 200 || got.body != "{\"now\":\"2026-11-23T12:00:00Z\",\"changes\":[]}\n" {
		t.Errorf("with none: %+v", got)
	}
	send(t, token, get(v1Vault))
	at := time.Now().Add(-time.Hour).Truncate(time.Second)
	zoned := at.In(time.FixedZone("", 3600)).Format(time.RFC3339)
	got := send(t, admin, post(api.PathPolicyChanges, fmt.Sprintf(
		`{"resource":%q,"identity":"device","at":%q,"effect":"granted","note":"a reader"}`, vault+"/.default", zoned)))
	if got.status != 200 {
		t.Fatalf("%+v", got)
	}
	first := decoded[api.PolicyChangeAnswer](t, got.body)
	if first.ID == "" || !first.At.Equal(at) || first.NotedOn.Before(at) || first.EndsOn.Before(first.NotedOn) {
		t.Errorf("%+v", first)
	}
	want := api.PolicyChange{
		ID: first.ID, Resource: vault, Identity: "device", At: first.At, Effect: api.EffectGranted, Note: "a reader",
		NotedOn: first.NotedOn, EndsOn: first.EndsOn, Touched: 1, Waiting: 1,
	}
	if first.PolicyChange != want || !first.Now.Equal(noon) {
		t.Errorf("got %+v, want %+v at %v", first, want, noon)
	}
	got = send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"revoked","at":null}`))
	second := decoded[api.PolicyChangeAnswer](t, got.body)
	if got.status != 200 || second.Resource != "" || second.Identity != "" || time.Since(second.At) > time.Minute {
		t.Errorf("on everything, now: %+v", got)
	}
	list := decoded[api.PolicyChanges](t, send(t, admin, get(api.PathPolicyChanges)).body).Changes
	if len(list) != 2 || list[0].ID != second.ID || list[1].ID != first.ID {
		t.Errorf("%+v", list)
	}
	status := decoded[api.Status](t, send(t, admin, get(api.PathStatus)).body)
	if len(status.Changes) != 2 || status.Changes[0].ID != second.ID {
		t.Errorf("the status lists %+v", status.Changes)
	}
	got = send(t, admin, withdraw("?id="+second.ID))
	if was := decoded[api.PolicyChangeAnswer](t, got.body); got.status != 200 || !was.Now.Equal(noon) || was.ID != second.ID || was.Effect != api.EffectRevoked || was.Touched != 1 {
		t.Errorf("withdrawn: %+v", got)
	}
	if list := d.Agent.Changes(); len(list) != 1 {
		t.Errorf("left are %+v", list)
	}
	for _, want := range []string{`"policy change noted","by":"uid `, `"policy change withdrawn","by":"uid `} {
		if !strings.Contains(d.log.String(), want) {
			t.Errorf("the log lacks %s", want)
		}
	}
}

func TestPolicyChangesThatAreRefused(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	admin := d.admin()
	note := func(body string) string { return post(api.PathPolicyChanges, body) }
	const rest = `,"all_resources":true,"effect":"changed"}`
	future := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	for _, test := range []struct {
		name, text string
		status     int
		code       api.Code
		want       string
	}{
		{"nothing", note(``), 400, api.CodeBadRequest, "names a resource"},
		{"both", note(`{"resource":"https://vault.azure.net"` + rest), 400, api.CodeBadRequest, "not both"},
		{"no effect", note(`{"all_resources":true}`), 400, api.CodeBadRequest, "granted, revoked or changed"},
		{"an effect that is none", note(`{"all_resources":true,"effect":"Revoked"}`), 400, api.CodeBadRequest, "granted, revoked or changed"},
		{"an effect not for entering", note(`{"all_resources":true,"effect":"unknown"}`), 400, api.CodeBadRequest, "granted, revoked or changed"},
		{"an effect that is a number", note(`{"all_resources":true,"effect":7}`), 400, api.CodeBadRequest, `field "effect" is a number`},
		{"a resource that nobody has", note(`{"resource":"https://vault.azure.net/x","effect":"granted"}`), 400, api.CodeBadRequest, "no grant names resource"},
		{"a resource that is none", note(`{"resource":"vault","effect":"granted"}`), 400, api.CodeBadRequest, "App ID URI"},
		{"an unknown identity", note(`{"identity":"nobody"` + rest), 400, api.CodeUnknownIdentity, `"nobody"`},
		{"an unknown field", note(`{"when":"now"` + rest), 400, api.CodeBadRequest, `unknown field "when"`},
		{"a time that is a number", note(`{"at":1795435200` + rest), 400, api.CodeBadRequest, `field "at" is a number, it must be a string`},
		{"a time in words", note(`{"at":"yesterday"` + rest), 400, api.CodeBadRequest, `field "at" is "yesterday": write a time with its zone as 2026-11-23T14:30:00Z`},
		{"a time without a zone", note(`{"at":"2026-11-23T12:00:00"` + rest), 400, api.CodeBadRequest, "with its zone"},
		{"an empty time", note(`{"at":""` + rest), 400, api.CodeBadRequest, "with its zone"},
		{"a day that is none", note(`{"at":"2026-02-30T12:00:00Z"` + rest), 400, api.CodeBadRequest, "with its zone"},
		{"a long time", note(`{"at":"` + strings.Repeat("9", 1000) + `"` + rest), 400, api.CodeBadRequest, `9": write`},
		{"the year 1", note(`{"at":"0001-01-02T00:00:00Z"` + rest), 400, api.CodeBadRequest, "the year 1"},
		{"the future", note(`{"at":"` + future + `"` + rest), 422, api.CodeFutureChange, "synchronised"},
		{"a long note", note(`{"note":"` + strings.Repeat("x", 257) + `"` + rest), 400, api.CodeBadRequest, "more than 256"},
		{"a hundred thousand", note(`[` + strings.Repeat(`{"effect":"changed"},`, 100_000) + `{}]`), 400, api.CodeBadRequest, "larger than 65536 bytes"},
		{"a list", note(`[{"effect":"changed"}]`), 400, api.CodeBadRequest, "no JSON object"},
		{"a query", post(api.PathPolicyChanges+"?x", "{}"), 400, api.CodeBadRequest, "no query parameters"},
		{"a query of the list", get(api.PathPolicyChanges + "?x"), 400, api.CodeBadRequest, "no query parameters"},
		{"nothing withdrawn", withdraw(""), 400, api.CodeBadRequest, "id parameter"},
		{"an empty ID", withdraw("?id="), 400, api.CodeBadRequest, "id parameter"},
		{"more than an ID", withdraw("?id=1&x=2"), 400, api.CodeBadRequest, "no other"},
		{"a broken query", withdraw("?id=%"), 400, api.CodeBadRequest, "malformed"},
		{"an unknown ID", withdraw("?id=nothing"), 404, api.CodeUnknownChange, `"nothing"`},
		{"a body where none is", request("DELETE", api.PathPolicyChanges+"?id=1", "{}", "Content-Length: 2"), 400, api.CodeBadRequest, "DELETE request must not have a body"},
	} {
		got := send(t, admin, test.text)
		checkRefusal(t, test.name, got, test.status, test.code)
		if detail := got.problem(t).Detail; !strings.Contains(detail, test.want) || len(detail) > 600 {
			t.Errorf("%s: %q, want %q", test.name, detail, test.want)
		}
	}
	if left := d.Agent.Changes(); len(left) != 0 {
		t.Errorf("something was noted: %+v", left)
	}
}

// A date is told as one that does not count where it was given by a clock that nobody vouches for.
func TestUncountedDateIsTold(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		known            bool
		dated            string
		unsure, asOfNote bool
	}{
		{known: true, dated: fmt.Sprintf(`,"at":%q`, time.Now().Add(-time.Hour).Format(time.RFC3339))},
		{known: false, dated: fmt.Sprintf(`,"at":%q`, time.Now().Add(-time.Hour).Format(time.RFC3339)), unsure: true, asOfNote: true},
		{known: false, unsure: true},
	} {
		d := newDaemonOf(t, agent.Options{Fetch: fetchDay, Rules: rules(), Clock: tokencache.Clock{Synchronised: func() bool { return row.known }}})
		admin := d.admin()
		told := decoded[api.PolicyChangeAnswer](t, send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"changed"`+row.dated+`}`)).body)
		listed := decoded[api.PolicyChanges](t, send(t, admin, get(api.PathPolicyChanges)).body).Changes
		if len(listed) != 1 || listed[0].Unsure != row.unsure || listed[0].AsOfNote != row.asOfNote || told.Unsure != row.unsure || told.AsOfNote != row.asOfNote {
			t.Errorf("clock known %v, %q: %+v, listed as %+v", row.known, row.dated, told, listed)
		}
	}
}

func TestTooManyPolicyChanges(t *testing.T) {
	t.Parallel()
	full := tokencache.Record{Lineage: "l", Generation: 1}
	for i := range tokencache.MaxChanges { // no two of one resource
		full.Changes = append(full.Changes, tokencache.PolicyChange{
			ID: fmt.Sprint(i), AllIdentities: true, Resource: fmt.Sprint("api://", i), Effect: tokencache.Revoked, At: time.Now(), NotedOn: time.Now(),
		})
	}
	d := newDaemonOf(t, agent.Options{Fetch: fetchDay, Rules: rules(), Record: &full})
	admin := d.admin()
	got := send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"changed"}`))
	checkRefusal(t, "one more", got, 422, api.CodeTooManyChanges)
	// All of them fit into an answer that a client takes.
	if got := send(t, admin, get(api.PathPolicyChanges)); got.status != 200 || len(got.body) > 1<<20 {
		t.Errorf("the list is %d bytes", len(got.body))
	}
}

// A change that cannot be written down is in force, and whoever entered it learns both.
func TestPolicyChangeThatIsNotKept(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	log := new(logged)
	a, err := agent.New(agent.Options{
		Fetch: fetchDay, Rules: rules(), Log: log.logger(),
		Keep: func(tokencache.Record) error { return errors.New("no space left on device") },
	})
	if err != nil {
		t.Fatal(err)
	}
	d.Agent.Close()
	d.Agent = a
	defer a.Close()
	admin := d.admin()
	got := send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"changed"}`))
	checkRefusal(t, "noted", got, 507, api.CodeNotKept)
	if detail := got.problem(t).Detail; !strings.Contains(detail, "in force") || !strings.Contains(detail, "no space left") {
		t.Errorf("%q", detail)
	}
	list := decoded[api.PolicyChanges](t, send(t, admin, get(api.PathPolicyChanges)).body).Changes
	if len(list) != 1 {
		t.Fatalf("%+v", list)
	}
	got = send(t, admin, withdraw("?id="+list[0].ID))
	checkRefusal(t, "withdrawn", got, 507, api.CodeNotKept)
	if detail := got.problem(t).Detail; !strings.Contains(detail, "withdrawn") {
		t.Errorf("%q", detail)
	}
}

func TestRefreshIsHeldWhileAChangeSpreads(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(2*time.Hour).fetch)
	token, admin := d.tokens(""), d.admin()
	send(t, token, get(v1Vault))
	d.change(tokencache.Granted, 0)
	result := func(body string) api.RefreshResult {
		t.Helper()
		results := decoded[api.RefreshResponse](t, send(t, admin, post(api.PathRefresh, body)).body).Results
		if len(results) != 1 {
			t.Fatalf("%s: %+v", body, results)
		}
		return results[0]
	}
	if got := result(`{}`); got.Outcome != api.OutcomeHeld || !strings.Contains(got.Detail, "still spreading") {
		t.Errorf("%+v", got)
	}
	if got := result(`{"now":true}`); got.Outcome != api.OutcomeUnchanged || got.Detail != "" {
		t.Errorf("%+v", got)
	}
}

func TestStatusTellsOfPermissions(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, newRolling(2*time.Hour).fetch)
	token, admin := d.tokens(""), d.admin()
	send(t, token, get(v1Vault))
	one := func() api.TokenStatus {
		t.Helper()
		got := send(t, admin, get(api.PathStatus))
		if strings.Contains(got.body, "canary") || strings.Contains(got.body, "null") {
			t.Fatal(got.body)
		}
		tokens := decoded[api.Status](t, got.body).Tokens
		if len(tokens) != 1 {
			t.Fatalf("%+v", tokens)
		}
		return tokens[0]
	}
	first := one()
	if first.Permissions.Standing != api.StandingCurrent || first.Life != 86400 || len(first.SHA256) != 12 || first.HeldUntil != nil || first.Before != nil || first.Refused != nil {
		t.Errorf("%+v", first)
	}
	minted := time.Now().Add(-2 * time.Hour)
	if first.MintedFrom == nil || first.MintedTo == nil || first.MintedFrom.After(minted) || first.MintedTo.Before(minted.Add(-time.Minute)) {
		t.Errorf("minted from %v to %v", first.MintedFrom, first.MintedTo)
	}
	if c := first.Claims; c == nil || c.Audience != vault || c.ClientID != claimed || c.ObjectID != objectID || fmt.Sprint(c.Groups, c.Roles, c.WIDs) != "[group-1] [role-1] [wid-1]" {
		t.Errorf("claims %+v", first.Claims)
	}
	if first.Rollover.Pattern != api.RolloverUnlearnt || first.Rollover.Seen != 0 {
		t.Errorf("rollover %+v", first.Rollover)
	}
	d.change(tokencache.Revoked, time.Minute)
	if got := one(); got.Permissions.Standing != api.StandingStale || !got.Permissions.Withheld || got.HeldUntil == nil {
		t.Errorf("while a change spreads: %+v", got)
	}
	send(t, token, post(api.PathRejected, `{"resource":"https://vault.azure.net","status":403}`))
	if got := one(); got.Refused == nil {
		t.Errorf("after a report: %+v", got)
	}
}

// What is known of a key without a token says nothing of permissions.
func TestStatusOfAKeyWithoutAToken(t *testing.T) {
	t.Parallel()
	var key agent.KeyStatus
	if got := tokenStatus(key); got.Permissions != (api.Permissions{}) || got.Claims != nil || got.MintedFrom != nil {
		t.Errorf("%+v", got)
	}
	before := tokencache.Claims{Groups: []string{"g"}}
	key.Before, key.Left, key.Expected, key.Seen = &before, time.Hour, noon, 3
	key.Pattern = tokencache.Pattern{Kind: tokencache.Regular, Age: 12 * time.Hour}
	got := tokenStatus(key)
	if got.Before == nil || got.Before.Groups[0] != "g" || got.Claims == nil || got.Rollover.Age != 43200 || got.Rollover.Seen != 3 || got.Rollover.Expected == nil {
		t.Errorf("%+v", got)
	}
}

// A watcher and a waiting caller see a change made on the admin socket, and the token that follows it.
func TestChangeIsSeenByAll(t *testing.T) {
	t.Parallel()
	back := newRolling(2 * time.Hour)
	d := newDaemon(t, back.fetch)
	token, admin := d.tokens(""), d.admin()
	send(t, token, get(v1Vault))
	w := d.watchAt(token, watchVault)
	w.next(api.EventToken)
	at := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
	send(t, admin, post(api.PathPolicyChanges, `{"all_resources":true,"effect":"revoked","at":"`+at+`"}`))
	if got := w.next(api.EventPermissions); !got.Permissions.Withheld {
		t.Errorf("%+v", got)
	}
	conn := dial(t, token, get(v1Vault+"&wait=10m"))
	defer conn.Close()
	come(&d.quotas().waiting, 1)
	back.roll("", time.Minute)
	send(t, admin, post(api.PathRefresh, `{"now":true}`))
	if got := w.next(api.EventToken); got.Permissions.Standing != api.StandingCurrent {
		t.Errorf("%+v", got)
	}
	if got := exchangeOn(t, conn, ""); got.status != 200 || got.header.Get(api.PermissionsHeader) != "current" {
		t.Errorf("%+v", got)
	}
}

// A revocation that ends while somebody waits lets the token through.
func TestWithdrawingEndsAWait(t *testing.T) {
	t.Parallel()
	back := newRolling(0)
	inBubble(t, back.fetch, func(b *bubble) {
		back.roll("", 2*time.Hour) // by the bubble's clock
		revoked := changeOn(b.t, b.agent, tokencache.Revoked, time.Hour)
		w := newRecorder()
		leave, done := b.begin(w, v1Vault+"&wait=10m")
		defer leave()
		time.Sleep(time.Minute)
		synctest.Wait()
		if text := w.take(); text != "" {
			b.t.Fatalf("answered: %s", text)
		}
		if _, err := b.agent.WithdrawChange("the test", revoked.ID); err != nil {
			b.t.Fatal(err)
		}
		<-done
		if token := decoded[api.Token](b.t, w.take()); token.Permissions.Standing != api.StandingCurrent {
			b.t.Errorf("%+v", token.Permissions)
		}
	})
}
