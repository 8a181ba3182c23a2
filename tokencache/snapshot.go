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
	Source       string          `json:"source,omitempty"` // whose tokens these are; the cache leaves it to those who keep it
	BootID       string          `json:"boot_id"`          // of the boot in which it was taken; empty: not known
	Boot         time.Duration   `json:"boot_ns"`
	On           time.Duration   `json:"on_ns,omitempty"` // on-time when it was taken; 0: kept by a release that had none
	Wall         time.Time       `json:"wall,omitzero"`   // by the device's clock, when it was taken
	Synchronised bool            `json:"synchronised"`    // whether that was known to be right
	Keys         []SnapshotEntry `json:"keys"`
	Rollovers    []Rollover      `json:"rollovers,omitempty"` // of all keys, the latest last

	Paused  time.Duration `json:"paused_ns,omitempty"` // no call before: the source asked for it; 0: it did not
	Failing *BackOff      `json:"failing,omitempty"`   // the source as a whole; nil: it is well

	// Record is the policy changes on record, for a start at which the record that is kept by itself is gone, or older: the
	// cache leaves them to those who keep it.
	Record Record `json:"-"`

	Principals []Principals `json:"principals,omitempty"` // whom each selector's tokens speak for
	Tombstones []Tombstone  `json:"bygones,omitempty"`    // of tokens that are not held any more, the latest last
	// Static says that the source has shown its counts of lives to be none: it gave the same number hours later.
	Static bool `json:"static_counts,omitempty"`
	// CountedOn is the on-time at which its counts had last been shown, over hours, to be some; 0: they have not been, since
	// they were none.
	CountedOn time.Duration `json:"counted_on_ns,omitempty"`
	// OnRecord is how many changes were on record, whether or not there is a copy of them.
	OnRecord int `json:"on_record,omitempty"`
}

// Taken says when m was taken.
func (m *Snapshot) Taken() Instant { return Instant{On: m.On, Boot: m.Boot, BootID: m.BootID} }

// SnapshotEntry is what is kept of one key.
type SnapshotEntry struct {
	Key        Key            `json:"key"`
	Token      Token          `json:"token,omitzero"`       // zero when none is held that is valid
	Nominal    time.Duration  `json:"nominal_ns"`           // of the token, by its source
	ReceivedOn time.Time      `json:"received_on,omitzero"` // by the device's clock
	Deadline   time.Duration  `json:"deadline_ns"`          // when it expires
	Next       *time.Duration `json:"next_ns,omitempty"`    // when it is fetched; nil: it is not
	Asked      *time.Duration `json:"asked_ns,omitempty"`   // when it was asked for last; nil: it was not

	// Of the token held last.
	ReceivedAt  time.Duration `json:"received_on_ns,omitempty"`    // on-time at which it was first received; 0: not known
	IssuedFrom  time.Duration `json:"issued_from_on_ns,omitempty"` // on-times between which it was issued; both 0: not known
	IssuedTo    time.Duration `json:"issued_to_on_ns,omitempty"`
	Blind       bool          `json:"blind,omitempty"` // nothing told its age: IssuedFrom is what the longest life allows
	IssueWindow               // by the issuer's clock
	Life        time.Duration `json:"life_ns"`            // at its minting; 0: there never was one, and what follows is zero
	Given       time.Duration `json:"given_ns,omitempty"` // at its receipt, as the back end counted it; 0: not known
	IssuedAt    time.Duration `json:"born_ns"`
	Received    time.Duration `json:"received_ns,omitempty"`
	Shown       time.Duration `json:"shown_ns"`
	Answered    time.Duration `json:"answered_ns"`
	Tries       int           `json:"tries,omitempty"`
	Claims      Claims        `json:"claims"`
	Before      *Claims       `json:"before,omitempty"`

	// Unconfirmed says that the token's life left is not known for certain, since the device was off for a time that
	// nobody can tell.
	Unconfirmed bool `json:"unconfirmed,omitempty"`
	// Presumed says that Deadline is nobody's word, as in Fetched.
	Presumed bool `json:"presumed,omitempty"`

	Rollovers []Rollover `json:"rollovers,omitempty"` // seen of this key, the latest last

	// Withheld names the revocations on record that withhold the token, by their IDs, for a start at which the record is not
	// there to tell: the cache leaves them to those who keep it.
	Withheld []string `json:"withheld,omitempty"`

	Failing *BackOff `json:"failing,omitempty"` // nil: its last fetch did not fail
	Claim   *Claim   `json:"claim,omitempty"`   // that of a former principal, by what the key was given; nil: there is none
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
		BootID: c.bootID, Boot: time.Duration(now), On: c.onAt(now), Wall: c.clock.Wall(), Synchronised: c.clockTrusted(), Rollovers: c.rollovers.export(),
		Record: c.recordLocked(), Principals: c.exportPrincipalsLocked(), Tombstones: c.tombstones.export(),
		Paused: time.Duration(max(0, c.queue.paused)), Failing: c.queue.backOff.export(), Static: c.static, CountedOn: c.countedOn,
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
	r := SnapshotEntry{
		Key: e.key, Nominal: e.token.nominal, ReceivedOn: e.token.receivedWall, Deadline: time.Duration(e.token.deadline),
		Next: unless(never, max(e.schedule.next, paused)), Asked: unless(longAgo, e.asked),
		ReceivedAt: e.token.receipt.on, IssuedFrom: e.token.receipt.from, IssuedTo: e.token.receipt.to, Blind: e.token.receipt.blind,
		IssueWindow: e.token.issued, Life: e.token.life, Given: e.token.given,
		IssuedAt: time.Duration(e.token.issuedAt), Received: time.Duration(e.token.received),
		Shown: time.Duration(e.token.shown), Answered: time.Duration(e.last.answered), Tries: e.schedule.tries,
		Claims: e.token.lastClaims, Before: e.token.before, Unconfirmed: e.token.unconfirmed, Presumed: e.token.presumed, Rollovers: e.rollovers.export(),
		Failing: e.backOff.export(),
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
	told := make([]Rollover, len(h))
	for i, r := range h {
		told[i] = Rollover{Key: r.of, After: r.after, By: r.by, Watched: r.watched}
	}
	return told
}
