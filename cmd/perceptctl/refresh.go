package main

import (
	"context"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) refreshCommand() *cobra.Command {
	var request api.RefreshRequest
	var asJSON bool
	command := &cobra.Command{
		Use:   "refresh",
		Short: "ask the back end for newer tokens now",
		Long: `Ask the back end anew for every cached token, or for those that --identity and
--resource name, and show what each call brought:

  newer      a newer token than before
  unchanged  the back end's cached copy of the token already held
  older      one minted before the token held, which stays
  former     one of a principal that the identity's tokens were of before: it is
             taken only where none is held
  simulated  one of a simulated back end, where the identity's tokens are a real
             one's: it is taken only where none is held
  failed     no token; the one held stays, but for --forget --now
  held       nothing was asked: a policy change is still spreading

The back end keeps a token for about 24 hours and cannot be made to mint a newer
one: expect "unchanged" until it rolls over by itself.

A policy change takes up to 10 minutes to reach new tokens. A token that is minted
before may lack it, and the back end then hands out that one for about 24 hours.
So a refresh is held back meanwhile; perceptd fetches by itself afterwards. --now
fetches all the same.

--forget drops the tokens held, and what was learnt of their lives, once others have
come that can be used. Where nothing may be asked now, or while fetches fail, nothing
is dropped. With --now they are dropped before: modules that ask meanwhile wait for
what the back end gives, and get an error if it gives nothing. A token that comes again counts as received when it was
received first, so that a revocation withholds it as before.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.refresh(ctx, request, asJSON) }),
	}
	flags := command.Flags()
	flags.StringVar(&request.Identity, "identity", "", "`name` of the identity (default all)")
	flags.StringVar(&request.Resource, "resource", "", "App ID `URI` (default all)")
	flags.BoolVar(&request.Now, "now", false,
		"fetch even while a policy change is still spreading, and forget before asking, even while fetches fail")
	flags.BoolVar(&request.Forget, "forget", false,
		"drop the tokens held, and what was learnt of their lives, once others have come")
	flags.BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	a.completeFrom(command, "identity", identityNames)
	a.completeFrom(command, "resource", cachedResources)
	return command
}

func (a *app) refresh(ctx context.Context, request api.RefreshRequest, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.Refresh(ctx, request)
	if err != nil {
		return err
	}
	if asJSON {
		err = a.printJSON(answer)
	} else {
		err = a.print(a.screen(a.stdout).refreshed(answer.Results))
	}
	if err != nil {
		return err
	}
	for _, result := range answer.Results {
		if result.Outcome == api.OutcomeFailed {
			return &troubleError{}
		}
	}
	return nil
}

func (s screen) refreshed(results []api.RefreshResult) string {
	if len(results) == 0 {
		return "no such token is cached: nothing to refresh\n"
	}
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "RESOURCE", Shrinks: true}, {Title: "OUTCOME"}}
	rows := make([]term.Row, len(results))
	brought := make(map[api.Outcome]bool)
	for i, result := range results {
		rows[i] = term.Row{
			Cells: []term.Cell{{Text: result.Identity}, {Text: result.Resource}, outcomeCell(result.Outcome)},
			Notes: []term.Cell{{Text: result.Detail}},
		}
		if result.Outcome == api.OutcomeFailed {
			rows[i].Notes[0].Style = term.Bad
		}
		brought[result.Outcome] = true
	}
	text := s.Table(columns, rows)
	for _, outcome := range []struct {
		api.Outcome
		means string
	}{
		{api.OutcomeUnchanged, "the back end keeps a token for about 24 hours and hands out its copy until then"},
		{api.OutcomeFormer, "the identity's tokens speak for another principal by now, and a replica of the back " +
			"end lags; such a token is taken only where none is held, and perceptd asks again by itself"},
		{api.OutcomeSimulated, "a simulated back end answers, and its tokens open nothing: perceptctl doctor"},
		{api.OutcomeHeld, "wait, perceptd fetches by itself; --now fetches at once, which may cost a day"},
	} {
		if brought[outcome.Outcome] {
			text += "\n" + s.Paragraph("", string(outcome.Outcome)+": "+outcome.means, term.Faint)
		}
	}
	return text
}

func outcomeCell(outcome api.Outcome) term.Cell {
	switch outcome {
	case "":
		return term.Cell{Text: "none", Style: term.Faint}
	case api.OutcomeNewer:
		return term.Cell{Text: string(outcome), Style: term.Good}
	case api.OutcomeFailed:
		return term.Cell{Text: string(outcome), Style: term.Bad}
	case api.OutcomeHeld, api.OutcomeFormer, api.OutcomeSimulated:
		return term.Cell{Text: string(outcome), Style: term.Warning}
	}
	return term.Cell{Text: string(outcome)}
}
