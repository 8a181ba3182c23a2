package tokencache

import (
	"cmp"
	"slices"
	"time"
)

// enterLocked puts ch on record, and reports whether there was room. On a full record it drops the oldest change that
// is not a revocation and that every held token carries, or else joins two changes. So no token that is withheld is
// served for it. If there is no room, it changes nothing.
func (c *Cache) enterLocked(ch *change) bool {
	if len(c.changes) >= MaxChanges {
		if i := c.metLocked(); i >= 0 {
			c.changes = slices.Delete(c.changes, i, i+1)
		}
	}
	all := append(slices.Clone(c.changes), ch)
	if len(all) > MaxChanges {
		into, o := makesRoom(all, ch)
		if into == nil {
			return false
		}
		all = replaced(all, into, o)
	}
	inOrder(all)
	c.changes = all
	return true
}

// metLocked returns the index of the oldest change that may be dropped, or -1. Every token must carry it that is held,
// or was held last, since that one may come again. Revocations stay, since an older token may still come. So does the
// change that stands for a lost record.
func (c *Cache) metLocked() int {
	lacked := make([]bool, len(c.changes))
	for _, e := range c.entries {
		for _, i := range e.judgement.lacks {
			lacked[i] = lacked[i] || e.token.life != 0
		}
	}
	for i, ch := range c.changes {
		if !lacked[i] && ch.Effect != Revoked && ch.Effect != Unknown {
			return i
		}
	}
	return -1
}

// inOrder sorts changes by when they happened.
func inOrder(all []*change) {
	slices.SortStableFunc(all, func(x, y *change) int { return cmp.Compare(x.Moment, y.Moment) })
}

// makesRoom returns two of all changes that can be joined: into takes in o. All are sorted by when they happened,
// except for fresh, which is being recorded; it is nil while a record is loaded.
//
// At best the join judges no token worse: fresh takes in the oldest change that is about no more than fresh, or the two
// oldest of one identity and resource are joined. Otherwise the two oldest of one identity are joined, or the two
// oldest of all, and the result is about more than they were. That happens only for a revocation, for what stands for a
// lost record, and while loading, since these are never refused. Nil: no two can be joined.
func makesRoom(all []*change, fresh *change) (into, o *change) {
	all = slices.DeleteFunc(slices.Clone(all), func(ch *change) bool { return ch.Alone })
	if fresh != nil && !fresh.Alone {
		if i := slices.IndexFunc(all, fresh.covers); i >= 0 {
			return fresh, all[i]
		}
	}
	effects := []Effect{Changed, Unknown, Revoked} // what withholds nothing is joined first
	for _, effect := range effects {
		if into, o = oldestOfOne(all, effect, func(t target) target { return t }); into != nil {
			return into, o
		}
	}
	if fresh != nil && fresh.target().effect == Changed {
		return nil, nil
	}
	for _, effect := range effects {
		into, o = oldestOfOne(all, effect, func(t target) target {
			return target{effect: t.effect, everyone: t.everyone, selector: t.selector}
		})
		if into == nil {
			into, o = oldestOfOne(all, effect, func(t target) target { return target{effect: t.effect} })
		}
		switch {
		case into == nil:
		case o == fresh: // RecordChange returns its ID
			return o, into
		default:
			return into, o
		}
	}
	return nil, nil
}

// target is what a change does, to whom and to what, as far as joining depends on it.
type target struct {
	effect     Effect // Changed is Granted as well, since the two are handled alike
	everyone   bool
	selector   Selector
	everything bool
	canonical  string
}

// target returns the target of ch.
func (ch *change) target() target {
	t := target{effect: ch.Effect, everyone: ch.AllIdentities, everything: ch.Resource == ""}
	if t.effect == Granted {
		t.effect = Changed
	}
	if !t.everyone {
		t.selector = ch.Selector
	}
	if !t.everything {
		t.canonical = ch.canonical
	}
	return t
}

// oldestOfOne returns the two oldest changes of that effect with the same sort key, the older first.
func oldestOfOne(all []*change, effect Effect, sort func(target) target) (older, younger *change) {
	first := make(map[target]*change)
	for _, ch := range all {
		t := ch.target()
		if t.effect != effect {
			continue
		}
		if older := first[sort(t)]; older != nil {
			return older, ch
		}
		first[sort(t)] = ch
	}
	return nil, nil
}

// covers reports whether ch can take in o without judging any other token worse: both are about the same, or o is about
// less and every token about which ch is has to carry ch anyway.
func (ch *change) covers(o *change) bool {
	if t, of := ch.target(), o.target(); ch == o || t.effect != of.effect {
		return false
	} else if t == of {
		return true
	} else if !t.everyone && (of.everyone || t.selector != of.selector) {
		return false
	} else if !t.everything && (of.everything || t.canonical != of.canonical) {
		return false
	}
	both := ch.PolicyChange
	both.takeIn(o.PolicyChange)
	return both.Moment == ch.Moment && both.By == ch.By && both.Issuer == ch.Issuer
}

// replaced returns all with the join of into and o instead of the two.
func replaced(all []*change, into, o *change) []*change {
	all = slices.DeleteFunc(slices.Clone(all), func(ch *change) bool { return ch == into || ch == o })
	return append(all, joined(into, o))
}

// joined returns one change that stands for both, under the ID of into. It is about no more than it has to be.
func joined(into, o *change) *change {
	both := *into
	if into.AllIdentities || o.AllIdentities || into.Selector != o.Selector {
		both.AllIdentities, both.Selector = true, Selector{}
	}
	if into.Resource == "" || o.Resource == "" || into.canonical != o.canonical {
		both.Resource, both.canonical = "", ""
	}
	if into.Effect != o.Effect {
		both.Effect = Changed
	}
	both.assumed, both.dated = into.assumed || o.assumed, into.dated && o.dated
	both.takeIn(o.PolicyChange)
	return &both
}

// takeIn makes p stand for o as well: a token carries p only if it carries both, and is stale by p if it is older than
// either.
func (p *PolicyChange) takeIn(o PolicyChange) {
	p.Moment, p.By = max(p.Moment, o.Moment), max(p.By, o.By)
	p.At, p.RecordedAt = latest(p.At, o.At), latest(p.RecordedAt, o.RecordedAt)
	p.Vouched, p.Checked, p.Unplaced = p.Vouched && o.Vouched, p.Checked && o.Checked, p.Unplaced || o.Unplaced
	if p.Issuer.Latest.IsZero() || o.Issuer.Latest.IsZero() {
		p.Issuer.Latest = time.Time{}
	} else {
		p.Issuer.Latest = latest(p.Issuer.Latest, o.Issuer.Latest)
	}
	p.Issuer.Earliest = latest(p.Issuer.Earliest, o.Issuer.Earliest)
	if p.NotLater.IsZero() || o.NotLater.IsZero() {
		p.NotLater = time.Time{}
	} else {
		p.NotLater = latest(p.NotLater, o.NotLater)
	}
	p.Joined += 1 + o.Joined
}

// latest returns the later of two times.
func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
