package agent

import (
	"strings"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Sight is what is held for a caller, without the token's text.
type Sight struct {
	tokencache.TokenInfo
	Identity *grants.Identity
}

// Look tells a caller what is held now of the token that r would be answered with, and when to look
// again: the channel is closed when that is no longer true, which may turn out to be nothing new. Grants
// are checked anew at every call. The error is an *Error. It fetches nothing, but counts as asking.
func (a *Agent) Look(caller grants.Caller, r Request) (Sight, <-chan struct{}, error) {
	sight, news, err := a.look(caller, r)
	a.audit.refused(a.rules.Load(), &caller, r.forGrants(), err)
	return sight, news, err
}

func (a *Agent) look(caller grants.Caller, r Request) (Sight, <-chan struct{}, error) {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	granted, denial := a.rules.Load().authorize(&caller, r.forGrants())
	if denial != nil {
		return Sight{}, nil, denial
	}
	identity := granted.Identity
	sight, news, err := a.cache.Peek(tokencache.Key{Selector: identity.Selector(), Resource: r.Resource})
	if err != nil {
		return Sight{}, nil, a.explain(identity, r.Resource, err)
	}
	return Sight{TokenInfo: sight, Identity: identity}, news, nil
}
