package agent

import (
	"fmt"
	"slices"
	"strings"
	"unicode"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

const (
	// unreadID is the ID of the placeholder of a record that cannot be read now: a policy change that stands for it. No
	// record that is saved has it.
	unreadID = "unread"
	// lostPrefix begins the IDs of placeholders of a record that is lost.
	lostPrefix = "lost-"
)

func isUnreadPlaceholder(p tokencache.PolicyChange) bool { return p.ID == unreadID }

// isLostPlaceholder reports whether p stands for a record that is lost. Earlier releases gave it no ID of its own.
func isLostPlaceholder(p tokencache.PolicyChange) bool {
	return p.ID != unreadID && (p.Effect == tokencache.Unknown || strings.HasPrefix(p.ID, lostPrefix))
}

// lostEffect returns what a placeholder does to tokens from before, of which nobody knows what was on record.
func (r Rules) lostEffect() tokencache.Effect {
	if r.WithholdLost {
		return tokencache.Revoked
	}
	return tokencache.Unknown
}

// placeholder returns a policy change that stands for a record that could not be read.
func (r Rules) placeholder(id, what string, why error) tokencache.PolicyChange {
	printable := strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return ' '
	}, why.Error())
	return tokencache.PolicyChange{
		ID: id, AllIdentities: true, Effect: r.lostEffect(), Note: truncate(what+": "+printable, maxNote),
	}
}

// withLostEffect returns record with placeholders that do what the rules want, and whether that differs.
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

func consequence(withholds bool) string {
	if withholds {
		return "every token from before is withheld"
	}
	return "every token from before counts as uncertain"
}

// lostTrouble says what to do about a record that could not be read. It stays trouble until a person has done that.
func lostTrouble(c api.PolicyChange) string {
	return fmt.Sprintf("%s; %s: %s", c.Note, consequence(c.Withholds), c.Mend)
}

// lostRemedy is what a person does about a lost record.
func lostRemedy(id string) string {
	return "enter the changes of the last two days again (perceptctl policy-changed), " +
		"then: perceptctl policy-changes withdraw " + id
}

// recordText says what is wrong with the record of policy changes.
func recordText(is api.RecordState) string {
	if is == api.RecordUnread {
		return unreadWhat
	}
	return "the record of policy changes is lost"
}

// recordState returns what is wrong with the record where p stands for it, and what a person does about that. It
// returns nothing for a change that was recorded.
func (c *changeSaver) recordState(p tokencache.PolicyChange) (state api.RecordState, mend string) {
	switch why := c.unread.Load(); {
	case p.ID == unreadID && why != nil:
		return api.RecordUnread, unreadRemedy(*why)
	case isLostPlaceholder(p):
		return api.RecordLost, lostRemedy(p.ID)
	}
	return "", ""
}
