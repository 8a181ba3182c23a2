package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/cmd/perceptctl/term"
)

// The exit status, which is part of the interface: exitStatus decides it, exitHelp tells it.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitDenied      = 4
	exitTrouble     = 5
	exitInterrupted = 130
)

const exitHelp = `Exit status:
  0    all is well
  1    perceptd answered with an error, or something else went wrong
  2    the command line is wrong
  3    perceptd cannot be reached, or did not answer in time
  4    perceptd denied it (403): a grant or a proof of the caller is missing,
       or a revocation withholds the token
  5    perceptd answered, and needs a person: not ready, trouble, a refresh that failed,
       a policy change that could not be written to the disk
  130  interrupted
exec ends with its command's status, and with 125 where exec itself failed, 126 where
the command cannot be started, 127 where there is none.
`

// exitStatus is the one place that turns an error into an exit status.
func exitStatus(err error) int {
	var usage *usageError
	var trouble *troubleError
	var unreachable *client.UnreachableError
	var refusal *client.Error
	var own *statusError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &own):
		return own.status
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &trouble):
		return exitTrouble
	case errors.As(err, &unreachable):
		return exitUnreachable
	case errors.As(err, &refusal) && refusal.Status == http.StatusForbidden:
		return exitDenied
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	return exitError
}

// usageError is a wrong command line.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

// troubleError ends a verb whose output has already said what is wrong.
type troubleError struct{}

func (*troubleError) Error() string { return "perceptd needs a person" }

// app is one run of the program: its streams, its surroundings and the flags that all verbs share.
type app struct {
	stdin          io.Reader
	stdout, stderr *term.Output
	environ        []string

	client  client.Client
	timeout time.Duration

	began bool // the command line was accepted and its verb has begun
}

// run is the program: everything that it reads and writes is an argument. It returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, environ []string) int {
	a := &app{stdin: stdin, environ: environ}
	a.stdout, a.stderr = term.Open(stdout, a.getenv), term.Open(stderr, a.getenv)
	root := a.rootCommand()
	root.SetArgs(append([]string{}, args...)) // nil would mean os.Args
	root.SetIn(stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && !a.began {
		err = &usageError{err}
	}
	a.report(err)
	return exitStatus(err)
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "perceptctl",
		Short: "ask perceptd for tokens, see how it is, and look after it",
		Long: `perceptctl talks to perceptd, the daemon that gets the Azure managed-identity
tokens of this device and hands them to local modules.`,
		Example: `  perceptctl status
  perceptctl token --resource https://vault.azure.net --short
  sudo perceptctl policy-changed https://vault.azure.net --effect granted
  sudo perceptctl explain https://vault.azure.net
  sudo perceptctl reload`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.client.Socket, "socket", a.defaultSocket(),
		"`path` of the token socket; $"+api.SocketVariable+" sets the default")
	flags.StringVar(&a.client.AdminSocket, "admin-socket", "",
		"`path` of the admin socket (default "+api.AdminSocketName+" beside the token socket)")
	flags.DurationVar(&a.timeout, "timeout", time.Minute, "how long to wait for perceptd; 0 waits on")
	help := root.HelpFunc()
	root.SetHelpFunc(func(command *cobra.Command, args []string) { // a template would have the linker keep every exported method
		help(command, args)
		_, _ = fmt.Fprint(command.OutOrStdout(), "\n"+exitHelp) // as little can be done as about the help itself
	})
	root.AddCommand(a.statusCommand(), a.explainCommand(), a.timelineCommand(), a.policyChangedCommand(),
		a.policyChangesCommand(), a.tokenCommand(), a.watchCommand(), a.refreshCommand(), a.reloadCommand(),
		a.versionCommand(), a.simulateCommand())
	root.AddCommand(a.whoamiCommand(), a.grantsCommand(), a.doctorCommand(), a.cacheKeyCommand(), a.clockCommand(), a.execCommand(), a.envCommand())
	return root
}

func (a *app) defaultSocket() string {
	if path := a.getenv(api.SocketVariable); path != "" {
		return path
	}
	return api.DefaultTokenSocket
}

// verb makes a command's work from f: it notes that the command line was accepted.
func (a *app) verb(f func(context.Context) error) func(*cobra.Command, []string) error {
	return func(command *cobra.Command, _ []string) error {
		a.began = true
		return f(command.Context())
	}
}

// argued is verb for a command with arguments.
func (a *app) argued(f func(context.Context, []string) error) func(*cobra.Command, []string) error {
	return func(command *cobra.Command, args []string) error {
		a.began = true
		return f(command.Context(), args)
	}
}

// patience bounds one conversation with the daemon by --timeout.
func (a *app) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	return a.patienceBeyond(ctx, 0)
}

// patienceBeyond is patience with a daemon that was asked to wait for so long.
func (a *app) patienceBeyond(ctx context.Context, wait time.Duration) (context.Context, context.CancelFunc) {
	if a.timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, wait+a.timeout)
}

// report tells err, if it has not been told, and what to do about it.
func (a *app) report(err error) {
	var trouble *troubleError
	var ended *statusError
	if err == nil || errors.As(err, &trouble) || errors.As(err, &ended) && ended.cause == nil {
		return
	}
	// Nothing is left to do when standard error cannot be written.
	_, _ = io.WriteString(a.stderr, a.errorText(a.screen(a.stderr), err))
}

func (a *app) errorText(s screen, err error) string {
	if errors.Is(err, context.Canceled) {
		return "perceptctl: interrupted\n"
	}
	text := fmt.Sprintf("%s %s\n", s.Paint(term.Bad, "perceptctl:"), term.CleanLines(err.Error()))
	if hint := a.hint(err); hint != "" {
		text += fmt.Sprintf("%s %s\n", s.Paint(term.Warning, "hint:"), hint)
	}
	return text
}
