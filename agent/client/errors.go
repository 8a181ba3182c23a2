package client

import (
	"fmt"
	"net/http"
	"time"

	"perceptd/agent/api"
)

// Error is the daemon's refusal. Every method returns it when the daemon answered, but not with what
// was asked for. Branch on Code; it is empty when the answer was no problem document, which means
// that something else or another version is at the socket.
type Error struct {
	api.Problem

	// RetryAfter is when the daemon thinks that asking again may help. Zero: it does not say.
	RetryAfter time.Duration
}

// Error returns the daemon's detail, which says what to do next.
func (e *Error) Error() string {
	switch {
	case e.Detail != "":
		return e.Detail
	case e.Code == "":
		return fmt.Sprintf("what answers at the socket is not perceptd, or another version of it: it answered %d %s", e.Status, http.StatusText(e.Status))
	case e.Title != "":
		return fmt.Sprintf("perceptd answered %d %s", e.Status, e.Title)
	}
	return fmt.Sprintf("perceptd answered %d %s", e.Status, http.StatusText(e.Status))
}

// UnreachableError says that no daemon answered at the socket. Every method returns it. Its cause
// tells why: errors.Is(err, fs.ErrNotExist) when there is no socket, syscall.ECONNREFUSED when
// nobody listens on it, fs.ErrPermission when this process may not connect,
// context.DeadlineExceeded when there was no answer in time.
type UnreachableError struct {
	Socket string
	Err    error
}

func (e *UnreachableError) Error() string { return e.Socket + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }
