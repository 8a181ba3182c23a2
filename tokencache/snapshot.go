package tokencache

import (
	"slices"
	"time"
)

// Snapshot is what a cache knows, for a later one to begin with: Options.Snapshot. Durations are boot times, of the
// boot that BootID names, unless they say otherwise.
//
// It is the document that is kept, and what it is called in JSON does not change. Written as JSON, it has no token's
// text, so that none gets into a log, nor the record, of which there is a file of its own: whoever keeps it adds both.
type Snapshot struct {
	Source       string          `json:"source,omitempty"` // whose tokens these are; filled in by the keeper
	BootID       string          `json:"boot_id"`          // of the boot in which it was taken; empty: not known
	Boot         time.Duration   `json:"boot_ns"`
	On           time.Duration   `json:"on_ns,omitempty"` // on-time when it was taken; 0: by a release without on-time
	Wall         time.Time       `json:"wall,omitzero"`   // by the device's clock, when it was taken
	Synchronised bool            `json:"synchronised"`    // whether that was known to be right
	Keys         []SnapshotEntry `json:"keys"`
	Rollovers    []Rollover      `json:"rollovers,omitempty"` // of all keys, the latest last

	Paused  time.Duration `json:"paused_ns,omitempty"` // no call before: the source asked for a pause; 0: none
	Failing *BackOff      `json:"failing,omitempty"`   // the source as a whole; nil: it is well

	// Record is the policy changes on record, for a start at which the separate file of them is gone, or older. The
	// cache does not restore it: who keeps the snapshot does.
	Record Record `json:"-"`

	Principals []Principals `json:"principals,omitempty"` // whom each selector's tokens speak for
	Tombstones []Tombstone  `json:"bygones,omitempty"`    // of tokens that are not held any more, the latest last
	// Static says that the source's expires_in does not count down: it gave the same number hours later.
	Static bool `json:"static_counts,omitempty"`
	// CountedOn is the on-time at which it was last shown, over hours, to count down; 0: not since it was static.
	CountedOn time.Duration `json:"counted_on_ns,omitempty"`
	// OnRecord is how many changes were on record, whether or not there is a copy of them.
	OnRecord int `json:"on_record,omitempty"`
	// DenyRules says that there is a record of deny rules, which is kept elsewhere; filled in by the keeper.
	DenyRules bool `json:"deny_rules,omitempty"`
}

// Taken says when m was taken.
func (m *Snapshot) Taken() Instant { return Instant{On: m.On, Boot: m.Boot, BootID: m.BootID} }

// SnapshotEntry is what is kept of one key.
type SnapshotEntry struct {
	Key          Key            `json:"key"`
	Token        Token          `json:"token,omitzero"`       // zero when none is held that is valid
	Nominal      time.Duration  `json:"nominal_ns"`           // of the token, by its source
	ReceivedWall time.Time      `json:"received_on,omitzero"` // by the device's clock
	Deadline     time.Duration  `json:"deadline_ns"`          // when it expires
	Next         *time.Duration `json:"next_ns,omitempty"`    // when it is fetched; nil: it is not
	Asked        *time.Duration `json:"asked_ns,omitempty"`   // when it was asked for last; nil: it was not

	// Of the token held last.
	ReceivedOnTime time.Duration `json:"received_on_ns,omitempty"`    // on-time of its first receipt; 0: not known
	IssuedFrom     time.Duration `json:"issued_from_on_ns,omitempty"` // on-times of its issue; both 0: not known
	IssuedTo       time.Duration `json:"issued_to_on_ns,omitempty"`
	// its age is not known: IssuedFrom follows from the longest life
	Blind        bool          `json:"blind,omitempty"`
	IssueWindow                // by the issuer's clock
	Life         time.Duration `json:"life_ns"`            // when it was issued; 0: there never was a token
	Given        time.Duration `json:"given_ns,omitempty"` // left at its receipt, by the back end; 0: not known
	IssuedAt     time.Duration `json:"born_ns"`
	ReceivedBoot time.Duration `json:"received_ns,omitempty"`
	Shown        time.Duration `json:"shown_ns"`
	Answered     time.Duration `json:"answered_ns"`
	Tries        int           `json:"tries,omitempty"`
	Claims       Claims        `json:"claims"`
	Before       *Claims       `json:"before,omitempty"`

	// Unconfirmed says that the token's life left is not known for certain, since the device was off for an unknown
	// time.
	Unconfirmed bool `json:"unconfirmed,omitempty"`
	// Presumed says that Deadline is a guess, as in Fetched.
	Presumed bool `json:"presumed,omitempty"`

	Rollovers []Rollover `json:"rollovers,omitempty"` // seen of this key, the latest last

	// Withheld is the IDs of the revocations on record that withhold the token, for a start without the record. The
	// cache does not restore it: who keeps the snapshot does.
	Withheld []string `json:"withheld,omitempty"`

	Failing *BackOff `json:"failing,omitempty"` // nil: its last fetch did not fail
	Claim   *Claim   `json:"claim,omitempty"`   // of a former principal whose token the key was given; nil: none
}

// Rollover is an observed rollover: between which shares of a token's life it took place, and from which share on the
// back end was probed often.
type Rollover struct {
	Key     Key     `json:"of,omitzero"`
	After   float64 `json:"after"`
	By      float64 `json:"by"`
	Watched float64 `json:"watched"`
}

// Snapshot returns everything that c knows.
func (c *Cache) Snapshot() Snapshot {
	m, judged := c.snapshot()
	for i := range m.Keys {
		for _, at := range judged[i].lacks {
			if p := &m.Record.Changes[at]; p.Effect == Revoked {
				m.Keys[i].Withheld = append(m.Keys[i].Withheld, p.ID)
			}
		}
	}
	slices.SortFunc(m.Record.Changes, latestFirst)
	slices.SortFunc(m.Keys, func(a, b SnapshotEntry) int { return a.Key.compare(b.Key) })
	return m
}

// snapshot returns a snapshot with the changes in the cache's order, and each key's judgement instead of what withholds
// its token.
func (c *Cache) snapshot() (m Snapshot, judged []judgement) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	m = Snapshot{
		BootID: c.bootID, Boot: time.Duration(now), On: c.onAt(now),
		Wall: c.clock.Wall(), Synchronised: c.clockTrusted(), Rollovers: c.rollovers.export(),
		Record: c.exportRecordLocked(), Principals: c.exportPrincipalsLocked(), Tombstones: c.tombstones.export(),
		Paused: time.Duration(max(0, c.queue.paused)), Failing: c.queue.backOff.export(),
		Static: c.static, CountedOn: c.countedOn,
	}
	m.OnRecord = len(m.Record.Changes)
	m.Keys, judged = make([]SnapshotEntry, 0, len(c.entries)), make([]judgement, 0, len(c.entries))
	for _, e := range c.entries {
		if e.token.life != 0 || e.backOff.failures > 0 {
			m.Keys, judged = append(m.Keys, e.snapshot(now, c.queue.paused)), append(judged, e.judgement)
		}
	}
	return m, judged
}

// Withholders returns the revocations that withhold key's token, the earliest first. There are none if the token is not
// withheld, or key is unknown.
func (c *Cache) Withholders(key Key) []PolicyChange {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[key]
	if e == nil {
		return nil
	}
	all := make([]PolicyChange, 0, len(e.judgement.lacks))
	for _, at := range e.judgement.lacks {
		if ch := c.changes[at]; ch.Effect == Revoked {
			all = append(all, ch.PolicyChange)
		}
	}
	return all
}

// snapshot returns what is kept of e. paused is until when the back end asked for a pause in all calls.
func (e *entry) snapshot(now, paused bootTime) SnapshotEntry {
	t := &e.token
	r := SnapshotEntry{
		Key: e.key, Nominal: t.nominal, ReceivedWall: t.receivedWall, Deadline: time.Duration(t.deadline),
		Next: unless(never, max(e.schedule.next, paused)), Asked: unless(longAgo, e.asked),
		ReceivedOnTime: t.receipt.on, IssuedFrom: t.receipt.from, IssuedTo: t.receipt.to, Blind: t.receipt.blind,
		IssueWindow: t.issued, Life: t.life, Given: t.given,
		IssuedAt: time.Duration(t.issuedAt), ReceivedBoot: time.Duration(t.received),
		Shown: time.Duration(t.shown), Answered: time.Duration(e.last.answered), Tries: e.schedule.tries,
		Claims: t.lastClaims, Before: t.before, Unconfirmed: t.unconfirmed, Presumed: t.presumed,
		Rollovers: e.rollovers.export(), Failing: e.backOff.export(),
	}
	if !e.claim.by.IsZero() {
		r.Claim = &Claim{By: e.claim.by, From: time.Duration(e.claim.from)}
	}
	if e.token.deadline > now {
		r.Token = *e.token.Token
	}
	return r
}

// export returns h as it is kept.
func (h history) export() []Rollover {
	all := make([]Rollover, len(h))
	for i, r := range h {
		all[i] = Rollover{Key: r.of, After: r.after, By: r.by, Watched: r.watched}
	}
	return all
}
