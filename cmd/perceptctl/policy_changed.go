package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) policyChangedCommand() *cobra.Command {
	var request api.PolicyChangeRequest
	var at, effect string
	var asJSON bool
	command := &cobra.Command{
		Use:   "policy-changed {RESOURCE | --all-resources} --effect {granted | revoked | changed}",
		Short: "tell perceptd that permissions were changed in Azure",
		Long: `Put a policy change on record: from then on perceptd knows which of its tokens were
minted before it, says so to whoever asks for them, and looks for newer ones. Azure
tells nobody, so somebody must.

` + effects + `

Tokens that are already in a module's hands cannot be recalled. A later granted or
changed does not lift a revoked; withdrawing it does (perceptctl policy-changes).

Name the resource whose permissions changed. A change of group membership may be
about every resource of an identity: --all-resources --identity NAME.

--at takes
` + timeForms + `
Without it the change was made now. Rather date it too late than too early: a token
from before it could pass as current. While this device's clock is not known to be
right, a change counts as of its note, whatever its date: the answer says so
("as_of_note" with --json).

Direct Azure RBAC role assignments are not in a token: the resource looks them up
itself, within about 10 minutes, whatever the token.`,
		Example: `  perceptctl policy-changed https://vault.azure.net --effect granted
  perceptctl policy-changed --all-resources --identity vision --effect changed --at 14:05 --note "joined edge-readers"
  perceptctl policy-changed https://storage.azure.com --effect revoked --at "10m ago"`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.fromStatus(cachedResources),
	}
	command.RunE = a.verbWithArgs(func(ctx context.Context, args []string) error {
		request.Resource, request.Effect = strings.Join(args, ""), api.Effect(effect)
		if err := a.completeChange(ctx, &request, at); err != nil {
			return err
		}
		return a.policyChanged(ctx, request, asJSON)
	})
	flags := command.Flags()
	flags.BoolVar(&request.AllResources, "all-resources", false,
		"it touches every resource, as a group's membership does")
	flags.StringVar(&request.Identity, "identity", "", "`name` of the identity whose permissions changed (default all)")
	flags.StringVar(&at, "at", "", "`time` at which they changed (default now)")
	flags.StringVar(&effect, "effect", "", "what it `did`: granted, revoked or changed (required)")
	flags.StringVar(&request.Note, "note", "", "`text` to stand beside it, for people")
	flags.BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	a.completeFrom(command, "identity", identityNames)
	// It fails only for a flag that is not defined, or twice for the same.
	_ = command.RegisterFlagCompletionFunc("effect", cobra.FixedCompletions(
		[]cobra.Completion{
			"granted\tmore is permitted than before", "revoked\tless is permitted: tokens are withheld",
			"changed\tboth, or it is not known",
		}, cobra.ShellCompDirectiveNoFileComp))
	return command
}

// completeChange checks what the command line says of a change and fills in when it was.
func (a *app) completeChange(ctx context.Context, request *api.PolicyChangeRequest, at string) (err error) {
	switch {
	case request.AllResources == (request.Resource != ""):
		return &usageError{errors.New("a RESOURCE or --all-resources, one of the two")}
	case request.Effect == "":
		return &usageError{errors.New("--effect must say what the change did:\n" + effects)}
	case !slices.Contains([]api.Effect{api.EffectGranted, api.EffectRevoked, api.EffectChanged}, request.Effect):
		return &usageError{fmt.Errorf("--effect %q is none of these:\n%s", request.Effect, effects)}
	}
	request.At, err = a.timeFlag("at", at, func() (time.Time, error) {
		ctx, cancel := a.withTimeout(ctx)
		defer cancel()
		onRecord, err := a.client.PolicyChanges(ctx)
		return onRecord.Now, err
	})
	return err
}

func (a *app) policyChanged(ctx context.Context, request api.PolicyChangeRequest, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	change, err := a.client.RecordPolicyChange(ctx, request)
	warned := notKept(err)
	if err != nil && warned == "" {
		return err
	}
	if asJSON {
		return a.jsonWithWarning(change, warned)
	}
	s := a.screen(a.stdout)
	text := s.notKept(warned)
	if change.ID != "" {
		// The change is recorded; without a status only its effect on the tokens is not shown.
		status, err := a.client.Status(ctx)
		text += s.recorded(change.Now, change.PolicyChange, status, err == nil)
	}
	if err := a.print(text); err != nil {
		return err
	}
	return troubleIf(warned != "")
}

// notKept returns the daemon's detail when a change is in force but could not be written to the disk, or "".
func notKept(err error) string {
	var refusal *client.Error
	if errors.As(err, &refusal) && refusal.Code == api.CodeNotKept {
		return refusal.Error()
	}
	return ""
}

func (s screen) notKept(detail string) string {
	if detail == "" {
		return ""
	}
	return s.Paragraph("warning: ", detail, term.Bad)
}

// jsonWithWarning prints an answer for programs, and beside it for people that it was not kept.
func (a *app) jsonWithWarning(answer any, warned string) error {
	a.remarkNotKept(warned)
	if err := a.printJSON(answer); err != nil {
		return err
	}
	return troubleIf(warned != "")
}

// remarkNotKept says beside an answer for programs that it was not kept; "" is nothing to say.
func (a *app) remarkNotKept(detail string) {
	if detail != "" {
		// A remark only: the answer is printed whether or not it can be made.
		_, _ = a.stderr.Write([]byte(a.screen(a.stderr).notKept(detail)))
	}
}

// recorded says which change was recorded and what follows from it.
func (s screen) recorded(now time.Time, change api.PolicyChange, status api.Status, known bool) string {
	text := s.Paragraph("noted: ", s.times().ChangeText(now, change)+"; its ID is "+change.ID, term.Plain)
	if joined := joinedText(change); joined != "" {
		text += s.Paragraph("", joined, term.Warning)
	}
	switch {
	case change.AsOfRecording:
		text += s.Paragraph("", "it counts as of its note, at "+s.atRelative(now, change.RecordedOn)+
			", and not of its date: this device's clock is not known to be right", term.Warning)
	case change.Unsure:
		text += s.Paragraph("", "this device's clock is not known to be right yet: the time is corrected once it is",
			term.Warning)
	}
	if change.Touched == 0 {
		text += s.Paragraph("", "no token held now is touched; those that come are judged by it", term.Plain)
		return text + "\n" + s.consequences(change, nil, now)
	}
	text += s.Paragraph("", explain.Counted(change.Touched, "token")+" touched, waiting for a current one: "+
		waitingText(change), term.Plain)
	var touched []api.TokenStatus
	for _, token := range status.Tokens {
		isIt := func(of api.TokenChange) bool { return of.ID == change.ID }
		if token.ExpiresIn > 0 && slices.ContainsFunc(token.Changes, isIt) {
			touched = append(touched, token)
		}
	}
	if !known || len(touched) == 0 {
		return text + s.Paragraph("", "perceptctl status shows which and until when", term.Plain) + "\n" +
			s.consequences(change, nil, now)
	}
	text += "\n" + s.touchedTokens(now, touched)
	if more := change.Touched - len(touched); more > 0 {
		text += s.Paragraph("", "and "+explain.Counted(more,
			"token")+" more, which have later changes on record: perceptctl status", term.Plain)
	}
	return text + "\n" + s.consequences(change, touched, now)
}

// shownTokens is how many of the tokens that a change touches are shown one by one.
const shownTokens = 20

func (s screen) touchedTokens(now time.Time, tokens []api.TokenStatus) string {
	if len(tokens) == 0 {
		return ""
	}
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "RESOURCE", Shrinks: true},
		{Title: "PERMISSIONS"}, {Title: "CURRENT BY"}, {Title: "PROBABLY BY"}}
	var rows []term.Row
	for _, token := range tokens[:min(shownTokens, len(tokens))] {
		by, probably := "now", "now"
		if !explain.IsCurrent(token) {
			by, probably = s.atIfKnown(now, token.Permissions.CurrentBy), s.atIfKnown(now, token.Permissions.Likely)
		}
		rows = append(rows, term.Row{Cells: []term.Cell{
			{Text: token.Identity}, {Text: token.Resource}, permissionsCell(token), {Text: by}, {Text: probably},
		}})
	}
	text := s.Table(columns, rows)
	if more := len(tokens) - len(rows); more > 0 {
		text += s.Paragraph("", fmt.Sprintf("and %d more: perceptctl status", more), term.Plain)
	}
	return text
}

// consequences says what perceptd does about a change, until when, and what it cannot do.
func (s screen) consequences(change api.PolicyChange, touched []api.TokenStatus, now time.Time) string {
	by := ""
	if last := lastCurrentBy(touched); !last.IsZero() {
		by = "A current token is here by " + s.atRelative(now, last) +
			" at the latest, if the back end answers. "
	}
	if held := postponedUntil(touched); held.After(now) {
		by += "perceptd asks for none before " + s.atRelative(now, held) +
			": the change takes minutes to reach new tokens. "
	}
	text := ""
	if change.Effect == api.EffectRevoked {
		text = s.Paragraph("revoked: ", fmt.Sprintf("Tokens that are not current are withheld from everybody until "+
			"a current one arrives. "+
			"That can take a day, and more than 31 hours only if the back end does not answer. %s%s "+
			"To serve the tokens at hand again: perceptctl policy-changes withdraw %s",
			by, explain.NotRecalled, change.ID), term.Warning)
	} else {
		text = s.Paragraph("", by+"Tokens that are not current are served meanwhile, labelled as what they are, and "+
			"perceptd looks for "+
			"newer ones by itself. "+explain.NotRecalled, term.Plain)
	}
	return text + s.Paragraph("", explain.InTheToken, term.Plain)
}

// lastCurrentBy returns when the last of the tokens is current; zero when all are.
func lastCurrentBy(tokens []api.TokenStatus) (last time.Time) {
	for _, token := range tokens {
		if !explain.IsCurrent(token) {
			last = latest(last, token.Permissions.CurrentBy)
		}
	}
	return last
}

// postponedUntil returns until when nothing newer is asked for, of the last of the tokens; zero when nothing holds.
func postponedUntil(tokens []api.TokenStatus) time.Time {
	var last time.Time
	for _, token := range tokens {
		last = latest(last, token.HeldUntil)
	}
	return last
}
