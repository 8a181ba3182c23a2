package staleness

import (
	"fmt"
	"sync"
	"time"

	"perceptd/agent/simulator"
)

// strategy decides when the token of a key is asked for, without perceptd.
type strategy struct {
	name string

	// next returns when to ask, given what is in the hand. It is called anew after every answer and
	// whenever a policy change is made or has reached new tokens; a time that has passed means at once.
	next func(*hand) time.Time

	// fails says that next counts the module's failed requests itself. Otherwise every use fails at which
	// no valid token is in the hand.
	fails bool
}

// hand is what a strategy has of one key.
type hand struct {
	*life
	token    simulator.Token
	expires  time.Time // of token; the zero time when there is none
	received time.Time // when it first came
	again    int       // how often it came again since
	tried    time.Time // when the back end was asked last
	misses   int       // failures in a row, of an SDK those that a use waited for
	missing  time.Time // when the request began that these are tries of
}

// azidentity is a module with azidentity 1.15 and nothing between it and the back end: it asks at a use
// with less than five minutes left, and tries as long as it does for IMDS.
func azidentity() strategy {
	return strategy{name: "azidentity", next: (*hand).nextSDK, fails: true}
}

// sdkPauses are azidentity's between the tries of a request to IMDS.
var sdkPauses = [...]time.Duration{2 * time.Second, 6 * time.Second, 14 * time.Second, 25 * time.Second,
	25 * time.Second, 25 * time.Second}

func (h *hand) nextSDK() time.Time {
	due := latest(h.tried.Add(1), h.expires.Add(-sdkMargin+1))
	if h.misses == 0 {
		return h.nextUse(h.key, due)
	}
	if try := (h.misses - 1) % (len(sdkPauses) + 1); try < len(sdkPauses) {
		return h.tried.Add(sdkPauses[try])
	}
	return h.nextUse(h.key, due)
}

// gaveUp reports whether the failure just met was the last of an SDK's tries.
func (h *hand) gaveUp() bool { return h.misses > 0 && h.misses%(len(sdkPauses)+1) == 0 }

// halfLife refreshes a token once when half of the life is over that it had when it came, and then as
// azidentity does.
func halfLife() strategy {
	return strategy{name: "half life", fails: true, next: func(h *hand) time.Time {
		half := h.received.Add(h.expires.Sub(h.received) / 2)
		if h.expires.IsZero() || h.again > 0 || h.misses > 0 {
			return h.nextSDK()
		}
		return h.nextUse(h.key, latest(half, h.tried.Add(1)))
	}}
}

// polling asks again and again, whatever comes. The wait differs by up to 10 %: an even one would come to
// divide a day, and so hit every rollover at an expiry by chance.
func polling(every time.Duration) strategy {
	return strategy{name: fmt.Sprintf("polling, %v min", every.Minutes()), next: func(h *hand) time.Time {
		if h.tried.IsZero() {
			return h.nextUse(h.key, opened)
		}
		return h.tried.Add(time.Duration(float64(every) * (0.9 + 0.2*h.roll(forPolling, int64(h.key), int64(h.asked)))))
	}}
}

// oracle knows when a token rolls over, and when a policy change has reached new tokens. It waits for
// the latter while its token is valid, and tries every second when the back end does not answer.
func oracle() strategy {
	return strategy{name: "oracle", next: func(h *hand) time.Time {
		switch e := h.episode(); {
		case h.expires.IsZero() && h.misses == 0:
			return h.nextUse(h.key, opened)
		case h.misses > 0:
			return h.tried.Add(time.Second)
		case e == nil:
			return h.token.RollsOn.Add(-h.ahead())
		default:
			return earliest(latest(h.token.RollsOn.Add(-h.ahead()), e.reached), h.expires)
		}
	}}
}

// follow lets a strategy work on every key of the world, on both CPUs.
func (w world) follow(s strategy) []*life {
	lives := make([]*life, w.keys)
	var all sync.WaitGroup
	for first := range 2 {
		all.Go(func() {
			for key := first; key < w.keys; key += 2 {
				lives[key] = w.followOne(s, key)
			}
		})
	}
	all.Wait()
	return lives
}

func (w world) followOne(s strategy, key int) *life {
	now := opened
	h := &hand{life: w.live(key, func() time.Time { return now })}
	turns := h.turns()
	for {
		at := latest(now, s.next(h))
		if len(turns) > 0 && !turns[0].at.After(at) {
			now = turns[0].at
			turns[0].take()
			turns = turns[1:]
			continue
		}
		if now = at; !now.Before(w.span().to) {
			return h.life
		}
		h.ask(s)
	}
}

// turn is a moment of a policy change.
type turn struct {
	at   time.Time
	take func()
}

func (h *hand) turns() []turn {
	var all []turn
	for _, c := range h.changes(h.key) {
		all = append(all, turn{c.made, func() { h.change(c) }}, turn{c.reached, func() {
			if err := h.reach(); err != nil {
				panic(err)
			}
		}})
	}
	return all
}

// ask asks the back end and takes what it gives into the hand.
func (h *hand) ask(s strategy) {
	now := h.now()
	h.tried = now
	m, ok := h.life.ask()
	if !ok {
		if !s.fails || !now.Before(h.expires.Add(-sdkMargin)) {
			h.miss(s, now)
		}
		return
	}
	h.misses = 0
	if m.Serial == h.token.Serial {
		h.again++
		return
	}
	if !s.fails {
		h.failBetween(h.expires, now.Add(-sdkPatience))
	}
	h.token, h.expires, h.received, h.again = m, m.ExpiresOn.Add(-h.ahead()), now, 0
	h.hold(m)
	h.inModule(m.Permissions.Groups)
}

// miss notes that a call failed that a token was needed for.
func (h *hand) miss(s strategy, now time.Time) {
	if h.misses%(len(sdkPauses)+1) == 0 {
		h.missing = now
	}
	if h.misses++; s.fails && h.gaveUp() {
		h.failBetween(h.missing, now)
	}
}

// failBetween notes that no token was to be had from one moment to another.
func (h *hand) failBetween(from, to time.Time) {
	for use := h.nextUse(h.key, from); use.Before(to); use = h.nextUse(h.key, use.Add(1)) {
		h.fail(use)
	}
}
