package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func after(d time.Duration) time.Time { return noon.Add(d) }

// aToken is a token minted so long ago, with a day of life.
func aToken(identity, resource string, age time.Duration) api.TokenStatus {
	const day = 24 * time.Hour
	return api.TokenStatus{
		Identity: identity, Resource: resource, State: api.StateFresh, SHA256: "0123456789ab",
		ReceivedOn: after(-age), ExpiresOn: after(day - age), ExpiresIn: int64((day - age) / time.Second),
		LastFetch: after(-age), LastOutcome: api.OutcomeNewer, Fetches: 1, NextRefresh: after(time.Hour),
		IssuedFrom: after(-age - 2*time.Second), IssuedTo: after(-age + 2*time.Second), Life: 86400,
		Permissions: api.Permissions{State: api.PermissionsCurrent}, Changes: []api.TokenChange{},
		Claims:   &api.TokenClaims{Audience: resource},
		Rollover: api.RolloverStatus{Pattern: api.RolloverUnlearnt},
	}
}

// lacking makes the token lack a change that was made so long ago.
func lacking(token api.TokenStatus, standing api.PermissionState, ago time.Duration) api.TokenStatus {
	token.Permissions = api.Permissions{
		State: standing, Changed: noon.Add(-ago), CurrentBy: token.ExpiresOn.Add(time.Second),
	}
	return token
}

// judged has the token be touched by changes: it stands to each as it does to all, but carries those that no token
// waits for.
func judged(token api.TokenStatus, changes ...api.PolicyChange) api.TokenStatus {
	for _, change := range changes {
		of := api.TokenChange{ID: change.ID, State: token.Permissions.State}
		switch {
		case token.ExpiresIn <= 0:
			of.State = ""
		case change.Waiting == 0:
			of.State = api.PermissionsCurrent
		}
		token.Changes = append(token.Changes, of)
	}
	return token
}

func aChange(id string, effect api.Effect, ago time.Duration, waiting int) api.PolicyChange {
	return api.PolicyChange{ID: id, Effect: effect, At: noon.Add(-ago), RecordedOn: noon,
		EndsOn:  noon.Add(50 * time.Hour),
		Touched: 2, Waiting: waiting}
}

// barsOf returns the lines of the drawing before the legend: labels, rule, bars, now.
func barsOf(shown string) []string {
	bars, _, _ := strings.Cut(shown, "\n\n")
	return strings.Split(bars, "\n")
}

// checkWidth fails for a line over the width, for what is not to be shown, and for trailing spaces.
func checkWidth(t *testing.T, shown string, width int, plainText bool) {
	t.Helper()
	for line := range strings.Lines(shown) {
		line = strings.TrimSuffix(line, "\n")
		if overWide(line, width) {
			t.Errorf("%d columns of %d: %q", utf8.RuneCountInString(line), width, line)
		}
		if strings.TrimRight(line, " ") != line {
			t.Errorf("spaces at the end of %q", line)
		}
		for _, r := range line {
			if plainText && r > unicode.MaxASCII || !unicode.IsPrint(r) && r != unicode.ReplacementChar {
				t.Errorf("%q in %q", r, line)
			}
		}
	}
}

func TestTimelineLayout(t *testing.T) {
	t.Parallel()
	one := []api.TokenStatus{aToken("device", "https://vault.azure.net", 9*time.Hour)}
	var many []api.TokenStatus
	for i := range 30 {
		token := aToken(fmt.Sprintf("identity-%d", i), "https://vault.azure.net", time.Duration(i)*47*time.Minute)
		if i%3 == 1 {
			token = lacking(token, api.PermissionsStale, 10*time.Minute)
		}
		many = append(many, token)
	}
	long := []api.TokenStatus{
		aToken(strings.Repeat("an-identity-", 5), "https://"+strings.Repeat("department.", 20)+"example.net/and/a/path",
			3*time.Hour),
		lacking(aToken("bücher\x1b[2J", "api://ohne-schema-ünd-so", 23*time.Hour), api.PermissionsUncertain,
			time.Minute),
	}
	ended := []api.TokenStatus{aToken("device", "https://vault.azure.net", 3*time.Hour)}
	ended[0].Ended = &api.EndedStretch{From: after(-20 * time.Hour), To: after(-3 * time.Hour),
		State: api.PermissionsStale, Withheld: true}
	for name, tokens := range map[string][]api.TokenStatus{"none": nil, "one": one, "thirty": many,
		"long names": long, "ended": ended} {
		for _, width := range []int{40, 60, 80, 100, 160, 300} {
			for _, plainText := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %d columns, ASCII %t", name, width, plainText), func(t *testing.T) {
					t.Parallel()
					change := aChange("1f0c2a34", api.EffectGranted, 10*time.Minute, 1)
					tokens := slices.Clone(tokens)
					for i := range tokens {
						tokens[i] = judged(tokens[i], change)
					}
					status := api.Status{Now: noon, Tokens: tokens, Changes: []api.PolicyChange{change}}
					shown := screen{Screen: term.Screen{Width: width, ASCII: plainText}}.timeline(status)
					checkWidth(t, shown, min(width, widestTimeline), plainText)
					if len(tokens) == 0 {
						if shown != "no tokens are cached\n" {
							t.Errorf("got %q", shown)
						}
						return
					}
					checkBars(t, shown, len(tokens), plainText)
				})
			}
		}
	}
}

// checkBars checks that there is a bar for each token and that the line of now goes through all.
func checkBars(t *testing.T, shown string, tokens int, plainText bool) {
	t.Helper()
	m := marksFor(plainText)
	lines := barsOf(shown)
	if len(lines) != 2+tokens+1 {
		t.Fatalf("%d lines for %d tokens:\n%s", len(lines), tokens, shown)
	}
	rule := []rune(lines[1])
	now := strings.IndexRune(string(rule), m.now)
	if now < 0 {
		t.Fatalf("no now on the axis:\n%s", shown)
	}
	column := utf8.RuneCountInString(string(rule)[:now])
	for _, bar := range lines[2 : 2+tokens] {
		if r := []rune(bar)[column]; r != m.now && r != m.change {
			t.Errorf("%q where now is, in %q", r, bar)
		}
	}
	for i := range tokens {
		if !strings.Contains(shown, fmt.Sprintf("\n%*d  ", len(fmt.Sprint(tokens)), i+1)) {
			t.Errorf("token %d is not listed", i+1)
		}
	}
}

// TestMarksOnOneColumn has every mark fall on the same column, by turns without the weightiest.
func TestMarksOnOneColumn(t *testing.T) {
	t.Parallel()
	m := marksFor(true)
	x := axis{from: noon.Add(-100 * time.Hour), to: noon.Add(100 * time.Hour), now: noon, columns: 40, zone: time.UTC}
	elsewhere := noon.Add(-90 * time.Hour)
	l := life{issued: noon, half: noon, expires: noon, rollover: noon, unmet: noon, changes: []time.Time{noon}}
	column := x.column(noon)
	tests := []struct {
		want   rune
		remove func()
	}{
		{m.change, func() { l.changes = nil }},
		{m.now, func() { x.now = elsewhere }},
		{m.rollover, func() { l.rollover = time.Time{} }},
		{m.expiry, func() { l.expires = noon.Add(50 * time.Hour) }},
		{m.issued, func() { l.issued = elsewhere }},
		{m.half, func() { l.half = elsewhere }},
		{'u', nil},
	}
	for _, test := range tests {
		bar, _ := x.bar(l, m)
		if bar[column] != test.want {
			t.Errorf("%q, want %q in %q", bar[column], test.want, string(bar))
		}
		if test.remove != nil {
			test.remove()
		}
	}
}

func TestTimelineListsWhatIsHidden(t *testing.T) {
	t.Parallel()
	token := lacking(aToken("device", "https://vault.azure.net", 24*time.Hour-time.Minute), api.PermissionsStale,
		30*time.Second)
	token.Rollover.Expected = after(time.Minute)
	token.Permissions.Likely = noon.Add(time.Minute)
	status := api.Status{Now: noon, Simulated: true, Tokens: []api.TokenStatus{token}}
	for i := range 7 {
		status.Changes = append(status.Changes,
			aChange(fmt.Sprint(i), api.EffectChanged, time.Duration(30+i)*time.Second, 2))
	}
	status.Tokens[0] = judged(token, status.Changes...)
	status.Tokens[0].MoreChanges = 3 // of which the daemon says that they are there
	shown := screen{Screen: term.Screen{Width: 80}}.timeline(status)
	if !strings.HasPrefix(shown, "SIMULATED: ") {
		t.Errorf("not said to be simulated:\n%s", shown)
	}
	flat := strings.Join(strings.Fields(shown), " ")
	for _, want := range []string{
		"stale, minted Nov 22 12:01:00, half life 00:01:00, policy change 11:59:30, policy change 11:59:29,",
		"5 more (perceptctl policy-changes), rollover predicted 12:01:00, expires 12:01:00, current by 12:01:01, " +
			"probably by 12:01:00",
		"times are in UTC;",
	} {
		if !strings.Contains(flat, want) {
			t.Errorf("%q is not in\n%s", want, shown)
		}
	}
}

// TestTimelineOddTimes has what a wrong clock or an older daemon leaves out or gets wrong.
func TestTimelineOddTimes(t *testing.T) {
	t.Parallel()
	far := aToken("far", "r", time.Hour)
	far.IssuedFrom, far.IssuedTo, far.ExpiresOn = after(-50000*time.Hour), after(-50000*time.Hour),
		after(50000*time.Hour)
	undated := aToken("undated", "r", time.Hour)
	undated.IssuedFrom, undated.ExpiresOn = time.Time{}, time.Time{}
	timeless := aToken("timeless", "r", time.Hour)
	timeless.IssuedFrom, timeless.ReceivedOn, timeless.ExpiresOn = time.Time{}, time.Time{}, time.Time{}
	change := aChange("a", api.EffectGranted, 30*time.Minute, 1)
	change.Resource = "s"
	alternate := judged(lacking(aToken("alternate", "r", time.Hour), api.PermissionsStale, 30*time.Minute), change)
	none := api.TokenStatus{Identity: "none", Resource: "r", State: api.StateFetching}
	status := api.Status{Now: noon, Tokens: []api.TokenStatus{far, undated, timeless, alternate, none},
		Changes: []api.PolicyChange{change}}
	s := screen{Screen: term.Screen{Width: 80, ASCII: true}, zone: time.FixedZone("", 5*3600+1800)}
	shown := s.timeline(status)
	checkWidth(t, shown, 80, true)
	checkBars(t, shown, 5, true)
	for _, want := range []string{"received 16:30:00", "no valid token (fetching)", "policy change 17:00:00",
		"times are in UTC+05:30"} {
		if !strings.Contains(shown, want) {
			t.Errorf("%q is not in\n%s", want, shown)
		}
	}
}

// TestTicks checks that labels keep clear of each other on short and long axes, and over a change of clocks.
func TestTicks(t *testing.T) {
	t.Parallel()
	zone := berlin(t)
	for _, hours := range []int{1, 3, 13, 25, 48, 100, 336} {
		for _, columns := range []int{20, 52, 130} {
			from := time.Date(2026, 10, 24, 9, 0, 0, 0, zone)
			x := axis{from: from, to: from.Add(time.Duration(hours) * time.Hour), now: from.Add(time.Hour),
				columns: columns, zone: zone}
			last := -1
			for _, tick := range x.ticks() {
				if last >= 0 && tick.column < last+2 {
					t.Errorf("%d hours on %d columns: labels touch in %q", hours, columns, x.hours())
				}
				last = tick.column + len(tick.label) - 1
			}
			if n := utf8.RuneCountInString(x.hours()); n != columns {
				t.Errorf("%d hours on %d columns: %d", hours, columns, n)
			}
		}
	}
}

// FuzzTimeline checks that no line is over the width, whatever a status says.
func FuzzTimeline(f *testing.F) {
	f.Add("device", "https://vault.azure.net", int64(3600), int64(-7200), int64(60), 80, true)
	f.Add("", "", int64(-1), int64(0), int64(0), 80, false)
	f.Add("\x1b[31m\xff", "ü://"+strings.Repeat("x", 99), int64(0), int64(1)<<40, int64(-1)<<40, 40, false)
	f.Fuzz(func(t *testing.T, identity, resource string, left, minted, changed int64, width int, plainText bool) {
		const bound = 1 << 36 // seconds; what a time in JSON can say
		left, minted, changed = left%bound, minted%bound, changed%bound
		from, expected := time.Unix(minted, 0), time.Unix(changed, 0)
		token := api.TokenStatus{Identity: identity, Resource: resource, ExpiresIn: left,
			Permissions: api.Permissions{State: api.PermissionsStale, Changed: expected, CurrentBy: from,
				Likely: time.Unix(left, 0)},
			Changes: []api.TokenChange{{ID: "a", State: api.PermissionsStale}}}
		token.IssuedFrom, token.IssuedTo, token.Rollover.Expected = from, from, expected
		width = max(term.LeastWidth, min(width, 300))
		status := api.Status{Now: noon, Tokens: []api.TokenStatus{token},
			Changes: []api.PolicyChange{{ID: "a", At: expected, Effect: api.EffectRevoked, Touched: 1, Waiting: 1}}}
		checkWidth(t, screen{Screen: term.Screen{Width: width, ASCII: plainText}}.timeline(status),
			min(width, widestTimeline), plainText)
	})
}
