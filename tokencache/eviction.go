package tokencache

import (
	"fmt"
	"slices"
	"time"
)

// entryLocked returns key's entry for a caller, and makes it if there is none. It counts as a use. The caller's other
// entries are not evicted for it.
func (c *Cache) entryLocked(key Key, now bootTime, others ...*entry) (*entry, error) {
	if c.closed {
		return nil, ErrClosed
	}
	e := c.entries[key]
	if e == nil {
		if c.keep != nil && !c.keep(key) {
			return nil, ErrDropped
		}
		e = c.addLocked(key)
		c.evictLocked(append(others, e)...)
	}
	c.uses++
	e.used, e.asked = c.uses, now
	return e, nil
}

// addLocked makes an entry for key, which has none.
func (c *Cache) addLocked(key Key) *entry {
	e := &entry{
		key: key, canonical: Canonical(key.Resource), asked: longAgo, changed: make(chan struct{}),
		token:    heldToken{Token: &Token{}, deadline: longAgo},
		schedule: schedule{next: never, confirm: never, probedSince: never, softFetchAfter: longAgo},
		backOff:  keyBackOff{until: longAgo, callers: longAgo},
	}
	e.goesBy, e.anyName = c.alternates[e.canonical], c.anyName
	for _, r := range c.rollovers {
		if r.of == key { // it was here before
			e.rollovers.add(r, keyHistory)
		}
	}
	c.entries[key] = e
	c.queue.track(key.Selector)
	c.judgeLocked(e)
	return e
}

// evictLocked makes room by dropping the least recently used keys. It keeps those of stay, prefetched keys, and keys
// with a fetch under way, whose number is bounded by the callers that wait for them.
func (c *Cache) evictLocked(stay ...*entry) {
	for len(c.entries) > MaxKeys {
		var oldest *entry
		for _, o := range c.entries {
			if !slices.Contains(stay, o) && !o.prefetch && o.flight == nil && (oldest == nil || o.used < oldest.used) {
				oldest = o
			}
		}
		if oldest == nil {
			return
		}
		c.dropLocked(oldest, ErrDropped)
	}
}

// dropLocked removes e, and answers the callers that wait for it with why.
func (c *Cache) dropLocked(e *entry, why error) {
	c.forgetLocked(e)
	e.notify()
	delete(c.entries, e.key)
	if f := e.flight; f != nil {
		e.flight = nil
		c.queue.remove(f)
		f.outcome, f.err = Failed, why
		close(f.done)
	}
}

// Retain drops every key, with its token, that keep does not accept, now and from now on.
func (c *Cache) Retain(keep func(Key) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep = keep
	for key, e := range c.entries {
		if keep(key) {
			e.notify() // a watcher may have watched under a grant that is gone
			continue
		}
		c.dropLocked(e, ErrDropped)
	}
}

// Prefetch names the keys that are fetched before anyone asks, kept fresh even if nobody does, and never evicted. It
// replaces those named before. If there are more than MaxKeys, it returns an error and changes nothing.
func (c *Cache) Prefetch(keys []Key) error {
	if len(keys) > MaxKeys {
		return fmt.Errorf("%d tokens are to be prefetched: at most %d can be", len(keys), MaxKeys)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	for _, e := range c.entries {
		e.prefetch = false
	}
	now := c.now()
	for _, key := range keys {
		e := c.entries[key]
		if e == nil {
			e = c.addLocked(key)
		}
		e.prefetch = true
		if left := c.leftLocked(e, now); left > 0 {
			c.reviveLocked(e, left, now)
		} else if e.schedule.next == never && e.flight == nil {
			e.schedule.next = max(now, e.backOff.until, c.postponedUntilLocked(e, now)) // no caller waits for it
		}
	}
	c.evictLocked()
	c.wakeSchedule()
	return nil
}

// reviveLocked restarts the schedule of an idle key that is asked for again.
func (c *Cache) reviveLocked(e *entry, left time.Duration, now bootTime) {
	if left <= 0 || e.schedule.next != never || e.flight != nil {
		return
	}
	if c.unconfirmedLocked(e) && e.backOff.failures == 0 { // a fetch shows whether it has expired
		e.schedule.next = now
		c.wakeSchedule()
		return
	}
	if e.backOff.failures > 0 { // it was trying again when it became idle
		e.schedule.next = max(now, e.backOff.until)
	}
	c.planLocked(e, now)
	c.wakeSchedule()
}
