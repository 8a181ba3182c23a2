package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/clock"
	"perceptd/agent/iothub"
	"perceptd/agent/iothub/hubtest"
	"perceptd/agent/iothub/link"
	"perceptd/tokencache"
)

// member is a device of the fleet with its link to the hub.
type member struct {
	*device
	hub *iothub.Hub
}

// fleet is devices of one hub. They share a clock that runs fast, by which their tokens live; the hub runs by the real
// one.
type fleet struct {
	hub     *hubtest.Hub
	clock   tokencache.Clock
	members []*member
	out     io.Writer
}

// startFleet connects so many devices. Close it.
func startFleet(o options, out io.Writer) (*fleet, error) {
	hub, err := hubtest.Start(hubtest.Options{})
	if err != nil {
		return nil, err
	}
	f := &fleet{hub: hub, clock: clock.Fast(o.speed), out: out}
	for i := range o.devices {
		m, err := f.start(i, o)
		if err != nil {
			f.close()
			return nil, err
		}
		f.members = append(f.members, m)
	}
	return f, nil
}

// start starts the device with that number, and its link to the hub.
func (f *fleet) start(number int, o options) (*member, error) {
	var hub atomic.Pointer[iothub.Hub]
	d, err := newDevice(number, f.clock, func() {
		if h := hub.Load(); h != nil { // the agent begins before it
			h.Notice()
		}
	})
	if err != nil {
		return nil, err
	}
	connection := f.hub.CreateDevice(d.name)
	m := &member{d, iothub.New(iothub.Options{
		Link: link.Options{
			Credentials: link.SharedKeyFile{Read: func(string) ([]byte, error) { return []byte(connection), nil }},
			Address:     f.hub.MQTTAddress(), RootCAs: f.hub.RootCAs(), MaxBackoff: o.cap, Log: zap.NewNop(),
		},
		Agent: d.agent, Status: func() api.Status { return d.status(f.clock.Wall) }, Log: zap.NewNop(),
		Level: zap.NewAtomicLevel(), ReportEvery: reportEvery, ReportSpread: reportEvery,
	})}
	hub.Store(m.hub)
	return m, nil
}

// close ends the devices, all at once, and then the hub.
func (f *fleet) close() {
	var all sync.WaitGroup
	for _, m := range f.members {
		all.Go(func() {
			m.hub.Close()
			m.agent.Close()
		})
	}
	all.Wait()
	f.hub.Close()
}

// count returns of how many devices something is so.
func (f *fleet) count(is func(*member) bool) (n int) {
	for _, m := range f.members {
		if is(m) {
			n++
		}
	}
	return n
}

const (
	reportEvery   = time.Second // at least between two reports of a device
	pollEvery     = 25 * time.Millisecond
	progressEvery = time.Second
)

// goal is something that each device is to reach.
type goal struct {
	name string
	is   func(*member) bool
}

// reach waits until each device has reached each goal, or ctx ends, and shows how far they are. It returns how long
// after begun each of them did.
func (f *fleet) reach(ctx context.Context, begun time.Time, goals ...goal) spread {
	s := spread{devices: len(f.members)}
	done := make([]map[*member]bool, len(goals))
	for i, g := range goals {
		s.milestones = append(s.milestones, milestone{name: g.name})
		done[i] = make(map[*member]bool)
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	shown := time.Now()
	for {
		missing := 0
		for i, g := range goals {
			for _, m := range f.members {
				if done[i][m] {
					continue
				}
				if !g.is(m) {
					missing++
					continue
				}
				done[i][m] = true
				s.milestones[i].reached = append(s.milestones[i].reached, time.Since(begun))
			}
		}
		if now := time.Now(); missing == 0 || now.Sub(shown) >= progressEvery {
			f.progress(now.Sub(begun), s)
			shown = now
		}
		if missing == 0 {
			return s
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return s
		}
	}
}

// progress writes a line of how many devices have come how far.
func (f *fleet) progress(at time.Duration, s spread) {
	text := fmt.Sprintf("  %8s", seconds(at))
	for _, m := range s.milestones {
		text += fmt.Sprintf("   %s %d", m.name, len(m.reached))
	}
	fmt.Fprintln(f.out, text)
}

// configure creates an automatic configuration of that name, by which the hub sets a property below percept in the twin
// of each device.
func (f *fleet) configure(ctx context.Context, name, property string, value any) error {
	body, err := json.Marshal(map[string]any{
		"id": name, "targetCondition": "*", "priority": 10,
		"content": map[string]any{"deviceContent": map[string]any{"properties.desired.percept." + property: value}},
	})
	if err != nil {
		return err
	}
	return f.ask(ctx, "PUT", "/configurations/"+name, string(body))
}

// unconfigure deletes an automatic configuration, and so removes what it has set.
func (f *fleet) unconfigure(ctx context.Context, name string) error {
	return f.ask(ctx, "DELETE", "/configurations/"+name, "")
}

// ask asks the hub as a service does.
func (f *fleet) ask(ctx context.Context, method, path, body string) error {
	status, answer, err := f.hub.Ask(ctx, method, path, body)
	if err == nil && status >= 300 {
		err = fmt.Errorf("%s %s: status %d: %s", method, path, status, answer)
	}
	return err
}

// acknowledges reports whether the device has reported that it applied its desired properties as they are.
func (f *fleet) acknowledges(m *member) bool {
	percept, _ := f.hub.Reported(m.name)["percept"].(map[string]any)
	desired, _ := percept["desired"].(map[string]any)
	version := f.hub.Desired(m.name)["$version"]
	return desired["status"] == "applied" && fmt.Sprint(desired["version"]) == fmt.Sprint(version)
}

// backSince returns how long after resumed, when the hub was back, each device connected again.
func (f *fleet) backSince(resumed time.Time) (back []time.Duration) {
	for _, m := range f.members {
		for _, on := range f.hub.Counters(m.name).ConnectedOn {
			if on.After(resumed) {
				back = append(back, on.Sub(resumed))
				break
			}
		}
	}
	return back
}

// traffic adds up what the fleet has cost.
func (f *fleet) traffic() (sum hubtest.Counters) {
	for _, m := range f.members {
		c := f.hub.Counters(m.name)
		sum.Connects += c.Connects
		for _, pair := range [][2]*hubtest.Traffic{
			{&sum.TwinReads, &c.TwinReads}, {&sum.Reported, &c.Reported}, {&sum.Notifications, &c.Notifications},
		} {
			pair[0].Messages += pair[1].Messages
			pair[0].Metered += pair[1].Metered
			pair[0].Bytes += pair[1].Bytes
		}
		sum.BytesIn += c.BytesIn
		sum.BytesOut += c.BytesOut
	}
	return sum
}
