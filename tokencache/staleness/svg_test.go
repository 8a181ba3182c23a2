//go:build staleness

package staleness

import (
	"fmt"
	"html"
	"math"
	"strings"
	"time"
)

// Colours on a background of its own, so that the picture reads the same in light and dark surroundings.
const (
	paper  = "#fdfdfc"
	ink    = "#20242a"
	faint  = "#5c6570"
	grid   = "#dfe2e6"
	others = "#7d8792"
	ours   = "#0b62c4"
	goal   = "#e4f3e6"
	least  = "#2c8a45"
)

// drawing is an SVG in the making.
type drawing struct{ strings.Builder }

func (d *drawing) line(x1, y1, x2, y2 float64, colour, more string) {
	fmt.Fprintf(d, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" %s/>`+"\n", x1, y1, x2, y2, colour, more)
}

func (d *drawing) dot(x, y, r float64, fill, stroke string) {
	fmt.Fprintf(d, `<circle cx="%.1f" cy="%.1f" r="%.1f" fill="%s" stroke="%s" stroke-width="1.6"/>`+"\n", x, y, r,
		fill, stroke)
}

func (d *drawing) text(x, y float64, anchor, more, words string) {
	fmt.Fprintf(d, `<text x="%.1f" y="%.1f" text-anchor="%s" %s>%s</text>`+"\n", x, y, anchor, more,
		html.EscapeString(words))
}

// scale maps values to places on a logarithmic axis; what lies beyond its ends is put there.
type scale struct{ low, high, from, to float64 }

func (s scale) at(value float64) float64 {
	share := math.Log(min(max(value, s.low), s.high)/s.low) / math.Log(s.high/s.low)
	return s.from + share*(s.to-s.from)
}

type tick struct {
	value float64
	name  string
}

const (
	pictureWide = 1080
	pictureHigh = 640
	plotTop     = 86.0
	plotBottom  = 574.0
)

// picture draws the lag of all strategies, and lag against calls on the random back end.
func picture(all []*comparison, curve []point) string {
	d := &drawing{}
	fmt.Fprintf(d, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" `+
		`font-family="system-ui, -apple-system, 'Segoe UI', sans-serif" font-size="12" fill="%s">`+"\n",
		pictureWide, pictureHigh, pictureWide, pictureHigh, ink)
	fmt.Fprint(d, "<title>Lag from the rollover to the current token, by strategy and back end; "+
		"and lag against calls</title>\n")
	fmt.Fprintf(d, `<rect width="%d" height="%d" rx="6" fill="%s"/>`+"\n", pictureWide, pictureHigh, paper)
	d.lags(all)
	d.curve(curve)
	d.WriteString("</svg>\n")
	return d.String()
}

func heading(size int) string { return fmt.Sprintf(`font-size="%d" font-weight="600"`, size) }

func coloured(colour string) string { return fmt.Sprintf(`fill="%s"`, colour) }

// lags draws the left half: a row for each strategy, its mean and p99.
func (d *drawing) lags(all []*comparison) {
	x := scale{0.1, 1440, 212, 604}
	d.text(24, 34, "start", heading(16), "Lag from the rollover to the current token")
	d.text(24, 54, "start", coloured(faint), "after two rollovers; the oracle, which asks at the rollover, has none")
	d.dot(34, 71, 4.5, faint, faint)
	d.text(44, 75, "start", coloured(faint), "mean")
	d.dot(96, 71, 4.5, paper, faint)
	d.text(106, 75, "start", coloured(faint), "p99")
	for _, t := range []tick{{0.1, "≤ 6 s"}, {1, "1 min"}, {10, "10 min"}, {60, "1 h"}, {360, "6 h"}, {1440, "24 h"}} {
		d.line(x.at(t.value), plotTop, x.at(t.value), plotBottom, grid, "")
		d.text(x.at(t.value), plotBottom+18, "middle", coloured(faint), t.name)
	}
	d.text((x.from+x.to)/2, plotBottom+40, "middle", coloured(faint), "lag (logarithmic)")
	y := plotTop + 14
	for _, c := range all {
		d.text(24, y+4, "start", heading(13), "Back end: "+c.name)
		y += 20
		for _, r := range lagRows(c) {
			d.lagRow(x, y, r)
			y += 20
		}
		y += 1
	}
}

// lagged is one row of the left half.
type lagged struct {
	name      string
	mean, p99 time.Duration
	ours      bool
}

func lagRows(c *comparison) []lagged {
	f := c.of(together, learnt)
	rows := []lagged{
		{"perceptd", f.lag.mean(), f.lag.quantile(0.99), true},
		{"in a module's hand", f.module.mean(), f.module.quantile(0.99), true},
	}
	for _, o := range c.others {
		if o.name != oracle().name {
			rows = append(rows, lagged{o.name, o.lag.mean(), o.lag.quantile(0.99), false})
		}
	}
	return rows
}

func (d *drawing) lagRow(x scale, y float64, r lagged) {
	colour := others
	if r.ours {
		colour = ours
	}
	mean, p99 := x.at(r.mean.Minutes()), x.at(r.p99.Minutes())
	d.text(x.from-12, y+4, "end", coloured(map[bool]string{true: ours, false: ink}[r.ours]), r.name)
	d.line(mean, y, p99, y, colour, `stroke-width="2"`)
	d.dot(p99, y, 4.5, paper, colour)
	d.dot(mean, y, 4.5, colour, colour)
}

// curve draws the right half.
func (d *drawing) curve(all []point) {
	x, y := scale{0.8, 40, 704, 1050}, scale{1, 60, plotBottom, plotTop}
	d.text(660, 34, "start", heading(16), "Lag against calls, back end: random")
	d.text(660, 54, "start", coloured(faint), "rolls over at any age from 8 to 24 h")
	aims := aimsOf(model{name: "random"})
	fmt.Fprintf(d, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`+"\n",
		x.from, y.at(aims.mean.Minutes()), x.at(12*aims.share)-x.from, y.from-y.at(aims.mean.Minutes()), goal)
	for _, v := range []float64{1, 2, 5, 10, 20, 40} {
		d.line(x.at(v), plotTop, x.at(v), plotBottom, grid, "")
		d.text(x.at(v), plotBottom+18, "middle", coloured(faint), fmt.Sprint(v))
	}
	for _, v := range []float64{1, 2, 5, 10, 20, 60} {
		d.line(x.from, y.at(v), x.to, y.at(v), grid, "")
		d.text(x.from-8, y.at(v)+4, "end", coloured(faint), fmt.Sprint(v))
	}
	d.text((x.from+x.to)/2, plotBottom+40, "middle", coloured(faint),
		"calls in an hour of a stale episode (logarithmic)")
	fmt.Fprintf(d, `<text transform="translate(664 %.1f) rotate(-90)" text-anchor="middle" fill="%s">`+
		"mean lag in minutes (logarithmic)</text>\n", (plotTop+plotBottom)/2, faint)
	d.text(x.from+10, plotBottom-12, "start", coloured(least), "the aim")
	d.least(x, y)
	d.points(x, y, all)
}

// least draws the limit below which no schedule comes.
func (d *drawing) least(x, y scale) {
	best := bestProduct()
	from, to := max(x.low, best/y.high), min(x.high, best/y.low)
	d.line(x.at(from), y.at(best/from), x.at(to), y.at(best/to), least, `stroke-width="2" stroke-dasharray="5 4"`)
	at := 1.5
	fmt.Fprintf(d, `<text transform="translate(%.1f %.1f) rotate(%.1f)" text-anchor="middle" fill="%s">`+
		"no schedule can do better</text>\n",
		x.at(at)-6, y.at(best/at)+16, math.Atan2(y.at(best/to)-y.at(best/from), x.at(to)-x.at(from))*180/math.Pi, least)
}

func (d *drawing) points(x, y scale, all []point) {
	var before *point
	for i, p := range all {
		if p.every == 0 {
			continue
		}
		if before != nil {
			d.line(x.at(before.calls), y.at(before.lag.Minutes()), x.at(p.calls), y.at(p.lag.Minutes()), others,
				`stroke-width="2"`)
		}
		before = &all[i]
	}
	name := "polling every 60 min"
	for i := len(all) - 1; i >= 0; i-- {
		p := all[i]
		if p.every == 0 {
			continue
		}
		px, py := x.at(p.calls), y.at(p.lag.Minutes())
		d.dot(px, py, 4.5, others, others)
		d.text(px+10, py-4, "start", coloured(faint), name)
		name = fmt.Sprintf("%v min", all[max(0, i-1)].every.Minutes())
	}
	fills := [...]string{together: ours, alone: paper}
	for i, p := range all[len(all)-len(arrangements):] {
		key := plotTop + 26 + float64(i)*24
		d.dot(x.at(p.calls), y.at(p.lag.Minutes()), 6, fills[i], ours)
		d.dot(x.to-272, key-4, 6, fills[i], ours)
		d.text(x.to-260, key, "start", `font-weight="600" `+coloured(ours),
			fmt.Sprintf("%s: %.1f min, %.1f calls", p.name, p.lag.Minutes(), p.calls))
	}
}
