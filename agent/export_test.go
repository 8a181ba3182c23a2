package agent

import (
	"time"

	"perceptd/tokencache"
)

// Recorded returns the policy changes on record as the cache has them.
func (a *Agent) Recorded() []tokencache.RecordedChange { return a.cache.Changes() }

// DefaultSDKLife is the longest life that the SDK forms advertise, unless configured.
const DefaultSDKLife = defaultSDKLife

// SetAccounts has the agent look up users, and in which version their file is, by these functions.
func (a *Agent) SetAccounts(lookup func(name string) (uid uint32, found bool, err error), version func() int64) {
	a.deny.mu.Lock()
	defer a.deny.mu.Unlock()
	a.deny.accounts.lookup = lookup
	a.deny.accounts.version = func() accountsVersion { return accountsVersion{size: version()} }
}

// VersionOf reports whether a file's version at a time is known, and the same as that at another one.
func VersionOf(path string, now time.Time) any {
	if v := versionOf(path, now); v != (accountsVersion{}) {
		return v
	}
	return nil
}
