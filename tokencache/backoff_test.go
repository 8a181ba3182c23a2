package tokencache

import (
	"testing"
	"time"
)

func TestFirstRefresh(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name          string
		left, advised time.Duration
		roll          float64
		want          time.Duration
	}{
		{"half of a day", 24 * time.Hour, 0, 0.5, 12 * time.Hour},
		{"earliest", 24 * time.Hour, 0, 0, 10*time.Hour + 48*time.Minute},
		{"latest", 24 * time.Hour, 0, 1, 13*time.Hour + 12*time.Minute},
		{"the back end's own cached copy, half spent", 12 * time.Hour, 0, 0.5, 6 * time.Hour},
		{"two hours are not short", 2 * time.Hour, 0, 0.5, time.Hour},
		{"less than two hours are", 2*time.Hour - time.Second, 0, 0.5, 5759200 * time.Millisecond},
		{"ten minutes", 10 * time.Minute, 0, 0.5, 8 * time.Minute},
		{"advised", 24 * time.Hour, 5 * time.Hour, 0.9, 5 * time.Hour},
		{"advised past the expiry is no advice", time.Hour, 2 * time.Hour, 0.5, 48 * time.Minute},
		{"advised too soon", time.Hour, time.Second, 0.5, 30 * time.Second},
		{"nothing left", 0, 0, 0.5, 30 * time.Second},
	} {
		if got := firstRefresh(row.left, row.advised, row.roll); got != row.want {
			t.Errorf("%s: firstRefresh(%v, %v, %v) = %v, want %v", row.name, row.left, row.advised, row.roll, got, row.want)
		}
	}
}

func TestNextTry(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		left time.Duration
		roll float64
		want time.Duration
	}{
		{12 * time.Hour, 0.5, 6 * time.Hour},
		{12 * time.Hour, 0, 324 * time.Minute},
		{10 * time.Minute, 0.5, 5 * time.Minute},
		{10 * time.Minute, 0.4, 10*time.Minute + time.Second}, // less than the floor: the expiry itself
		{time.Second, 0.5, 2 * time.Second},
		{0, 0.5, time.Second},
	} {
		if got := nextTry(row.left, row.roll); got != row.want {
			t.Errorf("nextTry(%v, %v) = %v, want %v", row.left, row.roll, got, row.want)
		}
	}
}

// From half life on, a back end that keeps its copy to the end costs about eight calls, the last of them
// one second after the expiry.
func TestNextTryConverges(t *testing.T) {
	t.Parallel()
	for _, roll := range []float64{0, 0.25, 0.5, 0.75, 0.999} {
		left, calls := 12*time.Hour, 0
		for left > 0 {
			left -= nextTry(left, roll)
			calls++
		}
		if left != -afterExpiry {
			t.Errorf("roll %v: the last try comes %v after the expiry, want %v", roll, -left, afterExpiry)
		}
		if calls < 7 || calls > 9 {
			t.Errorf("roll %v: %d calls from half life to expiry", roll, calls)
		}
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name     string
		failures int
		left     time.Duration
		roll     float64
		want     time.Duration
	}{
		{"first", 1, 12 * time.Hour, 1, time.Second},
		{"second", 2, 12 * time.Hour, 1, 2 * time.Second},
		{"full jitter", 5, 12 * time.Hour, 0.5, 8 * time.Second},
		{"floor", 5, 12 * time.Hour, 0, time.Second},
		{"top", 50, 12 * time.Hour, 1, 5 * time.Minute},
		{"no overflow", 1 << 30, 12 * time.Hour, 1, 5 * time.Minute},
		{"last minutes", 50, 4 * time.Minute, 1, 5 * time.Second},
		{"the last minutes are not slept through", 50, 7 * time.Minute, 1, 2 * time.Minute},
		{"just before the last minutes", 50, 5*time.Minute + 10*time.Millisecond, 1, time.Second},
		{"just expired", 50, -4 * time.Minute, 1, 5 * time.Second},
		{"long expired", 50, -6 * time.Minute, 1, 5 * time.Minute},
		{"never had one", 50, noToken, 1, 5 * time.Minute},
	} {
		if got := backoff(row.failures, row.left, row.roll); got != row.want {
			t.Errorf("%s: backoff(%d, %v, %v) = %v, want %v", row.name, row.failures, row.left, row.roll, got, row.want)
		}
	}
}

func TestNominalOf(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ told, want time.Duration }{
		{0, 24 * time.Hour},
		{-time.Hour, 24 * time.Hour},
		{time.Hour, time.Hour},
		{28 * time.Hour, 28 * time.Hour},
		{1000 * time.Hour, 28*time.Hour + 5*time.Minute},
	} {
		if got := nominalOf(Fetched{Nominal: row.told}); got != row.want {
			t.Errorf("nominalOf(%v) = %v, want %v", row.told, got, row.want)
		}
	}
}

func TestMintedBefore(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	byExpiry := func(expires time.Time) Token { return Token{ExpiresOn: expires} }
	byClaim := func(issued, expires time.Time) Token {
		return Token{ExpiresOn: expires, Claims: Claims{IssuedAt: issued}}
	}
	minted := func(t Token) IssueWindow { return issueWindowOf(t, t.ExpiresOn.Sub(noon), true) } // as received at noon
	const hour = time.Hour
	for _, row := range []struct {
		name        string
		t, o        Token
		life, oLife time.Duration
		want        bool
	}{
		{"earlier expiry, same life", byExpiry(noon), byExpiry(noon.Add(time.Second)), 24 * time.Hour, 24 * time.Hour, true},
		{"later expiry, longer life", byExpiry(noon.Add(time.Hour)), byExpiry(noon), 28 * time.Hour, 24 * time.Hour, true},
		{"the same", byExpiry(noon), byExpiry(noon), 24 * time.Hour, 24 * time.Hour, false},
		{"dates decide", byClaim(noon, noon.Add(2*hour)), byClaim(noon.Add(-hour), noon.Add(20*hour)), 24 * hour, 24 * hour, false},
		{"the earlier date", byClaim(noon.Add(-hour), noon.Add(20*hour)), byClaim(noon, noon.Add(2*hour)), 24 * hour, 24 * hour, true},
		{"a date on one side, that of the other by its expiry", byClaim(noon, noon.Add(24*hour)), byExpiry(noon.Add(25 * hour)), 24 * hour, 24 * hour, true},
		{"a date that is none, later than the expiry", byClaim(noon.Add(30*hour), noon.Add(24*hour)), byClaim(noon.Add(hour), noon.Add(25*hour)), 24 * hour, 24 * hour, true},
		{"a date that is none, later than the receipt", byClaim(noon.Add(12*hour), noon.Add(24*hour)), byClaim(noon.Add(hour), noon.Add(25*hour)), 12 * hour, 24 * hour, true},
	} {
		if got := issuedBefore(row.t, minted(row.t), row.life, row.o, minted(row.o), row.oLife); got != row.want {
			t.Errorf("%s: %v, want %v", row.name, got, row.want)
		}
	}
}

func TestGateOrder(t *testing.T) {
	t.Parallel()
	named := func(c priority) *flight { return &flight{priority: c, opens: longAgo} }
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
func TestGateFavoursTheLate(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		now  bootTime
		want *flight
		with []*flight
	}{
		{bootTime(time.Minute), &flight{priority: forRefresh}, nil},
		{bootTime(6 * time.Minute), &flight{priority: forProbe}, nil},
		{bootTime(time.Minute), &flight{priority: forRefresh}, []*flight{{priority: forProbe}, {priority: forProbe}}}, // these are not late yet
		{bootTime(time.Minute), &flight{priority: forRefresh}, []*flight{{priority: forRefresh, asked: bootTime(20 * time.Second)}}},
		{bootTime(20 * time.Minute), &flight{priority: forProbe}, []*flight{{priority: forRefresh, asked: bootTime(16 * time.Minute)}}},
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
func TestGateSharesAmongIdentities(t *testing.T) {
	t.Parallel()
	a, b := Selector{Kind: ClientID, ID: "a"}, Selector{Kind: ClientID, ID: "b"}
	of := func(s Selector) *flight { return &flight{key: Key{Selector: s}, opens: longAgo} }
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
