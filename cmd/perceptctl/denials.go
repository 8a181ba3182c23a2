package main

import (
	"fmt"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

// fewDenials is how many kinds of denial a status shows; --json has more.
const fewDenials = 3

// denials lays out the latest denials below the counts of requests, or nothing.
func (s screen) denials(now time.Time, denials []api.Denial) string {
	text, lead := "", "denied    "
	for i, d := range denials {
		if i == fewDenials {
			return text + s.Paragraph(lead, fmt.Sprintf("and %d more kinds, see --json", len(denials)-fewDenials), term.Faint)
		}
		what := d.Caller
		if d.Resource != "" {
			what += " for " + d.Resource
		}
		times := "once"
		if d.Count > 1 {
			times = fmt.Sprintf("%d times, last", d.Count)
		}
		text += s.Paragraph(lead, fmt.Sprintf("%s, %s %s ago: %s", what, times, span(now.Sub(d.On)), d.Reason), term.Warning)
		lead = "          "
	}
	return text
}
