package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
)

// The forms that env prints in.
const (
	shellForm   = "shell"
	dotenvForm  = "dotenv"
	composeForm = "compose"
	jsonForm    = "json"
)

var envForms = []string{shellForm, dotenvForm, composeForm, jsonForm}

func (a *app) envCommand() *cobra.Command {
	var of callerQuery
	var form string
	command := &cobra.Command{
		Use:   "env",
		Short: "print the variables that point an Azure SDK at the loopback listener",
		Long: `Print the variables with which an unmodified Azure SDK gets its tokens from perceptd's
loopback listener, for programs that cannot be started by perceptctl exec. The
configuration must have a [loopback] listener.

IDENTITY_HEADER is a secret: whoever sends it is the caller whose grant it is for, and
for a grant by user must be that user as well. Keep it out of logs and of arguments.

Asked without more, it is for the grant of the process that asks. Root asks for
another's with --module, --unit, --container-image, --user or --group. Of grants
by several groups or images it is for the first of the configuration.

Forms: shell (to be evaluated), dotenv (an environment file), compose (a list for a
service with network_mode: host), json.`,
		Example: `  eval "$(perceptctl env)"
  sudo perceptctl env --user edge --format dotenv > /etc/camera.env`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			if !slices.Contains(envForms, form) {
				return &usageError{fmt.Errorf("--format %q is none of %s", form, strings.Join(envForms, ", "))}
			}
			return a.env(ctx, &of, form)
		}),
	}
	flags := command.Flags()
	flags.StringVar(&form, "format", shellForm, "`form`: "+strings.Join(envForms, ", "))
	flags.StringVar(&of.caller.Module, "module", "", "`name` of a module")
	flags.StringVar(&of.caller.Unit, "unit", "", "a systemd `service`")
	flags.StringVar(&of.caller.Image, "container-image", "", "image `ID` or digest of a container")
	flags.StringVar(&of.user, "user", "", "`name` or uid of a user")
	flags.StringArrayVar(&of.groups, "group", nil, "`name` or gid of a group")
	command.MarkFlagsMutuallyExclusive("module", "unit", "container-image", "user", "group")
	// It fails only for a flag that is not defined.
	_ = command.RegisterFlagCompletionFunc("format",
		cobra.FixedCompletions(envForms, cobra.ShellCompDirectiveNoFileComp))
	return command
}

func (a *app) env(ctx context.Context, of *callerQuery, form string) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	loopback, err := a.askLoopback(ctx, of)
	if err != nil {
		return err
	}
	if !validEndpoint.MatchString(loopback.Endpoint) || !validHeader.MatchString(loopback.Header) {
		return errors.New("perceptd's answer is not one of its own: nothing of it is printed")
	}
	if form == jsonForm {
		set := make(map[string]string)
		for _, v := range variablesOf(loopback) {
			set[v[0]] = v[1]
		}
		return a.printJSON(map[string]any{"set": set, "unset": otherSources, "grant": loopback.Grant})
	}
	return a.print(variablesFor(loopback, form, cmp.Or(a.getenv("NO_PROXY"), a.getenv("no_proxy"))))
}

func (a *app) askLoopback(ctx context.Context, of *callerQuery) (api.Loopback, error) {
	if err := of.resolve(); err != nil {
		return api.Loopback{}, &usageError{err}
	}
	who := of.caller
	if who.Module == "" && who.Unit == "" && who.Image == "" && who.UID == nil && who.GID == nil {
		return a.client.Loopback(ctx)
	}
	return a.client.LoopbackOf(ctx, who)
}

// What is printed gets evaluated by shells, so that nothing else may be in it.
var (
	validEndpoint = regexp.MustCompile(`^http://(127\.0\.0\.1|\[::1\]):[0-9]{1,5}/msi/token$`)
	validHeader   = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// otherSources are the variables that would make SDKs look for tokens elsewhere, or for others. Some SDKs heed an empty
// one as well.
var otherSources = []string{
	"IDENTITY_SERVER_THUMBPRINT", "IMDS_ENDPOINT", "MSI_ENDPOINT", "MSI_SECRET", "AZURE_POD_IDENTITY_AUTHORITY_HOST",
	"MSAL_MANAGED_IDENTITY_ENDPOINT", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_SECRET",
	"AZURE_CLIENT_CERTIFICATE_PATH",
	"AZURE_CLIENT_CERTIFICATE_PASSWORD", "AZURE_USERNAME", "AZURE_PASSWORD",
}

// noProxyHosts are the hosts that must not be asked through a proxy.
const noProxyHosts = "127.0.0.1,localhost,::1"

// variablesOf returns the variables, each with its value.
func variablesOf(l api.Loopback) [][2]string {
	return [][2]string{{"IDENTITY_ENDPOINT", l.Endpoint}, {"IDENTITY_HEADER", l.Header}, {"NO_PROXY", noProxyHosts},
		{"no_proxy", noProxyHosts}}
}

// variablesFor lays the variables out. noProxy is what the shell that asks has of NO_PROXY.
func variablesFor(l api.Loopback, form, noProxy string) string {
	set := variablesOf(l)
	var b strings.Builder
	switch form {
	case shellForm:
		fmt.Fprintf(&b, "unset %s\n", strings.Join(otherSources, " "))
		for _, v := range set {
			if v[1] == noProxyHosts {
				v[1] = addNoProxyHosts(noProxy)
			}
			fmt.Fprintf(&b, "export %s=%s\n", v[0], shellQuoted(v[1]))
		}
	case dotenvForm:
		fmt.Fprintf(&b, "# Leave unset: %s\n", strings.Join(otherSources, " "))
		for _, v := range set {
			fmt.Fprintf(&b, "%s=%s\n", v[0], v[1])
		}
	case composeForm:
		fmt.Fprintf(&b, "# For a service with network_mode: host. Leave unset: %s\nenvironment:\n",
			strings.Join(otherSources, " "))
		for _, v := range set {
			fmt.Fprintf(&b, "  - \"%s=%s\"\n", v[0], v[1])
		}
	}
	return b.String()
}

// addNoProxyHosts adds to a NO_PROXY list the hosts that must not be asked through a proxy.
func addNoProxyHosts(there string) string {
	all := strings.Split(there, ",")
	for _, one := range strings.Split(noProxyHosts, ",") {
		if !slices.Contains(all, one) {
			all = append(all, one)
		}
	}
	return strings.TrimPrefix(strings.Join(all, ","), ",")
}

// shellQuoted is text as one word of any POSIX shell.
func shellQuoted(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }
