package lives

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// shrink leaves out of a plan that goes wrong what can be left out, until then at most, and returns what is left, how
// that goes wrong, and whether nothing more can be left out.
func shrink(t *testing.T, p plan, f *fault, until time.Time) (plan, *fault, bool) {
	p.device.lasts = f.after + time.Millisecond
	p.events = slices.DeleteFunc(slices.Clone(p.events), func(e event) bool { return e.on > f.after })
	over := func() bool { return !time.Now().Before(until) }
	try := func(less plan) bool {
		if over() {
			return false
		}
		again, _ := inBubble(t, less)
		if again == nil || again.kind != f.kind {
			return false
		}
		p, f = less, again
		return true
	}
	for n := max(1, len(p.events)/2); n >= 1; n /= 2 {
		for i := 0; i < len(p.events); {
			less := p
			less.events = slices.Delete(slices.Clone(p.events), i, min(i+n, len(p.events)))
			if !try(less) {
				i += n
			}
		}
	}
	for _, simpler := range []func(d *device){
		func(d *device) { d.replicas = 1 },
		func(d *device) { d.alternates = false },
		func(d *device) { d.spelled = false },
		func(d *device) { d.keyless = false },
		func(d *device) { d.form = counted },
		func(d *device) { d.aged = 0 },
		func(d *device) { d.late = 0 },
		func(d *device) { d.rolls = atExpiry },
		func(d *device) { d.vouched, d.ahead = true, 0 },
		func(d *device) { d.ahead = 0 },
		func(d *device) { d.prefetch = false },
	} {
		less := p
		if simpler(&less.device); less.device != p.device {
			try(less)
		}
	}
	return p, f, !over()
}

// sortOf tells faults apart: what went wrong, and what it took.
func sortOf(p plan, f *fault) string {
	var took []string
	for _, e := range p.events {
		name := kindNames[e.kind]
		switch e.kind {
		case change, pipeline:
			if e.dated {
				name += " dated"
			}
		case diskFault:
			name += " " + e.disk.String()
		case backFault:
			name += " " + e.back.String()
		case clockSet:
			name += " set"
			if e.vouched && e.offset != 0 {
				name += " wrong"
			}
		}
		if !slices.Contains(took, name) {
			took = append(took, name)
		}
	}
	if p.device.form != counted {
		took = append(took, p.device.form.String())
	}
	if !p.device.vouched {
		took = append(took, "clock not vouched for")
	}
	if p.device.keyless {
		took = append(took, "keyless")
	}
	if p.device.spelled {
		took = append(took, "spelled")
	}
	if p.device.alternates {
		took = append(took, "alternates")
	}
	if p.device.replicas > 1 {
		took = append(took, "replicas")
	}
	return f.kind + ": " + strings.Join(took, ", ")
}
