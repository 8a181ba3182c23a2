package main

import (
	"fmt"
	"time"

	"perceptd/agent/api"
)

// fewDenials is how many kinds of denial a status shows; --json has more.
const fewDenials = 3

// denials lays out the latest denials below the counts of requests, or nothing.
func (s screen) denials(now time.Time, denials []api.Denial) string {
	text, lead := "", "denied    "
	for i, d := range denials {
		if i == fewDenials {
			return text + s.paragraph(lead, fmt.Sprintf("and %d more kinds, see --json", len(denials)-fewDenials), faint)
		}
		what := d.Caller
		if d.Resource != "" {
			what += " for " + d.Resource
		}
		times := "once"
		if d.Count > 1 {
			times = fmt.Sprintf("%d times, last", d.Count)
		}
		text += s.paragraph(lead, fmt.Sprintf("%s, %s %s ago: %s", what, times, span(now.Sub(d.On)), d.Reason), warning)
		lead = "          "
	}
	return text
}
