package hubtest

import (
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Faults are switched while the hub runs. Zero: there are none.
type Faults struct {
	RefuseLogins       atomic.Bool  // every CONNECT is refused: not authorized
	DropTwinAnswers    atomic.Bool  // twin requests are never answered
	AnswerBeforePuback atomic.Bool  // twin answers leave before the PUBACK of the request
	ThrottleTwin       atomic.Int64 // so many twin requests are answered with 429
	FailTwin           atomic.Int64 // so many twin requests are answered with 500
	RefuseSubscribes   atomic.Int64 // so many SUBSCRIBEs are answered with 0x80
	CutAtSubscribe     atomic.Int64 // so many connections are cut in the place of a SUBACK
	PubackDelay        atomic.Int64 // nanoseconds before each PUBACK
	LoginDelay         atomic.Int64 // nanoseconds before each CONNACK
}

// take counts n down, and reports whether it was above zero.
func take(n *atomic.Int64) bool {
	for {
		left := n.Load()
		if left <= 0 {
			return false
		}
		if n.CompareAndSwap(left, left-1) {
			return true
		}
	}
}

// delay waits for d, or until end is closed.
func delay(d *atomic.Int64, end <-chan struct{}) {
	if wait := time.Duration(d.Load()); wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-end:
		}
	}
}

// Limits are throttles, in operations a second. Zero: none. A second's worth may come at once.
type Limits struct {
	Connects    float64 // beyond, CONNECTs are refused: server unavailable
	TwinReads   float64 // beyond, 429
	TwinUpdates float64 // beyond, 429; reported and desired together
}

type throttles struct{ connects, twinReads, twinUpdates *rate.Limiter }

func (l Limits) throttles() throttles {
	limiter := func(perSecond float64) *rate.Limiter {
		if perSecond == 0 {
			return rate.NewLimiter(rate.Inf, 0)
		}
		return rate.NewLimiter(rate.Limit(perSecond), max(1, int(perSecond)))
	}
	return throttles{limiter(l.Connects), limiter(l.TwinReads), limiter(l.TwinUpdates)}
}

// SetLimits puts other throttles in force.
func (h *Hub) SetLimits(l Limits) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.throttles = l.throttles()
}
