package simulator

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const vault = "https://vault.azure.net"

var vision = Selection{ByClientID, "00000000-0000-0000-0000-000000000001"}

// token asks for one that has to be there.
func token(t *testing.T, b *Backend, sel Selection, resource string) Token {
	t.Helper()
	m, err := b.Token(sel, resource)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// claimsOf decodes a token as a module would.
func claimsOf(t *testing.T, text string) map[string]any {
	t.Helper()
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		t.Fatalf("the token has %d parts", len(parts))
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]any
	if err := json.Unmarshal(body, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestRolloverAge(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for _, c := range []struct {
		mode Rollover
		roll float64
		want time.Duration
	}{
		{AtExpiry, 0.5, day},
		{AtHalfLife, 0.5, 12 * time.Hour},
		{Jittered, 0, 8 * time.Hour},
		{Jittered, 0.5, 16 * time.Hour},
	} {
		if got := c.mode.age(day, c.roll); got != c.want {
			t.Errorf("%s, roll %v: %v, want %v", c.mode, c.roll, got, c.want)
		}
	}
	if got := Jittered.age(day, math.Nextafter(1, 0)); got > day {
		t.Errorf("a jittered rollover comes after the expiry: %v", got)
	}
}

// The same token until the very moment of the rollover, a newer one from then on.
func TestRolloverBoundary(t *testing.T) {
	t.Parallel()
	for _, mode := range []Rollover{AtExpiry, AtHalfLife, Jittered} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := New(Options{Rollover: mode, Seed: 7})
				if _, ok := b.RolloverAt(vision, vault); ok {
					t.Error("a rollover is known before the first token")
				}
				first := token(t, b, vision, vault)
				for range 3 {
					at, ok := b.RolloverAt(vision, vault)
					if !ok || !at.Equal(first.RollsOn) || at.After(first.ExpiresOn) {
						t.Fatalf("rollover at %v (%v), the token rolls on %v and expires on %v",
							at, ok, first.RollsOn, first.ExpiresOn)
					}
					time.Sleep(time.Until(at) - time.Nanosecond)
					if again := token(t, b, vision, vault); again.Text != first.Text {
						t.Fatal("another token before the rollover")
					}
					time.Sleep(time.Nanosecond)
					next := token(t, b, vision, vault)
					if next.Text == first.Text || !next.IssuedOn.Equal(at) || next.Serial != first.Serial+1 {
						t.Fatalf("at the rollover came %v after %v", next, first)
					}
					first = next
				}
			})
		})
	}
}

func TestJitterFollowsTheSeed(t *testing.T) {
	t.Parallel()
	start := time.Unix(1_800_000_000, 0)
	ages := func(seed uint64) (all []time.Duration) {
		now := start
		b := New(Options{Now: func() time.Time { return now }, Rollover: Jittered, Seed: seed})
		for range 20 {
			m := token(t, b, vision, vault)
			age := m.RollsOn.Sub(m.IssuedOn)
			if age < 8*time.Hour-time.Second || age > 24*time.Hour {
				t.Errorf("rolls over at the age of %v", age)
			}
			all, now = append(all, age), m.RollsOn
		}
		return all
	}
	if !slices.Equal(ages(1), ages(1)) {
		t.Error("the same seed gave other rollovers")
	}
	if slices.Equal(ages(1), ages(2)) {
		t.Error("another seed gave the same rollovers")
	}
	if one := ages(1); slices.Min(one) == slices.Max(one) {
		t.Error("no jitter between mintings")
	}
}

func TestTokenTimesAndClaims(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 700_000_000)
	b := New(Options{Now: func() time.Time { return now }})
	m := token(t, b, vision, vault)
	if !m.IssuedOn.Equal(now) || m.ExpiresOn.Unix() != 1_800_086_400 || m.IssuedAt.Unix() != 1_799_999_700 ||
		!m.NotBefore.Equal(m.IssuedAt) {
		t.Errorf("times: %+v %v %v %v", m, m.IssuedAt, m.NotBefore, m.ExpiresOn)
	}
	got := claimsOf(t, m.Text)
	for name, want := range map[string]any{
		"aud": vault, "iss": "https://sts.simulated.invalid/" + tenantID + "/", "idp": got["iss"],
		"iat": 1_799_999_700.0, "nbf": 1_799_999_700.0, "exp": 1_800_086_400.0,
		"appid": vision.ID, "oid": "00000000-0000-0000-0001-000000000001",
		"sub": "00000000-0000-0000-0001-000000000001",
		"tid": tenantID, "idtyp": "app", "ver": "1.0", "simulated": true, "warning": warningText,
		"groups": []any{"00000000-0000-0000-0002-000000000001"}, "roles": []any{"Simulated.Read"},
		"wids": []any{"00000000-0000-0000-0003-000000000001"}, "xms_mirid": userAssigned + "vision",
	} {
		if !reflect.DeepEqual(got[name], want) {
			t.Errorf("claim %s is %v, want %v", name, got[name], want)
		}
	}
	parts := strings.Split(m.Text, ".")
	for i, want := range map[int]string{0: `{"alg":"none","typ":"JWT"}`, 2: "simulated"} {
		if part, err := base64.RawURLEncoding.DecodeString(parts[i]); err != nil || string(part) != want {
			t.Errorf("part %d is %q (%v), want %q", i, part, err, want)
		}
	}
	if len(m.Text) < 1200 || len(m.Text) > 1600 {
		t.Errorf("the token has %d bytes, real ones 1,200 to 1,600", len(m.Text))
	}
	if printed := fmt.Sprintf("%v %+v %#v %s", m, m, m, &m); strings.Contains(printed, m.Text) {
		t.Error("a minted token prints its text")
	}
}

func TestCachesPerIdentityAndResource(t *testing.T) {
	t.Parallel()
	b := New(Options{})
	texts, utis := map[string]bool{}, map[any]bool{}
	for _, sel := range []Selection{{}, vision, {ByClientID, "00000000-0000-0000-0000-000000000002"}} {
		for _, resource := range []string{vault, vault + "/", "https://VAULT.azure.net"} {
			m := token(t, b, sel, resource)
			if again := token(t, b, sel, resource); again.Text != m.Text {
				t.Errorf("%v for %s: not cached", sel, resource)
			}
			texts[m.Text], utis[claimsOf(t, m.Text)["uti"]] = true, true
		}
	}
	if len(texts) != 9 || len(utis) != 9 {
		t.Errorf("%d tokens with %d utis, want 9 and 9", len(texts), len(utis))
	}
	byObject := token(t, b, Selection{ByObjectID, "00000000-0000-0000-0001-000000000001"}, vault)
	byResource := token(t, b, Selection{ByResourceID, strings.ToUpper(userAssigned + "vision")}, vault)
	if byClient := token(t, b, vision, vault); byObject.Text != byClient.Text || byResource.Text != byClient.Text {
		t.Error("the three IDs of an identity gave different tokens")
	}
	if _, err := b.Token(vision, ""); !errors.Is(err, ErrNoResource) {
		t.Errorf("no resource: %v", err)
	}
}

func TestWhichIdentity(t *testing.T) {
	t.Parallel()
	all := DefaultIdentities()
	for _, c := range []struct {
		name       string
		identities []Identity
		sel        Selection
		want       string // the identity's name
		wantErr    any
	}{
		{"system-assigned is the default", all, Selection{}, "device", nil},
		{"the only user-assigned is the default", all[1:2], Selection{}, "vision", nil},
		{"several user-assigned", all[1:], Selection{}, "", new(*AmbiguousIdentityError)},
		{"system-assigned wanted and there", all, Selection{By: SystemAssigned}, "device", nil},
		{"system-assigned wanted, no falling back", all[1:2], Selection{By: SystemAssigned}, "",
			new(*UnknownIdentityError)},
		{"unknown ID", all, Selection{ByClientID, "x"}, "", new(*UnknownIdentityError)},
		{"an empty ID selects nothing", []Identity{{Name: "bare"}}, Selection{By: ByObjectID}, "",
			new(*UnknownIdentityError)},
		{"unknown selection", all, Selection{By: 99}, "", new(*UnknownIdentityError)},
	} {
		m, err := New(Options{Identities: c.identities}).Token(c.sel, vault)
		if m.Identity.Name != c.want || (err != nil) != (c.wantErr != nil) || err != nil && !errors.As(err, c.wantErr) {
			t.Errorf("%s: %q, %v", c.name, m.Identity.Name, err)
		}
	}
	if _, err := find(nil, Selection{}); err == nil {
		t.Error("a device without identities has a default one")
	}
	_, err := New(Options{Identities: all[1:]}).Token(Selection{}, vault)
	if !strings.Contains(err.Error(), "vision, speech") {
		t.Errorf("%v does not list the choices", err)
	}
	if _, ok := New(Options{}).RolloverAt(Selection{ByClientID, "x"}, vault); ok {
		t.Error("an unknown identity rolls over")
	}
}

func TestPermissionsReachNewTokensAfterTheSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := New(Options{Life: time.Hour, PropagationDelay: 10 * time.Minute})
		start := time.Now()
		reaches, err := b.ChangePermissions("vision", Permissions{Groups: []string{"new"}, Roles: []string{}})
		if err != nil || !reaches.Equal(start.Add(10*time.Minute)) {
			t.Fatalf("reaches %v, %v", reaches, err)
		}
		at := func(after time.Duration, resource string) Permissions {
			time.Sleep(time.Until(start.Add(after)))
			return token(t, b, vision, resource).Permissions
		}
		before := at(10*time.Minute-time.Nanosecond, "a")
		if before.Groups[0] == "new" || len(before.Roles) != 1 {
			t.Errorf("a token minted before the spread was over has %v", before)
		}
		after := at(10*time.Minute, "b")
		if after.Groups[0] != "new" || len(after.Roles) != 0 || len(after.WIDs) != 1 {
			t.Errorf("a token minted after the spread has %v", after)
		}
		if old := at(time.Hour, "a"); old.Groups[0] == "new" {
			t.Error("a cached token changed its groups")
		}
		if rolled := at(time.Hour+10*time.Minute, "a"); rolled.Groups[0] != "new" {
			t.Error("the token after the rollover has the old groups")
		}
		if got := claimsOf(t, token(t, b, vision, "a").Text); got["roles"] != nil || got["groups"].([]any)[0] != "new" {
			t.Errorf("claims %v", got)
		}
	})
}

func TestManyChanges(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	b := New(Options{Now: func() time.Time { return now }})
	for i := range 100 {
		now = now.Add(time.Hour)
		if _, err := b.ChangePermissions("vision", Permissions{Groups: []string{fmt.Sprint(i)}}); err != nil {
			t.Fatal(err)
		}
		if got := token(t, b, vision, fmt.Sprint(i)).Permissions.Groups[0]; got != fmt.Sprint(i) {
			t.Errorf("change %d: group %s", i, got)
		}
	}
	if n := len(b.changes["vision"]); n > 30 {
		t.Errorf("%d changes are remembered", n)
	}
	if _, err := b.ChangePermissions("nobody", Permissions{}); err == nil ||
		!strings.Contains(err.Error(), `"nobody"`) {
		t.Errorf("unknown identity: %v", err)
	}
}

func TestReplicasBringOlderTokensBack(t *testing.T) {
	t.Parallel()
	serials := func(seed uint64) (all []uint64, back int) {
		now := time.Unix(1_800_000_000, 0)
		b := New(Options{Now: func() time.Time { return now }, Replicas: 3, Seed: seed, Aged: time.Hour})
		var newest time.Time
		for range 100 {
			m := token(t, b, vision, vault)
			if m.IssuedOn.Before(newest) {
				back++
			}
			if m.IssuedOn.After(newest) {
				newest = m.IssuedOn
			}
			all, now = append(all, m.Serial), now.Add(time.Minute)
		}
		if at, ok := b.RolloverAt(vision, vault); !ok || at.Before(now) {
			t.Errorf("all replicas have tokens, the first rolls over at %v, now %v", at, now)
		}
		if len(b.State().Tokens) != 3 {
			t.Errorf("%d cached tokens, want one a replica", len(b.State().Tokens))
		}
		return all, back
	}
	one, back := serials(1)
	again, _ := serials(1)
	other, _ := serials(2)
	if back == 0 || !slices.Equal(one, again) || slices.Equal(one, other) {
		t.Errorf("%d older tokens came back; repeatable %v; seeded %v",
			back, slices.Equal(one, again), !slices.Equal(one, other))
	}
}

func TestColdReplicaMayAnswerNow(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	b := New(Options{Now: func() time.Time { return now }, Replicas: 2})
	token(t, b, vision, vault)
	if at, ok := b.RolloverAt(vision, vault); !ok || !at.Equal(now) {
		t.Errorf("rollover at %v, %v; one replica is cold", at, ok)
	}
}

func TestAgedTokens(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	b := New(Options{Now: func() time.Time { return now }, Aged: 23 * time.Hour})
	var oldest time.Duration
	for i := range 50 {
		m := token(t, b, vision, fmt.Sprint(i))
		oldest = max(oldest, now.Sub(m.IssuedOn))
		if !m.RollsOn.After(now) {
			t.Errorf("a token that has rolled over is handed out: %v", m)
		}
	}
	if oldest < time.Hour || oldest > 23*time.Hour {
		t.Errorf("the oldest first token is %v old", oldest)
	}
	b = New(Options{Now: func() time.Time { return now }, Aged: 1000 * time.Hour})
	if m := token(t, b, vision, vault); !m.RollsOn.After(now) {
		t.Errorf("an expired token is handed out: %v", m)
	}
}

func TestCalls(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	b := New(Options{Now: func() time.Time { return now }})
	token(t, b, vision, vault)
	token(t, b, vision, vault)
	_, _ = b.Token(Selection{ByClientID, "x"}, vault)
	c := b.Calls()
	want := map[Key]int{{"vision", vault}: 2, {"", vault}: 1}
	if c.Total != 3 || c.Peak != 1 || !reflect.DeepEqual(c.PerKey, want) || len(c.Log) != 3 ||
		!c.Log[0].At.Equal(now) || c.Log[0].Identity != "vision" {
		t.Errorf("calls %+v", c)
	}
	end := b.beginCall(vision, vault)
	token(t, b, vision, vault)
	end()
	if got := b.Calls().Peak; got != 2 {
		t.Errorf("peak %d, want 2", got)
	}
}

// A daemon that embeds the simulation may run for months and be asked for anything.
func TestBounded(t *testing.T) {
	t.Parallel()
	var c Calls
	for i := range 3*maxLog + 1 {
		c.begin(Call{epoch, Key{"vision", fmt.Sprint(i)}})
	}
	if got := c.clone(); got.Total != 3*maxLog+1 || len(got.Log) != maxLog || len(got.PerKey) != maxKeys ||
		len(c.Log) > 2*maxLog ||
		got.Log[maxLog-1].Resource != fmt.Sprint(3*maxLog) {
		t.Errorf("%d calls, %d of %d logged, %d keys", got.Total, len(got.Log), len(c.Log), len(got.PerKey))
	}
	now := epoch
	b := New(Options{Now: func() time.Time { return now }})
	for i := range maxKeys + 1 {
		now = now.Add(time.Second)
		token(t, b, vision, fmt.Sprint(i))
	}
	_, first := b.replicas[0][Key{"vision", "0"}]
	_, last := b.replicas[0][Key{"vision", fmt.Sprint(maxKeys)}]
	if n := len(b.replicas[0]); n != maxKeys || first || !last {
		t.Errorf("%d tokens are held, the oldest %v, the newest %v", n, first, last)
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	b := New(Options{Replicas: 2})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				_, _ = b.Token(vision, fmt.Sprint(i%2))
				_, _ = b.ChangePermissions("vision", Permissions{Groups: []string{"g"}})
				b.RolloverAt(vision, vault)
				_ = b.State()
			}
		})
	}
	wg.Wait()
	if got := b.Calls().Total; got != 400 {
		t.Errorf("%d calls", got)
	}
}

func TestNamesAndParsers(t *testing.T) {
	t.Parallel()
	for _, k := range FaultKinds() {
		if got, err := ParseFaultKind(k.String()); got != k || err != nil {
			t.Errorf("%s parses as %s, %v", k, got, err)
		}
	}
	for i := range rollovers {
		if got, err := ParseRollover(rollovers[i]); int(got) != i || err != nil {
			t.Errorf("rollover %d: %s, %v", i, got, err)
		}
	}
	for i := range forms {
		if got, err := ParseForm(forms[i]); int(got) != i || err != nil {
			t.Errorf("form %d: %s, %v", i, got, err)
		}
	}
	_, fault := ParseFaultKind("flood")
	_, rollover := ParseRollover("never")
	_, form := ParseForm("gce")
	for err, choice := range map[error]string{fault: "gzip-bomb", rollover: "half-life", form: "app-service"} {
		if err == nil || !strings.Contains(err.Error(), choice) {
			t.Errorf("%v does not list the choices", err)
		}
	}
	for _, c := range []struct{ got, want string }{
		{FaultKind(0).String(), "no fault"}, {FaultKind(200).String(), "no fault"}, {Rollover(9).String(),
			"unknown rollover"},
		{Form(9).String(), "unknown form"}, {ByDefault.String(), "default"}, {ByObjectID.String(), "object_id"},
		{ByResourceID.String(), "resource_id"}, {SelectBy(9).String(), "unknown selection"},
		{Selection{By: SystemAssigned}.String(), "system-assigned"}, {Selection{ByClientID, "x"}.String(),
			"client_id x"},
	} {
		if c.got != c.want {
			t.Errorf("%q, want %q", c.got, c.want)
		}
	}
}
