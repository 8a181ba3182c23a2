package agent

import (
	"fmt"

	"go.uber.org/zap"

	"perceptd/tokencache"
)

// changeSaver saves the policy changes on the disk.
type changeSaver struct{ recordSaver[tokencache.Record] }

// open makes c ready. What now returns is of a lineage that is not on the disk yet.
//
// The record is saved anew whenever the device has been on for twice as long as the last time, and every hour. So the
// disk shows for how long the device was on, even where it is never on for long, where no tokens are kept, or where a
// boot cannot read them; and files that were damaged meanwhile are mended. A change that is recorded in such a boot
// then has a later on-time than the tokens.
func (c *changeSaver) open(
	write func(tokencache.Record) error, now func() tokencache.Record, clock tokencache.Clock, log *zap.Logger,
	changed func(),
) {
	c.what, c.now = "the record of policy changes", now
	c.origin = func(r tokencache.Record) tokencache.Origin {
		return tokencache.Origin{Lineage: r.Lineage, Generation: r.Generation}
	}
	c.recordSaver.open(write, clock, log, "the policy changes could not be kept", "the policy changes are kept again",
		changed)
}

// trouble says what a technician should know of the record, in sentences. outlives says what becomes of one that is not
// on the disk.
func (c *changeSaver) trouble(outlives string) []string {
	if why := c.unread.Load(); why != nil {
		return []string{fmt.Sprintf("%s: %v; what its copy and the marks on tokens withhold stays withheld, "+
			"other tokens from before are not taken for current; %s", unreadWhat, *why, unreadRemedy(*why))}
	}
	if since := c.saver.hangsSince(); !since.IsZero() {
		return []string{hangsText(c.what, since, "what was noted or withdrawn since is in force; "+outlives)}
	}
	if fault := c.saver.failure(); fault != nil {
		return []string{fmt.Sprintf("policy changes are not kept on the disk: %v; "+
			"if one was noted or withdrawn since, %s; %s; %s", fault, outlives, remedyFor(fault), triedAgain)}
	}
	return nil
}

// unreadRemedy is what a person does about a record that cannot be read now, if it must be for good.
func unreadRemedy(why error) string {
	return remedyFor(why) + "; it is read again every minute, and at once by perceptctl reload. " +
		"If it never can be, move its two files (policy-changes.json, policy-changes.copy.json), " +
		"and whatever begins with tokens.sealed and cannot be read either, " +
		"out of the state folder while perceptd runs. What no copy tells of is lost then, " +
		"and the status says what to do about that"
}
