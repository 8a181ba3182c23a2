//go:build mutations

package lives

const (
	judgement = "tokencache/verdict.go"
	changes   = "tokencache/policychange.go"
	memories  = "tokencache/restore.go"
)

var mutants = []mutant{
	// The judgement of tokens.
	{"a token that was received before a change is judged by its dates", judgement,
		"r, m, by := «e.token.receipt», e.token.issued", "receipt{on: ch.Moment + 1, from: e.token.receipt.from, to: " +
			"e.token.receipt.to}", aboutShort},
	{"in on-time a change needs no time to spread", judgement, "after && «r.from > ch.By+c.propagationDelay»:",
		"r.from > ch.By", anything},
	{"by the issuer's clock a change needs no time to spread", judgement,
		"case after && !by.Latest.IsZero() && m.Earliest.After(«by.Latest.Add(c.propagationDelay)»):", "by.Latest",
		anything},
	{"the latest moment of an issue decides", judgement, "case after && !by.Latest.IsZero() && «m.Earliest».After(",
		"m.Latest", aboutShort},
	{"a revocation withholds nothing", judgement, "if «ch.Effect == Revoked» {", "false", anything},
	{"a promise leaves out the life of the next token", judgement, "return «known.add(life)»", "known", anything},
	{"spellings of a resource are different ones", judgement, `|| «ch.canonical == e.canonical» ||`,
		"ch.Resource == e.key.Resource", aboutSpellings},
	{"a change touches identities that it is not about", judgement, "&& «ch.Selector != e.key.Selector» {",
		"ch.Selector.Kind > e.key.Selector.Kind", anything},
	{"an iat to come is a date", "tokencache/issuewindow.go", "sure && «dated.After(latest.Add(aheadAtMost))»",
		"dated.After(latest.Add(aheadAtMost + 24*time.Hour))", anything},
	{"another principal's token is judged by its date", "tokencache/fetch.go", "case held > 0 && «!another» && ",
		"true", aboutRenewals},

	// The hold.
	{"the back end is asked while a change is spreading", "tokencache/propagation.go",
		"\tholds := «c.spreadsUntilLocked(e, now)»\n\tif e.token.life", "longAgo", anything},
	{"a token that nobody gets is fetched while a revocation is spreading", "tokencache/propagation.go",
		"return «min(e.spreadsUntil(), e.policy.lacked)»", "longAgo", aboutSpellings},
	{"changes that follow each other hold without end", judgement,
		"longestWait: «longestWaitDelays*c.propagationDelay» +", "1000 * longestWaitDelays * c.propagationDelay",
		aboutPipelines},

	// The record.
	{"changes end after an hour", changes, "return «c.propagationDelay + longestNominal + recordAfter»",
		"c.propagationDelay + time.Hour", anything},
	{"a record is kept without its changes", "agent/store/policychanges.go", "text, err := r.encode(«record»)",
		"tokencache.Record{Instant: record.Instant, Lineage: record.Lineage, Generation: record.Generation}", anything},
	{"a record that cannot be read now is taken for none", "agent/store/recovery.go", "b.Unread = «err»", "nil",
		anything},
	{"a start goes on in the lineage that it read", "agent/recovery.go",
		"found.Record = «anew(found.Record, from...)»", "found.Record", aboutForks},
	{"what could not be saved is not saved again soon", "agent/saver.go", "retry := «saveRetryInterval»\n",
		"saveEvery", anything},
	{"a full record refuses revocations", "tokencache/compact.go", "makesRoom(all, ch)\n\t\tif «into == nil» {",
		"true", aboutFull},

	// The rules of clocks.
	{"on-time begins anew with each boot", "tokencache/ontime.go", "\treturn «latest»\n", "0", aboutBoots},
	{"the wall clock alone ends changes", changes, "left = «max(left, ch.At.Add(lasts).Sub(wall))»",
		"min(left, ch.At.Add(lasts).Sub(wall))", aboutLies},
	{"a kept token counts as received at the start", memories,
		"«receipt{on: r.ReceivedOnTime, from: r.IssuedFrom, to: r.IssuedTo, blind: r.Blind}»",
		"receipt{on: c.onAt(now), from: c.onAt(now), to: c.onAt(now)}", anything},
	{"a date is believed by a clock that nobody vouches for", changes, "\tif «!p.Vouched» {\n\t\treturn 0\n", "false",
		aboutGuesses},
	{"after a boot nothing is unconfirmed", memories, "a := downtime{shift: time.Duration(now) - m.Boot - away, " +
		"certain: «known»}", "true", anything},
	{"the wall clock alone tells the life left", "tokencache/clock.go",
		"return «min(byBoot, expiresOn.Sub(c.clock.Wall()))»", "expiresOn.Sub(c.clock.Wall())", aboutLies},
	{"a source that fails as a whole is asked on", "tokencache/sourcebackoff.go", "case «extent == OfSource»:",
		"extent == OfSource && failure == nil", aboutOutages},
}
