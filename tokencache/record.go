package tokencache

import "slices"

// Record is the policy changes on record, the latest first.
type Record struct {
	// Instant is when the record was taken from the cache. The next start computes its on-time from it: see OnAtBoot.
	Instant
	// Lineage names the record from its beginning on: the start of a process, or when that process read more.
	// Generations of two lineages have no order. Empty: from before there were lineages.
	Lineage string `json:"lineage,omitempty"`
	// Origins are the records from which this one was taken when its lineage began, the latest last. It has everything
	// of each up to a generation, except for what was withdrawn or over.
	Origins []Origin `json:"origins,omitempty"`
	// Generation rises whenever a change is recorded, withdrawn, dated, or over. Of two copies of one record, the one
	// of the higher generation is newer. Zero: from before there were generations, or nothing was ever recorded.
	Generation uint64         `json:"generation"`
	Changes    []PolicyChange `json:"changes"`
}

// Origin is a record as of a generation.
type Origin struct {
	Lineage    string `json:"lineage"`
	Generation uint64 `json:"generation"`
}

// isIn reports whether later has everything that o has.
func (o Origin) isIn(later Origin) bool {
	return later.Lineage == o.Lineage && later.Generation >= o.Generation
}

// MaxOrigins is how many origins a record has at most.
const MaxOrigins = 16

// Has reports whether r has, or had, everything that o has: it is o, or was taken from o, or from what o was and still
// is.
func (r Record) Has(o Record) bool {
	return r.has(o.as()) || o.asBegun() && r.has(o.Origins[len(o.Origins)-1])
}

// as returns r as an origin.
func (r Record) as() Origin { return Origin{r.Lineage, r.Generation} }

// has reports whether r has, or had, everything that its origin o had.
func (r Record) has(o Origin) bool {
	if r.Lineage == o.Lineage {
		return r.Generation >= o.Generation
	}
	return slices.ContainsFunc(r.Origins, o.isIn)
}

// asBegun reports whether r still is what its last origin was: it was taken from that alone, and nothing has changed
// since.
func (r Record) asBegun() bool {
	n := len(r.Origins)
	return n > 0 && r.Origins[n-1].Generation == r.Generation
}

// IsNewer reports whether r came after o. If neither of two is newer, each may have what the other lacks.
func (r Record) IsNewer(o Record) bool {
	return r.Has(o) && !o.Has(r) || r.has(o.as()) && !o.has(r.as())
}

// WithLineage returns r as the beginning of that lineage, taken from those records. Its generation stays if r is as the
// last of them and that has everything of the others; else it rises. A record that still is what its own origin was
// does not become an origin too: starts without changes do not use up the room for origins.
func (r Record) WithLineage(lineage string, from ...Record) Record {
	var all []Origin
	var latest uint64
	taken := 0
	for i, f := range from {
		empty := f.Generation == 0 && len(f.Origins)+len(f.Changes) == 0
		if empty || slices.ContainsFunc(from[i+1:], func(later Record) bool { return later.Has(f) }) {
			continue
		}
		all = append(all, f.Origins...)
		if f.Lineage != "" && !f.asBegun() {
			all = append(all, f.as())
		}
		latest = max(latest, f.Generation)
		taken++
	}
	if taken > 1 {
		latest++
	}
	r.Generation = max(r.Generation, latest)
	r.Lineage, r.Origins = lineage, nil
	for i, o := range all {
		if !slices.ContainsFunc(all[i+1:], o.isIn) {
			r.Origins = append(r.Origins, o)
		}
	}
	r.Origins = r.Origins[max(0, len(r.Origins)-MaxOrigins):]
	return r
}

// In returns r by the on-time of now, which is of this boot: what was recorded in this boot happened later than
// everything kept in the boots before, whenever that was read.
func (r Record) In(now Instant) Record {
	began, more := r.behind(now)
	if more == 0 {
		return r
	}
	r.Instant, r.Changes = r.Instant.In(now), slices.Clone(r.Changes)
	for i := range r.Changes {
		r.Changes[i].shift(began, more)
	}
	return r
}

// After returns r, corrected by kept, an older copy of it. r is by the on-time of now. A change that kept lacks
// happened no earlier than kept was taken, if it was recorded in a boot that did not know of kept and so continued from
// a lower on-time. What kept knew of earlier boots counts; within its own boot, which is this one or that of r, the
// order is right. A change that both have is from no earlier than either says.
func (r Record) After(kept Record, now Instant) Record {
	before := kept.On
	if kept.ofBoot(now.BootID, now.Boot) || kept.BootID != "" && kept.BootID == r.BootID {
		before -= kept.Boot
	}
	kept = kept.In(now)
	r.Changes = slices.Clone(r.Changes)
	for i := range r.Changes {
		p := &r.Changes[i]
		moment, by := before, before
		if j := slices.IndexFunc(kept.Changes, func(q PolicyChange) bool { return q.ID == p.ID }); j >= 0 {
			moment, by = kept.Changes[j].Moment, kept.Changes[j].By
		} else if p.By >= before {
			continue // it is dated before a boot that went on from there
		}
		if p.Moment != 0 && moment != 0 { // else that is not known
			p.Moment, p.By = max(p.Moment, moment), max(p.By, by)
		}
	}
	return r
}

// Two records may have developed separately, as in folders that were mounted over each other. Then a change in one and
// a change in the other may have the same ID and different meanings: on a full record, one change takes in another, and
// is about more from then on. So changes are compared by what they stand for, and never by their IDs alone.

// Both returns the changes of x and of y. Two with the same ID become one. There may be too many for a record: a cache
// that loads them joins some.
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

// with returns a change that stands for p and for o, which has the same ID. Joined is how many other changes that are
// at least.
func (p PolicyChange) with(o PolicyChange) PolicyChange {
	both := joined(
		&change{PolicyChange: p, canonical: Canonical(p.Resource)},
		&change{PolicyChange: o, canonical: Canonical(o.Resource)},
	).PolicyChange
	both.Joined = max(p.Joined, o.Joined)
	if p.Effect == Revoked || o.Effect == Revoked {
		both.Effect = Revoked
	}
	return both
}

// StandsFor reports whether no token is judged better by p than by o, which has the same ID. When people's clocks say
// that either was recorded makes no difference.
func (p PolicyChange) StandsFor(o PolicyChange) bool {
	both := p.with(o)
	return p.ID == o.ID && p.AboutAll(o) && both.Joined == p.Joined && both.Effect == p.Effect &&
		both.Moment == p.Moment && both.By == p.By &&
		both.Issuer.Latest.Equal(p.Issuer.Latest) && both.NotLater.Equal(p.NotLater)
}

// AboutAll reports whether p is about everything that o is about.
func (p PolicyChange) AboutAll(o PolicyChange) bool {
	return (p.AllIdentities || !o.AllIdentities && p.Selector == o.Selector) &&
		(p.Resource == "" || o.Resource != "" && Canonical(p.Resource) == Canonical(o.Resource))
}
