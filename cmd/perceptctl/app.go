package main

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/client"
	"perceptd/cmd/perceptctl/term"
)

// app is one run of the program: its streams, its surroundings and the flags that all verbs share.
type app struct {
	stdin          io.Reader
	stdout, stderr *term.Output
	environ        []string

	client  client.Client
	timeout time.Duration

	began bool // the command line was accepted and its verb has begun
}

// verb makes a command's work from f: it notes that the command line was accepted.
func (a *app) verb(f func(context.Context) error) func(*cobra.Command, []string) error {
	return func(command *cobra.Command, _ []string) error {
		a.began = true
		return f(command.Context())
	}
}

// verbWithArgs is verb for a command with arguments.
func (a *app) verbWithArgs(f func(context.Context, []string) error) func(*cobra.Command, []string) error {
	return func(command *cobra.Command, args []string) error {
		a.began = true
		return f(command.Context(), args)
	}
}

// withTimeout bounds one request to the daemon by --timeout.
func (a *app) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return a.withTimeoutBeyond(ctx, 0)
}

// withTimeoutBeyond adds to --timeout how long the daemon was asked to wait.
func (a *app) withTimeoutBeyond(ctx context.Context, wait time.Duration) (context.Context, context.CancelFunc) {
	if a.timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, wait+a.timeout)
}

// getenv returns the value of a variable of the environment that run was given.
func (a *app) getenv(name string) string {
	for _, entry := range a.environ {
		if value, found := strings.CutPrefix(entry, name+"="); found {
			return value
		}
	}
	return ""
}

// zone is the device's time zone, or the one that $TZ names.
func (a *app) zone() *time.Location {
	if name := strings.TrimPrefix(a.getenv("TZ"), ":"); name != "" {
		if zone, err := time.LoadLocation(name); err == nil {
			return zone
		}
	}
	return time.Local
}
