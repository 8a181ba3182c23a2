package agent

import (
	"fmt"
	"slices"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// MaxTwinPrefetch is how many tokens a twin may list to be prefetched.
const MaxTwinPrefetch = 64

// SetPrefetch prefetches these tokens beside those of the configuration, as far as grants allow them, in the place of
// those of the call before. idle says in words which of them concern nothing here.
func (a *Agent) SetPrefetch(all []api.PrefetchRequest) (idle []string, err error) {
	a.apply.Lock()
	defer a.apply.Unlock()
	a.twinPrefetch = slices.Clone(all)
	return a.prefetch(a.rules.Load())
}

// prefetch prefetches the configured tokens and the twin's. The caller holds apply. Where there is no room for all,
// some of the twin's are left out.
func (a *Agent) prefetch(rules *ruleset) (idle []string, err error) {
	keys := slices.Clone(rules.Prefetch())
	for i, p := range a.twinPrefetch {
		resource := grants.TrimScope(p.Resource)
		switch identity := rules.Named(p.Identity); {
		case p.Identity != "" && identity == nil:
			idle = append(idle, fmt.Sprintf("prefetch[%d]: no [[identity]] of the configuration is named %q", i,
				truncate(p.Identity, 64)))
			continue
		case p.Identity != "" && identity.Fault != "":
			idle = append(idle, fmt.Sprintf("prefetch[%d]: %s", i, identity.WhyIdle()))
			continue
		}
		allowed := rules.matching(nil, p.Identity, rules.Spelling(resource))
		if rules.Spelling(resource) == "" || len(allowed) == 0 {
			idle = append(idle, fmt.Sprintf("prefetch[%d]: no grant names resource %q for such an identity", i,
				truncate(resource, 256)))
			continue
		}
		for _, key := range allowed {
			if slices.Contains(keys, key) {
				continue
			}
			if len(keys) == tokencache.MaxKeys {
				idle = append(idle, fmt.Sprintf("prefetch[%d]: %d tokens are prefetched already, which is all that "+
					"can be",
					i, tokencache.MaxKeys))
				break
			}
			keys = append(keys, key)
		}
	}
	return idle, a.cache.Prefetch(keys)
}
