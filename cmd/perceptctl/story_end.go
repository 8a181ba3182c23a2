package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"perceptd/agent/api"
)

// backEnd tells what the back end does, and what it last answered.
func (t story) backEnd() string {
	text := "The back end keeps its own copy of a token for each resource for around 24 hours and hands that out; nothing can force a newer one."
	if t.token.LastFetch == nil {
		return text + " It has not answered yet."
	}
	text += fmt.Sprintf(" It was last asked at %s and ", t.atAndHowFar(t.now, *t.token.LastFetch))
	switch t.token.LastOutcome {
	case api.OutcomeNewer:
		text += "gave a newer token"
	case api.OutcomeUnchanged:
		text += "gave its copy of the token already held"
	case api.OutcomeOlder:
		text += "gave a token minted before the one held, which stays (its replicas do not agree)"
	case api.OutcomeFormer:
		text += "gave a token of a principal that the identity's tokens were of before, which is taken only where none is held (its replicas do not agree)"
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
	return counted(n, "time")
}

// pattern tells what was learnt of the rollovers.
func (t story) pattern() string {
	r := t.token.Rollover
	learnt := ""
	switch r.Pattern {
	case api.RolloverRegular:
		age, life := seconds(r.Age), seconds(t.token.Life)
		if life > 0 && life-age <= 5*time.Minute {
			learnt = "It hands out newer tokens always at the expiry of the one before"
		} else {
			learnt = "It hands out newer tokens always at about " + span(age) + " of age"
		}
	case api.RolloverIrregular:
		learnt = "It hands out newer tokens at ages that differ"
	default:
		return "When it hands out newer tokens has not been learnt yet: " + rolloversSeen(r.Seen) + "."
	}
	learnt += " (" + rolloversSeen(r.Seen) + ")."
	if r.Expected != nil && t.valid() {
		learnt += " The next is expected at about " + t.atAndHowFar(t.now, *r.Expected) + "."
	}
	return learnt
}

func rolloversSeen(n int) string {
	switch n {
	case 0:
		return "no rollover of this token was observed so far"
	case 1:
		return "1 rollover of this token was observed"
	}
	return fmt.Sprintf("%d rollovers of this token were observed", n)
}

// trouble tells what goes wrong, and when the back end is asked next.
func (t story) trouble() string {
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
	case next == nil:
		text += "No further fetch is planned."
	case !next.After(t.now):
		text += "It is asked again right now."
	default:
		text += "It is asked again at " + t.atAndHowFar(t.now, *next)
		if t.valid() || t.token.HeldUntil == nil {
			text += ", or earlier when a caller needs a token that is not there"
		}
		text += "."
	}
	return text
}

// awaited tells when the token is current.
func (t story) awaited() string {
	p := t.token.Permissions
	switch {
	case !t.valid() && len(t.changes) > 0:
		return "A token that comes now is judged by the changes above."
	case !t.valid():
		return ""
	case t.current():
		return "It is current now."
	case t.record() != nil:
		return "It is handed out as soon as what stands for the record is ended, as below under \"to do\"."
	case p.CurrentBy == 0:
		return "When a current token is here is not known."
	}
	text := "A current token is here by " + t.atAndHowFar(t.now, time.Unix(p.CurrentBy, 0)) + " at the latest, if the back end answers"
	switch {
	case p.Likely == 0:
		text += ". Whether it comes earlier cannot be said: nothing was learnt of this back end yet."
	case p.Likely < p.CurrentBy:
		text += ", and probably by " + t.atAndHowFar(t.now, time.Unix(p.Likely, 0)) + "."
	default:
		text += ", and probably not much earlier."
	}
	return text + " perceptd looks for it by itself."
}

// heldBack tells that fetches wait for a change to spread, and why.
func (t story) heldBack() string {
	held := t.token.HeldUntil
	if held == nil || !held.After(t.now) {
		return ""
	}
	return "Until " + t.atAndHowFar(t.now, *held) + " perceptd asks for no newer token: a policy change takes minutes to reach new " +
		"tokens, and one minted before would lack it and then stay in the back end's cache for about a day."
}

// inToken tells what of the permissions is in the token, where that matters.
func (t story) inToken() string {
	if len(t.changes) == 0 && t.current() {
		return ""
	}
	return inTheToken
}

// header is the value of Percept-Permissions that goes with the token.
func header(p api.Permissions) string {
	if p.Standing == api.StandingCurrent || p.Standing == "" {
		return string(api.StandingCurrent)
	}
	return fmt.Sprintf("%s; changed=%d; current-by=%d", p.Standing, p.Changed, p.CurrentBy)
}

// seen tells what modules get.
func (t story) seen() string {
	p := t.token.Permissions
	switch {
	case !t.valid():
		return "Modules that ask get an error that they may retry, until there is a token."
	case t.record() != nil:
		return "Modules that ask are refused (403, permissions_revoked) on every form until that is ended. " + notRecalled
	case p.Withheld:
		return "Modules that ask are refused (403, permissions_revoked) on every form until a current token is here. " + notRecalled
	case t.current():
		return "Modules get the token with the header " + api.PermissionsHeader + ": " + header(p) + "."
	}
	return "Modules get the token with the header " + api.PermissionsHeader + ": " + header(p) + ". SDKs are told that it lives for " +
		"25 minutes at most, so that they come back for the newer one. " + notRecalled
}

func (t story) rejected() string {
	if t.token.Refused == nil {
		return ""
	}
	return "A module reported at " + t.atAndHowFar(t.now, *t.token.Refused) + " that the resource refused this token."
}

// toDo tells what the reader can do.
func (t story) toDo() string {
	unmet := t.unmet()
	i := slices.IndexFunc(unmet, func(change standingChange) bool { return change.Record != "" })
	if i < 0 || !t.valid() {
		return t.toWait(unmet)
	}
	mend := "To mend the record of policy changes: " + unmet[i].Mend + "."
	if others := slices.Delete(unmet, i, i+1); len(others) > 0 {
		mend += " " + t.toWait(others)
	}
	return mend
}

// toWait tells the same, but for what there is to be done about the record.
func (t story) toWait(unmet []standingChange) string {
	watch := "perceptctl status --watch shows when it is here"
	switch p := t.token.Permissions; {
	case !t.valid() && t.token.HeldUntil != nil:
		return "Wait: the token comes by itself."
	case !t.valid() && t.token.State == api.StateFetching:
		return "Wait a moment, then ask again."
	case !t.valid():
		return "See to the back end: what it answered is above, and journalctl -u perceptd tells more. perceptd goes on asking by itself."
	case p.Withheld:
		return "Wait: nothing can hurry the back end, and " + watch + ". If modules must have the token at hand in spite of the revocation, or " +
			"it was noted by mistake: perceptctl policy-changes withdraw " + revocations(unmet) + "."
	case !t.current():
		text := "Wait: nothing can hurry the back end, perceptctl refresh neither; " + watch + "."
		if len(unmet) > 0 {
			text += " If a change was noted by mistake: perceptctl policy-changes withdraw " + unmet[0].ID + "."
		}
		return text
	case t.token.LastError != "":
		return "The token serves, but no newer one can be had: see to the back end before it expires; journalctl -u perceptd tells more."
	case t.token.Refused != nil:
		return "If permissions on " + t.token.Resource + " were changed, tell perceptd: perceptctl policy-changed " + t.token.Resource +
			" --effect granted|revoked|changed. If not, the permission may be missing."
	}
	return "Nothing. If permissions on it were changed in Azure and that is not above, tell perceptd: perceptctl policy-changed " +
		t.token.Resource + " --effect granted|revoked|changed."
}

// unmet returns the changes that the token may lack.
func (t story) unmet() []standingChange {
	var unmet []standingChange
	for _, change := range t.changes {
		if change.Standing == api.StandingStale || change.Standing == api.StandingUncertain {
			unmet = append(unmet, change)
		}
	}
	return unmet
}

// revocations lists the IDs of the revocations among changes, or says where to find them.
func revocations(changes []standingChange) string {
	var ids []string
	for _, change := range changes {
		if change.Effect == api.EffectRevoked {
			ids = append(ids, change.ID)
		}
	}
	if len(ids) == 0 {
		return "ID (perceptctl policy-changes lists them)"
	}
	return strings.Join(ids, " ")
}
