// Package source is where tokens come from: Azure's managed-identity endpoints, asked through
// azidentity.
//
// Each fetch is one question to the endpoint: azidentity's own cache, which is shared by the whole
// process and cannot be emptied, is passed by, no answer and no failure is retried, and no connection
// is kept. An answer is judged before azidentity sees it, and azidentity gets what was judged and nothing else: a token
// for another identity or resource than the one asked for, or without a sane expiry, is an error and never a token;
// what is mere advice refuses none. Only what is of the endpoint's own form speaks for Azure. Nothing that the endpoint
// said, and no secret, is in an error.
//
// azidentity reads the process environment, at the start and at every call: the caller must not change
// it while a source is in use. Fetches must be spaced and collapsed by the caller (tokencache does).
package source

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"go.uber.org/zap"

	"perceptd/tokencache"
)

const (
	defaultTimeout = 30 * time.Second

	// Any claims make azidentity ask the endpoint instead of its cache; none of them is sent.
	bypassCacheClaims = `{"access_token":{}}`
)

// Options is what a ManagedIdentity is made of.
type Options struct {
	Endpoint     Endpoint         // empty: Auto
	Timeout      time.Duration    // the longest that one fetch may take; zero: 30 s
	Wall         func() time.Time // the wall clock, right or wrong; nil: time.Now
	ClockTrusted func() bool      // whether Wall is known to be right; nil: never
	Log          *zap.Logger      // gets one warning for each field that endpoints fill with nonsense; nil: none
}

// ManagedIdentity gets tokens of managed identities through azidentity. It is safe for use by many
// goroutines, for several identities at once.
type ManagedIdentity struct {
	want        Endpoint
	environment func() environment
	at          target
	timeout     time.Duration
	transport   *transport

	mu      sync.Mutex // protects what follows
	missing error      // why azidentity would not use at; nil: it would
	// one for each selector ever asked with
	credentials map[tokencache.Selector]*azidentity.ManagedIdentityCredential
}

// New finds the endpoint; it sends nothing. The error says what to change in the environment or the
// configuration when azidentity would not use the endpoint that was named. Then the source is there all the same:
// each fetch looks again, and fails with that error, until azidentity would.
func New(o Options) (*ManagedIdentity, error) { return newIn(processEnvironment, o) }

func newIn(now func() environment, o Options) (*ManagedIdentity, error) {
	env := now()
	at, err := findTarget(o.Endpoint, env)
	if err != nil {
		at = env.expected(o.Endpoint)
	}
	m := newAt(at, o)
	m.want, m.environment = o.Endpoint, now
	if err == nil {
		return m, nil
	}
	m.missing = fmt.Errorf("source managed-identity: %w", err)
	return m, m.missing
}

func newAt(at target, o Options) *ManagedIdentity {
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.Wall == nil {
		o.Wall = time.Now
	}
	if o.ClockTrusted == nil {
		o.ClockTrusted = func() bool { return false }
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return &ManagedIdentity{
		at:          at,
		timeout:     o.Timeout,
		transport:   newTransport(at, o),
		credentials: make(map[tokencache.Selector]*azidentity.ManagedIdentityCredential),
	}
}

// Endpoint returns the form in use: Arc, AppService or IMDS. While azidentity would not use the one that was named, it
// is that one, and may be Auto.
func (m *ManagedIdentity) Endpoint() Endpoint { return m.at.form }

// Address returns the host:port that is connected to; empty: it is not known.
func (m *ManagedIdentity) Address() string { return m.at.dial }

// Missing looks whether azidentity would use the endpoint by now, and returns why it would not.
func (m *ManagedIdentity) Missing() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.missing == nil {
		return nil
	}
	switch at, err := findTarget(m.want, m.environment()); {
	case err != nil:
		m.missing = fmt.Errorf("source managed-identity: %w", err)
	case at != m.at:
		m.missing = fmt.Errorf("source managed-identity: azidentity chooses %s by now: systemctl restart perceptd",
			at.form)
	default:
		m.missing = nil
	}
	return m.missing
}

// Moved reports whether azidentity is free to choose, and would choose another endpoint by now than this source has:
// the Arc agent may have been installed since. This source stays at its own.
func (m *ManagedIdentity) Moved() bool {
	if m.want != Auto && m.want != "" {
		return false
	}
	at, err := findTarget(m.want, m.environment())
	return err == nil && at != m.at
}

// Fetch asks the endpoint once for a token of key. The error is a *tokencache.FetchError, or wraps
// context.Canceled when ctx was cancelled; a deadline of ctx is an Unreachable endpoint.
func (m *ManagedIdentity) Fetch(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	if err := m.Missing(); err != nil {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: err.Error()}
	}
	credential, failed := m.credential(key.Selector)
	if failed != nil {
		return tokencache.Fetched{}, failed
	}
	if key.Resource == "" {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Refused, Detail: "no resource was named"}
	}
	begun := time.Now()
	f := &fetch{key: key}
	bounded, cancel := context.WithTimeout(context.WithValue(ctx, fetchKey{}, f), m.timeout)
	defer cancel()
	token, err := getToken(bounded, credential, f)
	switch {
	case f.failure != nil:
		return tokencache.Fetched{}, f.failure
	case err == nil && f.result.Token.Text.Equal(tokencache.NewSecret(token.Token)):
		return f.result, nil
	case errors.Is(ctx.Err(), context.Canceled):
		return tokencache.Fetched{}, fmt.Errorf("fetch of %v given up: %w", key, ctx.Err())
	case bounded.Err() != nil:
		return tokencache.Fetched{}, m.at.timeout(time.Since(begun))
	}
	return tokencache.Fetched{}, malformed("azidentity does not accept what %s answered", m.at.dial)
}

// getToken asks through azidentity. A panic on the way is the fetch's failure: the runtime would end the daemon and
// print the value, which may quote an answer.
func getToken(ctx context.Context, credential *azidentity.ManagedIdentityCredential, f *fetch) (_ azcore.AccessToken,
	err error) {
	defer func() {
		if value := recover(); value != nil {
			f.failure = malformed("a fault of perceptd's or azidentity's: a panic of type %T in %s", value, panicSite())
			err = f.failure
		}
	}()
	return credential.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{f.key.Resource},
		Claims: bypassCacheClaims})
}

// panicSite names the function that panicked. It is called by a deferred function.
func panicSite() string {
	var counters [32]uintptr
	// without Callers, this and the deferred function
	frames := runtime.CallersFrames(counters[:runtime.Callers(3, counters[:])])
	for {
		frame, more := frames.Next()
		if !more || !strings.HasPrefix(frame.Function, "runtime.") {
			return frame.Function
		}
	}
}

// credential returns the azidentity credential of a selector, made when first needed.
func (m *ManagedIdentity) credential(s tokencache.Selector) (*azidentity.ManagedIdentityCredential,
	*tokencache.FetchError) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.credentials[s]; c != nil {
		return c, nil
	}
	options := azidentity.ManagedIdentityCredentialOptions{ClientOptions: azcore.ClientOptions{
		Transport: m.transport,
		// The cache decides when to ask again. A try may take as long as the whole.
		Retry:     policy.RetryOptions{MaxRetries: -1, TryTimeout: m.timeout},
		Telemetry: policy.TelemetryOptions{ApplicationID: "perceptd"},
	}}
	switch {
	case s.Kind == tokencache.SystemAssigned && s.ID == "":
	case s.Kind == tokencache.ClientID && s.ID != "":
		options.ID = azidentity.ClientID(s.ID)
	case s.Kind == tokencache.ObjectID && s.ID != "":
		options.ID = azidentity.ObjectID(s.ID)
	case s.Kind == tokencache.ResourceID && s.ID != "":
		options.ID = azidentity.ResourceID(s.ID)
	default:
		return nil, &tokencache.FetchError{Kind: tokencache.Refused,
			Detail: fmt.Sprintf("%q selects no identity", s.String())}
	}
	c, err := azidentity.NewManagedIdentityCredential(&options)
	if err != nil {
		return nil, &tokencache.FetchError{Kind: tokencache.Refused, Detail: fmt.Sprintf(
			"azidentity takes no %v at this endpoint; was the environment changed? restart perceptd", s)}
	}
	m.credentials[s] = c
	return c, nil
}
