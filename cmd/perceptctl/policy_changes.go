package main

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
	"perceptd/tokencache"
)

func (a *app) policyChangesCommand() *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "policy-changes",
		Short: "list the policy changes on record, or withdraw one",
		Long: `List the policy changes that perceptd knows of, the latest first. WAITING counts the
tokens that a change touches and that are not current yet; perceptctl explain tells
until when. ENDS IN is how long a change stays on record while the device is on: a day
longer than anything from before it can come, so that no token waits for that.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.policyChanges(ctx, asJSON) }),
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	command.AddCommand(a.withdrawCommand())
	return command
}

func (a *app) policyChanges(ctx context.Context, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.PolicyChanges(ctx)
	switch {
	case err != nil:
		return err
	case asJSON:
		return a.printJSON(answer)
	}
	return a.print(a.screen(a.stdout).policyChanges(answer.Now, answer.Changes))
}

func (s screen) policyChanges(now time.Time, changes []api.PolicyChange) string {
	if len(changes) == 0 {
		return s.Paragraph("", "no policy changes are on record", term.Plain) +
			s.Paragraph("", "when permissions were changed in Azure: perceptctl policy-changed RESOURCE --effect "+
				"granted|revoked|changed", term.Faint)
	}
	columns := []term.Column{{Title: "ID"}, {Title: "WHEN"}, {Title: "EFFECT"},
		{Title: "IDENTITY", Shrinks: true}, {Title: "RESOURCE", Shrinks: true},
		{Title: "WAITING"}, {Title: "ENDS IN"}}
	rows := make([]term.Row, len(changes))
	for i, change := range changes {
		how := term.Plain
		if change.Effect == api.EffectRevoked && change.Waiting > 0 {
			how = term.Bad
		}
		rows[i] = term.Row{
			Cells: []term.Cell{
				{Text: change.ID}, {Text: s.at(now, change.At)}, {Text: string(change.Effect), Style: how},
				{Text: orAll(change.Identity)}, {Text: orAll(change.Resource)},
				waitingCell(change), {Text: explain.Duration(change.EndsOn.Sub(now))},
			},
			Notes: []term.Cell{{Text: change.Note, Style: term.Faint}, {Text: joinedText(change), Style: term.Warning},
				{Text: s.aboutChange(now, change), Style: term.Warning}},
		}
	}
	text := s.Table(columns, rows)
	if slices.ContainsFunc(changes, api.PolicyChange.IsOfTwin) {
		text += "\n" + s.Paragraph("", "a change of IoT Hub (twin-...) is withdrawn there: "+explain.TwinWithdrawal,
			term.Faint)
	}
	return text
}

func orAll(name string) string {
	if name == "" {
		return "all"
	}
	return name
}

func waitingCell(change api.PolicyChange) term.Cell {
	switch {
	case change.Touched == 0:
		return term.Cell{Text: "no token", Style: term.Faint}
	case change.Waiting == 0:
		return term.Cell{Text: waitingText(change), Style: term.Good}
	}
	return term.Cell{Text: waitingText(change), Style: term.Warning}
}

// aboutChange says what is out of the ordinary about a change on record, or "".
func (s screen) aboutChange(now time.Time, change api.PolicyChange) string {
	switch {
	case change.Withholds:
		return "tokens from before are withheld ([tokens] lost_record); to end that: " + change.Mend
	case change.Record != "":
		return "what changed before is not known; to end that: " + change.Mend
	case change.Effect == api.EffectUnknown:
		return "the record could not be read: what changed before is not known"
	case change.AsOfRecording:
		return "it counts as of its note, at " + s.at(now, change.RecordedOn) +
			": this device's clock was not known to be right"
	case change.Unsure:
		return "the time is not sure: this device's clock was not known to be right"
	}
	return ""
}

func (a *app) withdrawCommand() *cobra.Command {
	var resource, identity string
	command := &cobra.Command{
		Use:   "withdraw {ID... | --resource URI}",
		Short: "take policy changes off the record",
		Long: `Take policy changes off the record, as if they had never been noted: the tokens are
judged by those that are left. Withdrawing a revocation hands out again what it
withheld.

--resource takes off all that are on record for that resource, in whatever spelling
(slash at the end, case of the host); those for all resources stay.`,
		Example: `  perceptctl policy-changes withdraw 1f0c2a34
  perceptctl policy-changes withdraw --resource https://vault.azure.net --identity vision`,
		ValidArgsFunction: a.fromStatus(changeIDs),
	}
	command.RunE = a.verbWithArgs(func(ctx context.Context, ids []string) error {
		switch {
		case (len(ids) > 0) == (resource != ""):
			return &usageError{errors.New("the IDs of policy changes or --resource, one of the two")}
		case resource == "" && identity != "":
			return &usageError{errors.New("--identity goes with --resource")}
		case resource != "":
			var err error
			if ids, err = a.changesFor(ctx, resource, identity); err != nil {
				return err
			}
		}
		return a.withdraw(ctx, ids)
	})
	command.Flags().StringVar(&resource, "resource", "", "all that are for this resource `URI`, in any spelling")
	command.Flags().StringVar(&identity, "identity", "",
		"of these, those that are for the identity of that `name` alone")
	a.completeFrom(command, "resource", cachedResources)
	a.completeFrom(command, "identity", identityNames)
	return command
}

// changesFor returns the IDs of the changes on record for a resource, and for that identity unless it is empty. There
// is one at least, else it is an error.
func (a *app) changesFor(ctx context.Context, resource, identity string) (ids []string, err error) {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.PolicyChanges(ctx)
	if err != nil {
		return nil, err
	}
	for _, change := range answer.Changes {
		if change.Resource != "" && tokencache.Canonical(change.Resource) == tokencache.Canonical(resource) &&
			(identity == "" || change.Identity == identity) {
			ids = append(ids, change.ID)
		}
	}
	if ids == nil {
		return nil, &hintedError{errors.New("no such policy change for " + resource + " is on record"),
			"perceptctl policy-changes lists them"}
	}
	return ids, nil
}

// withdraw takes each of the changes off the record; one that cannot be does not keep the others.
func (a *app) withdraw(ctx context.Context, ids []string) error {
	s := a.screen(a.stdout)
	var failures []error
	anyWarned := false
	for _, id := range ids {
		text, warned, err := a.withdrawOne(ctx, s, id)
		if err != nil {
			failures = append(failures, err)
			continue
		}
		anyWarned = anyWarned || warned
		if err := a.print(text); err != nil {
			return err
		}
	}
	if len(failures) == 0 {
		return troubleIf(anyWarned)
	}
	return errors.Join(failures...)
}

func (a *app) withdrawOne(ctx context.Context, s screen, id string) (text string, warned bool, err error) {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	change, err := a.client.WithdrawPolicyChange(ctx, id)
	detail := notKept(err)
	if err != nil && detail == "" {
		return "", false, err
	}
	text = s.notKept(detail)
	if change.ID == "" { // by an older daemon
		return text + s.Paragraph("withdrawn: ", id, term.Plain), true, nil
	}
	text += s.Paragraph("withdrawn: ", change.ID+", "+s.times().ChangeText(change.Now, change.PolicyChange), term.Plain)
	if change.Waiting > 0 {
		text += s.Paragraph("", explain.Counted(change.Waiting, "token")+
			" waited for it; the changes left on record judge by themselves now", term.Faint)
	}
	return text, detail != "", nil
}
