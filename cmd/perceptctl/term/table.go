package term

import (
	"strings"
	"unicode/utf8"
)

// Column is a column of a table.
type Column struct {
	Title   string
	Shrinks bool // its cells may be cut when the table is too wide
}

// Cell is a field of a table. Its text comes from outside and is cleaned before it is shown.
type Cell struct {
	Text  string
	Style Style
}

// Row is a line of a table, with what there is to say about it on lines below.
type Row struct {
	Cells []Cell
	Notes []Cell // empty ones are left out
}

const leastCell = 8 // columns left to a cell that is cut

// Table lays rows out below their titles, no wider than the screen. The columns for which there is no room, from the
// last on, are noted below each row.
func (s Screen) Table(columns []Column, rows []Row) string {
	var b strings.Builder
	columns, rows = s.fold(columns, rows)
	widths := s.fit(columns, rows)
	titles := make([]Cell, len(columns))
	for i, c := range columns {
		titles[i] = Cell{Text: c.Title, Style: Title}
	}
	s.line(&b, titles, widths)
	for _, r := range rows {
		s.line(&b, r.Cells, widths)
		for _, note := range r.Notes {
			if note.Text != "" {
				b.WriteString(s.Paragraph(Gap, note.Text, note.Style))
			}
		}
	}
	return b.String()
}

// fold takes the last columns out of a table that is too wide however much its cells are cut, and notes on each row
// what is in them.
func (s Screen) fold(columns []Column, rows []Row) ([]Column, []Row) {
	left, total := 0, -len(Gap)
	for i, width := range natural(columns, rows) {
		if columns[i].Shrinks {
			width = min(width, leastCell)
		}
		if total += len(Gap) + width; i > 0 && total > s.Width {
			break
		}
		left++
	}
	if left == len(columns) {
		return columns, rows
	}
	folded := make([]Row, len(rows))
	for i, r := range rows {
		var folds []string
		for j := left; j < len(columns); j++ {
			if text := r.Cells[j].Text; text != "" {
				folds = append(folds, strings.ToLower(columns[j].Title)+": "+text)
			}
		}
		folded[i] = Row{Cells: r.Cells[:left], Notes: append([]Cell{{Text: strings.Join(folds, ", ")}}, r.Notes...)}
	}
	return columns[:left], folded
}

// natural returns the width of each column where there is room for all.
func natural(columns []Column, rows []Row) []int {
	widths := make([]int, len(columns))
	for i, c := range columns {
		widths[i] = utf8.RuneCountInString(c.Title)
		for _, r := range rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(r.Cells[i].Text))
		}
	}
	return widths
}

// fit returns the width of each column. While the table is too wide, the widest column that may
// shrink gives way.
func (s Screen) fit(columns []Column, rows []Row) []int {
	widths := natural(columns, rows)
	total := len(Gap) * (len(columns) - 1)
	for _, width := range widths {
		total += width
	}
	for ; total > s.Width; total-- {
		widest := -1
		for i, c := range columns {
			if c.Shrinks && widths[i] > leastCell && (widest < 0 || widths[i] > widths[widest]) {
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

// line writes one row; no spaces are at its end, be it that a cell ends in some.
func (s Screen) line(b *strings.Builder, cells []Cell, widths []int) {
	padding := ""
	for i, c := range cells {
		text := strings.TrimRight(Cut(Clean(c.Text), widths[i]), " ")
		if text != "" {
			b.WriteString(padding + s.Paint(c.Style, text))
			padding = ""
		}
		padding += strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text)) + Gap
	}
	b.WriteByte('\n')
}
