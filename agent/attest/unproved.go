package attest

// UnprovedError says which part of the proof of a caller is missing. Everything that returns it denies
// the caller.
type UnprovedError struct {
	What string // what could not be proved
	Why  string // what stands against it
	Hint string // what to do about it; may be empty

	// Again tells that the same caller can be proved by its next request: on the same connection, once Proof.HearAgain has said
	// so, or on a new one a moment later.
	Again bool
}

func (e *UnprovedError) Error() string {
	if e.Why == "" {
		return e.What
	}
	return e.What + ": " + e.Why
}
