package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"perceptd/cmd/perceptctl/term"
)

// probeTimeout is how long one thing may take that is asked: a socket, or another program.
const probeTimeout = 5 * time.Second

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
		return nil, fmt.Errorf("%s, of systemd 250 and later, is not here", name)
	}
	ctx, cancel := context.WithTimeout(ctx, sealTimeout)
	defer cancel()
	var stderr bytes.Buffer
	command := exec.CommandContext(ctx, path, args...)
	command.Env, command.Stdin, command.Stderr = a.environ, bytes.NewReader(input), &stderr
	out, err := command.Output()
	if err == nil {
		if remarks := term.CleanLines(stderr.String()); remarks != "" {
			_, err = fmt.Fprintf(a.stderr, "%s: %s\n", name, remarks)
		}
		return out, err
	}
	if lines := strings.Split(strings.TrimSpace(stderr.String()), "\n"); ctx.Err() == nil && lines[len(lines)-1] != "" {
		return nil, fmt.Errorf("%s %s: %s", name, args[0], lines[len(lines)-1])
	}
	return nil, fmt.Errorf("%s %s: %w", name, args[0], errors.Join(ctx.Err(), err))
}

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
