package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) statusCommand() *cobra.Command {
	var asJSON, watch bool
	var every time.Duration
	command := &cobra.Command{
		Use:   "status",
		Short: "show how perceptd is, its identities and its tokens",
		Long: `Show what needs a person first, then where tokens come from, the identities and
the cached tokens. No token text is shown.

A token is
  fresh     valid, no refresh is due
  refresh   valid, a refresh is due or under way
  failing   valid, but refreshing it fails
  fetching  not there yet, being fetched
  missing   not there, and the last fetch failed
  idle      valid, but nobody asks: left to expire

Its permissions are
  current    minted after every policy change on record, or none is known
  stale      minted before a policy change
  uncertain  which of the two cannot be told
  withheld   not current, and a revocation keeps it from everybody
  denied     whatever they are, a deny rule keeps it from everybody

perceptctl explain tells why, and until when. Tokens that are not current are no
trouble by themselves: the back end's cache of about 24 hours makes them, and
perceptd looks for newer ones. Withheld ones were ordered, so neither are they.

The exit status is 5 when perceptd is not ready, reports trouble, or holds a
configuration that did not load. With --watch it is 0 once you end it with Ctrl-C.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			switch {
			case !watch:
				return a.status(ctx, asJSON)
			case every <= 0:
				return &usageError{fmt.Errorf("--every %v is no time at all", every)}
			}
			return a.watch(ctx, every, asJSON)
		}),
	}
	flags := command.Flags()
	flags.BoolVar(&asJSON, "json", false, "print perceptd's whole answer, each on one line with --watch")
	flags.BoolVar(&watch, "watch", false, "show it again and again, until Ctrl-C")
	flags.DurationVar(&every, "every", 2*time.Second, "how often, with --watch")
	return command
}

func (a *app) status(ctx context.Context, asJSON bool) error {
	status, err := a.fetchStatus(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		err = a.printJSON(status)
	} else {
		err = a.print(a.screen(a.stdout).status(status))
	}
	if err == nil && needsPerson(status) {
		err = &troubleError{}
	}
	return err
}

// watch shows the status again and again until ctx ends. A daemon that goes away is shown as such
// and waited for, since watching a restart is a reason to watch.
func (a *app) watch(ctx context.Context, every time.Duration, asJSON bool) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for first := true; ; first = false {
		if err := a.watchOnce(ctx, asJSON, first); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// watchOnce shows one snapshot; its error is that of showing it.
func (a *app) watchOnce(ctx context.Context, asJSON, first bool) error {
	status, err := a.fetchStatus(ctx)
	s := a.screen(a.stdout)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil && asJSON:
		a.report(err) // standard output stays JSON
		return nil
	case err != nil:
		return a.draw(s, a.errorText(s, err), first)
	case asJSON:
		return a.printJSONLine(status)
	}
	return a.draw(s, s.status(status), first)
}

func (a *app) fetchStatus(ctx context.Context) (api.Status, error) {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	return a.client.Status(ctx)
}

// checkIdentity refuses the name of an identity that is not configured; "" is none.
func checkIdentity(status api.Status, identity string) error {
	names := identityNames(status)
	if identity == "" || slices.Contains(names, identity) {
		return nil
	}
	return &hintedError{fmt.Errorf("no identity %q is configured", identity), "name one with --identity: " +
		cleanList(names)}
}

// needsPerson decides the exit status of a status.
func needsPerson(status api.Status) bool {
	return !status.Ready || len(status.Trouble) > 0 || status.Config.Error != ""
}

// status lays out a status: trouble first, then the daemon, its identities and its tokens.
func (s screen) status(status api.Status) string {
	text := s.simulated(status)
	for _, trouble := range status.Trouble {
		if !reportedOfDeny(status.Deny, trouble) { // what follows says it, and more
			text += s.Paragraph("trouble: ", trouble, term.Bad)
		}
	}
	text += s.denyInForce(status)
	text += s.daemon(status)
	text += s.denials(status)
	text += "\n" + s.identities(status.Identities)
	text += "\n" + s.tokens(status)
	if onRecord := s.changesOnRecord(status); onRecord != "" {
		text += "\n" + onRecord
	}
	return text
}

// simulated warns of a simulated back end, before all else.
func (s screen) simulated(status api.Status) string {
	if !status.Simulated {
		return ""
	}
	if status.Source.Kind != "simulated" {
		return s.Paragraph("SIMULATED: ", simulatedSource(status.Source), term.Loud)
	}
	return s.Paragraph("SIMULATED: ", "these tokens come from a simulated back end and open nothing; perceptd's "+
		"user and root can steer it", term.Loud)
}

// simulatedSource says that a back end which is not called a simulated one is one.
func simulatedSource(from api.SourceStatus) string {
	return "a token that is held says that a simulated back end made it, and opens nothing, though the source is " +
		sourceText(from)
}

func sourceText(from api.SourceStatus) string {
	return strings.TrimSpace(from.Kind + " " + from.Endpoint + " " + from.Address)
}

func (s screen) daemon(status api.Status) string {
	up := "up " + explain.Duration(status.Now.Sub(status.StartedOn))
	ready := s.Paragraph("perceptd  ", fmt.Sprintf("%s, ready, %s", status.Version, up), term.Plain)
	if !status.Ready {
		ready = s.Paragraph("perceptd  ", fmt.Sprintf("%s, not ready, %s", status.Version, up), term.Bad)
	}
	source := status.Source.Kind + ", " + status.Source.Endpoint
	if status.Source.Address != "" {
		source += " at " + status.Source.Address
	}
	config := "defaults"
	if len(status.Config.Files) > 0 {
		config = strings.Join(status.Config.Files, ", ")
	}
	config += ", loaded " + explain.Duration(status.Now.Sub(status.Config.LoadedOn)) + " ago"
	text := ready + s.Paragraph("source    ", source, term.Plain) + s.Paragraph("config    ", config, term.Plain) +
		s.gone(status.Config) + s.edited(status.Config) + s.reloadError(status)
	n := status.Requests
	if l := status.Loopback; l != nil {
		text += s.Paragraph("loopback  ", loopbackText(*l), term.Plain)
	}
	text += s.Paragraph("clock     ", clockText(status.Clock), term.Plain) +
		s.Paragraph("tokens    ", keptText(status.Kept), term.Plain)
	text += s.hub(status)
	return text + s.Paragraph("requests  ",
		fmt.Sprintf("%d served, %d denied, %d invalid, %d failed", n.Served, n.Denied, n.Invalid, n.Failed), term.Plain)
}

// loopbackText says where tokens are served over TCP, and how callers are known there.
func loopbackText(l api.LoopbackStatus) string {
	if !l.Open {
		return l.Address + ", not open"
	}
	return l.Address + ", callers are known by a header secret"
}

// clockText says what is known of the device's clock. Some seconds are an answer's own time.
func clockText(c api.ClockStatus) string {
	text := "known to be right"
	switch {
	case !c.Known && c.By == "":
		text = "not known to be right: nobody can be asked whether it is synchronised"
	case !c.Known:
		text = "not known to be right: times are by a clock that is not synchronised"
	}
	switch {
	case c.Skew == nil, -60 < *c.Skew && *c.Skew < 60:
		return text
	case *c.Skew < 0:
		return text + "; " + explain.Duration(seconds(-*c.Skew)) + " behind the back end's"
	}
	return text + "; " + explain.Duration(seconds(*c.Skew)) + " ahead of the back end's"
}

// keptText says what tokens outlive.
func keptText(k api.KeptStatus) string {
	switch {
	case k.Restart && k.Reboot:
		return "kept over a restart and a reboot"
	case k.Restart:
		return "kept over a restart, not over a reboot: " + k.Why
	case k.Reboot:
		return "kept over a stop and a reboot"
	case k.Why != "":
		return "not kept: " + k.Why
	}
	return "not kept"
}

// gone says that files of what was in force last are not there any more.
func (s screen) gone(c api.ConfigStatus) string {
	if len(c.Gone) == 0 {
		return ""
	}
	return s.Paragraph("          ", "gone, and what it allowed with it: "+strings.Join(c.Gone, ", ")+": if that was "+
		"not meant, put it back, then: perceptctl reload", term.Warning)
}

// edited says that the files are others than those that were read last.
func (s screen) edited(c api.ConfigStatus) string {
	if c.EditedOn.IsZero() {
		return ""
	}
	return s.Paragraph("          ", "edited on "+c.EditedOn.UTC().Format("Jan 2 15:04 UTC")+
		" and not reloaded: perceptctl reload", term.Warning)
}

// reloadError says that the last reload did not take, and why, where the trouble has not said so.
func (s screen) reloadError(status api.Status) string {
	if status.Config.Error == "" {
		return ""
	}
	text := "a reload"
	if !status.Config.ErrorOn.IsZero() {
		text += " " + explain.Duration(status.Now.Sub(status.Config.ErrorOn)) + " ago"
	}
	text += " changed nothing"
	reported := func(trouble string) bool { return strings.Contains(trouble, status.Config.Error) }
	if !slices.ContainsFunc(status.Trouble, reported) {
		text += ": " + status.Config.Error
	}
	return s.Paragraph("          ", text, term.Bad)
}

func (s screen) identities(identities []api.IdentityStatus) string {
	if len(identities) == 0 {
		return "no identities are configured\n"
	}
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "SELECTOR", Shrinks: true}, {Title: "GRANTS"},
		{Title: ""}}
	rows := make([]term.Row, len(identities))
	for i, identity := range identities {
		mark := ""
		note, style := explain.PrincipalText(identity.Principal), term.Faint
		switch {
		case identity.Fault != "":
			mark, style, note = "faulty", term.Bad, strings.TrimPrefix(identity.Place+": "+identity.Fault, ": ")
		case identity.Default:
			mark = "default"
		}
		grants := term.Cell{Text: strconv.Itoa(identity.Grants)}
		if identity.Grants == 0 {
			grants = term.Cell{Text: "none", Style: term.Warning}
		}
		rows[i] = term.Row{
			Cells: []term.Cell{{Text: identity.Name}, {Text: identity.Selector}, grants,
				{Text: mark, Style: style}},
			Notes: []term.Cell{{Text: note}},
		}
	}
	return s.Table(columns, rows)
}

// formerPrincipalText says in a line that a token is of a former principal; or "". explain says more.
func formerPrincipalText(token api.TokenStatus) string {
	if !token.Former {
		return ""
	}
	return "of a former principal" + formerText(token)
}

// formerText names the former principal that a token is of, after a colon: by its object ID where that is known.
func formerText(token api.TokenStatus) string {
	switch p := explain.PrincipalOf(token); {
	case p == nil:
		return ""
	case p.ObjectID != "":
		return ": object ID " + p.ObjectID
	default:
		return ": " + explain.PrincipalText(p)
	}
}

func (s screen) tokens(status api.Status) string {
	now, tokens := status.Now, status.Tokens
	if len(tokens) == 0 {
		return "no tokens are cached\n"
	}
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "RESOURCE", Shrinks: true}, {Title: "STATE"},
		{Title: "EXPIRES"},
		{Title: "REFRESH"}, {Title: "PERMISSIONS"}}
	rows := make([]term.Row, len(tokens))
	for i, token := range tokens {
		permissions := permissionsCell(token)
		if explain.DeniedToAll(status.Deny, token) {
			permissions = term.Cell{Text: "denied", Style: term.Bad}
		}
		rows[i] = term.Row{
			Cells: []term.Cell{
				{Text: token.Identity}, {Text: token.Resource}, stateCell(token.State),
				expiryCell(token), refreshCell(now, token), permissions,
			},
			Notes: []term.Cell{
				{Text: failures(now, token), Style: term.Bad},
				{Text: unconfirmed(token), Style: term.Warning},
				{Text: formerPrincipalText(token), Style: term.Warning},
				{Text: s.expectation(now, token)},
				{Text: refused(now, token), Style: term.Warning},
			},
		}
	}
	return s.Table(columns, rows)
}

func stateCell(state api.TokenState) term.Cell {
	switch state {
	case api.StateFresh:
		return term.Cell{Text: string(state), Style: term.Good}
	case api.StateFailing, api.StateFetching:
		return term.Cell{Text: string(state), Style: term.Warning}
	case api.StateMissing:
		return term.Cell{Text: string(state), Style: term.Bad}
	case api.StateIdle:
		return term.Cell{Text: string(state), Style: term.Faint}
	}
	return term.Cell{Text: string(state)}
}

func expiryCell(token api.TokenStatus) term.Cell {
	if token.ExpiresIn <= 0 {
		return term.Cell{Text: "none", Style: term.Bad}
	}
	return term.Cell{Text: explain.Duration(seconds(token.ExpiresIn))}
}

func refreshCell(now time.Time, token api.TokenStatus) term.Cell {
	switch {
	case token.NextRefresh.IsZero():
		return term.Cell{Text: "none", Style: term.Faint}
	case !token.NextRefresh.After(now):
		return term.Cell{Text: "now"}
	}
	return term.Cell{Text: explain.Duration(token.NextRefresh.Sub(now))}
}

// unconfirmed says that a token may be over, or "".
func unconfirmed(token api.TokenStatus) string {
	if !token.Unconfirmed {
		return ""
	}
	return "it may have expired: the device was off for a time that its clock cannot tell"
}

// expectation says when a token that is not current is followed by one that is, or "".
func (s screen) expectation(now time.Time, token api.TokenStatus) string {
	p := token.Permissions
	if token.ExpiresIn <= 0 || explain.IsCurrent(token) || p.CurrentBy.IsZero() {
		return ""
	}
	text := "a current one by " + s.at(now, p.CurrentBy) + " at the latest"
	if !p.Likely.IsZero() && p.Likely.Before(p.CurrentBy) {
		text += ", probably by " + s.at(now, p.Likely)
	}
	return text
}

// refused says that a resource refused the token, or "".
func refused(now time.Time, token api.TokenStatus) string {
	if token.Refused.IsZero() {
		return ""
	}
	return "a module reported " + explain.Duration(now.Sub(token.Refused)) + " ago that the resource refused it"
}

// changesOnRecord counts the policy changes and says where to read on, or "" without any.
func (s screen) changesOnRecord(status api.Status) string {
	if len(status.Changes) == 0 {
		return ""
	}
	waiting := 0
	for _, change := range status.Changes {
		if change.Waiting > 0 {
			waiting++
		}
	}
	text := explain.Counted(len(status.Changes), "policy change") + " on record, "
	switch waiting {
	case 0:
		text += "which every token here has met"
	case len(status.Changes):
		text += "which tokens here have not met yet"
	default:
		text += fmt.Sprintf("%d of which tokens here have not met yet", waiting)
	}
	return s.Paragraph("", text+": perceptctl policy-changes", term.Plain)
}

// failures says what stands between a key and its next token, or "".
func failures(now time.Time, token api.TokenStatus) string {
	if token.LastError == "" {
		return ""
	}
	text := token.LastError
	if !token.LastFetch.IsZero() {
		text = explain.Duration(now.Sub(token.LastFetch)) + " ago: " + text
	}
	if token.Failures > 1 {
		text = fmt.Sprintf("failed %d times in a row, last %s", token.Failures, text)
	}
	return text
}

// draw shows one picture of a watch: on a terminal it replaces the one before, elsewhere it follows it.
func (a *app) draw(s screen, text string, first bool) error {
	switch {
	case a.stdout.Redraws():
		return a.stdout.Redraw(text, first)
	case first:
		return a.print(text)
	}
	return a.print(strings.Repeat("-", s.Width) + "\n" + text)
}

// shownDenials is how many kinds of denial a status shows; --json has more.
const shownDenials = 3

// denials lays out the latest denials below the counts of requests, or nothing.
func (s screen) denials(status api.Status) string {
	now, denials := status.Now, status.Denials
	text, lead := "", "denied    "
	for i, d := range denials {
		if i == shownDenials {
			return text + s.Paragraph(lead, fmt.Sprintf("and %d more kinds, see --json", len(denials)-shownDenials),
				term.Faint)
		}
		what := d.Caller
		if d.Resource != "" {
			what += " for " + d.Resource
		}
		times := "once"
		if d.Count > 1 {
			times = fmt.Sprintf("%d times, last", d.Count)
		}
		reason := d.Reason
		if d.Code == api.CodeDenied && !isStillDenied(status.Deny, d) {
			reason += "; lifted since"
		}
		text += s.Paragraph(lead, fmt.Sprintf("%s, %s %s ago: %s",
			what, times, explain.Duration(now.Sub(d.On)), reason), term.Warning)
		lead = "          "
	}
	return text
}
