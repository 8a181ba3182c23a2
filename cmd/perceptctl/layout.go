package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// column is a column of a table.
type column struct {
	title   string
	shrinks bool // its cells may be cut when the table is too wide
}

// cell is a field of a table. Its text comes from outside and is cleaned before it is shown.
type cell struct {
	text string
	how  style
}

// row is a line of a table, with what there is to say about it on lines below.
type row struct {
	cells []cell
	notes []cell // empty ones are left out
}

const (
	gap       = "  "
	leastCell = 8 // columns left to a cell that is cut
)

// table lays rows out below their titles, no wider than the screen. Columns for which that has no room, from the last on, are told
// below each row.
func (s screen) table(columns []column, rows []row) string {
	var b strings.Builder
	columns, rows = s.fold(columns, rows)
	widths := s.fit(columns, rows)
	titles := make([]cell, len(columns))
	for i, c := range columns {
		titles[i] = cell{c.title, title}
	}
	s.line(&b, titles, widths)
	for _, r := range rows {
		s.line(&b, r.cells, widths)
		for _, note := range r.notes {
			if note.text != "" {
				b.WriteString(s.paragraph(gap, note.text, note.how))
			}
		}
	}
	return b.String()
}

// fold takes the last columns out of a table that is too wide whatever gives way, and notes on each row what is in them.
func (s screen) fold(columns []column, rows []row) ([]column, []row) {
	left, total := 0, -len(gap)
	for i, width := range natural(columns, rows) {
		if columns[i].shrinks {
			width = min(width, leastCell)
		}
		if total += len(gap) + width; i > 0 && total > s.width {
			break
		}
		left++
	}
	if left == len(columns) {
		return columns, rows
	}
	folded := make([]row, len(rows))
	for i, r := range rows {
		var told []string
		for j := left; j < len(columns); j++ {
			if text := r.cells[j].text; text != "" {
				told = append(told, strings.ToLower(columns[j].title)+": "+text)
			}
		}
		folded[i] = row{cells: r.cells[:left], notes: append([]cell{{strings.Join(told, ", "), plain}}, r.notes...)}
	}
	return columns[:left], folded
}

// natural returns the width of each column where there is room for all.
func natural(columns []column, rows []row) []int {
	widths := make([]int, len(columns))
	for i, c := range columns {
		widths[i] = utf8.RuneCountInString(c.title)
		for _, r := range rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(r.cells[i].text))
		}
	}
	return widths
}

// fit returns the width of each column. While the table is too wide, the widest column that may
// shrink gives way.
func (s screen) fit(columns []column, rows []row) []int {
	widths := natural(columns, rows)
	total := len(gap) * (len(columns) - 1)
	for _, width := range widths {
		total += width
	}
	for ; total > s.width; total-- {
		widest := -1
		for i, c := range columns {
			if c.shrinks && widths[i] > leastCell && (widest < 0 || widths[i] > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		widths[widest]--
	}
	return widths
}

// line writes one row; nothing pads it after its last cell that has text.
func (s screen) line(b *strings.Builder, cells []cell, widths []int) {
	padding := ""
	for i, c := range cells {
		text := cut(clean(c.text), widths[i])
		if text != "" {
			b.WriteString(padding + s.paint(c.how, text))
			padding = ""
		}
		padding += strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text)) + gap
	}
	b.WriteByte('\n')
}

// cut takes the middle out of text that is longer than width, and says so with "…".
func cut(text string, width int) string {
	runes := []rune(text)
	if len(runes) <= width {
		return text
	}
	head := (width - 1) / 2
	tail := width - 1 - head
	return string(runes[:head]) + "…" + string(runes[len(runes)-tail:])
}

// paragraph breaks text into lines between words. The first begins with lead, the others with as
// many spaces. A word that is longer than a line has one of its own and stays whole, since it may be a path that somebody copies: the
// terminal wraps it.
func (s screen) paragraph(lead, text string, how style) string {
	room := s.width - utf8.RuneCountInString(lead)
	var lines []string
	line := ""
	for _, word := range strings.Fields(clean(text)) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= room {
			line += " " + word
			continue
		}
		if line != "" {
			lines = append(lines, line)
		}
		line = word
	}
	lines = append(lines, line)
	var b strings.Builder
	for _, line := range lines {
		b.WriteString(s.paint(how, strings.TrimRight(lead+line, " ")) + "\n")
		lead = strings.Repeat(" ", utf8.RuneCountInString(lead))
	}
	return b.String()
}

// span tells a duration in the two largest units that matter: "3d 4h", "11h 52m", "4m 12s", "9s".
func span(d time.Duration) string {
	seconds := int64(max(d, 0) / time.Second)
	units := []struct {
		name    string
		seconds int64
	}{{"d", 86400}, {"h", 3600}, {"m", 60}, {"s", 1}}
	for i, unit := range units {
		if seconds < unit.seconds || i == len(units)-1 {
			continue
		}
		text := fmt.Sprintf("%d%s", seconds/unit.seconds, unit.name)
		smaller := units[i+1]
		if rest := seconds % unit.seconds / smaller.seconds; rest > 0 {
			text += fmt.Sprintf(" %d%s", rest, smaller.name)
		}
		return text
	}
	return fmt.Sprintf("%ds", seconds)
}

// seconds turns the wire's seconds into a duration.
func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }
