package agent

import (
	"fmt"
	"slices"
	"strings"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// IDs of the journal's entries about the principals of tokens. They never change.
const (
	MessagePrincipal = "c7d1f0a4be2f4a0d9c3b6f58e1a94d27" // an identity's tokens are of another principal than before
	MessageForgotten = "2b8e64d90f1c4d7fa5e07c39d46b1a83" // an administrator had a token dropped
)

// logPrincipal warns that an identity's tokens are of another principal, and about what is odd in a new token.
func (a *Agent) logPrincipal(e tokencache.Event) {
	fields := []zap.Field{zap.String("resource", e.Key.Resource), zap.Stringer("selector", e.Key.Selector)}
	if identity := a.rules.Load().IdentityOf(e.Key); identity != nil {
		fields = append(fields, zap.String("identity", identity.Name))
	}
	warn := func(message string, more ...zap.Field) { a.log.Warn(message, slices.Concat(fields, more)...) }
	if s := e.Switch; s != nil {
		warn("the identity's tokens speak for another principal than before", append(leftOut(s.Untold),
			zap.String("object_id", s.To.ObjectID), zap.String("tenant_id", s.To.TenantID),
			zap.String("client_id", s.To.ClientID), zap.String("object_id_before", s.From.ObjectID),
			zap.String("tenant_id_before", s.From.TenantID), zap.String("client_id_before", s.From.ClientID),
			zap.String("message_id", MessagePrincipal))...)
	}
	if e.Twin != nil {
		warn("two keys have one token: the back end does not tell them apart", zap.Stringer("other", *e.Twin))
	}
	if e.AudienceBefore != "" {
		warn("a token is for another audience than the one before",
			zap.String("audience", truncate(e.Audience, 128)),
			zap.String("audience_before", truncate(e.AudienceBefore, 128)))
	}
	if len(e.Omitted) > 0 {
		warn("a token has claims that are too long, or no text that can be shown: they count as missing",
			zap.Strings("claims", e.Omitted))
	}
}

// logForgotten records that an administrator had a token dropped.
func (a *Agent) logForgotten(key tokencache.Key, identity, digest string) {
	a.log.Info("token forgotten", zap.String("identity", identity), zap.String("resource", key.Resource),
		zap.Stringer("selector", key.Selector), zap.String("token_sha256", digest),
		zap.String("message_id", MessageForgotten))
}

// maxOddities is how many sentences of one kind the status has about odd tokens.
const maxOddities = 4

// oddities returns a sentence for each pair of keys that have one token, each token whose audience differs from that of
// the token before, and each token that lacks claims.
func oddities(keys []cachedKey) []string {
	var twins, audiences, claims []string
	first := make(map[string]cachedKey)
	for _, key := range keys {
		if key.SHA256 == "" {
			continue
		}
		if other, there := first[key.SHA256]; there {
			twins = append(twins, fmt.Sprintf("%s and %s have one and the same token: "+
				"the back end does not tell them apart, and one of the two may be refused with it",
				other.name(), key.name()))
		} else {
			first[key.SHA256] = key
		}
		if key.AudienceBefore != "" {
			audiences = append(audiences, fmt.Sprintf("the token of %s is for the audience %q, "+
				"and the one before was for %q: see whether the resource takes it",
				key.name(), truncate(key.Claims.Audience, 128), truncate(key.AudienceBefore, 128)))
		}
		if len(key.Claims.Omitted) > 0 {
			claims = append(claims, fmt.Sprintf("the token of %s has claims that are too long, "+
				"or no text that can be shown, and that count as missing: %s; "+
				"whose token it is, or what it carries, is not told in full",
				key.name(), strings.Join(key.Claims.Omitted, ", ")))
		}
	}
	return slices.Concat(atMost(twins), atMost(audiences), atMost(claims))
}

// atMost returns the first sentences of all, and how many are left out.
func atMost(all []string) []string {
	if len(all) <= maxOddities {
		return all
	}
	const last = maxOddities - 1
	return append(all[:last:last], fmt.Sprintf("%s (and %d more like it)", all[last], len(all)-maxOddities))
}

// name names a key in sentences.
func (k cachedKey) name() string {
	return fmt.Sprintf("identity %q for %s", k.identity, k.Key.Resource)
}
