package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/simulator"
	"perceptd/cmd/perceptctl/term"
)

// simulatorState is simulator.State as it comes over the wire, where the rollover is a word.
type simulatorState struct {
	simulator.State
	Rollover string `json:"rollover"`
}

func (a *app) simulateStateCommand() *cobra.Command {
	var at string
	var asJSON bool
	command := &cobra.Command{
		Use:   "state",
		Short: "show what a simulated back end knows",
		Long: `Show a simulated back end's identities, the tokens in its cache, when each rolls
over, how often it was asked, and the faults in force. Times are by its clock.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			var state simulatorState
			if err := a.steer(ctx, at, http.MethodGet, "state", nil, &state); err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(state)
			}
			return a.print(a.screen(a.stdout).simulation(state))
		}),
	}
	a.atFlag(command, &at)
	command.Flags().BoolVar(&asJSON, "json", false, "print the whole state")
	return command
}

func (s screen) simulation(state simulatorState) string {
	text := s.Paragraph("SIMULATED: ", simulatedWarning, term.Loud)
	text += s.Paragraph("clock     ", state.Now.UTC().Format(time.DateTime)+" UTC", term.Plain)
	text += s.Paragraph("tokens    ", fmt.Sprintf("live %s, rollover at %s, spread %s, replicas %d",
		state.Life, state.Rollover, state.Spread, state.Replicas), term.Plain)
	text += s.Paragraph("requests  ", fmt.Sprintf("%d, at most %d at once", state.Calls.Total, state.Calls.Peak), term.Plain)
	text += "\n" + s.simulatedIdentities(state.Identities)
	text += "\n" + s.simulatedTokens(state)
	text += "\n" + s.faults(state)
	return text
}

func (s screen) simulatedIdentities(identities []simulator.IdentityState) string {
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "SELECTOR", Shrinks: true}, {Title: "GROUPS"}, {Title: "ROLES"}, {Title: "WIDS"}}
	rows := make([]term.Row, len(identities))
	for i, identity := range identities {
		selector := "client_id " + identity.ClientID
		if identity.SystemAssigned {
			selector = "system-assigned"
		}
		now := identity.InForce
		rows[i] = term.Row{Cells: []term.Cell{
			{Text: identity.Name}, {Text: selector}, count(now.Groups), count(now.Roles), count(now.WIDs),
		}}
		to := identity.Permissions
		if !slices.Equal(now.Groups, to.Groups) || !slices.Equal(now.Roles, to.Roles) || !slices.Equal(now.WIDs, to.WIDs) {
			rows[i].Notes = []term.Cell{{Text: "its permissions were changed, which has not reached new tokens yet", Style: term.Warning}}
		}
	}
	return s.Table(columns, rows)
}

func count(list []string) term.Cell { return term.Cell{Text: strconv.Itoa(len(list))} }

func (s screen) simulatedTokens(state simulatorState) string {
	if len(state.Tokens) == 0 {
		return "no tokens were handed out\n"
	}
	calls := make(map[simulator.Key]int)
	for _, c := range state.Calls.PerKey {
		calls[c.Key] = c.Calls
	}
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "RESOURCE", Shrinks: true}, {Title: "NO"}, {Title: "REPLICA"},
		{Title: "EXPIRES"}, {Title: "ROLLOVER"}, {Title: "ASKED"}}
	rows := make([]term.Row, len(state.Tokens))
	for i, token := range state.Tokens {
		rows[i] = term.Row{Cells: []term.Cell{
			{Text: token.Identity}, {Text: token.Resource},
			{Text: strconv.FormatUint(token.Serial, 10)}, {Text: strconv.Itoa(token.Replica)},
			{Text: span(token.ExpiresOn.Sub(state.Now))}, {Text: span(token.RollsOn.Sub(state.Now))},
			{Text: strconv.Itoa(calls[token.Key])},
		}}
	}
	return s.Table(columns, rows)
}

func (s screen) faults(state simulatorState) string {
	if len(state.Faults) == 0 {
		return "no faults are in force\n"
	}
	columns := []term.Column{{Title: "FAULT"}, {Title: "RESOURCE", Shrinks: true}, {Title: "STRUCK"}, {Title: "ENDS"}}
	rows := make([]term.Row, len(state.Faults))
	for i, fault := range state.Faults {
		resource, struck, ends := "all", strconv.Itoa(fault.Struck), "when cleared"
		if fault.Resource != "" {
			resource = fault.Resource
		}
		if fault.Count > 0 {
			struck += " of " + strconv.Itoa(fault.Count)
		}
		if !fault.Until.IsZero() {
			ends = "in " + span(fault.Until.Sub(state.Now))
		}
		rows[i] = term.Row{Cells: []term.Cell{{Text: fault.Kind.String(), Style: term.Warning}, {Text: resource}, {Text: struck}, {Text: ends}}}
	}
	return s.Table(columns, rows)
}
