package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) grantsCommand() *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "grants",
		Short: "list the grants in force, or check what a caller may have",
		Long: `List the grants in force: who may have tokens of which identity for which
resources. What no grant allows is denied, and what deny rules take away is marked,
with the rules behind: "may be denied" where a rule names a user, a module or a unit
that the callers of the grant may be. A faulty grant decides for its callers as the
others do, and gives nothing: its place and its fault stand behind.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.grants(ctx, asJSON) }),
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	command.AddCommand(a.grantsCheckCommand(), a.grantsAddCommand())
	return command
}

func (a *app) grants(ctx context.Context, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.Grants(ctx)
	switch {
	case err != nil:
		return err
	case asJSON:
		return a.printJSON(answer)
	case answer.NoConfiguration != "":
		return a.print(a.screen(a.stdout).Paragraph("",
			"no configuration is in force, and every request is refused: "+answer.NoConfiguration, term.Bad))
	case len(answer.Grants) == 0:
		return a.print("no grants: every caller is denied\n")
	}
	return a.print(a.screen(a.stdout).grants(answer))
}

// grants lists the grants. What deny rules take away is marked, and the rules stand behind.
func (s screen) grants(answer api.Grants) string {
	columns := []term.Column{{Title: ""}, {Title: "CALLER", Shrinks: true}, {Title: "IDENTITY", Shrinks: true},
		{Title: "RESOURCE", Shrinks: true}, {Title: ""}}
	var rows []term.Row
	for _, g := range answer.Grants {
		number, caller, identity := strconv.Itoa(g.Number), g.Caller, g.Identity
		resources := g.Resources
		if len(resources) == 0 {
			resources = []string{""} // of a faulty one they may not be understood
		}
		for _, resource := range resources {
			how, style := "", term.Faint
			switch {
			case g.Fault != "":
				how, style = "faulty", term.Bad
			case slices.Contains(g.Denied, resource):
				how, style = "denied", term.Bad
			case slices.Contains(g.MayBeDenied, resource):
				how, style = "may be denied", term.Warning
			case g.Prefetch:
				how = "prefetched"
			}
			rows = append(rows, term.Row{Cells: []term.Cell{{Text: number, Style: term.Faint}, {Text: caller},
				{Text: identity}, {Text: resource}, {Text: how, Style: style}}})
			number, caller, identity = "", "", "" // once is enough
		}
	}
	text := s.Table(columns, rows) + s.faultyGrants(answer.Grants)
	if denied := s.grantsDenied(answer); denied != "" {
		text += "\n" + denied
	}
	return text
}

// faultyGrants says of each faulty grant where it is written and what its fault is; or "".
func (s screen) faultyGrants(all []api.Grant) string {
	text := ""
	for _, g := range all {
		if g.Fault == "" {
			continue
		}
		if text == "" {
			text = "\n"
		}
		text += s.Paragraph("faulty: ", fmt.Sprintf("grant %d%s decides and gives nothing: %s", g.Number, placeOf(g),
			g.Fault), term.Bad)
	}
	return text
}

// placeOf says where a grant is written, if that is known.
func placeOf(g api.Grant) string {
	if g.Place == "" {
		return ""
	}
	return " in " + g.Place
}

// grantsDenied says which deny rules take tokens from which grants, and who lifts them; or "".
func (s screen) grantsDenied(answer api.Grants) string {
	if answer.Deny == nil {
		return ""
	}
	text := s.denyRecord(answer.Now, *answer.Deny)
	for _, rule := range answer.Deny.InForce() {
		var numbers []string
		for _, g := range answer.Grants {
			if slices.Contains(g.DeniedBy, rule.ID) {
				numbers = append(numbers, strconv.Itoa(g.Number))
			}
		}
		if len(numbers) == 0 {
			continue
		}
		what := "grant " + numbers[0]
		if len(numbers) > 1 {
			what = "grants " + strings.Join(numbers, ", ")
		}
		text += s.Paragraph("denied: ", what+", by the rule for "+s.times().DenyText(answer.Now, rule), term.Bad) +
			s.Paragraph("        ", lifting(rule), term.Plain)
	}
	return text
}

func (a *app) grantsCheckCommand() *cobra.Command {
	var c callerQuery
	var asJSON bool
	command := &cobra.Command{
		Use:   "check --resource URI",
		Short: "say what the grants in force decide for a caller, and why",
		Long: `Say whether a caller may have a token, of which identity, which grant says so, and
what every other grant that is for such a caller does to it.

Name the caller as grants do. A service also has a user and groups, so --unit,
--user and --group may stand together, and so may --module and the image of its
container. The user of a name is taken to have the groups that it has on this
device, unless --group tells of others. The caller itself sees more with
perceptctl whoami.

The exit status is 4 when it is denied.`,
		Example: `  perceptctl grants check --module vision --resource https://vault.azure.net
  perceptctl grants check --unit camera.service --user edge --resource https://vault.azure.net`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.checkGrants(ctx, &c, asJSON) }),
	}
	flags := command.Flags()
	flags.StringVar(&c.caller.Module, "module", "", "`name` of the module whose socket is asked")
	flags.StringVar(&c.caller.Unit, "unit", "", "systemd `service` that asks")
	flags.StringVar(&c.caller.Image, "container-image", "", "image `ID` or digest of the container that asks")
	flags.StringVar(&c.user, "user", "", "`name` or uid of the user that asks")
	flags.StringArrayVar(
		&c.groups, "group", nil, "`name` or gid of a group of the process that asks; may be given more than once")
	flags.StringVar(&c.resource, "resource", "", "App ID `URI` that the token would be for (required)")
	flags.StringVar(&c.identity, "identity", "", "`name` of the identity (default: what the grants say)")
	flags.BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	command.MarkFlagsOneRequired("module", "unit", "container-image", "user", "group")
	a.completeFrom(command, "identity", identityNames)
	a.completeFrom(command, "resource", cachedResources)
	// It fails only for a flag that is not defined.
	_ = command.MarkFlagRequired("resource")
	return command
}

func (a *app) checkGrants(ctx context.Context, c *callerQuery, asJSON bool) error {
	if err := c.resolve(); err != nil {
		return &usageError{err}
	}
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.CheckGrants(ctx, c.caller, c.resource, c.identity)
	if err != nil {
		return err
	}
	if asJSON {
		err = a.printJSON(answer)
	} else {
		err = a.print(a.screen(a.stdout).decision(answer))
	}
	if err == nil && !answer.Allowed {
		err = &hintedError{deniedError(answer.Code, "such a request is denied"), ""}
	}
	return err
}

// understood is what is understood of a grant, which may be nothing of a faulty one.
func understood(text string) string { return cmp.Or(text, "(not understood)") }

// decision lays out what was decided, then what each grant had to do with it.
func (s screen) decision(d api.Decision) string {
	text := s.Paragraph("denied   ", d.Reason, term.Bad)
	if d.Allowed {
		text = s.Paragraph("allowed  ", d.Reason, term.Good)
	}
	for _, c := range d.Considered {
		text += "\n" + s.Paragraph("", fmt.Sprintf("grant %d%s, %s: identity %s for %s", c.Number, placeOf(c.Grant),
			c.Caller, understood(c.Identity), understood(strings.Join(c.Resources, ", "))), term.Plain)
		text += s.Paragraph(term.Gap, c.Why, term.Faint)
	}
	if d.Suggestion != nil {
		text += "\n" + term.Clean("to allow it: sudo "+d.Suggestion.Command) + "\n" // in one line, to be copied
	}
	return text
}
