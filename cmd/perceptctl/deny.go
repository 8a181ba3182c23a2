package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) denyCommand() *cobra.Command {
	var request api.DenyRequest
	var asJSON bool
	command := &cobra.Command{
		Use:   "deny [--module NAME] [--identity NAME] [--resource URI] ...",
		Short: "stop tokens at once, or list what is denied",
		Long: `Stop tokens at once, whatever the grants allow: perceptd hands out none that a deny
rule denies, on any socket, and ends the watches that are open on them. A rule denies the
tokens for which all holds that it names, and stays in force over restarts and
reboots until it is lifted.

What a rule names need not be configured: such a rule is idle until it is.

Tokens that are already in a module's hands cannot be recalled: they work until they
expire. To end those, take the permissions away in Azure as well.

Without anything named, list the deny rules, the latest first: those of this device
and those that IoT Hub has set. A rule is lifted by the side that set it.`,
		Example: `  sudo perceptctl deny --module vision --note "camera 4 was stolen"
  sudo perceptctl deny --identity device --resource https://vault.azure.net
  sudo perceptctl deny --all
  sudo perceptctl deny`,
		Args: cobra.NoArgs,
	}
	command.RunE = a.verb(func(ctx context.Context) error {
		switch {
		case request.DenyTarget != api.DenyTarget{}:
			return a.deny(ctx, request, asJSON)
		case isNamingFlagSet(command):
			return &usageError{errors.New("nothing is named that is to be denied: --module, --unit, --user, " +
				"--identity, --resource or --all")}
		}
		return a.denyRules(ctx, asJSON)
	})
	flags := command.Flags()
	flags.BoolVar(&request.All, "all", false, "every token of every caller")
	flags.StringVar(&request.Module, "module", "", "`name` of the module that gets none")
	flags.StringVar(&request.Unit, "unit", "", "systemd `service` that gets none")
	flags.StringVar(&request.User, "user", "", "`name` or uid of the user that gets none")
	flags.StringVar(&request.Identity, "identity", "", "`name` of the identity whose tokens are denied")
	flags.StringVar(&request.Resource, "resource", "", "App ID `URI` that the tokens are for, in any spelling")
	flags.StringVar(&request.Note, "note", "", "`text` to stand beside it, for people")
	flags.BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	a.completeFrom(command, "identity", identityNames)
	a.completeFrom(command, "resource", cachedResources)
	a.completeFromGrants(command, "module", "module ")
	a.completeFromGrants(command, "unit", "unit ")
	command.AddCommand(a.liftCommand(), a.heedHubCommand(), a.forgetLostCommand())
	return command
}

// isNamingFlagSet reports whether a flag of a rule stands on the command line, be it with nothing behind it.
func isNamingFlagSet(command *cobra.Command) bool {
	return slices.ContainsFunc([]string{"all", "module", "unit", "user", "identity", "resource", "note"},
		command.Flags().Changed)
}

func (a *app) denyRules(ctx context.Context, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.DenyRules(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		err = a.printJSON(answer)
	} else {
		err = a.print(a.screen(a.stdout).denyRules(answer.Now, answer.DenyStatus))
	}
	if err != nil {
		return err
	}
	return troubleIf(answer.IsLost() || answer.AreMissing())
}

// denyRules lists deny rules: first what is wrong with their record, then what is set aside, then the rules.
func (s screen) denyRules(now time.Time, d api.DenyStatus) string {
	text := s.denyRecord(now, d)
	if len(d.Rules) == 0 && text == "" {
		return s.Paragraph("", "nothing is denied but what no grant allows", term.Plain) +
			s.Paragraph("", "to stop a module's tokens at once: perceptctl deny --module NAME", term.Faint)
	}
	if len(d.Rules) == 0 {
		return text
	}
	if text != "" {
		text += "\n"
	}
	columns := []term.Column{{Title: "ID", Shrinks: true}, {Title: "SINCE"}, {Title: "DENIED", Shrinks: true}}
	rows := make([]term.Row, len(d.Rules))
	for i, rule := range d.Rules {
		how := term.Bad
		if rule.SetAside || rule.Idle != "" {
			how = term.Faint
		}
		by := "by " + explain.SetBy(rule)
		if rule.Note != "" {
			by += ": " + rule.Note
		}
		rows[i] = term.Row{
			Cells: []term.Cell{{Text: rule.ID}, {Text: s.at(now, rule.Since)}, {Text: rule.String(), Style: how}},
			Notes: []term.Cell{{Text: by, Style: term.Faint}, {Text: ruleState(rule), Style: term.Warning}},
		}
	}
	text += s.Table(columns, rows)
	if hasHubRule := slices.ContainsFunc(d.Rules, explain.IsOfHub); hasHubRule && d.HubSetAsideOn.IsZero() {
		text += "\n" + s.Paragraph("", "what IoT Hub has set is lifted in IoT Hub; where that cannot be, root can set "+
			"it aside here: sudo perceptctl deny lift --from-hub", term.Faint)
	}
	return text
}

// denyRecord says that the record of deny rules is lost, or which rules are gone with one, and that what IoT Hub denies
// is set aside; or "".
func (s screen) denyRecord(now time.Time, d api.DenyStatus) string {
	text := ""
	if d.IsLost() {
		text += s.Paragraph("refused: ", "every request: "+d.Lost, term.Bad)
		if d.Mend != "" {
			text += s.Paragraph("         ", d.Mend, term.Plain)
		}
	}
	if d.AreMissing() {
		text += s.Paragraph("missing: ", d.Missing, term.Bad)
		text += s.Paragraph("         ", d.Mend, term.Plain)
	}
	if !d.HubSetAsideOn.IsZero() {
		text += s.Paragraph("set aside: ", "root set aside what IoT Hub denies, at "+
			s.atRelative(now, d.HubSetAsideOn)+"; to heed it again: sudo perceptctl deny heed-hub", term.Warning)
	}
	return text
}

// ruleState says why a rule denies nothing now, or "".
func ruleState(rule api.DenyRule) string {
	switch {
	case rule.SetAside:
		return "set aside: it denies nothing"
	case rule.Idle != "":
		return "idle: " + rule.Idle
	}
	return ""
}

func (a *app) deny(ctx context.Context, request api.DenyRequest, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	rule, err := a.client.Deny(ctx, request)
	warned := notKept(err)
	if err != nil && warned == "" {
		return err
	}
	if asJSON {
		return a.jsonWithWarning(rule, warned)
	}
	s := a.screen(a.stdout)
	text := s.notKept(warned)
	if rule.ID != "" {
		// The rule is in force; without a status and the grants only what it is about is not shown.
		status, _ := a.client.Status(ctx)
		granted, _ := a.client.Grants(ctx)
		text += s.denied(rule, status.Tokens, granted.Grants)
	}
	if err := a.print(text); err != nil {
		return err
	}
	return troubleIf(warned != "")
}

// denied says what is denied from now on, what it is about, what it cannot do, and how it is lifted.
func (s screen) denied(rule api.DenyAnswer, tokens []api.TokenStatus, granted []api.Grant) string {
	text := s.Paragraph("denied: ", rule.String()+"; the rule's ID is "+rule.ID, term.Bad)
	if rule.Idle != "" {
		text += s.Paragraph("", "it is idle: "+rule.Idle, term.Warning)
	}
	if callers := callersGranted(rule.DenyRule, granted); len(callers) > 0 {
		text += s.Paragraph("", "it takes tokens from "+strings.Join(callers, ", "), term.Plain)
	}
	held, last := 0, time.Time{}
	for _, token := range tokens {
		if rule.Idle == "" && token.ExpiresIn > 0 && explain.Covers(rule.DenyRule, token.Identity, token.Resource) {
			held, last = held+1, latest(last, token.ExpiresOn)
		}
	}
	expiry := ""
	switch held {
	case 0:
	case 1:
		expiry = ", the one held here at " + s.atRelative(rule.Now, last)
	default:
		expiry = fmt.Sprintf(", the last of the %d held here at %s", held, s.atRelative(rule.Now, last))
	}
	return text + "\n" + s.Paragraph("", "Tokens that are already in a module's hands cannot be recalled: they work "+
		"until they expire"+expiry+". To end them, take the permissions away in Azure as well.", term.Warning) +
		s.Paragraph("", "To lift it: perceptctl deny lift "+rule.ID, term.Plain)
}

// callersGranted lists whom a rule that names no caller takes tokens from: each once, in the order of the grants.
func callersGranted(rule api.DenyRule, granted []api.Grant) (callers []string) {
	if explain.NamesCaller(rule) {
		return nil
	}
	for _, g := range granted {
		isNamed := func(resource string) bool { return explain.Covers(rule, g.Identity, resource) }
		if slices.ContainsFunc(g.Resources, isNamed) && !slices.Contains(callers, g.Caller) {
			callers = append(callers, g.Caller)
		}
	}
	return callers
}

// shownRules is how many deny rules a status shows; perceptctl deny has all.
const shownRules = 3

// denyInForce lists the first deny rules that are in force, in the status, behind what is wrong with their record; or
// nothing.
func (s screen) denyInForce(status api.Status) string {
	if status.Deny == nil {
		return ""
	}
	record := *status.Deny
	if record.IsLost() {
		record.Mend = lostNext(status.Deny, status.Hub)
	}
	text := s.denyRecord(status.Now, record)
	rules := status.Deny.InForce()
	for _, rule := range rules[:min(shownRules, len(rules))] {
		how, state := term.Bad, ""
		if rule.Idle != "" {
			how, state = term.Faint, "; idle: "+rule.Idle
		}
		text += s.Paragraph("denied: ", s.times().DenyText(status.Now, rule)+state, how)
	}
	if more := len(rules) - shownRules; more > 0 {
		text += s.Paragraph("denied: ", "by "+plural(more, "more rule", "more rules")+": perceptctl deny", term.Bad)
	}
	return text
}

// examineDeny says what keeps tokens from callers beside the grants, and what ends that.
func examineDeny(now time.Time, d *api.DenyStatus, h *api.HubStatus) (all []finding) {
	const what = "deny rules"
	if d == nil {
		return nil
	}
	if d.IsLost() {
		all = append(all, finding{fail, what, "every request is refused: " + d.Lost + "; " + lostWait(now, d, h),
			lostNext(d, h)})
	}
	if d.AreMissing() {
		all = append(all, finding{fail, what, d.Missing, d.Mend})
	}
	if !d.HubSetAsideOn.IsZero() {
		all = append(all, finding{note, what, "root set aside what IoT Hub denies, " +
			explain.Duration(now.Sub(d.HubSetAsideOn)) + " ago: nothing that it sets is heeded",
			"once IoT Hub is to be heeded again: sudo perceptctl deny heed-hub"})
	}
	rules := d.InForce()
	if d.DeniesAll() {
		rules = rules[1:] // a finding of its own
	}
	if len(rules) > 0 {
		all = append(all, finding{note, what, plural(len(rules), "rule takes", "rules take") +
			" tokens away, whatever the grants allow: " + ruleTexts(rules),
			"perceptctl deny lists them, and who lifts them"})
	}
	return all
}

// lostNext says what ends that a record is lost, where no hub will, or one may.
func lostNext(d *api.DenyStatus, h *api.HubStatus) string {
	if h == nil || d.IsHubSetAside() {
		return "deny again what is to stay denied, and then: sudo perceptctl deny forget-lost"
	}
	return cmp.Or(d.Mend, explain.LostNext)
}

// lostWait says what the end of a lost record waits for.
func lostWait(now time.Time, d *api.DenyStatus, h *api.HubStatus) string {
	switch {
	case h == nil:
		return "no hub will end this: none is configured"
	case d.IsHubSetAside():
		return "no hub will end this: what IoT Hub sets is set aside"
	case h.Connected:
		return "it waits for the twin from " + cmp.Or(hubName(h), "IoT Hub")
	}
	text := "it waits for " + cmp.Or(hubName(h), "IoT Hub") + ", not connected for " +
		explain.Duration(now.Sub(h.Since))
	if h.LastError != "" {
		text += ": " + h.LastError
	}
	return text
}

// examineAllDenied says that a deny rule denies everything, which a person alone ends, or nothing.
func (s screen) examineAllDenied(now time.Time, d *api.DenyStatus) []finding {
	if !d.DeniesAll() {
		return nil
	}
	rule := d.InForce()[0]
	return []finding{{fail, "denied", "nobody gets a token: " + s.times().DenyText(now, rule), lifting(rule)}}
}

// lifting says who lifts a deny rule, and how.
func lifting(rule api.DenyRule) string {
	if explain.IsOfHub(rule) {
		return "when that is over it is lifted in IoT Hub; where that cannot be: sudo perceptctl deny lift --from-hub"
	}
	return "when that is over: perceptctl deny lift " + rule.ID
}

// isStillDenied reports whether a deny rule that a denial names is still in force. One that names none is taken to be.
func isStillDenied(d *api.DenyStatus, denial api.Denial) bool {
	return !strings.HasPrefix(denial.Reason, "deny rule ") ||
		slices.ContainsFunc(d.InForce(), func(r api.DenyRule) bool {
			return strings.Contains(denial.Reason, "deny rule "+r.ID+":")
		})
}

// ruleTexts lists the first of deny rules, and marks those that are idle.
func ruleTexts(rules []api.DenyRule) string {
	var texts []string
	for _, rule := range rules[:min(shownRules, len(rules))] {
		text := rule.String()
		if rule.Idle != "" {
			text += " (idle)"
		}
		texts = append(texts, text)
	}
	if more := len(rules) - len(texts); more > 0 {
		texts = append(texts, fmt.Sprintf("%d more", more))
	}
	return strings.Join(texts, "; ")
}

// reportedOfDeny reports whether examineDeny says a trouble, and more.
func reportedOfDeny(d *api.DenyStatus, trouble string) bool {
	return d.IsLost() && strings.Contains(trouble, d.Lost) || d.AreMissing() && strings.Contains(trouble, d.Missing)
}

func (a *app) liftCommand() *cobra.Command {
	var fromHub, asJSON bool
	command := &cobra.Command{
		Use:   "lift {ID... | --from-hub}",
		Short: "lift deny rules of this device, or set aside what IoT Hub denies",
		Long: `Lift deny rules that were set on this device: from then on the grants alone decide.
What IoT Hub has set is lifted there, in the twin's desired properties or with a
direct method.

--from-hub is for a hub that is gone, or in the wrong hands: root sets aside all that
IoT Hub denies, and this device heeds nothing that it sets from then on. It is
written to the journal, shown in the status, and reported to the hub where it is
there. It lasts over reboots, until perceptctl deny heed-hub.`,
		Example: `  sudo perceptctl deny lift 1f0c2a34
  sudo perceptctl deny lift --from-hub`,
		ValidArgsFunction: a.fromStatus(localDenyIDs),
	}
	command.RunE = a.verbWithArgs(func(ctx context.Context, ids []string) error {
		switch {
		case (len(ids) > 0) == fromHub:
			return &usageError{errors.New("the IDs of deny rules or --from-hub, one of the two")}
		case fromHub:
			return a.setHub(ctx, a.client.SetHubAside, screen.hubSetAside, aside, asJSON)
		}
		return a.lift(ctx, ids, asJSON)
	})
	command.Flags().BoolVar(&fromHub, "from-hub", false, "set aside all that IoT Hub denies (root)")
	command.Flags().BoolVar(&asJSON, "json", false, "print perceptd's whole answers, each on one line")
	return command
}

// lift lifts each of the rules; one that cannot be does not keep the others.
func (a *app) lift(ctx context.Context, ids []string, asJSON bool) error {
	var failures []error
	anyWarned := false
	for _, id := range ids {
		warned, err := a.liftOne(ctx, id, asJSON)
		if err != nil {
			failures = append(failures, err)
		}
		anyWarned = anyWarned || warned
	}
	if !asJSON && len(failures) < len(ids) {
		if err := a.print(a.screen(a.stdout).stillDenied(a.stillDenied(ctx))); err != nil {
			return err
		}
	}
	if len(failures) == 0 {
		return troubleIf(anyWarned)
	}
	return errors.Join(failures...)
}

func (a *app) liftOne(ctx context.Context, id string, asJSON bool) (warned bool, err error) {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	rule, err := a.client.LiftDeny(ctx, id)
	detail := notKept(err)
	if err != nil && detail == "" {
		return false, err
	}
	if asJSON {
		a.remarkNotKept(detail)
		return detail != "", a.printJSONLine(rule)
	}
	s := a.screen(a.stdout)
	return detail != "", a.print(s.notKept(detail) +
		s.Paragraph("lifted: ", rule.ID+", "+s.times().DenyText(rule.Now, rule.DenyRule), term.Plain))
}

// stillDenied returns the rules that are in force after others were lifted; none where they cannot be had.
func (a *app) stillDenied(ctx context.Context) []api.DenyRule {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	left, err := a.client.DenyRules(ctx)
	if err != nil {
		return nil
	}
	return left.InForce()
}

// stillDenied says that other rules are still in force, or "".
func (s screen) stillDenied(rules []api.DenyRule) string {
	if len(rules) == 0 {
		return ""
	}
	return s.Paragraph("", plural(len(rules), "deny rule is", "deny rules are")+" still in force"+idleAmong(rules)+
		": perceptctl deny", term.Warning)
}

// idleAmong says how many of deny rules are idle, or "".
func idleAmong(rules []api.DenyRule) string {
	idle := 0
	for _, rule := range rules {
		if rule.Idle != "" {
			idle++
		}
	}
	if idle == 0 {
		return ""
	}
	return fmt.Sprintf(", %d of them idle", idle)
}

// These say that there is nothing to do for a verb of setHub, or "".

func aside(d api.DenyStatus) string {
	if !d.IsHubSetAside() {
		return ""
	}
	return "what IoT Hub sets was set aside already"
}

func heeded(d api.DenyStatus) string {
	if d.IsHubSetAside() {
		return ""
	}
	return "what IoT Hub sets was not set aside"
}

func notLost(d api.DenyStatus) string {
	if d.IsLost() || d.AreMissing() {
		return ""
	}
	return "the record of deny rules was not lost"
}

// setHub has perceptd do something that is for root, and shows what holds then, or that there was nothing to do.
func (a *app) setHub(ctx context.Context, do func(context.Context) (api.DenyRules, error),
	show func(screen, api.DenyRules) string, idle func(api.DenyStatus) string, asJSON bool) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	nothing := ""
	if before, err := a.client.DenyRules(ctx); err == nil {
		nothing = idle(before.DenyStatus)
	}
	answer, err := do(ctx) // all the same: who may not do it is to be told so
	warned := notKept(err)
	if err != nil && warned == "" {
		return err
	}
	if asJSON {
		return a.jsonWithWarning(answer, warned)
	}
	s := a.screen(a.stdout)
	text := s.notKept(warned)
	if nothing != "" {
		text += s.Paragraph("", "nothing to do: "+nothing, term.Plain)
	} else {
		text += show(s, answer)
	}
	if err := a.print(text); err != nil {
		return err
	}
	return troubleIf(warned != "")
}

func (s screen) hubSetAside(d api.DenyRules) string {
	ofHub := 0
	for _, rule := range d.Rules {
		if explain.IsOfHub(rule) {
			ofHub++
		}
	}
	text := s.Paragraph("set aside: ", "what IoT Hub denies ("+explain.Counted(ofHub, "rule")+
		"): it denies nothing here any more, and nothing that IoT Hub sets is heeded", term.Warning)
	text += s.Paragraph("", "The journal and perceptctl status say so, and IoT Hub is told when it is connected. "+
		"Rules of this device stay in force.", term.Plain)
	text += s.Paragraph("", "To heed IoT Hub again: sudo perceptctl deny heed-hub", term.Plain)
	return text + s.stillDenied(d.InForce())
}

func (a *app) heedHubCommand() *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "heed-hub",
		Short: "heed again what IoT Hub denies",
		Long: `Take back perceptctl deny lift --from-hub: what IoT Hub denies is denied again at once,
and what its twin says now follows when the hub has answered. It is for root.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			return a.setHub(ctx, a.client.HeedHub, screen.hubHeeded, heeded, asJSON)
		}),
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	return command
}

func (s screen) hubHeeded(d api.DenyRules) string {
	text := s.Paragraph("heeded: ", "what IoT Hub sets counts again; what its twin says now follows when the hub has "+
		"answered", term.Plain)
	rules := d.InForce()
	if len(rules) == 0 {
		return text
	}
	return text + s.Paragraph("", plural(len(rules), "deny rule is", "deny rules are")+" in force"+idleAmong(rules)+
		": perceptctl deny", term.Warning)
}

func (a *app) forgetLostCommand() *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "forget-lost",
		Short: "serve tokens again though the record of deny rules is lost",
		Long: `Where the record of deny rules is lost, perceptd refuses every request: what was denied
is not known. IoT Hub's rules are taken again from its twin, which ends that by
itself. This ends it at once, and without a hub nothing else does: what was on the
lost record denies nothing any more. Deny again first what is to stay denied.

Where the twin has ended it, rules that were set on this device or by direct methods
may be gone: perceptctl status says so until this is run. It is for root.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			return a.setHub(ctx, a.client.ForgetLostDenyRules, screen.lostForgotten, notLost, asJSON)
		}),
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	return command
}

func (s screen) lostForgotten(d api.DenyRules) string {
	text := s.Paragraph("ended: ", "what the loss of the record of deny rules caused; tokens are served by the "+
		"grants and the deny rules that there are now. A record that only cannot be read now is in force again once "+
		"it can be",
		term.Plain)
	if len(d.Rules) > 0 {
		text += "\n"
	}
	return text + s.denyRules(d.Now, d.DenyStatus)
}
