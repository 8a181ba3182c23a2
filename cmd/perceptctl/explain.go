package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
	"perceptd/tokencache"
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
	command.RunE = a.argued(func(ctx context.Context, args []string) error {
		return a.explain(ctx, args[0], identity, asJSON)
	})
	flags := command.Flags()
	flags.StringVar(&identity, "identity", "", "`name` of the identity (default all that have a token for it)")
	flags.BoolVar(&asJSON, "json", false, "print the story and what it is made of for programs")
	a.completeFrom(command, "identity", identityNames)
	return command
}

// explanation is the story of one token, as --json prints it.
type explanation struct {
	Now     time.Time        `json:"now"`
	Summary string           `json:"summary"`
	Story   []passage        `json:"story"`
	Token   api.TokenStatus  `json:"token"`
	Changes []standingChange `json:"policy_changes"` // those that touch the token
}

// passage is a part of a story.
type passage struct {
	About string `json:"about"`
	Text  string `json:"text"`
}

// standingChange is a policy change and how the token stands to it.
type standingChange struct {
	api.PolicyChange
	Standing api.Standing `json:"standing,omitempty"` // empty without a token
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
	stories := make([]explanation, len(tokens))
	for i, token := range tokens {
		stories[i] = s.explain(status, token)
	}
	if asJSON {
		return a.printJSON(stories)
	}
	text := s.simulated(status)
	for i, story := range stories {
		if i > 0 {
			text += "\n"
		}
		text += s.tell(story)
	}
	return a.print(text)
}

// chooseTokens returns the keys for a resource, or an error that says what there is instead.
func chooseTokens(status api.Status, resource, identity string) ([]api.TokenStatus, error) {
	resource = strings.TrimSuffix(resource, defaultScope)
	if err := checkIdentity(status, identity); err != nil {
		return nil, err
	}
	var chosen []api.TokenStatus
	var holders, resources, spelt []string
	for _, token := range status.Tokens {
		if !slices.Contains(resources, token.Resource) {
			resources = append(resources, token.Resource)
		}
		if token.Resource != resource {
			ofIts := identity == "" || token.Identity == identity
			if ofIts && tokencache.Spelling(token.Resource) == tokencache.Spelling(resource) && !slices.Contains(spelt, token.Resource) {
				spelt = append(spelt, token.Resource)
			}
			continue
		}
		holders = append(holders, token.Identity)
		if identity == "" || token.Identity == identity {
			chosen = append(chosen, token)
		}
	}
	switch {
	case len(chosen) > 0:
		return chosen, nil
	case len(spelt) > 0:
		return nil, &hintedError{fmt.Errorf("no token for %s is cached in that spelling", resource), "it is cached for: " + cleanAll(spelt)}
	case len(holders) > 0:
		return nil, &hintedError{fmt.Errorf("identity %q has no token for %s", identity, resource),
			"these have: " + cleanAll(holders)}
	case len(resources) > 0:
		return nil, &hintedError{fmt.Errorf("no token for %s is cached", resource),
			"tokens are cached for: " + cleanAll(resources) + "; any other comes when a granted caller asks, or with prefetch = true in its grant"}
	}
	return nil, &hintedError{fmt.Errorf("no token for %s is cached, nor any other", resource),
		"a token comes when a granted caller asks, or with prefetch = true in its grant"}
}

// checkIdentity refuses the name of an identity that is not configured; "" is none.
func checkIdentity(status api.Status, identity string) error {
	names := identityNames(status)
	if identity == "" || slices.Contains(names, identity) {
		return nil
	}
	return &hintedError{fmt.Errorf("no identity %q is configured", identity), "name one with --identity: " + cleanAll(names)}
}

// simulated warns of a simulated back end, before all else.
func (s screen) simulated(status api.Status) string {
	if !status.Simulated {
		return ""
	}
	if status.Source.Kind != "simulated" {
		return s.Paragraph("SIMULATED: ", simulatedSource(status.Source), term.Loud)
	}
	return s.Paragraph("SIMULATED: ", "these tokens come from a simulated back end and open nothing; perceptd's user and root can steer it", term.Loud)
}

// simulatedSource says that a back end which is not called a simulated one is one.
func simulatedSource(from api.SourceStatus) string {
	return "a token that is held says that a simulated back end made it, and opens nothing, though the source is " + sourceText(from)
}

func sourceText(from api.SourceStatus) string {
	return strings.TrimSpace(from.Kind + " " + from.Endpoint + " " + from.Address)
}

// tell lays a story out: each part behind what it is about.
func (s screen) tell(e explanation) string {
	const leadWidth = 10
	how := term.Warning
	switch {
	case e.Token.ExpiresIn <= 0 || e.Token.Permissions.Withheld:
		how = term.Bad
	case isCurrent(e.Token):
		how = term.Good
	}
	text := s.Paragraph("", e.Summary, how) + "\n"
	about := ""
	for _, p := range e.Story {
		lead := ""
		if p.About != about {
			lead, about = p.About, p.About
		}
		text += s.Paragraph(fmt.Sprintf("%-*s", leadWidth, lead), p.Text, term.Plain)
	}
	return text
}
