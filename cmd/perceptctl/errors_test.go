package main

import (
	"context"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

// TestUnreachableHints has the causes that a transcript cannot bring about as root, and the default
// sockets, where a daemon may well be.
func TestUnreachableHints(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		socket string
		err    error
		want   string
	}{
		{"admin socket, not permitted", api.DefaultAdminSocket, syscall.EACCES,
			"join it (sudo usermod -aG percept-admin $USER"},
		{"token socket, not permitted", api.DefaultTokenSocket, syscall.EACCES, "write permission on the socket"},
		{"admin socket, absent", api.DefaultAdminSocket, syscall.ENOENT,
			"there is no admin socket inside a module's container"},
		{"token socket, absent", api.DefaultTokenSocket, syscall.ENOENT, "mount the module's folder at /run/percept"},
		{"token socket, dead", api.DefaultTokenSocket, syscall.ECONNREFUSED,
			"perceptd is not running here: systemctl status perceptd"},
		{"out of time", api.DefaultTokenSocket, context.DeadlineExceeded, "--timeout gives it longer"},
		{"broken", api.DefaultTokenSocket, io.EOF, "the connection broke"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			err := &client.UnreachableError{Socket: test.socket, Err: test.err}
			if got := (&app{}).hint(err); !strings.Contains(got, test.want) {
				t.Errorf("hint %q, want %q", got, test.want)
			}
			if got := exitStatus(err); got != exitUnreachable {
				t.Errorf("exit status %d", got)
			}
		})
	}
}

func TestDefaultSocket(t *testing.T) {
	t.Parallel()
	for _, environ := range [][]string{nil, {api.SocketVariable + "="}} {
		a := &app{environ: environ}
		if got := a.defaultSocket(); got != api.DefaultTokenSocket {
			t.Errorf("environment %q: %q", environ, got)
		}
	}
}

func TestExitStatusOfOtherErrors(t *testing.T) {
	t.Parallel()
	tests := map[int]error{
		exitOK:          nil,
		exitError:       errors.New("no space left on device"),
		exitInterrupted: context.Canceled,
	}
	for want, err := range tests {
		if got := exitStatus(err); got != want {
			t.Errorf("%v: exit status %d, want %d", err, got, want)
		}
	}
}
