package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

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
		PersistentPreRunE: refuseEmpty,
		SilenceErrors:     true,
		SilenceUsage:      true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.client.Socket, "socket", a.defaultSocket(),
		"`path` of the token socket; $"+api.SocketVariable+" sets the default")
	flags.StringVar(&a.client.AdminSocket, "admin-socket", "",
		"`path` of the admin socket (default "+api.AdminSocketName+" beside the token socket)")
	flags.DurationVar(&a.timeout, "timeout", time.Minute, "how long to wait for perceptd; 0 waits on")
	help := root.HelpFunc()
	// a template would have the linker keep every exported method
	root.SetHelpFunc(func(command *cobra.Command, args []string) {
		help(command, args)
		_, _ = fmt.Fprint(command.OutOrStdout(), "\n"+exitHelp) // as little can be done as about the help itself
	})
	root.AddCommand(a.statusCommand(), a.explainCommand(), a.timelineCommand(), a.policyChangedCommand(),
		a.policyChangesCommand(), a.tokenCommand(), a.watchCommand(), a.refreshCommand(), a.reloadCommand(),
		a.versionCommand(), a.simulateCommand())
	root.AddCommand(a.whoamiCommand(), a.grantsCommand(), a.doctorCommand(), a.cacheKeyCommand(), a.clockCommand(),
		a.moduleFoldersCommand(), a.execCommand(), a.envCommand(), a.denyCommand())
	return root
}

func (a *app) defaultSocket() string {
	if path := a.getenv(api.SocketVariable); path != "" {
		return path
	}
	return api.DefaultTokenSocket
}
