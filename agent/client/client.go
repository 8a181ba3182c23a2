// Package client talks to perceptd over its Unix sockets: it gets tokens, watches them, and reports
// those that a resource refused; on the admin socket it reads the status, notes policy changes, and asks
// for refreshes and reloads. It needs the standard library and agent/api and nothing else.
//
// Every call opens its own connection and closes it, waits as long as its context allows, and reads
// at most 1 MiB of answer; a Watch stays open, and reads at most 64 KiB for each event. No error of
// this package carries token text.
//
// What the caller must do: give each context a deadline, and keep an api.Token out of logs. It is
// the wire's own type with the text in a plain string, so printing it with fmt prints the secret.
package client

import (
	"context"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"perceptd/agent/api"
)

// Client names the sockets of one daemon. Its zero value talks to the daemon of this device, or,
// inside a module's container, to the socket that is mounted there. It holds nothing open and may be
// used by many goroutines.
type Client struct {
	// Socket is the path of the token socket. Empty means api.DefaultTokenSocket.
	Socket string

	// AdminSocket is the path of the admin socket. Empty means admin.sock beside the token socket.
	AdminSocket string
}

// FromEnvironment returns a client of the token socket that $PERCEPT_SOCKET names, or of the default
// one when the variable is unset or empty.
func FromEnvironment() *Client {
	return &Client{Socket: os.Getenv(api.SocketVariable)}
}

// TokenSocketPath returns the path that Token, Watch, Rejected, WhoAmI and Loopback connect to.
func (c *Client) TokenSocketPath() string {
	if c.Socket == "" {
		return api.DefaultTokenSocket
	}
	return c.Socket
}

// AdminSocketPath returns the path that every method but Token, Watch, Rejected, WhoAmI and Loopback connects to.
func (c *Client) AdminSocketPath() string {
	if c.AdminSocket == "" {
		return filepath.Join(filepath.Dir(c.TokenSocketPath()), api.AdminSocketName)
	}
	return c.AdminSocket
}

// TokenRequest says which token is wanted.
type TokenRequest struct {
	// Resource is the App ID URI that the token is for, such as https://vault.azure.net. Required.
	Resource string

	// Identity is the configured name of the identity. Empty leaves the choice to the caller's grants
	// and the default identity.
	Identity string

	// MinTTL is the life that the token must have left; the daemon answers short_life rather than give
	// less. Zero or less asks for nothing.
	MinTTL time.Duration

	// IssuedAfter is a moment, by the issuer's clock and in whole seconds, after which the token must have
	// been minted; the daemon answers not_yet rather than give an older one. Zero asks for nothing.
	IssuedAfter time.Time

	// Wait is how long the daemon is to wait for a token that meets all this, and that no revocation
	// withholds, before it refuses: 10 minutes at most. Zero or less: for one call to the back end. Give
	// the context ten seconds more.
	Wait time.Duration
}

// Token returns a token that this process was granted. The daemon tells callers apart by socket and
// uid, so the same request may bring another process something else, or nothing.
//
// It returns an *Error when the daemon refuses, an *UnreachableError when none could be talked to,
// and the context's error when that ended first.
func (c *Client) Token(ctx context.Context, r TokenRequest) (api.Token, error) {
	query := url.Values{"resource": {r.Resource}}
	if r.Identity != "" {
		query.Set("identity", r.Identity)
	}
	if r.MinTTL > 0 {
		query.Set("min_ttl", r.MinTTL.String())
	}
	if !r.IssuedAfter.IsZero() {
		query.Set("issued_after", strconv.FormatInt(r.IssuedAfter.Unix(), 10))
	}
	if r.Wait > 0 {
		query.Set("wait", r.Wait.String())
	}
	call := call{socket: c.TokenSocketPath(), method: http.MethodGet, path: api.PathToken, query: query}
	var token api.Token
	if err := call.do(ctx, &token); err != nil {
		return api.Token{}, err
	}
	if token.AccessToken == "" {
		return api.Token{}, call.notTheContract()
	}
	return token, nil
}

// Rejected tells the daemon that a resource refused a token, and returns why that may be and what to do.
// The report changes nothing for other callers. A caller that reports too often gets an *Error with
// api.CodeBusy. Other errors are as for Token.
func (c *Client) Rejected(ctx context.Context, r api.Rejection) (api.Advice, error) {
	call := call{socket: c.TokenSocketPath(), method: http.MethodPost, path: api.PathRejected, body: r}
	return answerTo[api.Advice](ctx, call)
}

// WhoAmI returns how the daemon sees this process and what it may have. Errors are as for Token; that who
// calls could not be proved is an answer, not an error.
func (c *Client) WhoAmI(ctx context.Context) (api.WhoAmI, error) {
	call := call{socket: c.TokenSocketPath(), method: http.MethodGet, path: api.PathWhoAmI}
	return answerTo[api.WhoAmI](ctx, call)
}

// Grants returns every grant in force. Errors are as for Token.
func (c *Client) Grants(ctx context.Context) (api.Grants, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathGrants}
	return answerTo[api.Grants](ctx, call)
}

// Subject is a caller as far as an administrator describes it. A module and an image may stand together, and so may unit,
// uid and groups.
type Subject struct {
	Module, Unit, Image string
	UID, GID            *uint32  // nil: not said
	Groups              []uint32 // beside GID, without which they do not count
}

// CheckGrants returns what the grants in force say to a request of such a caller, and why. identity may be
// empty, as in TokenRequest. Being denied is an answer, not an error. Errors are as for Token.
func (c *Client) CheckGrants(ctx context.Context, who Subject, resource, identity string) (api.Decision, error) {
	query := who.query()
	query.Set("resource", resource)
	if identity != "" {
		query.Set("identity", identity)
	}
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathGrantsCheck, query: query}
	return answerTo[api.Decision](ctx, call)
}

// Loopback returns what an unmodified SDK in this process needs to get its tokens on the daemon's loopback listener. Without
// one the error is an *Error of api.CodeNoLoopback. Other errors are as for Token. The answer holds a secret.
func (c *Client) Loopback(ctx context.Context) (api.Loopback, error) {
	call := call{socket: c.TokenSocketPath(), method: http.MethodGet, path: api.PathLoopback}
	return answerTo[api.Loopback](ctx, call)
}

// LoopbackOf returns what Loopback returns to such a caller. It asks on the admin socket.
func (c *Client) LoopbackOf(ctx context.Context, who Subject) (api.Loopback, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathLoopback, query: who.query()}
	return answerTo[api.Loopback](ctx, call)
}

func (who Subject) query() url.Values {
	query := make(url.Values)
	for name, value := range map[string]string{"module": who.Module, "unit": who.Unit, "container_image": who.Image} {
		if value != "" {
			query.Set(name, value)
		}
	}
	for name, id := range map[string]*uint32{"uid": who.UID, "gid": who.GID} {
		if id != nil {
			query.Set(name, strconv.FormatUint(uint64(*id), 10))
		}
	}
	if who.GID != nil {
		for _, gid := range who.Groups {
			query.Set("gid", query.Get("gid")+","+strconv.FormatUint(uint64(gid), 10))
		}
	}
	return query
}

// Status returns what the daemon says of itself, its identities and its tokens. Errors are as for
// Token.
func (c *Client) Status(ctx context.Context) (api.Status, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathStatus}
	return answerTo[api.Status](ctx, call)
}

// Refresh asks the back end anew for the cached tokens that r names and returns what each call
// brought; a call that failed is a result, not an error. Errors are as for Token.
func (c *Client) Refresh(ctx context.Context, r api.RefreshRequest) (api.RefreshResponse, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodPost, path: api.PathRefresh, body: r}
	return answerTo[api.RefreshResponse](ctx, call)
}

// PolicyChanges returns the policy changes on record, the latest first. Errors are as for Token.
func (c *Client) PolicyChanges(ctx context.Context) (api.PolicyChanges, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathPolicyChanges}
	return answerTo[api.PolicyChanges](ctx, call)
}

// NotePolicyChange puts a policy change on record and in force, and returns it as it is on record. With an
// *Error of api.CodeNotKept it is in force all the same, but lost at the daemon's next start. Other
// errors are as for Token, and nothing has changed then.
func (c *Client) NotePolicyChange(ctx context.Context, r api.PolicyChangeRequest) (api.PolicyChangeAnswer, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodPost, path: api.PathPolicyChanges, body: r}
	return answerTo[api.PolicyChangeAnswer](ctx, call)
}

// WithdrawPolicyChange takes a policy change off the record, as if it had never been noted, and returns
// it as it was. With an *Error of api.CodeNotKept it is withdrawn all the same, but back after the
// daemon's next start; with api.CodeUnknownChange there is none of that ID. Other errors are as for Token.
func (c *Client) WithdrawPolicyChange(ctx context.Context, id string) (api.PolicyChangeAnswer, error) {
	call := call{
		socket: c.AdminSocketPath(), method: http.MethodDelete, path: api.PathPolicyChanges,
		query: url.Values{"id": {id}},
	}
	return answerTo[api.PolicyChangeAnswer](ctx, call)
}

// Reload makes the daemon read its configuration again and returns what changed. A bad configuration
// is an *Error with api.CodeInvalidConfig and changes nothing. Other errors are as for Token.
func (c *Client) Reload(ctx context.Context) (api.ReloadResponse, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodPost, path: api.PathReload}
	return answerTo[api.ReloadResponse](ctx, call)
}

// Ready returns whether the daemon is ready to hand out tokens, and why not. Not being ready is an
// answer, not an error. Errors are as for Token.
func (c *Client) Ready(ctx context.Context) (api.Health, error) {
	call := call{
		socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathReady,
		alsoAnswer: http.StatusServiceUnavailable,
	}
	return answerTo[api.Health](ctx, call)
}
