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
	"perceptd/agent/explain"
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
w for withheld; capitals are what is past. Letters before the bar are of the token
before, which lacked a policy change. A legend tells the marks that appear.

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
		bar, begins := axis.bar(l, marks)
		for _, mark := range bar {
			seen[mark] = true
		}
		drawing += fmt.Sprintf("%-*s%s%s\n", labelWidth, labels[i], term.Gap,
			s.paintBar(l, bar, begins))
	}
	drawing += text + axis.nowLine(s) + "\n\n" + s.legend(seen, marks) + "\n"
	for i, l := range lives {
		drawing += s.lifeText(number(i, lives)+"  ", status.Now, l)
	}
	drawing += s.Paragraph("", "times are in "+s.zoneName(status.Now)+"; perceptctl explain RESOURCE tells more",
		term.Faint)
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

// paintBar paints a bar, whose token begins at a column.
func (s screen) paintBar(l life, bar []rune, begins int) string {
	before, own := string(bar[:begins]), strings.TrimRight(string(bar[begins:]), " ")
	if ended := l.token.Ended; ended != nil && begins > 0 {
		before = s.Paint(lackStyle(ended.Withheld), before)
	}
	switch {
	case l.token.ExpiresIn <= 0:
		return before + s.Paint(term.Faint, own)
	case !explain.IsCurrent(l.token):
		return before + s.Paint(lackStyle(l.token.Permissions.Withheld), own)
	}
	return before + s.Paint(term.Good, own)
}

// lackStyle is how a token is painted that may lack a policy change.
func lackStyle(withheld bool) term.Style {
	if withheld {
		return term.Bad
	}
	return term.Warning
}

// life is a token's times. Those not known are zero.
type life struct {
	token               api.TokenStatus
	issuedFrom, issued  time.Time // the ends of the issue window
	half, expires       time.Time
	rollover            time.Time
	unmet               time.Time // the earliest change that it may lack
	changes             []time.Time
	currentBy, probably time.Time
}

func lifeOf(status api.Status, token api.TokenStatus) life {
	l := life{token: token}
	for _, change := range explain.ChangesOf(token, status.Changes) {
		l.changes = append(l.changes, change.At)
		if change.Lacked() && (l.unmet.IsZero() || change.At.Before(l.unmet)) {
			l.unmet = change.At
		}
	}
	if token.ExpiresIn <= 0 {
		return l
	}
	l.expires = status.Now.Add(seconds(token.ExpiresIn))
	if !token.ExpiresOn.IsZero() {
		l.expires = token.ExpiresOn
	}
	switch {
	case !token.IssuedFrom.IsZero() && !token.IssuedTo.IsZero():
		l.issuedFrom, l.issued = token.IssuedFrom, token.IssuedTo
		if width := l.issued.Sub(l.issuedFrom); width <= explain.ExactWidth {
			l.issued = l.issuedFrom.Add(width / 2)
			l.issuedFrom = l.issued
		}
	case !token.ReceivedOn.IsZero():
		l.issued = token.ReceivedOn
	}
	if !l.issued.IsZero() {
		l.half = l.issued.Add(l.expires.Sub(l.issued) / 2)
	}
	l.rollover = token.Rollover.Expected
	if p := token.Permissions; !explain.IsCurrent(token) {
		l.currentBy, l.probably = p.CurrentBy, p.Likely
	}
	return l
}

// lifeText lists every time of a token, to the second.
func (s screen) lifeText(lead string, now time.Time, l life) string {
	text := s.Paragraph(lead, l.token.Identity+"  "+l.token.Resource, term.Title)
	var parts []string
	add := func(name string, t time.Time) {
		if !t.IsZero() {
			parts = append(parts, name+" "+s.atSecond(now, t))
		}
	}
	if l.expires.IsZero() {
		parts = append(parts, "no valid token ("+string(l.token.State)+")")
	} else {
		parts = append(parts, verdictOf(l.token))
	}
	switch {
	case l.issuedFrom.IsZero():
		add("received", l.issued)
	case l.issued.Equal(l.issuedFrom):
		add("minted", l.issued)
	default:
		parts = append(parts, "minted "+s.atSecond(now, l.issuedFrom)+" to "+s.atSecond(now, l.issued))
	}
	add("half life", l.half)
	if ended := l.token.Ended; ended != nil {
		parts = append(parts, fmt.Sprintf("%s from %s to %s", lackWord(ended.State, ended.Withheld),
			s.atSecond(now, ended.From), s.atSecond(now, ended.To)))
	}
	for _, at := range l.changes[:min(explain.ShownChanges, len(l.changes))] {
		add("policy change", at)
	}
	if more := max(0, len(l.changes)-explain.ShownChanges) + l.token.MoreChanges; more > 0 {
		parts = append(parts, fmt.Sprintf("%d more (perceptctl policy-changes)", more))
	}
	add("rollover predicted", l.rollover)
	add("expires", l.expires)
	add("current by", l.currentBy)
	add("probably by", l.probably)
	return text + s.Paragraph(strings.Repeat(" ", len(lead)), strings.Join(parts, ", "), term.Plain)
}

func verdictOf(token api.TokenStatus) string {
	if explain.IsCurrent(token) {
		return string(api.PermissionsCurrent)
	}
	return verdict(token.Permissions)
}

// marks is what a bar is drawn with.
type marks struct {
	issued, half, rollover, expiry rune
	now, change                    rune
	past, future                   rune // of a token that is current
	tick, rule                     rune // of the axis
}

// marksFor returns what a terminal can show.
func marksFor(plainText bool) marks {
	if plainText {
		return marks{issued: '[', half: '+', rollover: '*', expiry: ']', now: '|', change: '!', past: '=', future: '-',
			tick: '+', rule: '-'}
	}
	return marks{issued: '├', half: '┼', rollover: '◆', expiry: '┤', now: '│', change: '▼', past: '━', future: '┄',
		tick: '┬', rule: '─'}
}

// letters are what a bar is made of from a policy change on that its token may lack.
func letters(state api.PermissionState, withheld bool) (past, future rune) {
	switch {
	case withheld:
		return 'W', 'w'
	case state == api.PermissionsStale:
		return 'S', 's'
	}
	return 'U', 'u'
}

// lackWord is what the letters stand for.
func lackWord(state api.PermissionState, withheld bool) string {
	if withheld {
		return "withheld"
	}
	return string(state)
}

// axis maps moments onto columns.
type axis struct {
	from, to time.Time // of the first column and behind the last
	now      time.Time
	columns  int
	zone     *time.Location
}

// maxReach is how far from now an axis reaches, whatever a wrong clock says.
const maxReach = 7 * 24 * time.Hour

// axisFor returns an axis that has every life on it, from a whole hour to a whole hour.
func axisFor(now time.Time, lives []life, columns int, zone *time.Location) axis {
	from, to := now.Add(-time.Hour), now.Add(time.Hour)
	for _, l := range lives {
		var ended time.Time
		if l.token.Ended != nil {
			ended = l.token.Ended.From
		}
		for _, t := range []time.Time{l.issued, l.expires, l.rollover, l.unmet, ended} {
			if t.IsZero() {
				continue
			}
			if t.Before(from) {
				from = t
			}
			if t.After(to) {
				to = t
			}
		}
	}
	from, to = latest(from, now.Add(-maxReach)), earliest(to, now.Add(maxReach))
	return axis{from: wholeHour(from, zone), to: wholeHour(to, zone).Add(time.Hour), now: now, columns: columns,
		zone: zone}
}

// wholeHour returns the last whole hour of the clocks in zone.
func wholeHour(t time.Time, zone *time.Location) time.Time {
	t = t.In(zone)
	return t.Add(-time.Duration(t.Minute())*time.Minute - time.Duration(t.Second())*time.Second - time.Duration(
		t.Nanosecond()))
}

// column returns the column of a moment; one off the axis is on its edge.
func (x axis) column(t time.Time) int {
	at := float64(t.Sub(x.from)) / float64(x.to.Sub(x.from)) * float64(x.columns)
	return max(0, min(x.columns-1, int(at)))
}

// bar draws a life. Marks are drawn over each other, the most important last: half life, issue, expiry,
// rollover, now, policy change.
// begins is the first column of the token itself: what is before it is of the token before.
func (x axis) bar(l life, m marks) (bar []rune, begins int) {
	bar = []rune(strings.Repeat(" ", x.columns))
	now := x.column(x.now)
	if ended := l.token.Ended; ended != nil && !l.issued.IsZero() {
		begins = x.column(l.issued)
		past, _ := letters(ended.State, ended.Withheld)
		for i := x.column(ended.From); i < begins && i <= x.column(ended.To); i++ {
			bar[i] = past
		}
	}
	if !l.expires.IsZero() && !l.issued.IsZero() {
		x.fill(bar, l, m)
		bar[x.column(l.half)] = m.half
		bar[x.column(l.issued)] = m.issued
		bar[x.column(l.expires)] = m.expiry
	}
	if !l.rollover.IsZero() {
		bar[x.column(l.rollover)] = m.rollover
	}
	bar[now] = m.now
	for _, at := range l.changes {
		if !at.Before(x.from) && at.Before(x.to) {
			bar[x.column(at)] = m.change
		}
	}
	return bar, begins
}

// fill draws the life itself: what is past and what is to come, and from when on the token lacks a change.
func (x axis) fill(bar []rune, l life, m marks) {
	past, future := letters(l.token.Permissions.State, l.token.Permissions.Withheld)
	for i := x.column(l.issued); i <= x.column(l.expires); i++ {
		lacks := !l.unmet.IsZero() && i >= x.column(l.unmet)
		switch isPast := i < x.column(x.now); {
		case lacks && isPast:
			bar[i] = past
		case lacks:
			bar[i] = future
		case isPast:
			bar[i] = m.past
		default:
			bar[i] = m.future
		}
	}
}

// tick is an hour of the axis that is labelled.
type tick struct {
	column int
	label  string
}

// ticks returns the hours to be labelled: as many as there is room for, midnights with their day.
func (x axis) ticks() []tick {
	const room = 7 // columns a label needs, and a space
	whole := int(x.to.Sub(x.from) / time.Hour)
	every := 24 * 7
	for _, hours := range []int{1, 2, 3, 4, 6, 8, 12, 24, 48} {
		if hours*x.columns >= room*whole {
			every = hours
			break
		}
	}
	var ticks []tick
	for t, days := x.from, 0; t.Before(x.to); t = t.Add(time.Hour) {
		local := t.In(x.zone)
		if local.Hour()%min(every, 24) != 0 {
			continue
		}
		label := local.Format("15:04")
		if local.Hour() == 0 {
			days++
			label = local.Format("Jan 2")
			if every > 24 && days%(every/24) != 1 {
				continue
			}
		}
		// The clocks that are put back show an hour twice.
		if n := len(ticks); n > 0 && x.column(t)-ticks[n-1].column < room-1 {
			continue
		}
		ticks = append(ticks, tick{x.column(t), label})
	}
	return ticks
}

// hours is the line of labels.
func (x axis) hours() string {
	line := []rune(strings.Repeat(" ", x.columns))
	for _, t := range x.ticks() {
		for i, r := range []rune(t.label) {
			if t.column+len(t.label) <= x.columns {
				line[t.column+i] = r
			}
		}
	}
	return string(line)
}

// rule is the axis itself.
func (x axis) rule(m marks) string {
	line := []rune(strings.Repeat(string(m.rule), x.columns))
	for _, t := range x.ticks() {
		line[t.column] = m.tick
	}
	line[x.column(x.now)] = m.now
	return string(line)
}

// nowLine names the line through all bars.
func (x axis) nowLine(s screen) string {
	label := "now " + s.atSecond(x.now, x.now)
	at := max(0, min(x.column(x.now), x.columns-utf8.RuneCountInString(label)))
	return strings.Repeat(" ", at) + label
}

// legend explains the marks that appear.
func (s screen) legend(seen map[rune]bool, m marks) string {
	var parts []string
	for _, entry := range []struct {
		mark    rune
		meaning string
	}{
		{m.issued, "minted"}, {m.half, "half life"}, {m.now, "now"}, {m.change, "policy change"},
		{m.rollover, "predicted rollover"}, {m.expiry, "expiry"}, {m.past, "past"}, {m.future, "to come"},
		{'S', "stale"}, {'s', "stale, to come"}, {'U', "uncertain"}, {'u', "uncertain, to come"},
		{'W', "withheld"}, {'w', "withheld, to come"},
	} {
		if seen[entry.mark] {
			parts = append(parts, string(entry.mark)+" "+entry.meaning)
		}
	}
	return s.entries(parts)
}

// entries lays out short texts one after the other, none of them broken.
func (s screen) entries(parts []string) string {
	text, line := "", ""
	for _, part := range parts {
		if line != "" && utf8.RuneCountInString(line)+3+utf8.RuneCountInString(part) > s.Width {
			text += line + "\n"
			line = ""
		}
		if line != "" {
			line += "   "
		}
		line += part
	}
	return text + line + "\n"
}
