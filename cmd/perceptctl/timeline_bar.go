package main

import (
	"strings"
	"time"
	"unicode/utf8"

	"perceptd/agent/api"
)

// marks is what a bar is drawn with.
type marks struct {
	minted, half, rollover, expiry rune
	now, change                    rune
	past, future                   rune // of a token that is current
	tick, rule                     rune // of the axis
}

// marksFor returns what a terminal can show.
func marksFor(plainText bool) marks {
	if plainText {
		return marks{minted: '[', half: '+', rollover: '*', expiry: ']', now: '|', change: '!', past: '=', future: '-', tick: '+', rule: '-'}
	}
	return marks{minted: '├', half: '┼', rollover: '◆', expiry: '┤', now: '│', change: '▼', past: '━', future: '┄', tick: '┬', rule: '─'}
}

// letters are what a bar is made of from a policy change on that its token may lack.
func letters(token api.TokenStatus) (past, future rune) {
	switch {
	case token.Permissions.Withheld:
		return 'W', 'w'
	case token.Permissions.Standing == api.StandingStale:
		return 'S', 's'
	}
	return 'U', 'u'
}

// axis maps moments onto columns.
type axis struct {
	from, to time.Time // of the first column and behind the last
	now      time.Time
	columns  int
	zone     *time.Location
}

// farthest is how far from now an axis reaches, whatever a wrong clock says.
const farthest = 7 * 24 * time.Hour

// axisFor returns an axis that has every life on it, from a whole hour to a whole hour.
func axisFor(now time.Time, lives []life, columns int, zone *time.Location) axis {
	from, to := now.Add(-time.Hour), now.Add(time.Hour)
	for _, l := range lives {
		for _, t := range []time.Time{l.minted, l.expires, l.rollover, l.unmet} {
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
	from, to = latest(from, now.Add(-farthest)), earliest(to, now.Add(farthest))
	return axis{from: wholeHour(from, zone), to: wholeHour(to, zone).Add(time.Hour), now: now, columns: columns, zone: zone}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// wholeHour returns the last whole hour of the clocks in zone.
func wholeHour(t time.Time, zone *time.Location) time.Time {
	t = t.In(zone)
	return t.Add(-time.Duration(t.Minute())*time.Minute - time.Duration(t.Second())*time.Second - time.Duration(t.Nanosecond()))
}

// column returns the column of a moment; one off the axis is on its edge.
func (x axis) column(t time.Time) int {
	at := float64(t.Sub(x.from)) / float64(x.to.Sub(x.from)) * float64(x.columns)
	return max(0, min(x.columns-1, int(at)))
}

// bar draws a life. Marks are drawn over each other, the weightiest last: half life, minting, expiry,
// rollover, now, policy change.
func (x axis) bar(l life, m marks) []rune {
	bar := []rune(strings.Repeat(" ", x.columns))
	now := x.column(x.now)
	if !l.expires.IsZero() && !l.minted.IsZero() {
		x.fill(bar, l, m)
		bar[x.column(l.half)] = m.half
		bar[x.column(l.minted)] = m.minted
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
	return bar
}

// fill draws the life itself: what is past and what is to come, and from when on the token lacks a change.
func (x axis) fill(bar []rune, l life, m marks) {
	past, future := letters(l.token)
	for i := x.column(l.minted); i <= x.column(l.expires); i++ {
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
	label := "now " + s.exactly(x.now, x.now)
	at := max(0, min(x.column(x.now), x.columns-utf8.RuneCountInString(label)))
	return strings.Repeat(" ", at) + label
}

// legend tells the marks that appear.
func (s screen) legend(seen map[rune]bool, m marks) string {
	var parts []string
	for _, entry := range []struct {
		mark    rune
		meaning string
	}{
		{m.minted, "minted"}, {m.half, "half life"}, {m.now, "now"}, {m.change, "policy change"},
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
