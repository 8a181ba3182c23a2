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
	text := s.paragraph("SIMULATED: ", simulatedWarning, loud)
	text += s.paragraph("clock     ", state.Now.UTC().Format(time.DateTime)+" UTC", plain)
	text += s.paragraph("tokens    ", fmt.Sprintf("live %s, rollover at %s, spread %s, replicas %d",
		state.Life, state.Rollover, state.Spread, state.Replicas), plain)
	text += s.paragraph("requests  ", fmt.Sprintf("%d, at most %d at once", state.Calls.Total, state.Calls.Peak), plain)
	text += "\n" + s.simulatedIdentities(state.Identities)
	text += "\n" + s.simulatedTokens(state)
	text += "\n" + s.faults(state)
	return text
}

func (s screen) simulatedIdentities(identities []simulator.IdentityState) string {
	columns := []column{{"IDENTITY", true}, {"SELECTOR", true}, {"GROUPS", false}, {"ROLES", false}, {"WIDS", false}}
	rows := make([]row, len(identities))
	for i, identity := range identities {
		selector := "client_id " + identity.ClientID
		if identity.SystemAssigned {
			selector = "system-assigned"
		}
		now := identity.InForce
		rows[i] = row{cells: []cell{
			{identity.Name, plain}, {selector, plain}, count(now.Groups), count(now.Roles), count(now.WIDs),
		}}
		to := identity.Permissions
		if !slices.Equal(now.Groups, to.Groups) || !slices.Equal(now.Roles, to.Roles) || !slices.Equal(now.WIDs, to.WIDs) {
			rows[i].notes = []cell{{"its permissions were changed, which has not reached new tokens yet", warning}}
		}
	}
	return s.table(columns, rows)
}

func count(list []string) cell { return cell{strconv.Itoa(len(list)), plain} }

func (s screen) simulatedTokens(state simulatorState) string {
	if len(state.Tokens) == 0 {
		return "no tokens were handed out\n"
	}
	calls := make(map[simulator.Key]int)
	for _, c := range state.Calls.PerKey {
		calls[c.Key] = c.Calls
	}
	columns := []column{{"IDENTITY", true}, {"RESOURCE", true}, {"NO", false}, {"REPLICA", false},
		{"EXPIRES", false}, {"ROLLOVER", false}, {"ASKED", false}}
	rows := make([]row, len(state.Tokens))
	for i, token := range state.Tokens {
		rows[i] = row{cells: []cell{
			{token.Identity, plain}, {token.Resource, plain},
			{strconv.FormatUint(token.Serial, 10), plain}, {strconv.Itoa(token.Replica), plain},
			{span(token.ExpiresOn.Sub(state.Now)), plain}, {span(token.RollsOn.Sub(state.Now)), plain},
			{strconv.Itoa(calls[token.Key]), plain},
		}}
	}
	return s.table(columns, rows)
}

func (s screen) faults(state simulatorState) string {
	if len(state.Faults) == 0 {
		return "no faults are in force\n"
	}
	columns := []column{{"FAULT", false}, {"RESOURCE", true}, {"STRUCK", false}, {"ENDS", false}}
	rows := make([]row, len(state.Faults))
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
		rows[i] = row{cells: []cell{{fault.Kind.String(), warning}, {resource, plain}, {struck, plain}, {ends, plain}}}
	}
	return s.table(columns, rows)
}
