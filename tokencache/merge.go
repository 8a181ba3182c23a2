package tokencache

import "slices"

// Two records that have gone on apart, as in folders that were mounted over each other, may have changes of one ID that mean different
// things: on a full record, one change takes in another, and is about more from then on. So changes are compared by what they stand for,
// and never by their IDs alone.

// Both returns the changes of x and those of y, as one where both have one of the same ID. They may be more than there is room for: a
// cache that is given them joins some then.
func Both(x, y []PolicyChange) []PolicyChange {
	all := slices.Clone(x)
	for _, o := range y {
		if i := slices.IndexFunc(all[:len(x)], func(p PolicyChange) bool { return p.ID == o.ID }); i >= 0 {
			all[i] = all[i].with(o)
		} else {
			all = append(all, o)
		}
	}
	return all
}

// with returns p where it stands for all that o, which has the same ID, stands for as well. Joined is how many others that are at least.
func (p PolicyChange) with(o PolicyChange) PolicyChange {
	both := joined(&change{PolicyChange: p, canonical: Canonical(p.Resource)}, &change{PolicyChange: o, canonical: Canonical(o.Resource)}).PolicyChange
	both.Joined = max(p.Joined, o.Joined)
	if p.Effect == Revoked || o.Effect == Revoked {
		both.Effect = Revoked
	}
	return both
}

// StandsFor reports whether no token is judged better by p than by o, which has the same ID. When either was noted, by people's clocks,
// makes no difference.
func (p PolicyChange) StandsFor(o PolicyChange) bool {
	both := p.with(o)
	return p.ID == o.ID && p.AboutAll(o) && both.Joined == p.Joined && both.Effect == p.Effect && both.Moment == p.Moment && both.By == p.By &&
		both.Issuer.Latest.Equal(p.Issuer.Latest) && both.NotLater.Equal(p.NotLater)
}

// AboutAll reports whether p is about all that o is about.
func (p PolicyChange) AboutAll(o PolicyChange) bool {
	return (p.AllIdentities || !o.AllIdentities && p.Selector == o.Selector) &&
		(p.Resource == "" || o.Resource != "" && Canonical(p.Resource) == Canonical(o.Resource))
}
