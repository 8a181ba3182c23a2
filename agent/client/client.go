// Package client talks to perceptd over its Unix sockets: it gets tokens, and on the admin socket it
// reads the status and asks for refreshes and reloads. It needs the standard library and agent/api
// and nothing else.
//
// Every call opens its own connection and closes it, waits as long as its context allows, and reads
// at most 1 MiB of answer. No error of this package carries token text.
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

// TokenSocketPath returns the path that Token connects to.
func (c *Client) TokenSocketPath() string {
	if c.Socket == "" {
		return api.DefaultTokenSocket
	}
	return c.Socket
}

// AdminSocketPath returns the path that every method but Token connects to.
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
