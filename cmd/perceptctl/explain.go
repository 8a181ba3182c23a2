package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) explainCommand() *cobra.Command {
	var identity string
	var asJSON bool
	command := &cobra.Command{
		Use:   "explain RESOURCE",
		Short: "tell the story of a token: what it carries, what changed, when it is current",
		Long: `Tell in sentences what perceptd knows of its token for a resource: when it was minted
and with which claims, which policy changes touch it and whether it carries them,
what the back end does, when a current token is here, what modules see, and what to
do. Without --identity every identity's token for that resource is explained.

No token text is shown.`,
		Example:           `  perceptctl explain https://vault.azure.net --identity vision`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.fromStatus(cachedResources),
	}
	command.RunE = a.verbWithArgs(func(ctx context.Context, args []string) error {
		return a.explain(ctx, api.FullResource(args[0]), identity, asJSON)
	})
	flags := command.Flags()
	flags.StringVar(&identity, "identity", "", "`name` of the identity (default all that have a token for it)")
	flags.BoolVar(&asJSON, "json", false, "print the story and what it is made of for programs")
	a.completeFrom(command, "identity", identityNames)
	return command
}

func (a *app) explain(ctx context.Context, resource, identity string, asJSON bool) error {
	status, err := a.fetchStatus(ctx)
	if err != nil {
		return err
	}
	tokens, err := chooseTokens(status, resource, identity)
	if err != nil {
		return err
	}
	s := a.screen(a.stdout)
	stories := make([]explain.Story, len(tokens))
	for i, token := range tokens {
		stories[i] = explain.Of(s.times(), status, token)
	}
	if asJSON {
		return a.printJSON(stories)
	}
	text := s.simulated(status)
	for i, story := range stories {
		if i > 0 {
			text += "\n"
		}
		text += s.explanation(story)
	}
	return a.print(text)
}

// chooseTokens returns the keys for a resource, or an error that says what there is instead.
func chooseTokens(status api.Status, resource, identity string) ([]api.TokenStatus, error) {
	if err := checkIdentity(status, identity); err != nil {
		return nil, err
	}
	tokens, err := explain.Choose(status, resource, identity)
	if missing, ok := errors.AsType[*explain.MissingError](err); ok {
		return nil, &hintedError{missing, term.Clean(missing.Hint)}
	}
	return tokens, err
}

// explanation lays an explanation out: each section behind what it is about.
func (s screen) explanation(e explain.Story) string {
	const leadWidth = 10
	how := term.Warning
	switch {
	case e.Token.ExpiresIn <= 0 || e.Token.Permissions.Withheld || e.Denied:
		how = term.Bad
	case explain.IsCurrent(e.Token):
		how = term.Good
	}
	text := s.Paragraph("", e.Summary, how) + "\n"
	about := ""
	for _, p := range e.Sections {
		lead := ""
		if p.About != about {
			lead, about = p.About, p.About
		}
		text += s.Paragraph(fmt.Sprintf("%-*s", leadWidth, lead), p.Text, term.Plain)
	}
	return text
}
