package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"perceptd/agent/api"
)

const (
	// What happens at all happens in a small part of this, also on a machine that is busy with other things.
	patience = 5 * time.Minute

	denyWithin = time.Second // of the first device's twin being written, on the last device
	peakRatio  = 1.5         // of the busiest sixth of the cap to the mean
	columns    = 60          // of drawings
)

// show is a demonstration: it writes what a fleet does, and notes what of that is not as it should be.
type show struct {
	*fleet
	options
	strain   *strain
	faults   []error
	unjudged []string // what this machine was too busy to judge
}

// run shows a fleet. The error names all that is not so.
func run(ctx context.Context, o options, out io.Writer) error {
	f, err := startFleet(o, out)
	if err != nil {
		return err
	}
	defer f.close()
	s := &show{fleet: f, options: o, strain: watchStrain()}
	defer s.strain.close()
	s.connect(ctx)
	spread, err := s.policyChange(ctx)
	if err != nil {
		return err
	}
	if err := s.denial(ctx); err != nil {
		return err
	}
	back, err := s.reconnection(ctx)
	if err != nil {
		return err
	}
	s.cost()
	if o.picture != "" {
		title := fmt.Sprintf("a policy change reaches %d devices", o.devices)
		if err := os.WriteFile(o.picture, []byte(svg(title, spread, back)), 0o644); err != nil {
			return err
		}
	}
	s.conclude()
	return errors.Join(append(s.faults, ctx.Err())...)
}

// conclude says once more what was not judged, where somebody may look last.
func (s *show) conclude() {
	if len(s.unjudged) == 0 {
		return
	}
	s.say("this machine was too busy to judge")
	for _, what := range s.unjudged {
		fmt.Fprintf(s.out, "  %s\n", what)
	}
	fmt.Fprintln(s.out, "  once more on an idle machine judges it")
}

// say begins a part.
func (s *show) say(format string, args ...any) { fmt.Fprintf(s.out, "\n== "+format+"\n", args...) }

// check says whether something is so, and keeps it in mind where it is not.
func (s *show) check(ok bool, format string, args ...any) {
	text, word := fmt.Sprintf(format, args...), "so    "
	if !ok {
		word = "NOT SO"
		s.faults = append(s.faults, errors.New("not so: "+text))
	}
	fmt.Fprintf(s.out, "  %s  %s\n", word, text)
}

// judge is check for what depends on how fast this machine is. A strain that kept it from being so is said, and then it
// is not a fault.
func (s *show) judge(ok bool, strain, format string, args ...any) {
	if ok || strain == "" {
		s.check(ok, format, args...)
		return
	}
	text := fmt.Sprintf(format, args...) + ": " + strain
	s.unjudged = append(s.unjudged, text)
	fmt.Fprintf(s.out, "  NOT JUDGED  %s\n", text)
}

// allServe checks that each device serves its module's token.
func (s *show) allServe(ctx context.Context) {
	serving := s.inTime(ctx, s.devices, func(m *member) bool { return m.serves(ctx) == nil })
	s.check(serving == s.devices, "%d of %d devices serve their module's token", serving, s.devices)
}

// inTime waits until something is so of a number of devices, all at once, and returns of how many it is so.
func (s *show) inTime(ctx context.Context, want int, is func(*member) bool) (n int) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if n = s.count(is); n == want || ctx.Err() != nil {
			return n
		}
		wait(ctx, pollEvery)
	}
}

// connect waits for all devices.
func (s *show) connect(ctx context.Context) {
	day := float64(life) / s.speed
	s.say("%d devices connect to a hub; a day of their tokens takes %.0f s", s.devices, time.Duration(day).Seconds())
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r := s.reach(ctx, time.Now(), connected)
	s.check(r.whole(), "all %d devices are connected", s.devices)
	s.allServe(ctx)
}

// connected is a goal.
var connected = goal{"connected", func(m *member) bool { return m.hub.Status().Connected }}

// policyChange sends all devices a policy change, and shows how it spreads.
func (s *show) policyChange(ctx context.Context) (spread, error) {
	s.say("one policy change goes to all of them, by one automatic configuration")
	const note = "from the fleet's twin"
	begun := time.Now()
	if err := s.configure(ctx, "changes", "policyChanges", []map[string]any{{
		"resource": vault, "identity": "vision", "effect": api.EffectGranted, "note": note,
		"at": s.clock.Wall().UTC().Format(time.RFC3339),
	}}); err != nil {
		return spread{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r := s.reach(ctx, begun,
		goal{"on record", func(m *member) bool { return m.hasChange(note) }},
		goal{"acknowledged", func(m *member) bool { return m.hasChange(note) && s.acknowledges(m) }},
		goal{"in the token", func(m *member) bool { return m.hasChange(note) && !m.isStale() }},
	)
	fmt.Fprintf(s.out, "\n%s\n%s\n", r.table(), r.picture(columns))
	for _, m := range r.milestones {
		s.check(len(m.reached) == s.devices, "%s on %d of %d devices", m.name, len(m.reached), s.devices)
	}
	return r, nil
}

// denial denies the module's tokens on all devices, and lifts that again.
func (s *show) denial(ctx context.Context) error {
	s.say("another configuration denies the module's tokens, and is deleted again")
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	begun, from := time.Now(), beginStretch()
	rules := []map[string]any{{"module": module.Module, "note": "it is stolen"}}
	if err := s.configure(ctx, "denial", "deny", rules); err != nil {
		return err
	}
	denied := s.reach(ctx, begun, goal{"denied", func(m *member) bool { return m.denies(ctx) }})
	strain := s.strain.since(from)
	s.check(denied.whole(), "all devices deny")
	s.judge(denied.last() <= denyWithin, strain, "the last device denies within %s, it was %s", seconds(denyWithin),
		seconds(denied.last()))
	begun = time.Now()
	if err := s.unconfigure(ctx, "denial"); err != nil {
		return err
	}
	lifted := s.reach(ctx, begun, goal{"served again", func(m *member) bool { return m.serves(ctx) == nil }})
	s.check(lifted.whole(), "all serve again after %s", seconds(lifted.last()))
	return nil
}

// reconnection shows the shape in which the devices come back after an outage. Each draws its waits at random, so one
// fleet in a hundred has a busier sixth than is allowed: two in a row are no chance.
func (s *show) reconnection(ctx context.Context) (reconnect, error) {
	from := beginStretch()
	r, err := s.outage(ctx)
	if err == nil && ctx.Err() == nil && r.ratio() > peakRatio {
		fmt.Fprintf(s.out, "\n  more than %.1f times the mean, as by chance in one fleet of a hundred: once more\n",
			peakRatio)
		from = beginStretch()
		r, err = s.outage(ctx)
	}
	if err == nil {
		s.judge(r.ratio() <= peakRatio, s.strain.since(from), "the peak is at most %.1f times the mean", peakRatio)
	}
	return r, err
}

// outage ends the hub for a while, and shows how the devices come back.
func (s *show) outage(ctx context.Context) (reconnect, error) {
	s.say("the hub is gone, for longer than twice the longest wait of a device, %v", s.cap)
	s.hub.Stop()
	wait(ctx, 2*s.cap+s.cap/4)
	left := s.inTime(ctx, 0, connected.is)
	s.check(left == 0, "no device is connected")
	s.allServe(ctx)
	resumed := time.Now()
	if err := s.hub.Resume(); err != nil {
		return reconnect{}, err
	}
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s.reach(waiting, resumed, connected)
	back := s.backSince(resumed)
	r := reconnectOf(back, s.devices, s.cap)
	fmt.Fprintf(s.out, "\n%s\n", r.picture(columns/2))
	s.check(len(back) == s.devices, "%d of %d devices are back", len(back), s.devices)
	return r, nil
}

// cost shows what the hub counts.
func (s *show) cost() {
	s.say("what this was for the hub")
	sum := s.traffic()
	fmt.Fprintf(s.out, "  connections %d, twin reads %d\n  reported patches %d (%d KB), desired notifications "+
		"%d (%d KB)\n", sum.Connects, sum.TwinReads.Messages, sum.Reported.Messages, sum.Reported.Bytes>>10,
		sum.Notifications.Messages, sum.Notifications.Bytes>>10)
	fmt.Fprintf(s.out, "  %d KB came from the devices and %d KB went to them, TLS included\n", sum.BytesIn>>10,
		sum.BytesOut>>10)
}

// wait sleeps, or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
