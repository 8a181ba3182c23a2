package tokencache

import "slices"

// twinLocked returns another key that has e's token, so that the back end does not tell the two apart; nil: there is none.
func (c *Cache) twinLocked(e *entry) *Key {
	for _, o := range c.entries {
		if o != e && o.token.Text.Equal(e.token.Text) {
			twin := o.key
			return &twin
		}
	}
	return nil
}

// audienceBefore returns the audience of the token before where after, of the one that takes its place, has another; else "".
func audienceBefore(before, after Claims) string {
	if before.Audience == after.Audience || after.Audience == "" {
		return ""
	}
	return before.Audience
}

// omittedAnew names the claims that are left out of after, of the token that takes the place of before's, where they are others than
// those left out of that.
func omittedAnew(before, after Claims) []string {
	if slices.Equal(before.Omitted, after.Omitted) {
		return nil
	}
	return after.Omitted
}
