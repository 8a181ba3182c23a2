// Package azcredential gives perceptd's tokens to the Azure SDK for Go: a Credential is an azcore.TokenCredential that
// asks on the token socket, without a loopback port or an environment variable between.
//
// A Credential holds no token: perceptd caches them, and asking costs a fraction of a millisecond. What it does beyond
// azidentity's ManagedIdentityCredential is that it reports to perceptd when a resource has refused a token, and
// returns what perceptd knows about that instead of the same token again.
package azcredential

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

// Options of a Credential.
type Options struct {
	// Identity is the configured name of the identity. Empty leaves the choice to the caller's grants.
	Identity string
}

// Credential gets tokens from perceptd. It may be used by many goroutines.
type Credential struct {
	client         *client.Client
	identity       string
	wait           func(context.Context, time.Duration) error
	refreshTimeout time.Duration // of the refresh of a token that is still good

	lastTokens sync.Map // by resource: a lastToken
}

// lastToken is what a Credential keeps of the token that it returned last for a resource: not its text.
type lastToken struct {
	sha256  string
	expires time.Time
}

var _ azcore.TokenCredential = (*Credential)(nil)

// New returns a credential that asks the daemon that c names. Nil options are the zero ones.
func New(c *client.Client, o *Options) *Credential {
	if o == nil {
		o = &Options{}
	}
	return &Credential{client: c, identity: o.Identity, wait: wait, refreshTimeout: defaultRefreshTimeout}
}

// How long an SDK's client can do without a token being refreshed, and so without noticing a new one.
const (
	refreshWithin = 30 * time.Minute
	refreshStale  = time.Minute // while permissions are not current
)

// defaultRefreshTimeout bounds the refresh of a token that is still good. perceptd answers from memory in less than a
// millisecond.
const defaultRefreshTimeout = 2 * time.Second

// GetToken returns a token for the one scope in o: RESOURCE/.default, or RESOURCE alone.
//
// RefreshOn is when perceptd may have a newer one: pipelines ask again then, and go on with the token they have where
// that fails. Claims, from a resource that refused a token, are reported to perceptd, which asks its back end once: a
// managed identity cannot be made to get a new token, so where there is none the error says why, and when there may be
// one. EnableCAE changes nothing, since managed identities get no such tokens, nor does TenantID, as with azidentity:
// the identity belongs to one tenant.
//
// While perceptd is away or its back end throttles, it is asked a few times, as long as ctx lasts. While a token that
// was returned for the resource is still good, it is asked once, for two seconds at most: a pipeline refreshes during a
// request, which goes on with that token. With Claims it is asked a few times nevertheless. The errors are final to a
// pipeline; errors.As finds *client.Error and *client.UnreachableError in them.
func (c *Credential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	resource, err := resourceOf(o.Scopes)
	if err != nil {
		return azcore.AccessToken{}, &Error{err}
	}
	if o.Claims != "" {
		if err := c.reportChallenge(ctx, resource, o.Claims); err != nil {
			return azcore.AccessToken{}, &Error{err}
		}
	}
	ask := c.ask
	if o.Claims == "" && c.lastTokenFor(resource).expires.After(time.Now()) {
		ask = c.askOnce
	}
	token, err := ask(ctx, client.TokenRequest{Resource: resource, Identity: c.identity})
	if err != nil {
		return azcore.AccessToken{}, &Error{err}
	}
	now := time.Now().Round(0) // by the wall clock, since the other stands still while the device is suspended
	expires := now.Add(seconds(token.ExpiresIn))
	c.lastTokens.Store(resource, lastToken{token.SHA256, expires})
	refresh := min(seconds(token.RefreshIn), refreshWithin)
	if token.Permissions.State != api.PermissionsCurrent {
		refresh = min(refresh, refreshStale)
	}
	return azcore.AccessToken{Token: token.AccessToken, ExpiresOn: expires, RefreshOn: now.Add(refresh)}, nil
}

// Watch yields what perceptd holds of the token for a scope, as client.Watch does.
func (c *Credential) Watch(ctx context.Context, scope string) iter.Seq2[client.Event, error] {
	resource, err := resourceOf([]string{scope})
	if err != nil {
		return func(yield func(client.Event, error) bool) { yield(client.Event{}, &Error{err}) }
	}
	return c.client.Watch(ctx, client.WatchRequest{Resource: resource, Identity: c.identity})
}

// Rejected reports to perceptd that a resource answered 401 or 403 to the token that was returned last for a scope, and
// returns why that may be and what to do. Call it for a 403, which a pipeline does not report to a credential.
func (c *Credential) Rejected(ctx context.Context, scope string, status int) (api.Advice, error) {
	resource, err := resourceOf([]string{scope})
	if err != nil {
		return api.Advice{}, &Error{err}
	}
	return c.report(ctx, resource, status, "")
}

func (c *Credential) report(ctx context.Context, resource string, status int, claims string) (api.Advice, error) {
	advice, err := c.client.Rejected(ctx, api.Rejection{
		Resource: resource, Identity: c.identity, SHA256: c.lastTokenFor(resource).sha256, Status: status,
		Claims: claims,
	})
	if err != nil {
		return api.Advice{}, &Error{err}
	}
	return advice, nil
}

// lastTokenFor returns what is kept of the token that was returned last; zero where none was.
func (c *Credential) lastTokenFor(resource string) lastToken {
	last, _ := c.lastTokens.Load(resource)
	kept, _ := last.(lastToken)
	return kept
}

// reportChallenge reports a claims challenge, and returns an error where perceptd has no token that may meet it.
func (c *Credential) reportChallenge(ctx context.Context, resource, claims string) error {
	advice, err := c.report(ctx, resource, http.StatusUnauthorized, claims)
	switch {
	case err != nil:
		return fmt.Errorf("telling of a claims challenge: %w", err)
	case advice.Retry:
		return nil
	}
	why := "nothing is known of why"
	if len(advice.Findings) > 0 {
		why = advice.Findings[0].Detail + "; " + advice.Findings[0].Action
	}
	return fmt.Errorf("%s wants another token, and there is none: %s", resource, why)
}

const maxTries = 4

// ask asks for a token, some times where that may help.
func (c *Credential) ask(ctx context.Context, r client.TokenRequest) (api.Token, error) {
	for try := 1; ; try++ {
		token, err := c.client.Token(ctx, r)
		pause, may := retryAfter(err, try)
		if err == nil || !may || try == maxTries || c.wait(ctx, pause) != nil {
			return token, err
		}
	}
}

// askOnce asks once, where the token that was returned last is still good.
func (c *Credential) askOnce(ctx context.Context, r client.TokenRequest) (api.Token, error) {
	ctx, cancel := context.WithTimeout(ctx, c.refreshTimeout)
	defer cancel()
	return c.client.Token(ctx, r)
}

const maxPause = 10 * time.Second

// retryAfter returns whether another try may help, and after which pause.
func retryAfter(err error, try int) (time.Duration, bool) {
	var refusal *client.Error
	var unreachable *client.UnreachableError
	pause := time.Second << (try - 1)
	switch {
	case errors.As(err, &refusal) && (refusal.Status == http.StatusServiceUnavailable ||
		refusal.Status == http.StatusTooManyRequests):
		if refusal.RetryAfter > 0 {
			pause = refusal.RetryAfter
		}
		return min(pause, maxPause), true
	// not perceptd's word: another program is in its place
	case errors.As(err, &unreachable), refusal != nil && refusal.Code == "":
		return pause, true
	}
	return 0, false
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

const suffix = "/.default"

// resourceOf returns the resource of the one scope that a managed identity can ask for at a time. All before the suffix
// counts: a resource may end with a slash of its own. A scope without the suffix is a resource, as for azidentity.
func resourceOf(scopes []string) (string, error) {
	if len(scopes) != 1 {
		return "", fmt.Errorf("a managed identity gets a token for one scope at a time: there are %d", len(scopes))
	}
	resource := strings.TrimSuffix(scopes[0], suffix)
	if resource == "" {
		return "", errors.New("the scope names no resource: write RESOURCE" + suffix)
	}
	return resource, nil
}

// Error is every error of a Credential. A pipeline does not try again: the Credential has done so where it may help.
type Error struct{ cause error }

func (e *Error) Error() string { return "token from perceptd: " + e.cause.Error() }

// Unwrap returns what went wrong: a *client.Error, a *client.UnreachableError, or the context's.
func (e *Error) Unwrap() error { return e.cause }

// NonRetriable marks the error as final, to the SDK's pipelines.
func (e *Error) NonRetriable() {}
