package hubtest

import (
	"slices"
	"time"
)

// Counters is what an identity has cost. A message is metered in blocks of 4 KB, as IoT Hub counts against its daily
// quota.
type Counters struct {
	Connects      int
	Refused       int // CONNECTs
	TwinReads     Traffic
	Reported      Traffic // patches of reported properties
	Notifications Traffic // of desired properties
	Methods       Traffic // calls, and their answers
	Events        Traffic

	// BytesIn and BytesOut are what went over TCP, TLS included, from and to the device, on connections that were
	// accepted.
	BytesIn, BytesOut int64

	// ConnectedOn is when each connection of late was accepted, the last one last.
	ConnectedOn []time.Time
}

// Traffic is messages of one kind.
type Traffic struct {
	Messages int
	Metered  int // blocks of 4 KB
	Bytes    int // of payloads
}

const (
	meterBlock     = 4 << 10
	connectsListed = 64
)

func (t *Traffic) add(payload int) {
	t.Messages++
	t.Metered += max(1, (payload+meterBlock-1)/meterBlock)
	t.Bytes += payload
}

// Counters returns what an identity has cost since it was registered.
func (h *Hub) Counters(id string) Counters {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.identities[id]
	if i == nil {
		return Counters{}
	}
	c := i.counters
	c.ConnectedOn = slices.Clone(c.ConnectedOn)
	if i.session != nil {
		c.BytesIn += i.session.wire.in.Load()
		c.BytesOut += i.session.wire.out.Load()
	}
	return c
}

func (c *Counters) connected(now time.Time) {
	c.Connects++
	c.ConnectedOn = append(c.ConnectedOn, now)
	if surplus := len(c.ConnectedOn) - connectsListed; surplus > 0 {
		c.ConnectedOn = slices.Delete(c.ConnectedOn, 0, surplus)
	}
}
