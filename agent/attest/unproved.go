package attest

// Error says which part of the proof of a caller is missing. Everything that returns it denies
// the caller.
type Error struct {
	What string // what could not be proved
	Why  string // what stands against it
	Hint string // what to do about it; may be empty

	// Retryable tells that the same caller can be proved by its next request: on the same connection, once Proof.HearAgain has said
	// so, or on a new one a moment later.
	Retryable bool
}

func (e *Error) Error() string {
	if e.Why == "" {
		return e.What
	}
	return e.What + ": " + e.Why
}
