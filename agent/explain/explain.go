// Package explain puts in sentences what is known of a token: what it carries, which policy changes touch it, what the
// back end does, when a current token is here, and what to do. It reads the daemon's status, and nothing else.
package explain

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// Story is what there is to say of one token.
type Story struct {
	Now      time.Time       `json:"now"`
	Summary  string          `json:"summary"`
	Sections []Section       `json:"story"`
	Token    api.TokenStatus `json:"token"`
	Denied   bool            `json:"denied,omitempty"` // to everybody, by deny rules
	Changes  []TokenChange   `json:"policy_changes"`   // those that touch the token
}

// Section is a paragraph of a story.
type Section struct {
	About string `json:"about"`
	Text  string `json:"text"`
}

// explainer writes the sentences about one token.
type explainer struct {
	Times
	now     time.Time
	token   api.TokenStatus
	changes []TokenChange
	deny    *api.DenyStatus
}

// Of puts together all that is known of a token, which is one of the status. Its times are by the clocks of times.
func Of(times Times, status api.Status, token api.TokenStatus) Story {
	t := explainer{
		Times: times, now: status.Now, token: token, changes: ChangesOf(token, status.Changes), deny: status.Deny,
	}
	e := Story{Now: status.Now, Summary: t.summary(), Token: token, Denied: t.deniedToAll(), Changes: t.changes}
	add := func(about string, texts ...string) {
		for _, text := range texts {
			if text != "" {
				e.Sections = append(e.Sections, Section{about, text})
			}
		}
	}
	add("denied", t.denied()...)
	add("token", t.lifetime(), t.principal(), t.claims(), t.claimChanges())
	add("changed", t.policyChanges()...)
	add("back end", t.backEnd(), t.rolloverPattern(), t.nextFetch())
	add("current", t.currentBy(), t.fetchesPostponed(), t.inToken())
	modulesGet := t.modulesGet()
	add("modules", modulesGet, t.othersDenied(modulesGet), t.rejected())
	add("to do", t.endSomeDenials(), t.nextSteps())
	add("times", "All times are in "+times.ZoneName(status.Now)+".")
	return e
}

func (t explainer) valid() bool { return t.token.ExpiresIn > 0 }

func (t explainer) current() bool { return IsCurrent(t.token) }

// tokenName names the token: "vision's token for https://vault.azure.net".
func (t explainer) tokenName() string { return t.token.Identity + "'s token for " + t.token.Resource }

func (t explainer) summary() string {
	changed := t.latestChange()
	switch {
	case t.deny.IsLost():
		return t.tokenName() + " is handed to nobody: what is denied is not known."
	case t.deniedToAll():
		return t.tokenName() + " is denied to everybody, whatever the grants allow."
	case !t.valid() && !t.token.HeldUntil.IsZero():
		return t.token.Identity + " has no token for " + t.token.Resource +
			", and none is fetched while a revocation is spreading."
	case !t.valid() && t.token.State == api.StateFetching:
		return t.token.Identity + " has no token for " + t.token.Resource + " yet: it is being fetched."
	case !t.valid() && t.token.Failures == 0:
		return t.token.Identity + " has no token for " + t.token.Resource +
			": the back end has not been asked for one since."
	case !t.valid():
		return t.token.Identity + " has no token for " + t.token.Resource + ": the back end did not give one."
	case t.token.Permissions.Withheld && t.lostRecord() != nil:
		return t.tokenName() + " is withheld: " + RecordText(t.lostRecord().Record) +
			", and it may lack a change that was on it ([tokens] lost_record)."
	case t.token.Permissions.Withheld:
		return t.tokenName() + " is withheld: permissions were revoked, and it may still carry them (the latest " +
			"change that it may lack was at " + changed + ")."
	case t.token.Permissions.State == api.PermissionsStale:
		return t.tokenName() + " is stale: it was minted before a policy change (at " + changed + ")."
	case !t.current():
		return t.tokenName() + " is uncertain: it may or may not carry a policy change (at " + changed + ")."
	case len(t.changes) > 0:
		return t.tokenName() + " is current: it carries every policy change on record."
	}
	return t.tokenName() + " is current, as far as perceptd was told: no policy change for it is on record."
}

// latestChange says when the latest change was that the token may lack, or as of when it counts.
func (t explainer) latestChange() string {
	on := t.token.Permissions.Changed
	for _, change := range t.changes {
		if change.At.Equal(on) && change.AsOfRecording {
			return t.At(t.now, change.At) + ", which counts as of its note at " + t.At(t.now, change.RecordedOn)
		}
	}
	return t.AtIfKnown(t.now, on)
}

// lostRecord returns the change that stands for a lost record of policy changes and withholds the token; else nil.
func (t explainer) lostRecord() *api.PolicyChange {
	if !t.token.Permissions.Withheld {
		return nil
	}
	return LostRecord(t.changes)
}

// lifetime says when the token was issued and received, and when it expires.
func (t explainer) lifetime() string {
	if !t.valid() {
		return "perceptd holds no valid token, so there is nothing to tell of one."
	}
	text := "The token"
	if t.token.SHA256 != "" {
		text += " (sha256 " + ShortDigest(t.token.SHA256) + "…)"
	}
	text += " " + t.issued() + "."
	if !t.token.ReceivedOn.IsZero() {
		text += " perceptd received it at " + t.AtRelative(t.now, t.token.ReceivedOn) + "."
	}
	if !t.token.ExpiresOn.IsZero() {
		text += " It expires at " + t.AtRelative(t.now, t.token.ExpiresOn) + "."
	}
	return text
}

// ExactWidth is the widest issue window that is shown as one time.
const ExactWidth = 5 * time.Second

// backdatedWidth is the widest issue window that comes from Entra's dating tokens back.
const backdatedWidth = 6 * time.Minute

func (t explainer) issued() string {
	from, to := t.token.IssuedFrom, t.token.IssuedTo
	if from.IsZero() || to.IsZero() {
		return "was minted at a time that is not known"
	}
	switch width := to.Sub(from); {
	case width <= ExactWidth:
		return "was minted at " + t.AtRelative(t.now, from.Add(width/2))
	case width <= backdatedWidth:
		return fmt.Sprintf(
			"was minted between %s and %s (no more exactly, since the issuer may date a token back by 5 minutes)",
			t.At(t.now, from), t.At(t.now, to))
	}
	return fmt.Sprintf("was minted between %s and %s (no more exactly, since it carries no date of its own)",
		t.At(t.now, from), t.At(t.now, to))
}

// principal names the principal that the token speaks for.
func (t explainer) principal() string {
	who := PrincipalText(PrincipalOf(t.token))
	switch {
	case !t.valid() || who == "":
		return ""
	case t.token.Former:
		return "It speaks for " + who +
			", which is a former principal of the identity: its tokens have come to speak for a new one. The back " +
			"end hands out its copy; perceptd asks for a token of the present one once an hour."
	}
	return "It speaks for " + who + "."
}

// claims lists the claims that decide permissions.
func (t explainer) claims() string {
	c := t.token.Claims
	if !t.valid() {
		return ""
	}
	if c == nil {
		return "What it carries is not known: its claims cannot be read."
	}
	carried := func(name, thing string, values []string) string {
		if slices.Contains(c.Omitted, name) {
			return thing + "s that are too long to be kept, or cannot be shown"
		}
		return claimText(thing, values)
	}
	text := fmt.Sprintf("It carries %s, %s and %s.",
		carried("groups", "group", c.Groups), carried("roles", "app role", c.Roles),
		carried("wids", "directory role", c.WIDs))
	if c.Audience != "" && c.Audience != t.token.Resource {
		text += " Its audience is " + c.Audience + "."
	}
	return text
}

const shownClaims = 3

// claimText counts values of a claim and lists the first: "2 groups (a, b)", "no app roles".
func claimText(thing string, values []string) string {
	if len(values) == 0 {
		return "no " + thing + "s"
	}
	listed := strings.Join(values[:min(shownClaims, len(values))], ", ")
	if more := len(values) - shownClaims; more > 0 {
		listed += fmt.Sprintf(" and %d more", more)
	}
	return Counted(len(values), thing) + " (" + listed + ")"
}

// claimChanges says how the claims differ from those of the token before.
func (t explainer) claimChanges() string {
	before, now := t.token.Before, t.token.Claims
	if before == nil || now == nil || !t.valid() {
		return ""
	}
	var parts []string
	for _, claim := range []struct {
		name, thing string
		before, now []string
	}{
		{"groups", "group", before.Groups, now.Groups}, {"roles", "app role", before.Roles, now.Roles},
		{"wids", "directory role", before.WIDs, now.WIDs},
	} {
		if slices.Contains(before.Omitted, claim.name) || slices.Contains(now.Omitted, claim.name) {
			continue
		}
		if came := except(claim.now, claim.before); len(came) > 0 {
			parts = append(parts, claimText(claim.thing, came)+" came")
		}
		if went := except(claim.before, claim.now); len(went) > 0 {
			parts = append(parts, claimText(claim.thing, went)+" went")
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return "Compared with the token before it, " + strings.Join(parts, ", ") +
		". That is evidence of a change that reached it, and no proof that all of them did."
}

// except returns the values that are not among others.
func except(values, others []string) []string {
	return slices.DeleteFunc(slices.Clone(values), func(v string) bool { return slices.Contains(others, v) })
}

const ShownChanges = 5

// policyChanges lists the policy changes that touch the token, each with whether the token carries it.
func (t explainer) policyChanges() []string {
	if t.token.Changes == nil {
		return []string{"Which policy changes it carries perceptd does not say, since it is older than this " +
			"perceptctl: it is to be restarted. perceptctl policy-changes lists those on record."}
	}
	if len(t.changes) == 0 && t.current() {
		return []string{"No policy change that touches it is on record. Azure tells nobody of them: perceptd knows " +
			"those that it was told."}
	}
	var texts []string
	for _, change := range t.changes[:min(ShownChanges, len(t.changes))] {
		text := capitalized(t.ChangeText(t.now, change.PolicyChange)) + " (ID " + change.ID + ")."
		if change.Note != "" {
			text += " Note: \"" + change.Note + "\"."
		}
		switch {
		case change.AsOfRecording:
			text += " It counts as of its note, at " + t.AtRelative(t.now, change.RecordedOn) +
				", since this device's clock was not known to be right then."
		case change.Unsure:
			text += " That time is not sure: this device's clock was not known to be right when it was noted."
		}
		if change.Resource != "" && tokencache.Canonical(change.Resource) != tokencache.Canonical(t.token.Resource) {
			text += " That resource is an alternate of this one."
		}
		texts = append(texts, text+t.policyStateText(change))
	}
	if more := len(t.changes) + t.token.MoreChanges - len(texts); more > 0 {
		texts = append(texts, fmt.Sprintf("There are %s before these: perceptctl policy-changes lists them.",
			Counted(more, "change")))
	}
	return texts
}

func (t explainer) policyStateText(change TokenChange) string {
	if change.Record != "" {
		return ""
	}
	switch change.State {
	case api.PermissionsCurrent:
		return " The token was minted after that had reached new tokens, and carries it."
	case api.PermissionsStale:
		if change.AsOfRecording {
			return " The token was minted before that note, and does not count as carrying it."
		}
		return " The token was minted before that, and does not carry it."
	case api.PermissionsUncertain:
		return " Whether the token carries it cannot be told: a change takes up to 10 minutes, or as long as the " +
			"configuration says, to reach new tokens, and the minting is not known to be later."
	}
	return ""
}

// backEnd says what the back end does, and what it last answered.
func (t explainer) backEnd() string {
	text := "The back end keeps its own copy of a token for each resource for around 24 hours and hands that out; " +
		"nothing can force a newer one."
	if t.token.LastFetch.IsZero() {
		return text + " It has not answered yet."
	}
	text += fmt.Sprintf(" It was last asked at %s and ", t.AtRelative(t.now, t.token.LastFetch))
	switch t.token.LastOutcome {
	case api.OutcomeNewer:
		text += "gave a newer token"
	case api.OutcomeUnchanged:
		text += "gave its copy of the token already held"
	case api.OutcomeOlder:
		text += "gave a token minted before the one held, which stays (its replicas do not agree)"
	case api.OutcomeFormer:
		text += "gave a token of a principal that the identity's tokens were of before, which is taken only where " +
			"none is held (its replicas do not agree)"
	case api.OutcomeSimulated:
		text += "gave a token that says that a simulated back end made it, which is taken only where none is held"
	case api.OutcomeFailed:
		text += "gave none"
	default:
		text += "gave an answer that is not known here"
	}
	return text + " (asked " + times(t.token.Fetches) + " so far)."
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return Counted(n, "time")
}

// rolloverPattern says what was learnt of the rollovers.
func (t explainer) rolloverPattern() string {
	r := t.token.Rollover
	learnt := ""
	switch r.Pattern {
	case api.RolloverRegular:
		age, life := time.Duration(r.Age)*time.Second, time.Duration(t.token.Life)*time.Second
		if life > 0 && life-age <= 5*time.Minute {
			learnt = "It hands out newer tokens always at the expiry of the one before"
		} else {
			learnt = "It hands out newer tokens always at about " + Duration(age) + " of age"
		}
	case api.RolloverIrregular:
		learnt = "It hands out newer tokens at ages that differ"
	default:
		return "When it hands out newer tokens has not been learnt yet: " + rolloversText(r.Seen) + "."
	}
	learnt += " (" + rolloversText(r.Seen) + ")."
	if !r.Expected.IsZero() && t.valid() {
		learnt += " The next is expected at about " + t.AtRelative(t.now, r.Expected) + "."
	}
	return learnt
}

func rolloversText(n int) string {
	switch n {
	case 0:
		return "no rollover of this token was observed so far"
	case 1:
		return "1 rollover of this token was observed"
	}
	return fmt.Sprintf("%d rollovers of this token were observed", n)
}

// nextFetch says why fetching fails, and when the back end is asked next.
func (t explainer) nextFetch() string {
	text := ""
	if t.token.LastError != "" {
		text = "Fetching fails"
		if t.token.Failures > 1 {
			text += fmt.Sprintf(", %d times in a row", t.token.Failures)
		}
		text += ": " + strings.TrimSuffix(t.token.LastError, ".") + ". "
	}
	switch next := t.token.NextRefresh; {
	case t.token.State == api.StateIdle:
		text += "Nobody asks for this token any more, so it is left to expire."
	case next.IsZero():
		text += "No further fetch is planned."
	case !next.After(t.now):
		text += "It is asked again right now."
	default:
		text += "It is asked again at " + t.AtRelative(t.now, next)
		if t.valid() || t.token.HeldUntil.IsZero() {
			text += ", or earlier when a caller needs a token that is not there"
		}
		text += "."
	}
	return text
}

// currentBy says by when a current token is expected.
func (t explainer) currentBy() string {
	p := t.token.Permissions
	switch {
	case !t.valid() && len(t.changes) > 0:
		return "A token that comes now is judged by the changes above."
	case !t.valid():
		return ""
	case t.current():
		return "It is current now."
	case t.lostRecord() != nil:
		return "It is handed out as soon as what stands for the record is ended, as below under \"to do\"."
	case p.CurrentBy.IsZero():
		return "When a current token is here is not known."
	}
	text := "A current token is here by " + t.AtRelative(t.now, p.CurrentBy) +
		" at the latest, if the back end answers"
	switch {
	case p.Likely.IsZero():
		text += ". Whether it comes earlier cannot be said: nothing was learnt of this back end yet."
	case p.Likely.Before(p.CurrentBy):
		text += ", and probably by " + t.AtRelative(t.now, p.Likely) + "."
	default:
		text += ", and probably not much earlier."
	}
	return text + " perceptd looks for it by itself."
}

// fetchesPostponed says until when fetches wait for a change to spread, and why.
func (t explainer) fetchesPostponed() string {
	held := t.token.HeldUntil
	if !held.After(t.now) {
		return ""
	}
	return "Until " + t.AtRelative(t.now, held) +
		" perceptd asks for no newer token: a policy change takes minutes to reach new tokens, and one minted before " +
		"would lack it and then stay in the back end's cache for about a day."
}

// inToken says which permissions are in the token, where that matters.
func (t explainer) inToken() string {
	if len(t.changes) == 0 && t.current() {
		return ""
	}
	return InTheToken
}

// header is the value of Percept-Permissions that goes with the token.
func header(p api.Permissions) string {
	if p.State == api.PermissionsCurrent || p.State == "" {
		return string(api.PermissionsCurrent)
	}
	return fmt.Sprintf("%s; changed=%d; current-by=%d", p.State, p.Changed.Unix(), p.CurrentBy.Unix())
}

// modulesGet says what modules get when they ask.
func (t explainer) modulesGet() string {
	p := t.token.Permissions
	switch {
	case t.deny.IsLost():
		return "Modules that ask are refused (503, deny_rules_lost) on every form until what was denied is known. " +
			NotRecalled
	case t.deniedToAll():
		return "Modules that ask are refused (403, denied) on every form until the deny rule is lifted. " + NotRecalled
	case !t.valid():
		return "Modules that ask get an error that they may retry, until there is a token."
	case t.lostRecord() != nil:
		return "Modules that ask are refused (403, permissions_revoked) on every form until that is ended. " +
			NotRecalled
	case p.Withheld:
		return "Modules that ask are refused (403, permissions_revoked) on every form until a current token is here. " +
			NotRecalled
	case t.current():
		return t.served() + " get the token with the header " + api.PermissionsHeader + ": " + header(p) + "."
	}
	return t.served() + " get the token with the header " + api.PermissionsHeader + ": " + header(p) +
		". SDKs are told that it lives for 25 minutes at most, so that they come back for the newer one. " + NotRecalled
}

// served names the modules that get the token.
func (t explainer) served() string {
	if len(RulesOn(t.deny, t.token)) > 0 {
		return "Modules that no deny rule names"
	}
	return "Modules"
}

func (t explainer) rejected() string {
	if t.token.Refused.IsZero() {
		return ""
	}
	return "A module reported at " + t.AtRelative(t.now, t.token.Refused) + " that the resource refused this token."
}

// nextSteps says what the reader can do.
func (t explainer) nextSteps() string {
	if t.deniedToAll() {
		return t.endDenial()
	}
	unmet := t.unmet()
	i := slices.IndexFunc(unmet, func(change TokenChange) bool { return change.Record != "" })
	if i < 0 || !t.valid() {
		return t.waiting(unmet)
	}
	mend := "To mend the record of policy changes: " + unmet[i].Mend + "."
	if others := slices.Delete(unmet, i, i+1); len(others) > 0 {
		mend += " " + t.waiting(others)
	}
	return mend
}

// waiting says what the reader can do, apart from mending the record.
func (t explainer) waiting(unmet []TokenChange) string {
	watch := "perceptctl status --watch shows when it is here"
	switch p := t.token.Permissions; {
	case !t.valid() && !t.token.HeldUntil.IsZero():
		return "Wait: the token comes by itself."
	case !t.valid() && t.token.State == api.StateFetching:
		return "Wait a moment, then ask again."
	case !t.valid():
		return "See to the back end: what it answered is above, and journalctl -u perceptd tells more. perceptd " +
			"goes on asking by itself."
	case p.Withheld:
		return "Wait: nothing can hurry the back end, and " + watch +
			". If modules must have the token at hand in spite of the revocation, or it was noted by mistake: " +
			t.withdrawal(revocations(unmet)) + "."
	case !t.current():
		text := "Wait: nothing can hurry the back end, perceptctl refresh neither; " + watch + "."
		if len(unmet) > 0 {
			text += " If a change was noted by mistake: " + t.withdrawal(unmet[:1]) + "."
		}
		return text
	case t.token.LastError != "":
		return "The token serves, but no newer one can be had: see to the back end before it expires; journalctl -u " +
			"perceptd tells more."
	case !t.token.Refused.IsZero():
		return "If permissions on " + t.token.Resource + " were changed, tell perceptd: perceptctl policy-changed " +
			t.token.Resource +
			" --effect granted|revoked|changed. If not, the permission may be missing."
	}
	nothing := "Nothing."
	if t.endSomeDenials() != "" {
		nothing = "Else nothing."
	}
	return nothing + " If permissions on it were changed in Azure and that is not above, tell perceptd: perceptctl " +
		"policy-changed " +
		t.token.Resource + " --effect granted|revoked|changed."
}

// unmet returns the changes that the token may lack.
func (t explainer) unmet() []TokenChange {
	return slices.DeleteFunc(slices.Clone(t.changes), func(change TokenChange) bool { return !change.Lacked() })
}

// revocations returns those of changes that revoke permissions.
func revocations(changes []TokenChange) []TokenChange {
	return slices.DeleteFunc(slices.Clone(changes), func(c TokenChange) bool { return c.Effect != api.EffectRevoked })
}

// withdrawal says where changes are withdrawn: those of the twin in IoT Hub unless that is set aside, the others here.
func (t explainer) withdrawal(changes []TokenChange) string {
	var here, there []string
	for _, change := range changes {
		if change.IsOfTwin() && !t.deny.IsHubSetAside() {
			there = append(there, change.ID)
		} else {
			here = append(here, change.ID)
		}
	}
	var ways []string
	if len(here) > 0 {
		ways = append(ways, "perceptctl policy-changes withdraw "+strings.Join(here, " "))
	}
	if len(there) > 0 {
		ways = append(ways, TwinWithdrawal+" ("+strings.Join(there, ", ")+")")
	}
	if len(ways) == 0 {
		return "perceptctl policy-changes withdraw ID (perceptctl policy-changes lists them)"
	}
	return strings.Join(ways, "; ")
}

// TwinWithdrawal says how a policy change that the twin has set is withdrawn.
const TwinWithdrawal = "take it out of percept.policyChanges in the twin's desired properties in IoT Hub"
