package server

import (
	"context"
	"errors"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

func TestEveryReasonInEveryShape(t *testing.T) {
	t.Parallel()
	proved := provedContext(t)
	fails := func(kind tokencache.Kind, after time.Duration) fetchFunc {
		return fetchError(&tokencache.FetchError{Kind: kind, RetryAfter: after, Detail: "the endpoint says so"})
	}
	const twoChoices = "https://two.choices"
	for _, test := range []struct {
		name, resource, selector, identity string
		fetch                              fetchFunc
		status                             int
		code                               api.Code
		error, text, retry                 string
	}{
		{"bad resource", "nonsense", "", "", fetchDay, 400, api.CodeBadRequest, "invalid_request", "App ID URI", ""},
		{"unknown identity", vault, "client_id=nobody", "nobody", fetchDay, 400, api.CodeUnknownIdentity,
			"invalid_request", "Identity not found", ""},
		{"ambiguous identity", twoChoices, "", "", fetchDay, 400, api.CodeAmbiguous, "invalid_request",
			"identities", ""},
		{"not granted", "https://not.granted", "", "", fetchDay, 403, api.CodeNotGranted, "access_denied", "[[grant]]",
			""},
		{"not granted by name", vault, "client_id=00000000-0000-0000-0000-000000000002", "camera", fetchDay, 403,
			api.CodeNotGranted, "access_denied", "[[grant]]", ""},
		{"unreachable", vault, "", "", fails(tokencache.Unreachable, 0), 503, api.CodeUnreachable,
			"temporarily_unavailable", "the endpoint says so", "2"},
		{"throttled", vault, "", "", fails(tokencache.Throttled, 4200*time.Millisecond), 503, api.CodeThrottled,
			"temporarily_unavailable", "the endpoint says so", "5"},
		{"throttled for long", vault, "", "", fails(tokencache.Throttled, time.Minute), 503, api.CodeThrottled,
			"temporarily_unavailable", "the endpoint says so", "10"},
		{"malformed", vault, "", "", fails(tokencache.Malformed, 0), 503, api.CodeMalformedAnswer,
			"temporarily_unavailable", "the endpoint says so", "2"},
		{"identity not found", vault, "", "", fails(tokencache.IdentityNotFound, 0), 400, api.CodeIdentityNotFound,
			"invalid_request", "the endpoint says so", ""},
		{"refused", vault, "", "", fails(tokencache.Refused, 0), 403, api.CodeRefused, "access_denied",
			"the endpoint says so", ""},
	} {
		d := newDaemon(t, test.fetch)
		target := "api-version=2019-08-01&resource=" + test.resource
		if test.selector != "" {
			target += "&" + test.selector
		}
		for _, path := range []string{api.PathIMDSToken, api.PathAppServiceToken} {
			got := d.answer(t, proved, onToken, "GET", path+"?"+target, "")
			name := test.name + " at " + path
			checkRefusal(t, name, got, test.status, test.code)
			checkSDKError(t, name, got, test.error, test.text)
			if retry := got.header.Get("Retry-After"); retry != test.retry {
				t.Errorf("%s: Retry-After %q, want %q", name, retry, test.retry)
			}
			if !strings.Contains(d.log.String(), decoded[sdkError](t, got.body).CorrelationID) {
				t.Errorf("%s: the log does not have the correlation ID", name)
			}
		}
		target = api.PathToken + "?resource=" + test.resource
		if test.identity != "" {
			target += "&identity=" + test.identity
		}
		got := d.answer(t, proved, onToken, "GET", target, "")
		checkRefusal(t, test.name, got, test.status, test.code)
		problem := got.problem(t)
		if problem.Status != got.status || problem.Type != "urn:percept:problem:"+string(test.code) ||
			problem.Title == "" || !strings.Contains(problem.Detail, test.text) {
			t.Errorf("%s: %+v", test.name, problem)
		}
		if retry := got.header.Get("Retry-After"); retry != test.retry {
			t.Errorf("%s: Retry-After %q, want %q", test.name, retry, test.retry)
		}
		hasChoices := test.code == api.CodeAmbiguous || test.code == api.CodeUnknownIdentity
		if hasChoices != (len(problem.Choices) > 0) {
			t.Errorf("%s: choices %q", test.name, problem.Choices)
		}
	}
}

func TestUnknownIdentityBeginsAsAzureSaysIt(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  apiError
		want string
	}{
		{apiError{code: api.CodeUnknownIdentity, detail: "Identity not found: really"},
			"Identity not found: really; no identity is granted to this caller for that resource"},
		{apiError{code: api.CodeIdentityNotFound, detail: "no such"}, "Identity not found: no such"},
		{apiError{code: api.CodeRefused, detail: "no such"}, "no such"},
	} {
		if got := test.err.sdkText(formIMDS); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}

func TestStoppingAgent(t *testing.T) {
	t.Parallel()
	proved := provedContext(t)
	d := newDaemon(t, fetchDay)
	d.Agent.Close()
	got := d.answer(t, proved, onToken, "GET", v1Vault, "")
	checkRefusal(t, "stopping", got, 503, api.CodeUnreachable)
}

func TestCallerThatWentAway(t *testing.T) {
	t.Parallel()
	gone, cancel := context.WithCancel(provedContext(t))
	cancel()
	d := newDaemon(t, hang)
	got := d.answer(t, gone, onToken, "GET", v1Vault, "")
	checkRefusal(t, "gone", got, 503, api.CodeUnreachable)
}

func TestEveryCodeHasAStatus(t *testing.T) {
	t.Parallel()
	elsewhere := []api.Code{api.CodeUnknownChange, api.CodeUnknownDenyRule, api.CodeUnknownMethod,
		api.CodeNotCached, api.CodeBusy} // where no SDK asks
	kinds := []tokencache.Kind{tokencache.Unreachable, tokencache.Throttled, tokencache.IdentityNotFound,
		tokencache.Refused, tokencache.Malformed}
	codes := slices.Collect(maps.Keys(api.StatusOf))
	for _, kind := range kinds {
		codes = append(codes, api.Code(kind))
	}
	for _, code := range codes {
		e := tokenError(&agent.Error{Code: code, Detail: "d"})
		if e.status == 500 || !e.counted || e.detail != "d" || e.code != code {
			t.Errorf("%s: %+v", code, e)
		}
		// SDKs repeat these for minutes, or not at all.
		switch e.status {
		case 404, 408, 410, 429:
			if !slices.Contains(elsewhere, code) {
				t.Errorf("%s is answered with %d", code, e.status)
			}
		}
	}
	for _, err := range []error{&agent.Error{Code: "other", Detail: canary}, errors.New(canary)} {
		e := errorOf(err)
		if e.status != 500 || e.code != api.CodeInternal || strings.Contains(e.detail, "canary") {
			t.Errorf("%T: %+v", err, e)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for after, want := range map[time.Duration]int{
		-time.Second: 2, 0: 2, 1: 1, time.Second: 1, time.Second + 1: 2, 9500 * time.Millisecond: 10, time.Hour: 10,
	} {
		if got := (&apiError{code: api.CodeThrottled, retryAfter: after}).retrySeconds(); got != want {
			t.Errorf("%v: got %d, want %d", after, got, want)
		}
	}
	for _, code := range []api.Code{api.CodeNotYet, api.CodeBusy} {
		if got := (&apiError{code: code, retryAfter: 5 * time.Minute}).retrySeconds(); got != 300 {
			t.Errorf("%s: got %d, want the truth", code, got)
		}
	}
}

func TestCorrelationIDsAreUUIDs(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	one, two := newCorrelationID(), newCorrelationID()
	if !form.MatchString(one) || one == two {
		t.Errorf("%s, %s", one, two)
	}
}

func TestSDKErrorCodes(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]string{
		400: "invalid_request", 405: "invalid_request", 403: "access_denied", 503: "temporarily_unavailable",
		500: "server_error",
	} {
		if got := (&apiError{status: status}).sdkErrorCode(); got != want {
			t.Errorf("%d: got %s, want %s", status, got, want)
		}
	}
}
