package tokencache

import (
	"fmt"
	"slices"
	"testing/synctest"
)

// CheckJudgements judges every token by every change anew, and compares what c tells of them with that. alternates is
// what c goes by. It is called in a bubble, in which nothing else goes on.
func (c *Cache) CheckJudgements(alternates map[string][]string) error {
	synctest.Wait()
	same := func(one, other string) bool { return Canonical(one) == Canonical(other) }
	goesBy := func(one, other string) bool { // by as many steps as there are
		reached := []string{one}
		for i := 0; i < len(reached); i++ {
			for resource, others := range alternates {
				all := append([]string{resource}, others...)
				if !slices.ContainsFunc(all, func(a string) bool { return same(a, reached[i]) }) {
					continue
				}
				for _, a := range all {
					if !slices.Contains(reached, a) {
						reached = append(reached, a)
					}
				}
			}
		}
		return slices.ContainsFunc(reached, func(a string) bool { return same(a, other) })
	}
	about := func(ch *change, key Key) bool {
		if !ch.AllIdentities && ch.Selector != key.Selector {
			return false
		}
		return ch.Resource == "" || same(ch.Resource, key.Resource) || goesBy(ch.Resource, key.Resource)
	}
	type far struct{ touched, waiting int }
	progress := make(map[string]far)
	withheld := make(map[Key][]string)
	states := make(map[Key]PermissionState)

	c.mu.Lock()
	now := c.now()
	for key, e := range c.entries {
		states[key] = Current
		for _, ch := range c.changes {
			if !about(ch, key) {
				continue
			}
			f, lacks := progress[ch.ID], c.verdictLocked(e, ch) != Current
			if lacks {
				states[key] = states[key].worse(c.verdictLocked(e, ch))
			}
			if lacks && ch.Effect == Revoked {
				withheld[key] = append(withheld[key], ch.ID)
			}
			if c.leftLocked(e, now) > 0 {
				f.touched++
				if lacks {
					f.waiting++
				}
			}
			progress[ch.ID] = f
		}
		if got := e.policy; got.worst != states[key] || got.withheld() != (withheld[key] != nil) {
			c.mu.Unlock()
			return fmt.Errorf("%v is %v, withheld %v, and has to be %v, withheld by %v", key, got.worst, got.withheld(),
				states[key], withheld[key])
		}
	}
	on := len(c.changes)
	c.mu.Unlock()

	noted, m := c.Changes(), c.Snapshot()
	if len(noted) != on || len(m.Record.Changes) != on || m.OnRecord != on {
		return fmt.Errorf("%d changes are on record, and %d told, %d kept, %d counted", on, len(noted),
			len(m.Record.Changes), m.OnRecord)
	}
	for i, n := range noted {
		if want := progress[n.ID]; n.Touched != want.touched || n.Waiting != want.waiting {
			return fmt.Errorf("change %s touches %d, of which %d wait, and has to touch %+v", n.ID, n.Touched,
				n.Waiting, want)
		}
		if kept := m.Record.Changes[i]; kept != n.PolicyChange {
			return fmt.Errorf("in the place of %+v, %+v is kept", n.PolicyChange, kept)
		}
	}
	for _, r := range m.Keys {
		var ids []string
		for _, p := range c.Withholders(r.Key) {
			ids = append(ids, p.ID)
		}
		if want := withheld[r.Key]; !slices.Equal(r.Withheld, want) || !slices.Equal(ids, want) {
			return fmt.Errorf("%v is kept as withheld by %v, told as %v, and has to be by %v", r.Key, r.Withheld, ids,
				want)
		}
	}
	return nil
}
