package main

import (
	"fmt"
	"html"
	"strings"
	"time"
)

// The picture's measures, in pixels.
const (
	svgWidth, panelHeight = 720, 220
	svgLeft, svgRight     = 60, 20
	plotHeight            = 150
)

var colours = []string{"#1f77b4", "#2ca02c", "#d62728", "#9467bd"}

// svg draws how something spreads, and how a fleet comes back, one above the other.
func svg(title string, s spread, r reconnect) string {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" `+
		`font-size="12">`+"\n", svgWidth, 2*panelHeight)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	fmt.Fprintf(&b, `<text x="%d" y="20" font-size="14">%s</text>`+"\n", svgLeft, html.EscapeString(title))
	s.drawSVG(&b, 40)
	fmt.Fprintf(&b, `<text x="%d" y="%d" font-size="14">connections in each sixth of the longest back-off, after an `+
		`outage</text>`+"\n", svgLeft, panelHeight+20)
	r.drawSVG(&b, panelHeight+40)
	b.WriteString("</svg>\n")
	return b.String()
}

// plotWidth is how wide the drawings are.
const plotWidth = svgWidth - svgLeft - svgRight

// axis draws a frame at y, with what its height and width stand for.
func axis(b *strings.Builder, y int, height, width string) {
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="none" stroke="#999"/>`+"\n", svgLeft, y, plotWidth,
		plotHeight)
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", svgLeft-4, y+10, html.EscapeString(height))
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", svgLeft+plotWidth, y+plotHeight+15,
		html.EscapeString(width))
}

func (s spread) drawSVG(b *strings.Builder, y int) {
	last := max(s.last(), time.Millisecond)
	axis(b, y, fmt.Sprint(s.devices), seconds(last))
	for i, m := range s.milestones {
		colour := colours[i%len(colours)]
		points := ""
		for x := 0; x <= plotWidth; x += 4 {
			n := m.by(last * time.Duration(x) / plotWidth)
			points += fmt.Sprintf("%d,%d ", svgLeft+x, y+plotHeight-n*plotHeight/max(1, s.devices))
		}
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="2" points="%s"/>`+"\n", colour,
			strings.TrimSpace(points))
		fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n", svgLeft+plotWidth-190, y+plotHeight-50+15*i,
			colour, html.EscapeString(m.name))
	}
}

func (r reconnect) drawSVG(b *strings.Builder, y int) {
	axis(b, y, fmt.Sprint(r.peak()), seconds(r.cap*time.Duration(len(r.buckets))/parts))
	width := plotWidth / len(r.buckets)
	for i, n := range r.buckets {
		height := n * plotHeight / max(1, r.peak())
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", svgLeft+i*width+1,
			y+plotHeight-height, width-2, height, colours[0])
	}
	mean := int(r.mean() * plotHeight / float64(max(1, r.peak())))
	fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="%s" stroke-dasharray="4"/>`+"\n", svgLeft,
		svgLeft+plotWidth, y+plotHeight-mean, y+plotHeight-mean, colours[2])
}
