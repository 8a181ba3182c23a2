package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) timelineCommand() *cobra.Command {
	var identity string
	var ascii bool
	command := &cobra.Command{
		Use:   "timeline",
		Short: "draw the life of every token on one time axis",
		Long: `Draw the life of every token as a bar on one time axis: when it was minted, half of
its life, now, policy changes, the predicted rollover and its expiry. From a policy
change that it may lack on, a bar is made of letters: s for stale, u for uncertain,
w for withheld; capitals are what is past. A legend tells the marks that appear.

A column stands for many minutes. Of marks that fall on the same one, the first of
these is drawn: policy change, now, predicted rollover, expiry, minting, half life.
The list below the bars has every time of every token.

Times are in the device's time zone. The drawing is as wide as the terminal, up to
160 columns, or 80 columns where there is none; it needs neither colour nor, where
the locale is not UTF-8, more than ASCII.`,
		Example: `  perceptctl timeline --identity vision`,
		Args:    cobra.NoArgs,
		RunE:    a.verb(func(ctx context.Context) error { return a.timeline(ctx, identity, ascii) }),
	}
	flags := command.Flags()
	flags.StringVar(&identity, "identity", "", "`name` of the identity (default all)")
	flags.BoolVar(&ascii, "ascii", false, "draw with ASCII alone, whatever the locale")
	a.completeFrom(command, "identity", identityNames)
	return command
}

func (a *app) timeline(ctx context.Context, identity string, ascii bool) error {
	status, err := a.fetchStatus(ctx)
	if err == nil {
		err = checkIdentity(status, identity)
	}
	if err != nil {
		return err
	}
	var tokens []api.TokenStatus
	for _, token := range status.Tokens {
		if identity == "" || token.Identity == identity {
			tokens = append(tokens, token)
		}
	}
	status.Tokens = tokens
	s := a.screen(a.stdout)
	s.ASCII = s.ASCII || ascii
	return a.print(s.timeline(status))
}

const widestTimeline = 160 // columns

// timeline lays out an axis, a bar for each token, what the marks mean, and the exact times.
func (s screen) timeline(status api.Status) string {
	s.Width = min(s.Width, widestTimeline)
	if len(status.Tokens) == 0 {
		return s.simulated(status) + "no tokens are cached\n"
	}
	lives := make([]life, len(status.Tokens))
	for i, token := range status.Tokens {
		lives[i] = lifeOf(status, token)
	}
	marks := marksFor(s.ASCII)
	labels, labelWidth := s.labels(lives)
	axis := axisFor(status.Now, lives, s.Width-labelWidth-len(term.Gap), s.location())
	seen := make(map[rune]bool)
	text := strings.Repeat(" ", labelWidth) + term.Gap
	drawing := text + strings.TrimRight(axis.hours(), " ") + "\n" +
		text + axis.rule(marks) + "\n"
	for i, l := range lives {
		bar := axis.bar(l, marks)
		for _, mark := range bar {
			seen[mark] = true
		}
		drawing += fmt.Sprintf("%-*s%s%s\n", labelWidth, labels[i], term.Gap, s.paintBar(l, strings.TrimRight(string(bar), " ")))
	}
	drawing += text + axis.nowLine(s) + "\n\n" + s.legend(seen, marks) + "\n"
	for i, l := range lives {
		drawing += s.lifeInWords(number(i, lives)+"  ", status.Now, l)
	}
	drawing += s.Paragraph("", "times are in "+s.zoneName(status.Now)+"; perceptctl explain RESOURCE tells more", term.Faint)
	return s.simulated(status) + s.inCharset(drawing)
}

// inCharset replaces what a terminal without UTF-8 cannot show, column by column.
func (s screen) inCharset(text string) string {
	if !s.ASCII {
		return text
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '…':
			return '~'
		case r > unicode.MaxASCII:
			return '?'
		}
		return r
	}, text)
}

// labels names each bar by its number in the list, its identity and its resource without the scheme, in
// at most a third of the width.
func (s screen) labels(lives []life) (labels []string, width int) {
	for i, l := range lives {
		_, host, found := strings.Cut(l.token.Resource, "://")
		if !found {
			host = l.token.Resource
		}
		label := term.Cut(term.Clean(number(i, lives)+" "+l.token.Identity+" "+host), s.Width/3)
		labels = append(labels, label)
		width = max(width, utf8.RuneCountInString(label))
	}
	return labels, width
}

// number counts lives from 1, each as wide as the last.
func number(i int, lives []life) string {
	return fmt.Sprintf("%*d", len(strconv.Itoa(len(lives))), i+1)
}

func (s screen) paintBar(l life, bar string) string {
	switch {
	case l.token.ExpiresIn <= 0:
		return s.Paint(term.Faint, bar)
	case l.token.Permissions.Withheld:
		return s.Paint(term.Bad, bar)
	case !isCurrent(l.token):
		return s.Paint(term.Warning, bar)
	}
	return s.Paint(term.Good, bar)
}

// life is a token's times. Those not known are zero.
type life struct {
	token               api.TokenStatus
	mintedFrom, minted  time.Time // the interval's ends; minted is the later
	half, expires       time.Time
	rollover            time.Time
	unmet               time.Time // the earliest change that it may lack
	changes             []time.Time
	currentBy, probably time.Time
}

func lifeOf(status api.Status, token api.TokenStatus) life {
	l := life{token: token}
	for _, change := range status.Changes {
		if !touches(change, token) {
			continue
		}
		l.changes = append(l.changes, change.At)
		lacks := standingTo(change, token)
		if (lacks == api.StandingStale || lacks == api.StandingUncertain) && (l.unmet.IsZero() || change.At.Before(l.unmet)) {
			l.unmet = change.At
		}
	}
	if token.ExpiresIn <= 0 {
		return l
	}
	l.expires = status.Now.Add(seconds(token.ExpiresIn))
	if token.ExpiresOn != nil {
		l.expires = *token.ExpiresOn
	}
	switch {
	case token.MintedFrom != nil && token.MintedTo != nil:
		l.mintedFrom, l.minted = *token.MintedFrom, *token.MintedTo
		if width := l.minted.Sub(l.mintedFrom); width <= exact {
			l.minted = l.mintedFrom.Add(width / 2)
			l.mintedFrom = l.minted
		}
	case token.ReceivedOn != nil:
		l.minted = *token.ReceivedOn
	}
	if !l.minted.IsZero() {
		l.half = l.minted.Add(l.expires.Sub(l.minted) / 2)
	}
	if token.Rollover.Expected != nil {
		l.rollover = *token.Rollover.Expected
	}
	if p := token.Permissions; !isCurrent(token) {
		if l.unmet.IsZero() && p.Changed != 0 {
			// A change that touches it as an alternate of another resource.
			l.unmet = time.Unix(p.Changed, 0)
			l.changes = append(l.changes, l.unmet)
		}
		if p.CurrentBy != 0 {
			l.currentBy = time.Unix(p.CurrentBy, 0)
		}
		if p.Likely != 0 {
			l.probably = time.Unix(p.Likely, 0)
		}
	}
	return l
}

// lifeInWords tells every time of a token, exactly.
func (s screen) lifeInWords(lead string, now time.Time, l life) string {
	text := s.Paragraph(lead, l.token.Identity+"  "+l.token.Resource, term.Title)
	var parts []string
	add := func(name string, t time.Time) {
		if !t.IsZero() {
			parts = append(parts, name+" "+s.exactly(now, t))
		}
	}
	if l.expires.IsZero() {
		parts = append(parts, "no valid token ("+string(l.token.State)+")")
	} else {
		parts = append(parts, verdictOf(l.token))
	}
	switch {
	case l.mintedFrom.IsZero():
		add("received", l.minted)
	case l.minted.Equal(l.mintedFrom):
		add("minted", l.minted)
	default:
		parts = append(parts, "minted "+s.exactly(now, l.mintedFrom)+" to "+s.exactly(now, l.minted))
	}
	add("half life", l.half)
	for _, at := range l.changes[:min(shownChanges, len(l.changes))] {
		add("policy change", at)
	}
	if more := len(l.changes) - shownChanges; more > 0 {
		parts = append(parts, fmt.Sprintf("%d more (perceptctl policy-changes)", more))
	}
	add("rollover predicted", l.rollover)
	add("expires", l.expires)
	add("current by", l.currentBy)
	add("probably by", l.probably)
	return text + s.Paragraph(strings.Repeat(" ", len(lead)), strings.Join(parts, ", "), term.Plain)
}

func verdictOf(token api.TokenStatus) string {
	if isCurrent(token) {
		return string(api.StandingCurrent)
	}
	return verdict(token.Permissions)
}

// exactly tells a moment to the second, with its day where that is not today.
func (s screen) exactly(now, t time.Time) string {
	return s.at(now, t) + t.In(s.location()).Format(":05")
}
