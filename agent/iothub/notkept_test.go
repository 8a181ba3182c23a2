package iothub

import (
	"errors"
	"sync/atomic"
	"testing"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/tokencache/tokencachetest"
)

// What a twin denies and the disk does not take is in force, and is not said to be kept, until the disk takes it.
func TestTwinThatIsNotKept(t *testing.T) {
	t.Parallel()
	var isFull atomic.Bool
	isFull.Store(true)
	a, err := agent.New(agent.Options{
		Fetch: new(tokencachetest.Source).Fetch, Rules: edge(),
		Deny: agent.DenyStore{Save: func(deny.Record) error {
			if isFull.Load() {
				return errors.New("no space left on device")
			}
			return nil
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	d := &desired{agent: a, level: zap.NewAtomicLevel(), log: zap.NewNop(), changed: func() {}}
	d.read(document{twinnedHub, 4, desiredOf(denyVision), 2})
	rules := a.DenyStatus()
	if s := d.describe(); s.Applied != 4 || len(rules.InForce()) != 1 {
		t.Errorf("%+v, %+v", s, rules)
	}
	if d.keep() {
		t.Error("a full disk has kept it")
	}
	isFull.Store(false)
	if !d.keep() {
		t.Error("it is not kept, and could be")
	}
}

// The acknowledgement says that what is in force was not kept, and no more once it was.
func TestNotKeptIsAcknowledged(t *testing.T) {
	t.Parallel()
	r := &reporter{wake: make(chan struct{}, 1), options: reporterOptions{Log: zap.NewNop()}}
	for _, isKept := range []bool{false, true} {
		r.acknowledge(api.DesiredStatus{Version: 7, Applied: 7}, isKept)
		if ack := r.ack.bounded(); ack.NotKept == isKept || ack.Status != ackApplied {
			t.Errorf("kept %v: %+v", isKept, ack)
		}
	}
}
