package agent

import (
	"fmt"
	"perceptd/tokencache"
	"slices"
	"strings"
	"unicode"
)

const (
	// unreadID is the ID of the change that stands for a record that cannot be read now. It is on no record that is kept.
	unreadID = "unread"
	// lostPrefix begins the IDs of changes that stand for a record that is lost.
	lostPrefix = "lost-"
)

// standsForLost reports whether p stands for a record that is lost. Releases before this one gave it no ID of its own.
func isLostPlaceholder(p tokencache.PolicyChange) bool {
	return p.ID != unreadID && (p.Effect == tokencache.Unknown || strings.HasPrefix(p.ID, lostPrefix))
}

// lostEffect is what becomes of tokens from before when nobody knows what was on record.
func (r Rules) lostEffect() tokencache.Effect {
	if r.WithholdLost {
		return tokencache.Revoked
	}
	return tokencache.Unknown
}

// standIn is the policy change that stands for a record that could not be read.
func (r Rules) placeholder(id, what string, why error) tokencache.PolicyChange {
	printable := strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return ' '
	}, why.Error())
	return tokencache.PolicyChange{ID: id, AllIdentities: true, Effect: r.lostEffect(), Note: cut(what+": "+printable, maxNote)}
}

// withLostEffect has the changes on r that stand for a lost record do what the rules want of them.
func (r Rules) withLostEffect(record tokencache.Record) (_ tokencache.Record, different bool) {
	record.Changes = slices.Clone(record.Changes)
	for i := range record.Changes {
		p := &record.Changes[i]
		if p.Joined > 0 && p.Effect == tokencache.Revoked {
			continue // it may stand for revocations as well
		}
		if (isLostPlaceholder(*p) || p.ID == unreadID) && p.Effect != r.lostEffect() {
			if isLostPlaceholder(*p) && !strings.HasPrefix(p.ID, lostPrefix) {
				p.ID = lostPrefix + p.ID // else it could not be told from a revocation
			}
			p.Effect, different = r.lostEffect(), true
		}
	}
	if different {
		record.Generation++
	}
	return record, different
}

func consequence(p tokencache.PolicyChange) string {
	if p.Effect == tokencache.Revoked {
		return "every token from before is withheld"
	}
	return "every token from before counts as uncertain"
}

// lostTrouble says what to do about a record that could not be read, which stays trouble until
// somebody did it.
func lostTrouble(p tokencache.PolicyChange) string {
	return fmt.Sprintf("%s; %s: %s", p.Note, consequence(p), lostRemedy(p))
}

// lostMend is what a person does about a lost record.
func lostRemedy(p tokencache.PolicyChange) string {
	return "enter the changes of the last two days again (perceptctl policy-changed), then: perceptctl policy-changes withdraw " + p.ID
}

// withheldForRecord returns what stands for the record, where that alone withholds the token of key, and no revocation that somebody noted.
func (a *Agent) placeholderAlone(key tokencache.Key) (standIn NotedChange, alone bool) {
	for _, p := range a.cache.Withholders(key) {
		c := NotedChange{RecordedChange: tokencache.RecordedChange{PolicyChange: p}}
		if c.Record, c.Mend = a.changeSaver.recordState(p); c.Record == 0 {
			return NotedChange{}, false
		}
		if !alone {
			standIn, alone = c, true
		}
	}
	return standIn, alone
}

// standsFor tells what is wrong with the record where p stands for it, and what a person does about that; zero where somebody noted p.
func (c *changeSaver) recordState(p tokencache.PolicyChange) (state RecordState, mend string) {
	switch why := c.unread.Load(); {
	case p.ID == unreadID && why != nil:
		return RecordUnread, unreadRemedy(*why)
	case isLostPlaceholder(p):
		return RecordLost, lostRemedy(p)
	}
	return 0, ""
}
