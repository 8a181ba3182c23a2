package main

import (
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A device's token lacks a policy change at first, is served all the same, and carries it within a day.
func TestDevice(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, err := newDevice(7, tokencache.Clock{}.OrRuntime(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer d.agent.Close()
		time.Sleep(time.Minute)
		if err := d.serves(t.Context()); err != nil || d.isStale() || d.name != "percept-007" {
			t.Errorf("%s: %v, stale %t", d.name, err, d.isStale())
		}
		change := api.PolicyChangeRequest{Resource: vault, Effect: api.EffectGranted, Note: "a note"}
		if _, err := d.agent.RecordChange("test", change); err != nil {
			t.Fatal(err)
		}
		if !d.isStale() || d.serves(t.Context()) != nil || !d.hasChange("a note") {
			t.Error("the change touches nothing")
		}
		time.Sleep(life + time.Hour)
		if d.isStale() || d.serves(t.Context()) != nil {
			t.Error("the token does not carry the change after a day")
		}
		if s := d.status(time.Now); !s.Simulated || len(s.Tokens) != 2 || s.Now.IsZero() {
			t.Errorf("%+v", s)
		}
	})
}
