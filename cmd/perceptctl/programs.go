package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"perceptd/cmd/perceptctl/term"
)

// probeTimeout is how long one thing may take that is asked: a socket, or another program.
const probeTimeout = 5 * time.Second

// pipeTimeout is how long systemd-creds may take: slow TPMs think for seconds.
const pipeTimeout = time.Minute

// probeTimeout is how long each socket is waited for. systemd holds those of a daemon that cannot start, and each
// client waits.
func (a *app) probeTimeout() time.Duration {
	if a.timeout <= 0 {
		return probeTimeout
	}
	return min(probeTimeout, a.timeout)
}

var errNoProgram = errors.New("the program is not here")

// runProgram runs a program that is on the path and returns what it printed. The error is an exec.ExitError where its
// exit status is not 0, and the context's where it was not waited for.
func (a *app) runProgram(ctx context.Context, name string, args ...string) (output string, err error) {
	path := a.findProgram(name)
	if path == "" {
		return "", errNoProgram
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	command := exec.CommandContext(ctx, path, args...)
	command.Env = a.environ
	command.WaitDelay = time.Second // for what it has started itself
	text, err := command.CombinedOutput()
	if state := command.ProcessState; err != nil && ctx.Err() != nil && (state == nil || !state.Exited()) {
		err = ctx.Err()
	}
	return strings.TrimSpace(string(text)), err
}

// pipeProgram runs a program with input and returns what it printed. Its standard error is passed on; when it fails,
// the last line of that is the error.
func (a *app) pipeProgram(ctx context.Context, input []byte, name string, args ...string) ([]byte, error) {
	path := a.findProgram(name)
	if path == "" {
		return nil, &absentError{name}
	}
	ctx, cancel := context.WithTimeout(ctx, pipeTimeout)
	defer cancel()
	var stderr bytes.Buffer
	command := exec.CommandContext(ctx, path, args...)
	command.Env, command.Stdin, command.Stderr = a.environWithoutNotify(), bytes.NewReader(input), &stderr
	command.WaitDelay = time.Second // for what it has started itself
	out, err := command.Output()
	if err == nil {
		if remarks := term.CleanLines(stderr.String()); remarks != "" {
			_, err = fmt.Fprintf(a.stderr, "%s: %s\n", name, remarks)
		}
		return out, err
	}
	if lines := strings.Split(strings.TrimSpace(stderr.String()), "\n"); ctx.Err() == nil && lines[len(lines)-1] != "" {
		err = errors.New(lines[len(lines)-1])
	} else {
		err = errors.Join(ctx.Err(), err)
	}
	return nil, &programError{program: name + " " + args[0], stderr: stderr.String(), why: err}
}

// environWithoutNotify is the environment for programs that are no part of the unit: systemd-creds would speak for it.
func (a *app) environWithoutNotify() []string {
	return slices.DeleteFunc(slices.Clone(a.environ), func(entry string) bool {
		return strings.HasPrefix(entry, "NOTIFY_SOCKET=")
	})
}

// absentError says that a program of systemd is not on the path.
type absentError struct{ program string }

func (e *absentError) Error() string { return e.program + ", of systemd 250 and later, is not here" }

func (e *absentError) Is(target error) bool { return target == errNoProgram }

// programError says that a program has failed.
type programError struct {
	program string // with its verb
	stderr  string // all that it has said
	why     error
}

func (e *programError) Error() string { return fmt.Sprintf("%s: %v", e.program, e.why) }

func (e *programError) Unwrap() error { return e.why }

// findProgram returns the path of a program in $PATH, or "".
func (a *app) findProgram(name string) string {
	for _, folder := range filepath.SplitList(a.getenv("PATH")) {
		path := filepath.Join(folder, name)
		if info, err := os.Stat(path); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}
