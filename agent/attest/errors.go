package attest

import (
	"errors"
	"io/fs"
)

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

func newError(what string, err error) error {
	var attestErr *Error
	if errors.As(err, &attestErr) {
		return attestErr
	}
	e := &Error{What: what, Why: err.Error()}
	switch {
	case errors.Is(err, errOutsidePidNamespace):
		e.Hint = "run perceptd on the device itself, or in its pid namespace (--pid host)"
	case errors.Is(err, errOverflowID):
		e.Hint = userNamespaceHint
	case errors.Is(err, errExited):
		e.Hint = "ask on a connection of your own"
	case errors.Is(err, errTooNew):
		e.Hint, e.Retryable = "ask again on this connection, or connect again", true
	}
	return e
}

var (
	errNotUnix             = errors.New("the connection did not come in on a Unix socket")
	errNoAttestation       = errors.New("nobody asked who is calling")
	errOutsidePidNamespace = errors.New("the peer is outside the daemon's pid namespace")
	errOverflowID          = errors.New("the peer's user or group has no number in the daemon's user namespace, where all such look the same")
	errExited              = errors.New("the process that connected has ended")

	// errTooNew is about a process that may have got its number from another, which connected and ended: the connection
	// had waited before anybody looked, as through a restart of the daemon, or young processes are refused.
	errTooNew = errors.New("it may have started after the connection was made")
)

const (
	doctorHint        = "perceptctl doctor tells whether the daemon can see its callers at all"
	procHint          = "mount /proc of perceptd's own pid namespace, or run it on the device itself"
	userNamespaceHint = "take PrivateUsers= away from perceptd, or run it on the device itself"
)

// withoutPath is an error about a file without the path, which stands before it already.
func withoutPath(err error) error {
	var about *fs.PathError
	if errors.As(err, &about) {
		return about.Err
	}
	return err
}

// truncate shortens what comes from outside for an error.
func truncate(text string) string {
	const most = 200
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}
