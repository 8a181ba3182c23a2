package store

import (
	"bytes"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

const canary = "eyJ0.canary-4f1d.c2ln"

// whole is a cache's memory in which every field says something, of a boot that n tells from others.
func whole(n int) tokencache.Snapshot {
	own := tokencache.Key{Resource: vault}
	user := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ResourceID, ID: "/subscriptions/s"},
		Resource: "api://<x>&y"}
	claims := tokencache.Claims{
		Issuer: "https://sts.windows.net/t/", Audience: vault, ClientID: "c", ObjectID: "o", TenantID: "t",
		IssuedAt: noon.Add(-5 * time.Minute), NotBefore: noon.Add(-4 * time.Minute),
		Groups: []string{"g1", "g\n2"}, Roles: []string{"r"}, WIDs: []string{"w"}, Omitted: []string{"xms_mirid"},
	}
	before := claims
	before.Groups = []string{"g1"}
	taken := tokencache.Instant{On: 41 * time.Hour, Boot: time.Hour, BootID: fmt.Sprintf("boot-%d", n)}
	return tokencache.Snapshot{
		Source: "managed-identity arc", BootID: taken.BootID, Boot: taken.Boot, On: taken.On,
		Wall: noon.Add(time.Nanosecond), Synchronised: true,
		Keys: []tokencache.SnapshotEntry{{
			Key: own,
			Token: tokencache.Token{Text: tokencache.NewSecret(canary), ExpiresOn: noon.Add(24 * time.Hour),
				NotBefore: noon, Claims: claims},
			Nominal: 24 * time.Hour, ReceivedWall: noon.Add(time.Second), Deadline: 25 * time.Hour,
			Next: new(13 * time.Hour), Asked: new(30 * time.Minute),
			ReceivedOnTime: 40 * time.Hour, IssuedFrom: -time.Hour, IssuedTo: 39 * time.Hour, Blind: true,
			IssueWindow: tokencache.IssueWindow{Earliest: noon.Add(-time.Minute), Latest: noon}, Life: 23 * time.Hour,
			Given: 22 * time.Hour, IssuedAt: -time.Minute,
			ReceivedBoot: time.Minute, Shown: 2 * time.Minute, Answered: 3 * time.Minute, Tries: 4, Claims: claims,
			Before: &before,
			Failing: &tokencache.BackOff{
				Kind: "refused", Extent: "identity", Detail: "no", Failures: 3, Waits: 2, Asks: 1,
				Until: 20 * time.Minute, Callers: math.MinInt64 / 2,
			},
			Claim: &tokencache.Claim{By: tokencache.Principal{ObjectID: "o2", TenantID: "t", ClientID: "c",
				Simulated: true}, From: -time.Minute},
			Withheld: []string{"a1", "gone"}, Unconfirmed: true, Presumed: true,
			Rollovers: []tokencache.Rollover{{Key: own, After: -0.01, By: 0.5, Watched: 0.25},
				{Key: user, By: 1.5, Watched: 1}},
		}, {
			Key: user, Nominal: time.Hour, Deadline: math.MinInt64 / 2, Life: time.Hour,
		}, {
			Key:   tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: "c"}, Resource: "r"},
			Token: tokencache.Token{Text: tokencache.NewSecret("opaque"), ExpiresOn: noon}, Claims: claims, Life: 1,
			Next: new(time.Duration(0)), Asked: new(time.Duration(0)),
		}},
		Paused: 2 * time.Hour, Failing: &tokencache.BackOff{
			Kind: "throttled", Extent: "source", Detail: "many", Failures: 7, Waits: 1, Asks: 1, Until: 2 * time.Hour,
			Callers: time.Hour,
		},
		Rollovers: []tokencache.Rollover{{Key: user, After: 0.25, By: 0.5, Watched: 0.125},
			{Key: own, After: 0.5, By: 1, Watched: 1}},
		Principals: []tokencache.Principals{{
			Selector: user.Selector, Current: tokencache.Principal{ObjectID: "o", TenantID: "t", ClientID: "c",
				Simulated: true},
			Former: []tokencache.Principal{{ObjectID: "o2"}}, Since: new(time.Minute), Shown: new(3 * time.Minute),
			Told: new(2 * time.Minute), Untold: 3, By: "api://x",
		}, {Current: tokencache.Principal{ClientID: "c"}}},
		Tombstones: []tokencache.Tombstone{
			{SHA256: tokencache.NewSecret("a").SHA256(), ReceivedBoot: time.Minute, ReceivedWall: noon, ExpiresOn: noon,
				Given: time.Hour, ReceivedOnTime: 30 * time.Hour, IssuedFrom: -2 * time.Hour, IssuedTo: 29 * time.Hour,
				Blind: true, Deadline: new(time.Hour), Came: 40 * time.Hour, Unlearnt: true},
			{SHA256: tokencache.NewSecret("b").SHA256()},
		},
		Static: true, CountedOn: 39 * time.Hour, OnRecord: 2, Record: tokencache.Record{Instant: taken, Lineage: "l",
			Origins: []tokencache.Origin{{Lineage: "k", Generation: 8}}, Generation: 9,
			Changes: []tokencache.PolicyChange{
				{ID: "a1", AllIdentities: true, At: noon, Effect: tokencache.Revoked, Note: "n",
					RecordedAt: noon.Add(time.Second)},
				{ID: "a2", Selector: user.Selector, Resource: vault, At: noon, Effect: tokencache.Granted,
					RecordedAt: noon, Joined: 3,
					Moment: 39 * time.Hour, By: 40 * time.Hour, Vouched: true, Checked: true, Unplaced: true,
					NotLater: noon.Add(time.Hour), Issuer: tokencache.Window{Earliest: noon,
						Latest: noon.Add(time.Second)}},
			}},
	}
}

// Every field of what a cache remembers has a value in whole, so that none is forgotten in the format.
func TestEveryFieldIsKept(t *testing.T) {
	t.Parallel()
	m := whole(1)
	m.DenyRules = true // which devices without them do not write, as version 3 always was
	var fields func(path string, v reflect.Value)
	fields = func(path string, v reflect.Value) {
		switch v.Type() {
		case reflect.TypeFor[time.Time](), reflect.TypeFor[tokencache.Secret]():
		default:
			if v.Kind() == reflect.Pointer {
				v = v.Elem()
			}
			if v.Kind() == reflect.Struct {
				for i := range v.NumField() {
					if name := path + "." + v.Type().Field(i).Name; !strings.HasSuffix(name, ".Key.Selector") {
						fields(name, v.Field(i))
					}
				}
				return
			}
		}
		if v.IsZero() {
			t.Errorf("%s is zero", path)
		}
	}
	fields("Memory", reflect.ValueOf(m))
	fields("Remembered", reflect.ValueOf(m.Keys[0]))
	fields("Rollover", reflect.ValueOf(m.Rollovers[0]))
	fields("Principals", reflect.ValueOf(m.Principals[0]))
	fields("Bygone", reflect.ValueOf(m.Tombstones[0]))
	text, err := encodeSnapshot(m)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeSnapshot(text)
	if err != nil || !reflect.DeepEqual(*got, m) {
		t.Errorf("%v\ngot  %+v\nwant %+v", err, got, m)
	}
	if n := strings.Count(string(text), `"g1"`); n != 3 {
		t.Errorf("%d lists of groups are written: those of the token held are the key's", n)
	}
	local := m
	local.Wall = m.Wall.In(time.FixedZone("elsewhere", 3600))
	if again, err := encodeSnapshot(local); err != nil || !bytes.Equal(again, text) {
		t.Errorf("in another zone it is another: %v", err)
	}
}

// Policy changes that could not be read again cost no token: they are on record by themselves.
func TestChangesAreLeftOut(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(p *tokencache.PolicyChange){
		"an id that is there already": func(p *tokencache.PolicyChange) { p.ID = "a2" },
		"no effect":                   func(p *tokencache.PolicyChange) { p.Effect = "" },
		"a note of two lines":         func(p *tokencache.PolicyChange) { p.Note = "a\nb" },
		"in 1969":                     func(p *tokencache.PolicyChange) { p.At = noon.AddDate(-57, 0, 0) },
	} {
		m := whole(1)
		spoil(&m.Record.Changes[0])
		text, err := encodeSnapshot(m)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, err := decodeSnapshot(text); err != nil || len(got.Keys) != len(m.Keys) ||
			len(got.Record.Changes) != 0 || got.OnRecord != 2 || got.Record.Generation != m.Record.Generation {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// One key that could not be read again does not cost the others.
func TestWhatIsLeftOut(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(r *tokencache.SnapshotEntry){
		"a resource that cannot be printed": func(r *tokencache.SnapshotEntry) { r.Key.Resource = "a\nb" },
		"a long resource": func(r *tokencache.SnapshotEntry) {
			r.Key.Resource = strings.Repeat("a", maxResource+1)
		},
		"no selector":                 func(r *tokencache.SnapshotEntry) { r.Key.Selector.ID = "x" },
		"an unknown selector":         func(r *tokencache.SnapshotEntry) { r.Key.Selector.Kind = "other" },
		"a negative life":             func(r *tokencache.SnapshotEntry) { r.Life = -1 },
		"a nominal life of centuries": func(r *tokencache.SnapshotEntry) { r.Nominal = math.MaxInt64 },
		"born before time":            func(r *tokencache.SnapshotEntry) { r.IssuedAt = math.MinInt64 },
		"asked after all time": func(r *tokencache.SnapshotEntry) {
			r.Asked = new(time.Duration(math.MaxInt64))
		},
		"received in 1969": func(r *tokencache.SnapshotEntry) {
			r.ReceivedWall = noon.AddDate(-57, 0, 0)
		},
		"minted in 2200": func(r *tokencache.SnapshotEntry) { r.Latest = noon.AddDate(200, 0, 0) },
		"expires in 9998": func(r *tokencache.SnapshotEntry) {
			r.Token.ExpiresOn = noon.AddDate(7972, 0, 0)
		},
		"a token that breaks the line": func(r *tokencache.SnapshotEntry) {
			r.Token.Text = tokencache.NewSecret("a\r\nb")
		},
		"a huge token": func(r *tokencache.SnapshotEntry) {
			r.Token.Text = tokencache.NewSecret(strings.Repeat("a", maxText+1))
		},
		"its token's claims": func(r *tokencache.SnapshotEntry) {
			r.Token.Claims.Audience = strings.Repeat("a", maxClaim+1)
		},
		"a claim that is no text": func(r *tokencache.SnapshotEntry) { r.Claims.ObjectID = "\xff" },
		"many groups": func(r *tokencache.SnapshotEntry) {
			r.Claims.Groups = make([]string, maxListed+1)
		},
		"issued in 9999": func(r *tokencache.SnapshotEntry) {
			r.Claims.IssuedAt = noon.AddDate(7973, 0, 0)
		},
		"of the one before": func(r *tokencache.SnapshotEntry) {
			r.Before = &tokencache.Claims{WIDs: []string{"\xff"}}
		},
		"tries": func(r *tokencache.SnapshotEntry) { r.Tries = -1 },
	} {
		m := whole(1)
		m.Keys = append(m.Keys, m.Keys[0])
		m.Keys[3].Key.Resource = "another"
		spoil(&m.Keys[3])
		text, err := encodeSnapshot(m)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := decodeSnapshot(text); err != nil || !reflect.DeepEqual(*got, whole(1)) {
			t.Errorf("%s: %v, %+v", name, err, got)
		}
	}
	m := whole(1)
	for _, strange := range []tokencache.Rollover{
		{After: 1, By: 0.5}, {After: 0.5, By: 2.5}, {By: 1, Watched: -2}, {By: math.NaN()},
		{After: math.Inf(-1), By: 1},
		{Key: tokencache.Key{Resource: "\n"}, By: 1},
	} {
		m.Rollovers = append(m.Rollovers, strange)
		m.Keys[0].Rollovers = append(m.Keys[0].Rollovers, strange)
	}
	text, err := encodeSnapshot(m)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodeSnapshot(text); err != nil || !reflect.DeepEqual(*got, whole(1)) {
		t.Errorf("strange rollovers: %v, %+v", err, got)
	}
}

func TestTheLatestRolloversAreKept(t *testing.T) {
	t.Parallel()
	m := tokencache.Snapshot{Keys: []tokencache.SnapshotEntry{{Key: tokencache.Key{Resource: "r"}, Life: 1}}}
	for i := range 2 * maxHistory {
		r := tokencache.Rollover{Key: m.Keys[0].Key, By: float64(i+1) / (2 * maxHistory)}
		m.Rollovers, m.Keys[0].Rollovers = append(m.Rollovers, r), append(m.Keys[0].Rollovers, r)
	}
	text, err := encodeSnapshot(m)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeSnapshot(text)
	if err != nil {
		t.Fatal(err)
	}
	for most, kept := range map[int][]tokencache.Rollover{maxHistory: got.Rollovers, maxOwn: got.Keys[0].Rollovers} {
		if n := len(kept); n != most || kept[n-1].By != 1 {
			t.Errorf("%d of %d", n, most)
		}
	}
}

// What could not be read again is an error where nothing would be left of it.
func TestWhatCannotBeKept(t *testing.T) {
	t.Parallel()
	for says, spoil := range map[string]func(m *tokencache.Snapshot){
		"source":    func(m *tokencache.Snapshot) { m.Source = "\x00" },
		"boot_id":   func(m *tokencache.Snapshot) { m.BootID = "\x00" },
		"no uptime": func(m *tokencache.Snapshot) { m.Boot = -1 },
		"its wall":  func(m *tokencache.Snapshot) { m.Wall = noon.AddDate(300, 0, 0) },
		"twice":     func(m *tokencache.Snapshot) { m.Keys = append(m.Keys, m.Keys[0]) },
		"more than 256": func(m *tokencache.Snapshot) {
			for i := range tokencache.MaxKeys {
				m.Keys = append(m.Keys, tokencache.SnapshotEntry{Key: tokencache.Key{Resource: fmt.Sprint(i)}})
			}
		},
	} {
		m := whole(1)
		spoil(&m)
		if _, err := encodeSnapshot(m); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
		if _, err := WriteMemfd(m); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("carried: %s: %v", says, err)
		}
	}
}

// What is larger than can be kept costs the largest tokens, and no other.
func TestTooLargeToBeKept(t *testing.T) {
	t.Parallel()
	groups := make([]string, 20)
	for i := range groups {
		groups[i] = strings.Repeat("\x01", maxClaim)
	}
	m := whole(1)
	ordinary := len(m.Keys)
	for i := range 200 {
		m.Keys = append(m.Keys, tokencache.SnapshotEntry{
			Key:    tokencache.Key{Resource: fmt.Sprint(i)},
			Token:  tokencache.Token{Text: tokencache.NewSecret(strings.Repeat("a", maxText))},
			Claims: tokencache.Claims{Groups: groups},
		})
	}
	text, err := encodeSnapshot(m)
	if err != nil || len(text) > maxSnapshot {
		t.Fatalf("%d bytes, %v", len(text), err)
	}
	got, err := decodeSnapshot(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range m.Keys[:ordinary] {
		if !slices.ContainsFunc(got.Keys, func(k tokencache.SnapshotEntry) bool { return k.Key == r.Key }) {
			t.Errorf("%v is not among %d", r.Key, len(got.Keys))
		}
	}
	if n := len(got.Keys); n < 50 || n == len(m.Keys) {
		t.Errorf("%d keys of %d", n, len(m.Keys))
	}
}

// As many keys as there may be, with tokens and claims as large as Entra's get, fit.
func TestFullSnapshot(t *testing.T) {
	t.Parallel()
	groups := make([]string, 200)
	for i := range groups {
		groups[i] = fmt.Sprintf("%08x-0000-4000-8000-000000000000", i)
	}
	m := tokencache.Snapshot{Wall: noon}
	for i := range tokencache.MaxKeys {
		claims := tokencache.Claims{Groups: groups, Audience: strings.Repeat("a", 255)}
		key := tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ResourceID, ID: strings.Repeat("s", 300)},
			Resource: fmt.Sprintf("%0500d", i)}
		r := tokencache.SnapshotEntry{
			Key: key, Life: 1, Claims: claims, Before: &claims,
			Token: tokencache.Token{Text: tokencache.NewSecret(strings.Repeat("t", 16<<10)), Claims: claims},
		}
		for range maxOwn {
			r.Rollovers = append(r.Rollovers, tokencache.Rollover{Key: key, After: 1.0 / 3, By: 2.0 / 3,
				Watched: 1.0 / 7})
			m.Rollovers = append(m.Rollovers, r.Rollovers[0])
		}
		m.Keys = append(m.Keys, r)
	}
	m.Rollovers = m.Rollovers[:maxHistory]
	text, err := encodeSnapshot(m)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodeSnapshot(text); err != nil || !reflect.DeepEqual(*got, m) {
		t.Errorf("not the same: %v", err)
	}
}

func TestWhatIsNoSnapshot(t *testing.T) {
	t.Parallel()
	text, err := encodeSnapshot(whole(1))
	if err != nil {
		t.Fatal(err)
	}
	with := func(old, replacement string) string {
		if !bytes.Contains(text, []byte(old)) {
			t.Fatalf("nothing to replace: %s in %s", old, text)
		}
		return strings.Replace(string(text), old, replacement, 1)
	}
	key := `{"key":{"selector":{"kind":"system-assigned"},"resource":"r"},"claims":{}},`
	for _, row := range []struct{ name, text, says string }{
		{"empty", "", "not JSON"},
		{"half", string(text[:len(text)/2]), "not JSON"},
		{"more behind", string(text) + "{}", "not JSON"},
		{"another version", with(`"version":3`, `"version":4`), "another release"},
		{"no version", `{}`, "another release"},
		{"a lineage", with(`"lineage":"l"`, `"lineage":"`+strings.Repeat("l", maxID+1)+`"`), "its lineage"},
		{"a generation", with(`"generation":9`, `"generation":18446744073709551615`), "its generation"},
		{"an unknown field", with(`"boot_ns"`, `"`+canary+`"`), "not what perceptd writes"},
		{"another type", with(`"boot_ns":`, `"boot_ns":"`+canary+`","x":`), "not what perceptd writes"},
		{"a boot ID", with(`boot-1`, strings.Repeat("b", maxID+1)), "boot_id"},
		{"an uptime", with(`"boot_ns":`, `"boot_ns":-`), "no uptime"},
		{"a wall", with(`"wall":"2026`, `"wall":"2200`), "its wall"},
		{"many keys", with(`"keys":[`, `"keys":[`+strings.Repeat(key, tokencache.MaxKeys)), "more than 256"},
		{"a key twice", with(`"keys":[`, `"keys":[`+key+key), "twice"},
		{"a selector", with(`"resource_id"`, `"nobody"`), "its selector"},
		{"no selector", with(`"keys":[`, `"keys":[{"key":{"resource":"s"},"claims":{}},`), "not what perceptd writes"},
		{"a selector without a kind", with(`"keys":[`, `"keys":[{"key":{"selector":{},"resource":"s"},"claims":{}},`),
			"not what perceptd writes"},
		{"no key", with(`"keys":[`, `"keys":[{"claims":{}},`), "its key"},
		{"a key that is null", with(`"keys":[`, `"keys":[null,`), "its key"},
		{"principals without a selector", with(`"principals":[`, `"principals":[{"current":{}},`),
			"not what perceptd writes"},
		{"principals that are null", with(`"principals":[`, `"principals":[null,`), "not what perceptd writes"},
		{"a rollover of an empty key", with(`"of":{"selector":{"kind":"resource_id"`,
			`"of":{},"watched":0},{"after":0.1,"by":0.2,"of":{"selector":{"kind":"resource_id"`),
			"not what perceptd writes"},
		{"a resource", with(`"resource":"r"`, `"resource":"\u0007"`), "its resource"},
		{"an empty token", with(canary, ``), "its token is none"},
		{"a token with a line end", with(canary, canary+`\n`), "its token is none"},
		{"a token's time", with(`"expires_on":"2026`, `"expires_on":"9026`), "its token's times"},
		{"a life", with(`"life_ns":`, `"life_ns":-`), "life"},
		{"a boot time", with(`"born_ns":-60000000000`, `"born_ns":-9223372036854775808`), "boot time"},
		{"a minting", with(`"minted_latest":"2026`, `"minted_latest":"1926`), "1970 to 2200"},
		{"tries", with(`"tries":`, `"tries":-`), "tries"},
		{"an old claim", with(`"iat":"2026`, `"iat":"1926`), "1970 to 2200"},
		{"a long claim", with(`"oid":"o"`, `"oid":"`+strings.Repeat("o", maxClaim+1)+`"`), "a claim"},
		{"a long list", with(`"groups":[`, `"groups":[`+strings.Repeat(`"",`, maxListed)), "lists more"},
		{"a rollover", with(`"after":-0.01`, `"after":0.75`), "ends before"},
		{"a share", with(`"after":-0.01`, `"after":-3`), "a share"},
		{"a rollover of nobody", with(`"of":{"selector":{"kind":"resource_id"`, `"of":{"selector":{"kind":"nobody"`),
			"its selector"},
		{"many rollovers of one", with(`"rollovers":[`, `"rollovers":[`+strings.Repeat(`{"by":1},`, maxOwn)),
			"more than 8"},
		{"a principal's claim", with(`"former":[{"oid":"o2"`, `"former":[{"oid":"`+strings.Repeat("o", maxClaim+1)+`"`),
			"a claim"},
		{"principals of nobody", with(`"principals":[{"selector":{"kind":"resource_id"`,
			`"principals":[{"selector":{"kind":"nobody"`), "its selector"},
		{"principals twice", with(`"principals":[`,
			`"principals":[{"selector":{"kind":"system-assigned"},"current":{}},`), "twice"},
		{"a claim of nobody", with(`"claim":{"by":{"oid":"o2","tid":"t","appid":"c","simulated":true}`,
			`"claim":{"by":{}`), "nobody's"},
		{"untold without end", with(`"untold":3`, `"untold":-3`), "out of range"},
		{"many former principals", with(`"former":[`, `"former":[`+strings.Repeat(`{},`, maxFormer)), "more than 8"},
		{"a switch before time", with(`"since_ns":60000000000`, `"since_ns":-9223372036854775808`), "boot time"},
		{"a bygone of nothing", with(`"sha256":"c`, `"sha256":"x`), "its digest"},
		{"a bygone before time", with(`"received_ns":60000000000,"received_on"`,
			`"received_ns":-9223372036854775808,"received_on"`), "boot time"},
		{"a bygone's time", with(`"expires_on":"2026-11-23T12:00:00Z","given_ns":36`,
			`"expires_on":"1926-11-23T12:00:00Z","given_ns":36`), "1970 to 2200"},
		{"many bygones", with(`"bygones":[`, `"bygones":[`+strings.Repeat(`{},`, maxBygones)), "more than 512"},
		{"many rollovers", with(`"rollovers":[{"of"`, `"rollovers":[`+strings.Repeat(`{"by":1},`, maxHistory)+`{"of"`),
			"more than 512"},
	} {
		m, err := decodeSnapshot([]byte(row.text))
		if m != nil || err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, %v, want %q", row.name, m, err, row.says)
		} else if strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: a token is told: %v", row.name, err)
		}
	}
}

func FuzzDecodeMemory(f *testing.F) {
	text, err := encodeSnapshot(whole(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(
		`{"version":1,"keys":[{"key":{"selector":{"kind":"client_id","id":"c"}},"claims":{},"rollovers":[{"by":1}]}]}`))
	f.Add([]byte(`{"version":1,"keys":null,"wall":"2026-11-23T12:00:00+01:00"}`))
	f.Add([]byte(`{"version":1,"keys":[{"key":{"selector":{"kind":"client_id","id":"c"}},"token":{"text":"t",` +
		`"claims":{}},"claims":{"wids":[]}}]}`))
	f.Fuzz(func(t *testing.T, text []byte) { checkMemory(t, text) })
}

// checkMemory checks that what can be read is within the bounds, and is written and read again as it is.
func checkMemory(t *testing.T, text []byte) {
	m, err := decodeSnapshot(text)
	if err != nil {
		return
	}
	if len(m.Keys) > tokencache.MaxKeys || len(m.Rollovers) > maxHistory {
		t.Fatalf("%d keys, %d rollovers", len(m.Keys), len(m.Rollovers))
	}
	again, err := encodeSnapshot(*m)
	if err != nil {
		t.Fatalf("read, and not to be written: %v", err)
	}
	same, err := decodeSnapshot(again)
	if err != nil || len(same.Keys) != len(m.Keys) || len(same.Rollovers) != len(m.Rollovers) {
		t.Fatalf("written, and not to be read: %v\n%s", err, again)
	}
	if twice, err := encodeSnapshot(*same); err != nil || !bytes.Equal(again, twice) {
		t.Errorf("%v: another time it is another:\n%s\n%s", err, again, twice)
	}
}
