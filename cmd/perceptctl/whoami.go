package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) whoamiCommand() *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "whoami",
		Short: "show how perceptd sees this process, and what it may have",
		Long: `Show how perceptd sees the process that asks: its module, service, container, user
and groups, as far as they were proved, and the grants that decide over it. Run
it as the caller in question: in its container, in its service, as its user.

The exit status is 4 when nothing is granted, when what decides is faulty, when all
that is granted is denied, or when perceptd could not prove who calls.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.whoami(ctx, asJSON) }),
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	return command
}

func (a *app) whoami(ctx context.Context, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.WhoAmI(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		err = a.printJSON(answer)
	} else {
		err = a.print(a.screen(a.stdout).whoami(answer))
	}
	switch {
	case err != nil:
		return err
	case !answer.Proved:
		hint := ""
		if answer.Unattested != nil {
			hint = term.Clean(answer.Unattested.Hint)
		}
		return &hintedError{deniedError(api.CodeUnknownCaller,
			"perceptd could not prove who calls: it answers no request for a token"), hint}
	case answer.Refused != "":
		return deniedError(answer.Code, answer.Refused)
	case len(answer.Grants) == 0:
		return &hintedError{deniedError(api.CodeNotGranted, "nothing is granted to this caller"),
			"an administrator can add a [[grant]] for it; perceptctl grants lists those there are"}
	case !slices.ContainsFunc(answer.Grants, func(g api.Grant) bool { return g.Fault == "" }):
		return deniedError(api.CodeFaultyGrant, "what decides about this caller is faulty, and gives nothing")
	case !slices.ContainsFunc(answer.Grants, func(g api.Grant) bool { return len(g.Denied) < len(g.Resources) }):
		return &hintedError{deniedError(api.CodeDenied, "all that is granted to this caller is denied"),
			"perceptctl token --resource tells by what; an administrator sees all deny rules with perceptctl deny"}
	}
	return nil
}

// whoami lays out how a caller is seen: what is missing first, then the caller, then its grants.
func (s screen) whoami(w api.WhoAmI) string {
	text := ""
	if w.Unattested != nil {
		missing := w.Unattested.What
		if w.Unattested.Why != "" {
			missing += ": " + w.Unattested.Why
		}
		text += s.Paragraph("not proved  ", missing, term.Bad)
	}
	for _, fact := range factsOf(w.Caller) {
		text += s.fact(fact)
	}
	return text + s.whoamiGrants(w.Grants) + s.whoamiDenials(w.Denials)
}

// whoamiDenials says what the caller was lately denied, and what to do about it.
func (s screen) whoamiDenials(denials []api.Denial) string {
	text := ""
	for _, d := range denials {
		text += "\n" + s.Paragraph("denied  ", fmt.Sprintf("%s, %s: %s", d.Resource, plural(d.Count, "time", "times"),
			d.Reason), term.Bad)
		if d.Suggestion != nil {
			text += s.Paragraph("        ", mend(d), term.Plain)
		}
	}
	return text
}

// whoamiGrants lists the grants that decide over a caller.
func (s screen) whoamiGrants(all []api.Grant) string {
	if len(all) == 0 {
		return ""
	}
	columns := []term.Column{{Title: "GRANTED TO", Shrinks: true}, {Title: "IDENTITY", Shrinks: true},
		{Title: "RESOURCE", Shrinks: true}, {Title: ""}}
	var rows []term.Row
	for _, g := range all {
		resources := g.Resources
		if len(resources) == 0 {
			resources = []string{""} // of a faulty one they may not be understood
		}
		for _, resource := range resources {
			mark := ""
			switch {
			case g.Fault != "":
				mark = "faulty"
			case slices.Contains(g.Denied, resource):
				mark = "denied"
			}
			rows = append(rows, term.Row{Cells: []term.Cell{{Text: g.Caller}, {Text: g.Identity}, {Text: resource},
				{Text: mark, Style: term.Bad}}})
		}
	}
	return "\n" + s.Table(columns, rows) + s.faultyGrants(all)
}

type fact struct{ name, text string }

// fact lays out one fact. A digest that would be broken gets a line of its own, to be copied from.
func (s screen) fact(f fact) string {
	const lead = 12
	if lead+len(f.text) > s.Width && !strings.Contains(f.text, " ") {
		return s.Paragraph("", f.name, term.Plain) + s.Paragraph(term.Gap, f.text, term.Plain)
	}
	return s.Paragraph(fmt.Sprintf("%-*s", lead, f.name), f.text, term.Plain)
}

// factsOf lists what is known of a caller, the most telling first.
func factsOf(c api.Caller) []fact {
	var all []fact
	add := func(name, text string) {
		if text != "" {
			all = append(all, fact{name, text})
		}
	}
	add("module", c.Module)
	add("unit", c.Unit)
	if in := c.Container; in != nil {
		add("container", fmt.Sprintf("%s (%s)", in.Name, in.ID[:min(len(in.ID), 12)]))
		add("edge module", in.EdgeModule)
		add("image", in.Image)
		add("image ID", in.Digest)
		add("digests", strings.Join(in.RepoDigests, ", "))
	}
	if c.Nested {
		add("namespace", "a pid namespace of its own, as in a container: user and groups say nothing")
	}
	add("user", nameAndNumber(c.UID, c.User))
	add("group", nameAndNumber(c.GID, c.Group))
	var groups []string
	for _, gid := range c.Groups {
		groups = append(groups, fmt.Sprint(gid))
	}
	add("groups", strings.Join(groups, ", "))
	if c.PID != 0 {
		add("process", fmt.Sprint(c.PID))
	}
	return all
}

// nameAndNumber writes a user or group by name and number, as far as they are known.
func nameAndNumber(id *uint32, name string) string {
	switch {
	case id == nil:
		return ""
	case name == "":
		return fmt.Sprint(*id)
	}
	return fmt.Sprintf("%s (%d)", name, *id)
}
