package tokencache_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// lifeAnswer is what a back end says of one token at some time.
type lifeAnswer struct {
	after time.Duration // the first
	left  time.Duration // expires_in
	until time.Duration // expires_on, after the first answer; 0: it moves with expires_in
	ahead time.Duration // the device's wall clock, of the true time
	known bool          // whether that clock is known to be right
	want  time.Duration // life left by then; 0: it is refused
}

// A back end that gives one token again and contradicts itself: what it says later shortens the life, and lengthens it
// only where something else bears it out. The token is never taken to live longer than it truly may.
func TestLifeOfATokenThatComesAgain(t *testing.T) {
	t.Parallel()
	const day, hour, min = 24 * time.Hour, time.Hour, time.Minute
	for _, row := range []struct {
		name      string
		uncounted bool // expires_on alone is told
		undated   bool // the token has no iat
		answers   []lifeAnswer
	}{
		{"counted down", false, false,
			[]lifeAnswer{{0, day, day, 0, false, day}, {6 * hour, 18 * hour, day, 0, false, 18 * hour}}},
		{"counted down with seconds lost", false, false,
			[]lifeAnswer{{0, day, day, 0, false, day},
				{6 * hour, 18*hour - 2*time.Second, day, 0, false, 18*hour - 2*time.Second}}},
		{"shorter than thought", false, false,
			[]lifeAnswer{{0, day, day, 0, false, day}, {6 * hour, 10 * hour, day, 0, false, 10 * hour}}},
		{"the same number, without a clock", false, true,
			[]lifeAnswer{{0, day, 0, 0, false, day}, {6 * hour, day, 0, 0, false, 18 * hour},
				{20 * hour, day, 0, 0, false, 4 * hour}}},
		{"the same number of a dated token, without a clock", false, false,
			[]lifeAnswer{{0, day, day, 0, false, day}, {6 * hour, day, day, 0, false, 18 * hour}}},
		{"the same number, and an expiry that a right clock judges", false, false,
			[]lifeAnswer{{0, day, day, 0, true, day}, {6 * hour, day, day, 0, true, 18 * hour}}},
		{"the same low number, and an expiry that a right clock judges", false, false,
			[]lifeAnswer{{0, hour, day, 0, true, hour}, {30 * min, hour, day, 0, true, hour}}},
		{"the same low number, and no expiry", false, true,
			[]lifeAnswer{{0, hour, 0, 0, true, hour}, {30 * min, hour, 0, 0, true, 30 * min}}},
		{"too short at first, by the whole life of a dated token", false, false,
			[]lifeAnswer{{0, hour, day, 0, false, hour}, {30 * min, day - 30*min, day, 0, false, day - 30*min}}},
		{"too short at first, and nothing to see it by", false, true,
			[]lifeAnswer{{0, hour, day, 0, false, hour}, {30 * min, day - 30*min, day, 0, false, 30 * min}}},
		{"too short at first, by two answers that agree later", false, true,
			[]lifeAnswer{{0, hour, day, 0, false, hour}, {30 * min, day - 30*min, day, 0, false, 30 * min},
				{40 * min, day - 40*min, day, 0, false, day - 40*min}}},
		{"too short at first, and the same number later", false, true,
			[]lifeAnswer{{0, hour, day, 0, false, hour}, {30 * min, day - 30*min, day, 0, false, 30 * min},
				{40 * min, day - 30*min, day, 0, false, 20 * min}}},
		{"more than its dates allow", false, false,
			[]lifeAnswer{{0, hour, day, 0, false, hour}, {30 * min, day - min, day, 0, false, 30 * min}}},
		{"too short for once", false, true,
			[]lifeAnswer{{0, day, day, 0, false, day}, {hour, 10 * min, day, 0, false, 10 * min},
				{hour + 5*min, 23*hour - 5*min, day, 0, false, 23*hour - 5*min}}},
		{"by a clock that was ahead", true, false,
			[]lifeAnswer{{0, hour, day, 23 * hour, false, hour}, {30 * min, day - 30*min, day, 0, true, day - 30*min}}},
		{"by a clock that was moved and is not known to be right", true, false,
			[]lifeAnswer{{0, hour, day, 23 * hour, false, hour}, {30 * min, day - 30*min, day, 0, false, 30 * min}}},
		{"a right clock has proved the count wrong", false, true,
			[]lifeAnswer{{0, 20 * hour, 10 * hour, 0, false, 20 * hour},
				{hour, 19 * hour, 10 * hour, 0, true, 9 * hour}, {2 * hour, 18 * hour, 10 * hour, 0, false, 8 * hour}}},

		{"over, and the same number again", false, true,
			[]lifeAnswer{{0, hour, 0, 0, false, hour}, {hour + min, hour, 0, 0, false, 0},
				{3 * hour, hour, 0, 0, false, 0}}},
		{"over, and the same number again, by a right clock alone", false, true,
			[]lifeAnswer{{0, hour, 0, 0, true, hour}, {hour + min, hour, 0, 0, true, 0}}},
		{"over, but not by its expiry and a right clock", false, false,
			[]lifeAnswer{{0, hour, day, 0, true, hour}, {hour + min, hour, day, 0, true, hour},
				{day - 10*min, hour, day, 0, true, 10 * min}}},
		{"over, and the same number again beside an expiry that no right clock judges", true, false,
			[]lifeAnswer{{0, day, day, 0, false, day}, {day + min, day, day, 0, false, 0}}},
		{"over by a wrong number, which is repeated", false, true,
			[]lifeAnswer{{0, day, day, 0, false, day}, {hour, min, day, 0, false, min},
				{hour + 30*time.Second, 10 * hour, day, 0, false, 10 * hour}}},
		{"a minute, again and again", false, true,
			[]lifeAnswer{{0, min, day, 0, false, min}, {5 * min, min, day, 0, false, min},
				{10 * min, min, day, 0, false, min}}},
		{"over by a clock that was ahead", true, false,
			[]lifeAnswer{{0, hour, day, 23 * hour, false, hour},
				{hour + 2*time.Second, day - hour - 2*time.Second, day, 0, false, day - hour - 2*time.Second}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				w, r := &tokencachetest.Clock{}, &registry{}
				var now lifeAnswer
				r.gives(func(key tokencache.Key) tokencache.Fetched {
					f := tokenOf("a", key, began)
					f.Left, f.Counted, f.Nominal = now.left, !row.uncounted && now.until != 0, 0
					f.Token.ExpiresOn = began.Add(now.until)
					if now.until == 0 { // as the source fills it in
						f.Token.ExpiresOn = w.AfterUptime().Wall().Add(now.left)
					}
					if row.undated {
						f.Token.Claims = tokencache.Claims{}
					}
					return f
				})
				c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: w.AfterUptime()})
				defer c.Close()
				for i, answer := range row.answers {
					r.during(func() {
						now = row.answers[max(0, i-1)]
						if i > 0 && answer.after > row.answers[0].left {
							now = answer // the schedule asks at the expiry
						}
					})
					time.Sleep(answer.after - time.Since(began))
					synctest.Wait()
					r.during(func() { now = answer })
					w.Set(-answer.ahead, answer.known)
					_, err := c.Refresh(t.Context(), vault, true)
					if answer.want == 0 {
						if kindOf(t, err) != tokencache.Malformed || only(t, c).Left != 0 {
							t.Errorf("answer %d: %v, %v left", i+1, err, only(t, c).Left)
						}
						continue
					}
					if got := only(t, c).Left; err != nil || (got-answer.want).Abs() > time.Second {
						t.Errorf("answer %d: %v left, want %v; %v", i+1, got, answer.want, err)
					}
				}
			})
		})
	}
}

// What another key's token shows of the issuer's clock bears a correction out. Numbers that are no counts bear out
// nothing.
func TestLifeByAnotherToken(t *testing.T) {
	t.Parallel()
	for _, static := range []bool{false, true} {
		registered(t, func(t *testing.T, r *registry, _ *tokencache.Cache) {
			began := time.Now()
			wrong := true
			w := &tokencachetest.Clock{}
			r.gives(func(key tokencache.Key) tokencache.Fetched {
				f := tokenOf("a", key, began.Add(-5*time.Hour)) // nothing is fresh
				switch {
				case static:
					f.Left = 10 * time.Hour
				case wrong && key == vault:
					f.Left = time.Hour
				}
				return f
			})
			c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: w.AfterUptime()})
			defer c.Close()
			refreshed(t, c, vault, tokencache.Newer)
			refreshed(t, c, storage, tokencache.Newer)
			r.during(func() { wrong = false })
			time.Sleep(10 * time.Minute)
			refreshed(t, c, storage, tokencache.Unchanged)
			time.Sleep(10 * time.Minute)
			refreshed(t, c, vault, tokencache.Unchanged)
			want := 19*time.Hour - 20*time.Minute
			if static {
				want = 10*time.Hour - 20*time.Minute
			}
			for _, s := range c.Status() {
				if s.Left != want && (s.Key == vault || static) {
					t.Errorf("static %v: %v left of %v, want %v", static, s.Left, s.Key, want)
				}
			}
		})
	}
}

// A life that is corrected is planned by: the token is refreshed at its half, not at that of the life it was thought to
// have.
func TestCorrectedLifeIsPlannedBy(t *testing.T) {
	t.Parallel()
	registered(t, func(t *testing.T, r *registry, c *tokencache.Cache) {
		began := time.Now()
		wrong := true
		r.gives(func(key tokencache.Key) tokencache.Fetched {
			f := tokenOf("a", key, began)
			if wrong {
				f.Left = time.Hour
			}
			return f
		})
		refreshed(t, c, vault, tokencache.Newer)
		r.during(func() { wrong = false })
		time.Sleep(10 * time.Minute)
		refreshed(t, c, vault, tokencache.Unchanged)
		got := only(t, c)
		if wait := time.Until(got.NextRefresh); got.Life != 24*time.Hour || wait < 10*time.Hour {
			t.Errorf("a life of %v, refreshed in %v", got.Life, wait)
		}
	})
}

// A life that nobody told, and that is presumed while the back end hands the token out, neither shortens what is known
// of it nor is a number that is repeated; but it has an end.
func TestPresumedLife(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		first time.Duration // life told at first; 0: presumed then, too
		least time.Duration // for which the token is served
	}{
		{"from the first answer on", 0, 28 * time.Hour},
		{"after a life was told", 20 * time.Hour, 28 * time.Hour},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began, r := time.Now(), &registry{}
				c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: (&tokencachetest.Clock{}).AfterUptime()})
				defer c.Close()
				r.gives(func(key tokencache.Key) tokencache.Fetched {
					f := tokenOf("a", key, began)
					f.Left, f.Counted, f.Presumed = 10*time.Minute, false, true
					f.Token.ExpiresOn = began.Add(24 * time.Hour)
					if row.first > 0 && time.Since(began) < time.Minute {
						f.Left, f.Presumed = row.first, false
					}
					return f
				})
				for time.Since(began) < row.least {
					a := mustGet(t, c, vault, tokencache.Need{})
					if told := row.first - time.Since(began); a.Left < told-time.Minute {
						t.Fatalf("after %v: %v left, and %v were told", time.Since(began), a.Left, told)
					}
					time.Sleep(time.Minute)
				}
				if calls := len(r.asked(vault)); calls > 400 {
					t.Errorf("%d calls", calls)
				}
				time.Sleep(20 * time.Minute)
				if a, err := c.Get(t.Context(), vault, tokencache.Need{}); err == nil {
					t.Errorf("served with %v left after the longest life there is", a.Left)
				}
			})
		})
	}
}

// A life that nobody told is no word that a later one must be borne out against: not in the same boot, nor after
// another one.
func TestWordAfterAPresumedLife(t *testing.T) {
	t.Parallel()
	const life, behind, most = 20 * time.Hour, 12 * time.Hour, 24*time.Hour + 5*time.Minute
	for _, row := range []struct {
		name  string
		boots int
		asked bool // after the boot, while the life was still presumed
	}{
		{"in one boot", 0, false},
		{"after a boot", 1, false},
		{"after a boot and an answer", 1, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began, r, w := time.Now().Round(0), &registry{}, &tokencachetest.Clock{}
				presumed := true
				r.gives(func(key tokencache.Key) tokencache.Fetched {
					f := tokenOf("a", key, began)
					f.Counted, f.Token.ExpiresOn = false, began.Add(life)
					if f.Left = min(life+behind-time.Since(began), most); presumed {
						f.Left, f.Presumed = 10*time.Minute, true
					}
					return f
				})
				c := tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: w.AfterBoot(), BootID: "boot 0"})
				defer func() { c.Close() }()
				mustGet(t, c, vault, tokencache.Need{})
				for boot := 1; boot <= row.boots; boot++ {
					m := c.Snapshot()
					c.Close()
					clock := w.AfterBoot()
					id := fmt.Sprint("boot ", boot)
					c = tokencache.New(tokencache.Options{Fetch: r.Fetch, Clock: clock, BootID: id, Snapshot: &m,
						On: tokencache.OnAtBoot(id, clock.Boot(), m.Taken())})
				}
				if row.asked {
					time.Sleep(time.Minute)
					mustGet(t, c, vault, tokencache.Need{MinTTL: 15 * time.Minute})
				}
				presumed = false
				w.Set(-behind, false)
				for time.Since(began) < life-time.Minute {
					mustGet(t, c, vault, sdk)
					time.Sleep(5 * time.Minute)
				}
			})
		})
	}
}

// A token without a date may live for longer than is believed of it at first. The back end's counts tell, also over a
// boot of which nobody knows how long the device was off before: then two of them that agree. A number that is no count
// tells nothing.
func TestLongLifeOverABoot(t *testing.T) {
	t.Parallel()
	const life, off = 28 * time.Hour, 24 * time.Minute
	for _, row := range []struct {
		name   string
		ahead  time.Duration // the clock, after the boot
		static bool
	}{
		{"a clock that is behind", -time.Hour, false},
		{"a clock that is far ahead", 20 * year, false},
		{"a clock that is far behind", -20 * year, false},
		{"a number that is no count", -time.Hour, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began := time.Now().Round(0)
				fetch := func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
					f := tokencache.Fetched{Token: tokencache.Token{Text: tokencache.NewSecret("a"),
						ExpiresOn: began.Add(life)}, Left: life - time.Since(began), Counted: true}
					if row.static {
						f.Left = 24 * time.Hour
					}
					return f, nil
				}
				w := &tokencachetest.Clock{Trusted: true}
				c := tokencache.New(tokencache.Options{Fetch: fetch, Clock: w.AfterBoot(), BootID: "one"})
				mustGet(t, c, vault, sdk)
				time.Sleep(11 * time.Hour)
				m := c.Snapshot()
				c.Close()
				time.Sleep(off)
				w.Set(-row.ahead, false)
				clock := w.AfterBoot()
				c = tokencache.New(tokencache.Options{Fetch: fetch, Clock: clock, BootID: "two", Snapshot: &m,
					On: tokencache.OnAtBoot("two", clock.Boot(), m.Taken())})
				defer c.Close()
				for time.Since(began) < 23*time.Hour {
					mustGet(t, c, vault, sdk)
					time.Sleep(10 * time.Minute)
				}
				if row.static {
					// nobody knows how long it was off
					if got, most := only(t, c).Left, life-time.Since(began)+off; got > most {
						t.Errorf("%v left of %v at most", got, most)
					}
					return
				}
				for time.Since(began) < life-time.Minute {
					a := mustGet(t, c, vault, sdk)
					if truly := life - time.Since(began); a.Left > truly {
						t.Fatalf("%v left, of %v", a.Left, truly)
					}
					time.Sleep(10 * time.Minute)
				}
			})
		})
	}
}

// A token without a date has the usual life at most, and the longest that is known where a clock that is right, or
// another answer, bears out that it has more.
func TestLongLifeWithoutADate(t *testing.T) {
	t.Parallel()
	const hour, longest = time.Hour, 28*time.Hour + 5*time.Minute
	for _, row := range []struct {
		name                string
		told                time.Duration
		known               bool // the clock is known to be right
		another             bool // another token's answer came an hour before
		uncounted, noExpiry bool
		want                time.Duration
	}{
		{name: "no more than is usual", told: 24 * hour, want: 24 * hour},
		{name: "more, by a right clock", told: 28 * hour, known: true, want: 28 * hour},
		{name: "more, and another answer", told: 28 * hour, another: true, want: 28 * hour},
		{name: "more, and nothing bears it out", told: 28 * hour, want: 24 * hour},
		{name: "more, as nobody counts it", told: 28 * hour, known: true, uncounted: true, want: 24 * hour},
		{name: "more, and no expiry", told: 28 * hour, known: true, another: true, noExpiry: true, want: 24 * hour},
		{name: "days", told: 120 * hour, known: true, want: longest},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, began := &tokencachetest.Clock{Trusted: row.known}, time.Now().Round(0)
				fetch := func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
					f := tokencache.Fetched{Token: tokencache.Token{Text: tokencache.NewSecret(key.Resource)},
						Left: row.told, Counted: !row.uncounted, Reckoned: row.noExpiry}
					if key == storage {
						f.Left = 20 * hour
					}
					f.Token.ExpiresOn = time.Now().Round(0).Add(f.Left)
					return f, nil
				}
				c := tokencache.New(tokencache.Options{Fetch: fetch, Clock: w.AfterUptime()})
				defer c.Close()
				if row.another {
					mustGet(t, c, storage, tokencache.Need{})
					time.Sleep(hour)
				}
				if got := mustGet(t, c, vault, tokencache.Need{}).Left; got != row.want {
					t.Errorf("%v left %v after the beginning, want %v", got, time.Since(began), row.want)
				}
			})
		})
	}
}
