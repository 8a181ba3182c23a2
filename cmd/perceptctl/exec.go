package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/identityproxy"
)

// The exit status of exec where it is not the command's: that of a shell, and of env(1).
const (
	exitExec     = 125 // exec itself failed
	exitCannot   = 126 // the command cannot be started
	exitNotFound = 127 // there is no such command
)

// statusError ends the program with a status of its own.
type statusError struct {
	cause  error // nil: the command has ended so, and said all there is to say
	status int
}

func (e *statusError) Error() string {
	if e.cause == nil {
		return fmt.Sprintf("the command ended with status %d", e.status)
	}
	return e.cause.Error()
}

func (e *statusError) Unwrap() error { return e.cause }

func (a *app) execCommand() *cobra.Command {
	var arc bool
	command := &cobra.Command{
		Use:   "exec [--arc] -- COMMAND [ARGUMENT...]",
		Short: "run a command whose Azure SDK gets its tokens from perceptd",
		Long: `Run a command with an identity endpoint of its own: that of Azure App Service, on a
loopback port of this network namespace, which hands each request on to perceptd's
token socket. Azure SDKs find it by IDENTITY_ENDPOINT and IDENTITY_HEADER, which are
set, and need no change. What would lead them elsewhere is taken out of the
environment; AZURE_CLIENT_ID is kept, which chooses a user-assigned identity.

It is fit to be a container's first process: it passes signals on, reaps what the
command leaves behind, and ends with its status (128 and the signal's number where
one ended it). When it is killed, so is the command. It needs no root and, without
--arc, no disk that can be written. perceptd may come later, and may be restarted.`,
		Example: `  perceptctl exec -- python3 app.py
  docker run --name camera --network none \
    -v /run/percept/modules/camera:/run/percept:ro -v /usr/bin/perceptctl:/perceptctl:ro \
    --entrypoint /perceptctl IMAGE exec -- node app.js`,
		Args: cobra.MinimumNArgs(1),
		RunE: a.argued(func(_ context.Context, args []string) error { return a.exec(args, arc) }),
	}
	command.Flags().BoolVar(&arc, "arc", false,
		"speak Azure Arc's form; its keys go to "+identityproxy.ArcKeyFolder)
	command.Flags().SetInterspersed(false) // the command's flags are its own
	return command
}

// exec runs a command beside a relay, and returns how it ended as an error.
func (a *app) exec(args []string, arc bool) error {
	r, err := identityproxy.Listen(identityproxy.Options{Socket: a.client.TokenSocketPath(), Arc: arc})
	if err != nil {
		return &statusError{err, exitExec}
	}
	defer r.Close() // there is nobody left to tell
	environ := environment(a.environ, r.Variables())
	path, err := find(args[0], environ)
	if err != nil {
		return err
	}
	go func() {
		if err := r.Serve(); err != nil {
			a.report(fmt.Errorf("no more tokens: %w", err))
		}
	}()
	status, err := runToEnd(path, args, environ, r.Holder())
	switch {
	case err != nil:
		return err
	case status != 0:
		return &statusError{nil, status}
	}
	return nil
}

// environment is environ with variables that lead SDKs to the relay, and without what leads them elsewhere.
func environment(environ, variables []string) []string {
	lead := []string{"IDENTITY_ENDPOINT", "IDENTITY_HEADER", "NO_PROXY", "no_proxy"}
	var noProxy string
	var kept []string
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if strings.EqualFold(name, "NO_PROXY") && noProxy == "" {
			noProxy = value
		}
		if !slices.Contains(lead, name) && !slices.Contains(leadElsewhere, name) {
			kept = append(kept, variable)
		}
	}
	noProxy = withUnproxied(noProxy)
	kept = append(kept, variables...)
	return append(kept, "NO_PROXY="+noProxy, "no_proxy="+noProxy)
}

// startError is why a command could not be started, with the status that shells give it.
func startError(name string, err error) error {
	status := exitCannot
	if errors.Is(err, errNoCommand) {
		status = exitNotFound
	}
	return &statusError{fmt.Errorf("cannot run %q: %w", name, err), status}
}
