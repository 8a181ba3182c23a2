package tokencache

import (
	"slices"
	"time"
)

// makeRoomLocked makes room for p on a full record, and reports whether it could. Nothing of what is withheld is
// given up: what goes is met by every token held, or another change on record says at least as much.
//
// First the oldest change goes that is no revocation and that every token held meets. Else, for a revocation and for what
// stands for a record that was lost, there is always room: it takes in an earlier one of the same identity and resource, or else the oldest changes are joined into one.
func (c *Cache) makeRoomLocked(p *PolicyChange) bool {
	if i := slices.IndexFunc(c.changes, c.isMetLocked); i >= 0 {
		c.changes = slices.Delete(c.changes, i, i+1)
		return true
	}
	if p.Effect != Revoked && p.Effect != Unknown {
		return false
	}
	same := func(ch *change) bool {
		return ch.Effect == p.Effect && ch.AllIdentities == p.AllIdentities && ch.Selector == p.Selector && ch.spelling == Spelling(p.Resource)
	}
	if i := slices.IndexFunc(c.changes, same); i >= 0 {
		taken := c.changes[i]
		c.changes = slices.Delete(c.changes, i, i+1)
		p.takeIn(taken.PolicyChange)
		return true
	}
	return c.joinLocked(func(e Effect) bool { return e == Changed || e == Granted }) || c.joinLocked(func(e Effect) bool { return e == Revoked })
}

// isMetLocked reports whether ch makes room: every token held meets it. A revocation never does, since a token from before it may
// come yet, nor does what stands for a record that was lost.
func (c *Cache) isMetLocked(ch *change) bool {
	if ch.Effect == Revoked || ch.Effect == Unknown {
		return false
	}
	for _, e := range c.entries {
		if !e.token.Text.IsZero() && c.touches(ch, e) && c.verdictLocked(e, ch) != Current {
			return false
		}
	}
	return true
}

// joinLocked makes one of the two oldest changes of such effects that are of one identity, for all of its resources; or if
// there are no two of one, of the two oldest, for all identities. It keeps the ID of the older. False: there are no two.
func (c *Cache) joinLocked(such func(Effect) bool) bool {
	var all []*change
	for _, ch := range c.changes {
		if such(ch.Effect) {
			all = append(all, ch)
		}
	}
	if len(all) < 2 {
		return false
	}
	older, younger := all[0], all[1]
	for i, ch := range all[1:] {
		of := slices.IndexFunc(all[:i+1], func(o *change) bool { return o.Selector == ch.Selector && o.AllIdentities == ch.AllIdentities })
		if of >= 0 {
			older, younger = all[of], ch
			break
		}
	}
	joined := younger.PolicyChange
	joined.ID, joined.Resource = older.ID, ""
	if older.Selector != younger.Selector || older.AllIdentities != younger.AllIdentities {
		joined.AllIdentities, joined.Selector = true, Selector{}
	}
	if older.Effect != younger.Effect {
		joined.Effect = Changed
	}
	joined.takeIn(older.PolicyChange)
	c.changes = slices.DeleteFunc(c.changes, func(ch *change) bool { return ch == older || ch == younger })
	c.enterLocked(joined, c.clock.Boot())
	return true
}

// takeIn has p stand for o as well: no token meets it that does not meet both.
func (p *PolicyChange) takeIn(o PolicyChange) {
	p.Moment, p.By = max(p.Moment, o.Moment), max(p.By, o.By)
	p.At, p.NotedOn = latest(p.At, o.At), latest(p.NotedOn, o.NotedOn)
	p.Vouched = p.Vouched && o.Vouched
	p.Issuer.Latest = bothKnown(latest, p.Issuer.Latest, o.Issuer.Latest)
	p.Issuer.Earliest = bothKnown(earliest, p.Issuer.Earliest, o.Issuer.Earliest)
	p.Joined += 1 + o.Joined
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// bothKnown returns that one of a and b, zero where one of them is not known.
func bothKnown(one func(a, b time.Time) time.Time, a, b time.Time) time.Time {
	if a.IsZero() || b.IsZero() {
		return time.Time{}
	}
	return one(a, b)
}
