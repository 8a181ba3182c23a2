package azcredential

import (
	"context"
	"errors"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

// accepts answers 200 to all, and remembers the token of the last request.
type accepts struct{ authorization string }

func (a *accepts) Do(r *http.Request) (*http.Response, error) {
	a.authorization = r.Header.Get("Authorization")
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: r}, nil
}

// A request of an SDK's pipeline whose token is still good is not held up by the refresh of it while perceptd is away,
// and the next refresh brings the newer one. In virtual time, with the SDK's own policy.
func TestRefreshHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	p.answers = []any{token("1", api.PermissionsCurrent, 60), token("2", api.PermissionsCurrent, 60)}
	socket := p.client.Socket
	synctest.Test(t, func(t *testing.T) {
		resource := &accepts{}
		bearer := runtime.NewBearerTokenPolicy(New(p.client, nil), []string{vault + "/.default"}, nil)
		pipeline := runtime.NewPipeline("test", "v1", runtime.PipelineOptions{PerRetry: []policy.Policy{bearer}},
			&policy.ClientOptions{Transport: resource})
		ask := func(want string) {
			t.Helper()
			begun := time.Now()
			request, err := runtime.NewRequest(t.Context(), http.MethodGet, vault)
			if err == nil {
				_, err = pipeline.Do(request)
			}
			if waited := time.Since(begun); err != nil || resource.authorization != "Bearer "+canary+want ||
				waited != 0 {
				t.Errorf("not with token %s, or after %v: %v", want, waited, err)
			}
		}
		ask("1")
		time.Sleep(2 * time.Minute)
		p.client.Socket += "-gone"
		ask("1")
		p.client.Socket = socket
		ask("1") // the SDK asks every 30 seconds at most
		time.Sleep(time.Minute)
		ask("2")
	})
}

// Who has a good token asks once, and briefly; who has none, or one that has expired, or was challenged, is patient.
func TestPatience(t *testing.T) {
	t.Parallel()
	throttled := api.Problem{Status: http.StatusServiceUnavailable, Code: api.CodeThrottled, Detail: "later"}
	expired := token("1", api.PermissionsCurrent, 60)
	expired.ExpiresIn = 0
	for name, row := range map[string]struct {
		first  api.Token
		then   policy.TokenRequestOptions
		pauses int
	}{
		"a good one":     {token("1", api.PermissionsCurrent, 60), scope(vault), 0},
		"another's":      {token("1", api.PermissionsCurrent, 60), scope("https://storage.azure.com"), maxTries - 1},
		"an expired one": {expired, scope(vault), maxTries - 1},
		"challenged once": {token("1", api.PermissionsCurrent, 60), policy.TokenRequestOptions{Scopes: []string{vault},
			Claims: "{}"}, maxTries - 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newFakePerceptd(t)
			p.answers, p.advice = []any{row.first, throttled}, api.Advice{Retry: true}
			c := New(p.client, nil)
			pauses := 0
			c.wait = func(context.Context, time.Duration) error { pauses++; return nil }
			if _, err := c.GetToken(t.Context(), scope(vault)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.GetToken(t.Context(), row.then); !errors.As(err, new(*client.Error)) ||
				pauses != row.pauses {
				t.Errorf("%v after %d pauses, want %d", err, pauses, row.pauses)
			}
		})
	}
}

// A perceptd that takes the connection and does not answer holds up the refresh of a good token for refreshTimeout at
// most.
func TestSilentPerceptd(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	p.answers = []any{token("1", api.PermissionsCurrent, 60)}
	c := New(p.client, nil)
	if _, err := c.GetToken(t.Context(), scope(vault)); err != nil {
		t.Fatal(err)
	}
	p.client.Socket += "-silent"
	l, err := net.Listen("unix", p.client.Socket) // connects who comes, and is never asked for them
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c.refreshTimeout = time.Millisecond
	if _, err := c.GetToken(t.Context(), scope(vault)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
