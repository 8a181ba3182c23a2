package client

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"perceptd/agent/api"
)

// DenyRules returns the deny rules of the device, the latest first, and whether they are known. Errors are as for
// Token.
func (c *Client) DenyRules(ctx context.Context) (api.DenyRules, error) {
	return answerTo[api.DenyRules](ctx, c.denyCall(http.MethodGet, api.PathDeny))
}

// Deny takes tokens away at once, whatever the grants allow, and returns the rule that does. With an *Error of
// api.CodeNotKept the rule is in force and returned, but lost at the daemon's next start. Other errors are as for
// Token; nothing is denied then.
func (c *Client) Deny(ctx context.Context, r api.DenyRequest) (api.DenyAnswer, error) {
	call := c.denyCall(http.MethodPost, api.PathDeny)
	call.body = r
	return call.denyRule(ctx)
}

// LiftDeny lifts the deny rule of that ID, which a person on this device has set, and returns it as it was. With an
// *Error of api.CodeNotKept it is lifted, but back after the daemon's next start; with api.CodeUnknownDenyRule there is
// none of that ID. Other errors are as for Token.
func (c *Client) LiftDeny(ctx context.Context, id string) (api.DenyAnswer, error) {
	call := c.denyCall(http.MethodDelete, api.PathDeny)
	call.query = url.Values{"id": {id}}
	return call.denyRule(ctx)
}

// SetHubAside has the device heed nothing that IoT Hub sets, until HeedHub, and returns the rules as they are then. It
// is for root: others get an *Error of api.CodeNotRoot. With one of api.CodeNotKept it is done, but undone at the
// daemon's next start. Other errors are as for Token.
func (c *Client) SetHubAside(ctx context.Context) (api.DenyRules, error) {
	return answerTo[api.DenyRules](ctx, c.denyCall(http.MethodDelete, api.PathDenyHub))
}

// HeedHub takes back what SetHubAside did. Its answer and errors are as there.
func (c *Client) HeedHub(ctx context.Context) (api.DenyRules, error) {
	return answerTo[api.DenyRules](ctx, c.denyCall(http.MethodPost, api.PathDenyHub))
}

// ForgetLostDenyRules ends the denial of everything that a lost record of deny rules causes: what was on it denies
// nothing any more. Its answer and errors are as for SetHubAside.
func (c *Client) ForgetLostDenyRules(ctx context.Context) (api.DenyRules, error) {
	return answerTo[api.DenyRules](ctx, c.denyCall(http.MethodDelete, api.PathDenyLost))
}

func (c *Client) denyCall(method, path string) call {
	return call{socket: c.AdminSocketPath(), method: method, path: path}
}

// denyRule returns the rule that the answer is about, also with the error that it is not kept.
func (c call) denyRule(ctx context.Context) (api.DenyAnswer, error) {
	answer, err := answerTo[api.DenyAnswer](ctx, c)
	var refusal *Error
	if errors.As(err, &refusal) && refusal.DenyRule != nil {
		answer = *refusal.DenyRule
	}
	return answer, err
}
