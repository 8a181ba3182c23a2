//go:build mutations

package lives

const (
	judgement = "tokencache/permissions.go"
	changes   = "tokencache/change.go"
	entries   = "tokencache/entry.go"
	memories  = "tokencache/memory.go"
)

var mutants = []mutant{
	// The judgement of tokens.
	{"a token that was received before a change is judged by its dates", judgement,
		"after := r.on > ch.Moment\n\tswitch {\n\tcase ch.Effect == Unknown && r.on < ch.Moment:\n\t\treturn Uncertain\n\tcase r.on < ch.Moment:\n\t\treturn Stale\n",
		"after := true\n\tswitch {\n", 280},
	{"in on-time a change needs no time to spread", judgement, "r.from > ch.By+c.spread", "r.from > ch.By", 19},
	{"by the issuer's clock a change needs no time to spread", judgement, "case after && !by.Latest.IsZero() && m.Earliest.After(by.Latest.Add(c.spread)):", "case after && !by.Latest.IsZero() && m.Earliest.After(by.Latest):", 19},
	{"the latest moment of an issue decides", judgement, "&& m.Earliest.After(by.Latest.Add(c.spread)):", "&& m.Latest.After(by.Latest.Add(c.spread)):", 70},
	{"a revocation withholds nothing", judgement, "if ch.Effect == Revoked {", "if ch.Effect == Revoked && ch.Joined > 0 {", 1},
	{"a promise leaves out the life of the next token", judgement, "return known + life", "return known + 0*life", 1},
	{"spellings of a resource are different ones", changes, "ch.spelling == e.spelling", "ch.Resource == e.key.Resource", 125},
	{"a change touches identities that it is not about", changes, "ch.Selector != e.key.Selector", "ch.Selector.Kind > e.key.Selector.Kind", 4},
	{"an iat to come is a date", "tokencache/minting.go", "sure && dated.After(latest.Add(aheadAtMost))", "sure && dated.After(latest.Add(aheadAtMost+24*time.Hour))", 10},
	{"another principal's token is judged by its date", "tokencache/run.go", "case held > 0 && !another && mintedBefore", "case held > 0 && mintedBefore", 31},

	// The hold.
	{"the back end is asked while a change is spreading", entries, "return now < e.holds() && e.holds()+lastMinutes < e.deadline", "return e.failures > 1000", 1},
	{"changes that follow each other hold without end", judgement, "const silence = 3", "const silence = 3000", 1},

	// The record.
	{"changes end after an hour", changes, "lasts := c.spread + longestNominal + recordAfter", "lasts := c.spread + time.Hour", 1},
	{"a record is kept without its changes", "agent/record.go", "if err := r.keep(now); err != nil {", "if err := r.keep(tokencache.Record{Taken: now.Taken, Lineage: now.Lineage, Generation: now.Generation}); err != nil {", 1},
	{"a record that cannot be read now is taken for none", "agent/keep/begin.go", "b.Unread = err", "b.RecordFault = err", 1},
	{"what could not be saved is not saved again soon", "agent/memory.go", "save = saved + keepAgain", "save = saved + saveEvery", 1},
	{"a full record refuses revocations", changes, "if !c.enterLocked(c.changeLocked(p, now)) {", "if len(c.changes) >= MaxChanges || !c.enterLocked(c.changeLocked(p, now)) {", 1},

	// The rules of clocks.
	{"on-time begins anew with each boot", "tokencache/ontime.go", "\treturn latest\n", "\treturn latest - latest\n", 1},
	{"the wall clock alone ends changes", changes, "left = max(left, ch.At.Add(lasts).Sub(wall))", "left = min(left, ch.At.Add(lasts).Sub(wall))", 1},
	{"a kept token counts as received at the start", memories, "receipt{on: r.ReceivedAt, from: r.IssuedFrom, to: r.IssuedTo, blind: r.Blind}", "receipt{on: c.on + now, from: c.on + now, to: c.on + now}", 1},
	{"a date is believed by a clock that nobody vouches for", changes, "\tif !p.Vouched {\n\t\treturn 0\n\t}\n\tago", "\tago", 1},
	{"after a boot nothing is unconfirmed", memories, "a := absence{shift: now - m.Boot - away, certain: known}", "a := absence{shift: now - m.Boot - away, certain: true}", 1},
	{"the wall clock alone tells the life left", "tokencache/cache.go", "return min(byBoot, expiresOn.Sub(c.clock.Wall()))", "return expiresOn.Sub(c.clock.Wall())", 1},
	{"a source that fails as a whole is asked on", "tokencache/rest.go", "case extent == OfSource:", "case extent == OfSource && failure == nil:", 1},
}
