package agent

import (
	"errors"
	"os"
	"os/user"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/deny"
	"perceptd/tokencache"
)

// accounts says who the users are that deny rules name, by the device's own files.
type accounts struct {
	lookup  func(name string) (uid uint32, found bool, err error)
	version func() accountsVersion
	clock   tokencache.Clock

	looked atomic.Int64 // when they were looked at last, by the boot clock
}

// accountsVersion tells two contents of the file of accounts apart. Zero: it cannot be told which it is.
type accountsVersion struct {
	inode   uint64
	size    int64
	changed int64 // in ns since 1970
}

const (
	accountsFile = "/etc/passwd"
	// accountsEvery is how often it is looked whether there are other accounts, at most.
	accountsEvery = time.Second
	// accountsSettle is the age from which on a change of the file cannot bear the time of the one before it.
	accountsSettle = 2 * time.Second
)

func (c *accounts) open(clock tokencache.Clock) {
	c.lookup, c.clock = lookupUser, clock
	c.version = func() accountsVersion { return versionOf(accountsFile, clock.Wall()) }
}

// isDue reports whether it has to be looked again who the users are. It does so to one caller a second.
func (c *accounts) isDue() bool {
	now := c.clock.Boot()
	last := c.looked.Load()
	return now-time.Duration(last) >= accountsEvery && c.looked.CompareAndSwap(last, int64(now))
}

// versionOf returns the version of a file at a time; zero where it cannot be read, or changed just now.
func versionOf(path string, now time.Time) accountsVersion {
	info, err := os.Stat(path)
	if err != nil {
		return accountsVersion{}
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || now.Sub(time.Unix(stat.Ctim.Unix())) < accountsSettle {
		return accountsVersion{}
	}
	return accountsVersion{stat.Ino, stat.Size, stat.Ctim.Nano()}
}

// lookupUser returns the uid of a user of this device.
func lookupUser(name string) (uid uint32, found bool, err error) {
	account, err := user.Lookup(name)
	if _, unknown := errors.AsType[user.UnknownUserError](err); unknown {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	id, err := strconv.ParseUint(account.Uid, 10, 32)
	return uint32(id), err == nil, err
}

// rulesNow returns the rules in force, in which a deny rule by a user's name is about the account that has the name
// now.
func (a *Agent) rulesNow() *ruleset {
	rules := a.rules.Load()
	if rules.denied.NamesUsers() && a.deny.accounts.isDue() && a.renewUsers() {
		return a.rules.Load()
	}
	return rules
}

// renewUsers looks up again who the users are that deny rules name, if that may be others, and reports whether it is.
func (a *Agent) renewUsers() bool {
	now := a.deny.accounts.version() // before they are looked up
	a.deny.mu.Lock()
	if now == a.deny.users && now != (accountsVersion{}) {
		a.deny.mu.Unlock()
		return false
	}
	a.deny.users = now
	rules := *a.rules.Load()
	before := rules.denied
	rules.denied = deny.Compile(a.deny.record, a.deny.namesIn(&rules))
	changed := rules.denied.MovedUsers(before)
	if len(changed) > 0 {
		a.rules.Store(&rules)
	}
	a.deny.mu.Unlock()
	if len(changed) == 0 {
		return false
	}
	a.cache.Wake()
	a.changed()
	a.hubLog.Info("deny rules by a user's name are about other accounts than before", zap.Strings("rules", changed))
	return true
}
