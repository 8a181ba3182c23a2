package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// milestone is something that each device of a fleet reaches, and when each did, since the beginning.
type milestone struct {
	name    string
	reached []time.Duration
}

// share returns when so much of a fleet had reached the milestone; false: it has not.
func (m milestone) share(part float64, of int) (time.Duration, bool) {
	rank := max(1, int(math.Ceil(part*float64(of))))
	if rank > len(m.reached) {
		return 0, false
	}
	return slices.Sorted(slices.Values(m.reached))[rank-1], true
}

// by returns how many devices had reached it by a time.
func (m milestone) by(at time.Duration) (n int) {
	for _, r := range m.reached {
		if r <= at {
			n++
		}
	}
	return n
}

// spread is how something spreads through a fleet: the milestones of each device, in their order.
type spread struct {
	devices    int
	milestones []milestone
}

// whole reports whether all devices have reached every milestone.
func (s spread) whole() bool {
	for _, m := range s.milestones {
		if len(m.reached) < s.devices {
			return false
		}
	}
	return true
}

// table says when the first, half, 95 % and the last of the devices reached each milestone.
func (s spread) table() string {
	text := fmt.Sprintf("  %-13s %9s %9s %9s %9s %9s\n", "", "devices", "first", "half", "95 %", "last")
	for _, m := range s.milestones {
		text += fmt.Sprintf("  %-13s %9d", m.name, len(m.reached))
		for _, part := range []float64{0, 0.5, 0.95, 1} {
			cell := "-"
			if at, ok := m.share(part, s.devices); ok {
				cell = seconds(at)
			}
			text += fmt.Sprintf(" %9s", cell)
		}
		text += "\n"
	}
	return text
}

// seconds writes a time as a number of seconds.
func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// last returns when a device reached a milestone last.
func (s spread) last() (last time.Duration) {
	for _, m := range s.milestones {
		for _, r := range m.reached {
			last = max(last, r)
		}
	}
	return last
}

// levels are the heights of a column of text.
var levels = []rune(" ▁▂▃▄▅▆▇█")

// picture draws each milestone as a line over time, as high as the part of the fleet that has reached it.
func (s spread) picture(columns int) string {
	last := max(s.last(), time.Millisecond)
	text := ""
	for _, m := range s.milestones {
		line := make([]rune, columns)
		for i := range line {
			n := m.by(last * time.Duration(i+1) / time.Duration(columns))
			height := n * (len(levels) - 1) / max(1, s.devices)
			if n > 0 {
				height = max(height, 1)
			}
			line[i] = levels[height]
		}
		text += fmt.Sprintf("  %-13s %s\n", m.name, string(line))
	}
	end := seconds(last)
	return text + fmt.Sprintf("  %-13s 0%s%s\n", "", strings.Repeat(" ", max(1, columns-1-len(end))), end)
}
