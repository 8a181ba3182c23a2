package agent

import (
	"strings"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// TokenInfo describes the token that is cached for a caller, without the token's text.
type TokenInfo struct {
	tokencache.TokenInfo
	Identity *grants.Identity
}

// Peek returns what is cached now of the token that r would be answered with, and a channel that is closed when that
// may have changed. It checks the grants at every call. It fetches nothing, but the cache counts it as a request for
// the token. The error is an *Error.
func (a *Agent) Peek(caller grants.Caller, r Request) (info TokenInfo, changed <-chan struct{}, err error) {
	info, changed, err = a.peek(caller, r)
	a.audit.refused(a.rules.Load(), &caller, r.forGrants(), err)
	return info, changed, err
}

// peek is Peek without a trace in the audit.
func (a *Agent) peek(caller grants.Caller, r Request) (TokenInfo, <-chan struct{}, error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	granted, denial := a.rules.Load().authorize(&caller, r.forGrants())
	if denial != nil {
		return TokenInfo{}, nil, denial
	}
	identity := granted.Identity
	info, changed, err := a.cache.Peek(tokencache.Key{Selector: identity.Selector(), Resource: r.Resource})
	if err != nil {
		return TokenInfo{}, nil, a.callerError(identity, r.Resource, err)
	}
	return TokenInfo{TokenInfo: info, Identity: identity}, changed, nil
}
