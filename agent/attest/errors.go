package attest

import (
	"errors"
	"io/fs"
)

// Error says which part of a caller's attestation is missing. The caller is denied.
type Error struct {
	What string // what could not be attested
	Why  string // the reason
	Hint string // what to do about it; may be empty

	// Retryable says that the same caller can be attested by its next request: on this connection if
	// Attestation.AttestByNextRequest returns true, or on a new connection a moment later.
	Retryable bool
}

func (e *Error) Error() string {
	if e.Why == "" {
		return e.What
	}
	return e.What + ": " + e.Why
}

// newError returns err as an Error about what, with the hint for its cause. An Error stays as it is.
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
	errOverflowID          = errors.New("the peer's user or group has no number in the daemon's user namespace, " +
		"where all such look the same")
	errExited = errors.New("the process that connected has ended")

	// errTooNew is about a process whose ID may have belonged to another process, which connected and ended. Either
	// the connection had waited before the first check, for example during a restart of the daemon, or young
	// processes are refused.
	errTooNew = errors.New("it may have started after the connection was made")
)

// Hints that more than one cause has in common.
const (
	doctorHint   = "perceptctl doctor tells whether the daemon can see its callers at all"
	procHint     = "mount /proc of perceptd's own pid namespace, or run it on the device itself"
	rootlessHint = "a rootless engine's container gets tokens on its module's socket alone: " +
		"choose require = \"socket\" in its [[module]], or run it by root's engine"
	userNamespaceHint = "take PrivateUsers= away from perceptd, or run it on the device itself"
)

// withoutPath returns the cause of an error about a file, for a text that has named the path already.
func withoutPath(err error) error {
	var about *fs.PathError
	if errors.As(err, &about) {
		return about.Err
	}
	return err
}

// truncate shortens text from outside before it goes into an error.
func truncate(text string) string {
	const most = 200
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}
