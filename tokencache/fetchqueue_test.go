package tokencache

import (
	"testing"
	"time"
)

func TestQueueOrder(t *testing.T) {
	t.Parallel()
	named := func(c priority) *flight { return &flight{priority: c, notBefore: longAgo} }
	probe, refresh, caller, caller2 := named(forProbe), named(forRefresh), named(forCaller), named(forCaller)
	g := newFetchQueue()
	g.identities[Selector{}] = identityCalls{answered: true}
	g.waiting = []*flight{probe, refresh, caller, caller2}
	for i, want := range []*flight{caller, caller2} {
		if got := g.begin(0); got != want {
			t.Fatalf("call %d is of class %v, want %v", i, got.priority, want.priority)
		}
	}
	if g.begin(0) != nil || g.nextStart(0) != never {
		t.Fatal("a third call at once")
	}
	g.running = nil
	if got := g.begin(0); got != refresh {
		t.Fatal("a probe before a refresh")
	}
	if g.begin(0) != nil {
		t.Fatal("a probe takes the last of the calls at once")
	}
	g.running = nil
	if got := g.begin(0); got != probe {
		t.Fatal("the probe is gone")
	}
	g.running = nil
	g.waiting = []*flight{named(forProbe)}
	if g.begin(0) != nil || g.nextStart(0) != bootTime(time.Second) {
		t.Fatal("a probe takes the last call of a second")
	}
	g.waiting = []*flight{named(forProbe), named(forCaller), named(forCaller)}
	if g.begin(0) == nil {
		t.Fatal("no fifth call in a second")
	}
	g.waiting = g.waiting[1:]
	if g.begin(bootTime(time.Second-1)) != nil {
		t.Fatal("a sixth call in a second")
	}
	if g.begin(bootTime(time.Second)) == nil {
		t.Fatal("no call when the second is over")
	}
	g.remove(named(forCaller)) // not queued: no harm
}

// Every second call is for the flight that has been late for longest, wherever it stands in the queue.
func TestQueueFavoursTheStarved(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		now  bootTime
		want *flight
		with []*flight
	}{
		{bootTime(time.Minute), &flight{priority: forRefresh}, nil},
		{bootTime(6 * time.Minute), &flight{priority: forProbe}, nil},
		// these are not late yet
		{bootTime(time.Minute), &flight{priority: forRefresh}, []*flight{{priority: forProbe}, {priority: forProbe}}},
		{bootTime(time.Minute), &flight{priority: forRefresh},
			[]*flight{{priority: forRefresh, asked: bootTime(20 * time.Second)}}},
		{bootTime(20 * time.Minute), &flight{priority: forProbe},
			[]*flight{{priority: forRefresh, asked: bootTime(16 * time.Minute)}}},
	} {
		g := newFetchQueue()
		g.identities[Selector{}] = identityCalls{answered: true}
		g.waiting = append(g.waiting, row.with...)
		g.waiting = append(g.waiting, row.want, &flight{asked: row.now}, &flight{asked: row.now})
		if f := g.begin(row.now); f == nil || f.priority != forCaller {
			t.Fatalf("%+v goes before a caller", f)
		}
		if f := g.begin(row.now); f != row.want {
			t.Errorf("after %v among %d others it is the turn of %+v", row.now, len(row.with), f)
		}
	}
}

// Identities take turns, and one that does not answer never has all calls.
func TestQueueSharesAmongIdentities(t *testing.T) {
	t.Parallel()
	a, b := Selector{Kind: ClientID, ID: "a"}, Selector{Kind: ClientID, ID: "b"}
	of := func(s Selector) *flight { return &flight{key: Key{Selector: s}, notBefore: longAgo} }
	g := newFetchQueue()
	for range 5 {
		g.waiting = append(g.waiting, of(a))
	}
	g.track(a)
	for range callsAtOnce {
		if g.begin(0) == nil {
			t.Fatal("the only identity there is has not all calls")
		}
	}
	g = newFetchQueue()
	g.track(a)
	g.track(b)
	for range 5 {
		g.waiting = append(g.waiting, of(a))
	}
	first := g.begin(0)
	if first == nil || g.begin(0) != nil {
		t.Fatal("an identity for which there was no answer yet has not one call at once")
	}
	g.waiting = append(g.waiting, of(b))
	second := g.begin(0)
	if second == nil || second.key.Selector != b {
		t.Fatalf("%+v beside a call of the first identity", second)
	}
	g.ended(first, true)
	g.ended(second, true)
	g.waiting = append(g.waiting, of(b), of(b))
	for i, want := range []Selector{a, b, a, b, a} { // they take turns
		f := g.begin(bootTime(time.Hour + time.Duration(i)*time.Second))
		if f == nil || f.key.Selector != want {
			t.Fatalf("call %d: %+v, want one of %v", i, f, want)
		}
		g.ended(f, true)
	}
	now := bootTime(2 * time.Hour)
	g.waiting = []*flight{of(a), of(a)}
	slow := g.begin(now)
	if f := g.begin(now.add(slowCall + 1)); f != nil {
		t.Fatalf("%+v beside a slow one of the same identity", f)
	}
	quick := g.begin(now.add(slowCall))
	if quick == nil {
		t.Fatal("one call at once for an identity that answers")
	}
	g.ended(slow, true)
	g.ended(quick, false)
	g.waiting = []*flight{of(a), of(a)}
	if now = now.add(time.Hour); g.begin(now) == nil || g.begin(now) != nil {
		t.Fatal("an identity for which there was no answer last time has not one call at once")
	}
	for i := range 3 * MaxKeys {
		g.track(Selector{Kind: ObjectID, ID: string(rune(i))})
	}
	if len(g.identities) > MaxKeys {
		t.Errorf("%d identities are remembered", len(g.identities))
	}
}
