package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
)

// story tells of one token.
type story struct {
	screen
	now     time.Time
	token   api.TokenStatus
	changes []standingChange
}

// explain puts together all that is known of a token.
func (s screen) explain(status api.Status, token api.TokenStatus) explanation {
	t := story{screen: s, now: status.Now, token: token, changes: []standingChange{}}
	for _, change := range status.Changes {
		if touches(change, token) {
			t.changes = append(t.changes, standingChange{change, standingTo(change, token)})
		}
	}
	e := explanation{Now: status.Now, Summary: t.summary(), Token: token, Changes: t.changes}
	add := func(about string, texts ...string) {
		for _, text := range texts {
			if text != "" {
				e.Story = append(e.Story, passage{about, text})
			}
		}
	}
	add("token", t.birth(), t.whose(), t.carries(), t.differs())
	add("changed", t.changed()...)
	add("back end", t.backEnd(), t.pattern(), t.trouble())
	add("current", t.awaited(), t.heldBack(), t.inToken())
	add("modules", t.seen(), t.rejected())
	add("to do", t.toDo())
	add("times", "All times are in "+s.zoneName(status.Now)+".")
	return e
}

func (t story) valid() bool   { return t.token.ExpiresIn > 0 }
func (t story) current() bool { return isCurrent(t.token) }

// names names the token: "vision's token for https://vault.azure.net".
func (t story) names() string { return t.token.Identity + "'s token for " + t.token.Resource }

func (t story) summary() string {
	changed := t.latestChange()
	switch {
	case !t.valid() && t.token.HeldUntil != nil:
		return t.token.Identity + " has no token for " + t.token.Resource + ", and none is fetched while a revocation is spreading."
	case !t.valid() && t.token.State == api.StateFetching:
		return t.token.Identity + " has no token for " + t.token.Resource + " yet: it is being fetched."
	case !t.valid() && t.token.Failures == 0:
		return t.token.Identity + " has no token for " + t.token.Resource + ": the back end has not been asked for one since."
	case !t.valid():
		return t.token.Identity + " has no token for " + t.token.Resource + ": the back end did not give one."
	case t.token.Permissions.Withheld && t.record() != nil:
		return t.names() + " is withheld: " + recordText(t.record().Record) + ", and it may lack a change that was on it ([tokens] lost_record)."
	case t.token.Permissions.Withheld:
		return t.names() + " is withheld: permissions were revoked, and it may still carry them (the latest change that it may lack was at " + changed + ")."
	case t.token.Permissions.Standing == api.StandingStale:
		return t.names() + " is stale: it was minted before a policy change (at " + changed + ")."
	case !t.current():
		return t.names() + " is uncertain: it may or may not carry a policy change (at " + changed + ")."
	case len(t.changes) > 0:
		return t.names() + " is current: it carries every policy change on record."
	}
	return t.names() + " is current, as far as perceptd was told: no policy change for it is on record."
}

// latestChange tells when the latest change was that the token may lack, or as of when it counts.
func (t story) latestChange() string {
	on := t.token.Permissions.Changed
	for _, change := range t.changes {
		if change.At.Unix() == on && change.AsOfNote {
			return t.at(t.now, change.At) + ", which counts as of its note at " + t.at(t.now, change.NotedOn)
		}
	}
	return t.atUnix(t.now, on)
}

// record returns what stands for the record of policy changes and withholds the token, where no revocation that was noted does; else nil.
func (t story) record() *api.PolicyChange {
	if !t.token.Permissions.Withheld {
		return nil
	}
	var all []api.PolicyChange
	for _, change := range t.changes {
		all = append(all, change.PolicyChange)
	}
	return standIn(all, t.token)
}

// standIn returns what of the changes stands for the record of policy changes and withholds tokens, where no revocation on record does that may
// touch the token; else nil.
func standIn(changes []api.PolicyChange, token api.TokenStatus) (found *api.PolicyChange) {
	for _, change := range changes {
		switch {
		case !touches(change, token):
		case change.Withholds:
			found = &change
		case change.Effect == api.EffectRevoked && standingTo(change, token) != api.StandingCurrent:
			return nil
		}
	}
	return found
}

// birth tells when the token was minted and received, and when it expires.
func (t story) birth() string {
	if !t.valid() {
		return "perceptd holds no valid token, so there is nothing to tell of one."
	}
	text := "The token"
	if t.token.SHA256 != "" {
		text += " (sha256 " + t.token.SHA256 + "…)"
	}
	text += " " + t.minted() + "."
	if t.token.ReceivedOn != nil {
		text += " perceptd received it at " + t.atAndHowFar(t.now, *t.token.ReceivedOn) + "."
	}
	if t.token.ExpiresOn != nil {
		text += " It expires at " + t.atAndHowFar(t.now, *t.token.ExpiresOn) + "."
	}
	return text
}

// exact is the widest interval of a minting that is told as a moment.
const exact = 5 * time.Second

// imprecise is the widest that comes from Entra's dating tokens back.
const imprecise = 6 * time.Minute

func (t story) minted() string {
	from, to := t.token.MintedFrom, t.token.MintedTo
	if from == nil || to == nil {
		return "was minted at a time that is not known"
	}
	switch width := to.Sub(*from); {
	case width <= exact:
		return "was minted at " + t.atAndHowFar(t.now, from.Add(width/2))
	case width <= imprecise:
		return fmt.Sprintf("was minted between %s and %s (no more exactly, since the issuer may date a token back by 5 minutes)",
			t.at(t.now, *from), t.at(t.now, *to))
	}
	return fmt.Sprintf("was minted between %s and %s (no more exactly, since it carries no date of its own)",
		t.at(t.now, *from), t.at(t.now, *to))
}

// whose tells whom the token speaks for.
func (t story) whose() string {
	who := principalText(principalOf(t.token))
	switch {
	case !t.valid() || who == "":
		return ""
	case t.token.Former:
		return "It speaks for " + who + ", which is a former principal of the identity: its tokens have come to speak for a new one. " +
			"The back end hands out its copy; perceptd asks for a token of the present one once an hour."
	}
	return "It speaks for " + who + "."
}

// carries tells the claims that decide permissions.
func (t story) carries() string {
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
		return claimed(thing, values)
	}
	text := fmt.Sprintf("It carries %s, %s and %s.",
		carried("groups", "group", c.Groups), carried("roles", "app role", c.Roles), carried("wids", "directory role", c.WIDs))
	if c.Audience != "" && c.Audience != t.token.Resource {
		text += " Its audience is " + c.Audience + "."
	}
	return text
}

const shownClaims = 3

// claimed counts values of a claim and lists the first: "2 groups (a, b)", "no app roles".
func claimed(thing string, values []string) string {
	if len(values) == 0 {
		return "no " + thing + "s"
	}
	listed := strings.Join(values[:min(shownClaims, len(values))], ", ")
	if more := len(values) - shownClaims; more > 0 {
		listed += fmt.Sprintf(" and %d more", more)
	}
	return counted(len(values), thing) + " (" + listed + ")"
}

// differs tells how the claims differ from those of the token before.
func (t story) differs() string {
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
		if came := without(claim.now, claim.before); len(came) > 0 {
			parts = append(parts, claimed(claim.thing, came)+" came")
		}
		if went := without(claim.before, claim.now); len(went) > 0 {
			parts = append(parts, claimed(claim.thing, went)+" went")
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return "Compared with the token before it, " + strings.Join(parts, ", ") +
		". That is evidence of a change that reached it, and no proof that all of them did."
}

// without returns the values that are not among others.
func without(values, others []string) []string {
	return slices.DeleteFunc(slices.Clone(values), func(v string) bool { return slices.Contains(others, v) })
}

const shownChanges = 5

// changed tells the policy changes that touch the token, each with how the token stands to it.
func (t story) changed() []string {
	if len(t.changes) == 0 && t.current() {
		return []string{"No policy change that touches it is on record. Azure tells nobody of them: perceptd knows those that it was told."}
	}
	var texts []string
	for _, change := range t.changes[:min(shownChanges, len(t.changes))] {
		text := capital(t.changeInWords(t.now, change.PolicyChange)) + " (ID " + change.ID + ")."
		if change.Note != "" {
			text += " Note: \"" + change.Note + "\"."
		}
		switch {
		case change.AsOfNote:
			text += " It counts as of its note, at " + t.atAndHowFar(t.now, change.NotedOn) + ", since this device's clock was not known to be right then."
		case change.Unsure:
			text += " That time is not sure: this device's clock was not known to be right when it was noted."
		}
		texts = append(texts, text+t.standsTo(change))
	}
	if more := len(t.changes) - len(texts); more > 0 {
		texts = append(texts, fmt.Sprintf("There are %s before these: perceptctl policy-changes lists them.", counted(more, "change")))
	}
	if text := t.byAlternate(); text != "" {
		texts = append(texts, text)
	}
	return texts
}

// byAlternate tells that the latest change is on another resource, which this one is an alternate of or
// that is one of its own.
func (t story) byAlternate() string {
	p := t.token.Permissions
	isOwn := func(change standingChange) bool { return change.At.Unix() == p.Changed }
	if t.current() || p.Changed == 0 || slices.ContainsFunc(t.changes, isOwn) {
		return ""
	}
	return "A policy change at " + t.atAndHowFar(t.now, time.Unix(p.Changed, 0)) + " is on a resource that goes by this one's " +
		"name as well (alternates): perceptctl policy-changes lists it."
}

func (t story) standsTo(change standingChange) string {
	if change.Record != "" {
		return ""
	}
	switch change.Standing {
	case api.StandingCurrent:
		return " The token was minted after that had reached new tokens, and carries it."
	case api.StandingStale:
		if change.AsOfNote {
			return " The token was minted before that note, and does not count as carrying it."
		}
		return " The token was minted before that, and does not carry it."
	case api.StandingUncertain:
		return " Whether the token carries it cannot be told: a change takes up to 10 minutes, or as long as the " +
			"configuration says, to reach new tokens, and the minting is not known to be later."
	}
	return ""
}

// standingTo judges a token by one change, as far as the status tells. Empty without a token.
func standingTo(change api.PolicyChange, token api.TokenStatus) api.Standing {
	counts := change.At
	if change.AsOfNote {
		counts = change.NotedOn
	}
	before := token.MintedTo != nil && token.MintedTo.Before(counts)
	switch {
	case token.ExpiresIn <= 0:
		return ""
	// The daemon's own judgement decides where it is about this change.
	case isCurrent(token) || change.Waiting == 0:
		return api.StandingCurrent
	// Of the changes that the token may lack, Changed is the latest; it comes in whole seconds.
	case !change.Unsure && change.At.Unix() > token.Permissions.Changed:
		return api.StandingCurrent
	case before && change.Effect != api.EffectUnknown:
		return api.StandingStale
	case change.Waiting == change.Touched || token.MintedFrom == nil ||
		!token.MintedFrom.After(counts.Add(defaultSpread)):
		return api.StandingUncertain
	}
	return api.StandingCurrent
}

// defaultSpread is how long a change takes to reach new tokens, where the configuration says nothing else.
const defaultSpread = 10 * time.Minute

func capital(text string) string { return strings.ToUpper(text[:1]) + text[1:] }
