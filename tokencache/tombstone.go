package tokencache

import (
	"slices"
	"time"
)

// maxTombstones is how many tombstones there are at most: for each key that of the token replaced last, and as many
// more.
const maxTombstones = 2 * MaxKeys

// tombstoneLife is for how long, in on-time, an expired token is remembered after the back end last gave it. A back end
// that goes on giving it is asked more often than that.
const tombstoneLife = 25 * time.Hour

// tombstone is what is known of a token that is not held any more. If it comes again after it was forgotten, replaced
// or passed over, it was received when it was first received.
type tombstone struct {
	digest       string // of its text
	received     bootTime
	cameOn       time.Duration // on-time by which the back end gave it last
	receivedWall time.Time     // wall time
	expiresOn    time.Time     // as the issuer says
	receipt      receipt

	given    time.Duration // life left then, as the back end counted it; 0: it did not, or was proved wrong
	deadline bootTime      // when it is believed to expire, by the back end's word; never: not known
	unlearnt bool          // what was learned of its life was dropped on request, and is not restored
}

// tombstones is the tokens that are not held any more, the latest last.
type tombstones []tombstone

// index returns where the token with that digest is, -1 if it is not there.
func (all tombstones) index(digest string) int {
	return slices.IndexFunc(all, func(r tombstone) bool { return r.digest == digest })
}

// find returns the tombstone of the token with that text.
func (all tombstones) find(text Secret) (tombstone, bool) {
	i := all.index(text.SHA256())
	if i < 0 {
		return tombstone{}, false
	}
	return all[i], true
}

// add adds r, in place of an earlier tombstone of the same token.
func (all *tombstones) add(r tombstone) {
	kept := slices.DeleteFunc(*all, func(o tombstone) bool {
		if o.digest != r.digest {
			return false
		}
		r.unlearnt = r.unlearnt || o.unlearnt
		return true
	})
	kept = append(kept, r)
	if len(kept) > maxTombstones {
		kept = slices.Delete(kept, 0, len(kept)-maxTombstones)
	}
	*all = kept
}

// cameAgain takes in that the back end gave the token with that text at that on-time.
func (all tombstones) cameAgain(text Secret, on time.Duration) {
	if i := all.index(text.SHA256()); i >= 0 {
		all[i].cameOn = on
	}
}

// reviewTombstonesLocked forgets tokens that have certainly expired and that the back end no longer gives, unless one
// may lack a change on record that happened while it may have been valid.
func (c *Cache) reviewTombstonesLocked(now bootTime) {
	c.tombstones = slices.DeleteFunc(c.tombstones, func(r tombstone) bool {
		expired := c.onAt(now) > r.receipt.on+longestNominal && c.onAt(now) > r.cameOn+tombstoneLife
		return expired && !slices.ContainsFunc(c.changes, func(ch *change) bool {
			return r.receipt.from <= ch.By+c.propagationDelay && ch.Moment <= r.receipt.on+longestNominal
		})
	})
}

// tombstoneOfLocked returns the tombstone of the token that e holds.
func (c *Cache) tombstoneOfLocked(e *entry) tombstone {
	r := tombstone{
		digest: e.token.Text.SHA256(), cameOn: c.onAt(max(0, e.token.shown)), expiresOn: e.token.ExpiresOn,
		receipt: e.token.receipt, received: e.token.received, receivedWall: e.token.receivedWall,
		given: e.token.given, deadline: e.token.deadline,
	}
	if e.token.unconfirmed || e.token.presumed {
		r.given, r.deadline = 0, never // it is not known when it was received, or for how long it is valid
	}
	return r
}

// dropped returns r without what was learned of the token's life.
func (r tombstone) dropped() tombstone {
	r.given, r.deadline, r.unlearnt = 0, never, true
	return r
}

// tombstoneLocked returns what is known of the token with that text, if e holds it or it was held before.
func (c *Cache) tombstoneLocked(e *entry, text Secret) (tombstone, bool) {
	if text.Equal(e.token.Text) {
		return c.tombstoneOfLocked(e), true
	}
	return c.tombstones.find(text)
}

// DropTokens drops every token, and fetches again those that are wanted.
func (c *Cache) DropTokens() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	for _, e := range c.entries {
		if e.token.Text.IsZero() {
			continue
		}
		c.forgetLocked(e)
		e.notify()
		if e.schedule.next != never {
			e.schedule.next = max(min(e.schedule.next, now), c.postponedUntilLocked(e, now))
		}
	}
	c.wakeSchedule()
}

// forgetLocked drops e's token and leaves a tombstone.
func (c *Cache) forgetLocked(e *entry) {
	if !e.token.Text.IsZero() {
		c.tombstones.add(c.tombstoneOfLocked(e))
	}
	e.token.forget()
}

// dropTokenLocked drops e's token, and what was learned of its life, because somebody asked for it. It returns the
// token's digest, "" if there was none. A prefetched key is then due, whatever becomes of the fetch that follows.
func (c *Cache) dropTokenLocked(e *entry, now bootTime) string {
	if e.token.Text.IsZero() {
		return ""
	}
	r := c.tombstoneOfLocked(e).dropped()
	c.tombstones.add(r)
	e.token.forget()
	e.token.deadline, e.token.life, e.token.given, e.token.unconfirmed = longAgo, 0, 0, false
	e.schedule.advised, e.schedule.probedSince, e.schedule.tries = longAgo, never, 0
	if e.prefetch {
		e.schedule.next = now
	}
	e.notify()
	return r.digest
}

// Tombstone is a token that is not held any more, as it is kept. Durations are boot times unless they say otherwise.
type Tombstone struct {
	SHA256       string        `json:"sha256"` // of the token's text
	ReceivedBoot time.Duration `json:"received_ns"`
	ReceivedWall time.Time     `json:"received_on,omitzero"` // by the device's clock
	ExpiresOn    time.Time     `json:"expires_on,omitzero"`  // by the issuer's
	// life left at its receipt, by the back end; 0: not known
	Given    time.Duration  `json:"given_ns,omitempty"`
	Deadline *time.Duration `json:"deadline_ns,omitempty"` // when it is believed to expire; nil: not known
	Came     time.Duration  `json:"came_on_ns,omitempty"`  // on-time by which it last came; 0: when this was kept
	Unlearnt bool           `json:"unlearnt,omitempty"`    // what was learned of its life was dropped on request

	// As in SnapshotEntry.
	ReceivedOnTime time.Duration `json:"received_on_ns,omitempty"`
	IssuedFrom     time.Duration `json:"issued_from_on_ns,omitempty"`
	IssuedTo       time.Duration `json:"issued_to_on_ns,omitempty"`
	Blind          bool          `json:"blind,omitempty"`
}

// Tombstone returns the tombstone of r's token, for use when r is dropped. False: there is none.
func (r SnapshotEntry) Tombstone() (Tombstone, bool) {
	b := Tombstone{
		SHA256: r.Token.Text.SHA256(), ReceivedBoot: r.ReceivedBoot, ReceivedWall: r.ReceivedWall,
		ExpiresOn: r.Token.ExpiresOn,
		Given:     r.Given, Deadline: &r.Deadline,
		ReceivedOnTime: r.ReceivedOnTime, IssuedFrom: r.IssuedFrom, IssuedTo: r.IssuedTo, Blind: r.Blind,
	}
	if r.Unconfirmed || r.Presumed {
		b.Given, b.Deadline = 0, nil
	}
	return b, !r.Token.Text.IsZero()
}

// export returns the tombstones as they are kept.
func (all tombstones) export() []Tombstone {
	var kept []Tombstone
	for _, r := range all {
		kept = append(kept, Tombstone{
			SHA256: r.digest, ReceivedBoot: time.Duration(r.received), ReceivedWall: r.receivedWall,
			ExpiresOn: r.expiresOn,
			Given:     r.given, Deadline: unless(never, r.deadline), Came: r.cameOn, Unlearnt: r.unlearnt,
			ReceivedOnTime: r.receipt.on, IssuedFrom: r.receipt.from, IssuedTo: r.receipt.to, Blind: r.receipt.blind,
		})
	}
	return kept
}

// beforeBoot is a boot time for what happened in an earlier boot, if no more is known.
const beforeBoot = bootTime(-time.Second)

// receivedFirstLocked corrects the receipt of the token that r is about, which came again before r could be read: it
// was first received as in r. That does not lengthen the life it is believed to have. If somebody had its life
// forgotten, what the back end has said since stays.
func (c *Cache) receivedFirstLocked(r tombstone, now bootTime) {
	i := c.tombstones.index(r.digest)
	if i >= 0 && c.tombstones[i].unlearnt {
		r = r.dropped()
	}
	if i >= 0 && r.receipt.on < c.tombstones[i].receipt.on {
		first, since := r, c.tombstones[i]
		first.receipt, first.deadline = r.receipt.again(since.receipt), min(r.deadline, since.deadline)
		first.cameOn = max(r.cameOn, since.cameOn)
		c.tombstones[i] = first
	}
	for _, e := range c.entries {
		if e.token.digest != r.digest || r.receipt.on >= e.token.receipt.on {
			continue
		}
		e.token.receipt = r.receipt.again(e.token.receipt)
		e.token.received, e.token.receivedWall, e.token.given = r.received, r.receivedWall, r.given
		e.token.deadline = min(e.token.deadline, r.deadline)
		c.judgeLocked(e)
		c.expediteLocked(e, now)
		e.notify()
	}
}
