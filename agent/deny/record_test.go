package deny

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"perceptd/agent/grants"
)

var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func wanted(modules ...string) (all []Wanted) {
	for _, name := range modules {
		all = append(all, Wanted{Target: Target{Module: name}})
	}
	return all
}

func modulesOf(r Record) string {
	var names []string
	for _, rule := range r.Rules {
		names = append(names, rule.Module)
	}
	return strings.Join(names, " ")
}

func tighten(r Record, from HubSide, wanted []Wanted) Record {
	after, _ := r.Tighten(from, wanted, noon.Add(time.Hour))
	return after
}

func TestWhatATwinDoes(t *testing.T) {
	t.Parallel()
	must := func(r Record, err error) Record {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r, _, err := Record{}.Add(Rule{ID: "l", Target: Target{Module: "local"}, Origin: Local})
	r = must(must(r, err).Replace(HubSide{"hub/a", 1}, wanted("one", "two"), noon))
	later := noon.Add(time.Hour)
	if again := must(r.Replace(HubSide{"hub/a", 9}, wanted("two", "one"), later)); !again.Equal(r) {
		t.Errorf("a repeated document changes %+v to %+v", r, again)
	}
	if got := modulesOf(tighten(r, HubSide{"hub/a", 2}, wanted("three", "one"))); got !=
		"local one two three" {
		t.Errorf("a notification: %s", got)
	}
	if got := modulesOf(must(r.Replace(HubSide{"hub/a", 2}, wanted("three", "two"), later))); got != "local two three" {
		t.Errorf("another twin: %s", got)
	}
	moved := tighten(r, HubSide{"hub/b", 1}, wanted("one"))
	if got := modulesOf(moved); got != "local one two one" {
		t.Errorf("a notification of another hub: %s", got)
	}
	moved = must(moved.Replace(HubSide{"hub/b", 1}, wanted("one"), later))
	if got := modulesOf(moved); got != "local one" || moved.Rules[1].Hub != "hub/b" {
		t.Errorf("the twin of another hub: %s", got)
	}
	if modulesOf(r) != "local one two" {
		t.Errorf("a record was changed: %s", modulesOf(r))
	}
}

func TestRoomForDenyRules(t *testing.T) {
	t.Parallel()
	var many []Wanted
	for i := range MaxRules + 1 {
		many = append(many, Wanted{Target: Target{User: strings.Repeat("u", i+1)}})
	}
	from := HubSide{"hub/a", 1}
	if _, err := (Record{}).Replace(from, many, noon); !errors.Is(err, ErrTooMany) {
		t.Error(err)
	}
	r, err := Record{}.Replace(from, many[1:], noon)
	if err != nil {
		t.Fatal(err)
	}
	if r = tighten(r, from, many[:1]); len(r.Rules) != MaxRules+1 {
		t.Errorf("a notification finds no room: %d rules", len(r.Rules))
	}
	for i := range MaxRules + 1 {
		many[i].Target.User = strings.Repeat("v", i+1)
	}
	full, noRoom := r.Tighten(from, many, noon)
	if noRoom != len(many)-(MaxRules-1) {
		t.Errorf("%d find no room", noRoom)
	}
	stop := slices.Concat(many, []Wanted{{Target: Target{All: true}}})
	if all, _ := r.Tighten(from, stop, noon); !slices.ContainsFunc(all.Rules, func(r Rule) bool { return r.All }) {
		t.Error("of more than there is room for, what denies everything is left out")
	}
	if len(full.Rules) != 2*MaxRules || full.Rules[2*MaxRules-1].Target != many[MaxRules-2].Target {
		t.Errorf("of a notification %d rules find room", len(full.Rules)-len(r.Rules))
	}
	if _, err := full.Replace(from, many[1:], noon); err != nil {
		t.Error(err)
	}
	for i := range MaxRules {
		if r, _, err = r.Add(Rule{ID: strings.Repeat("l", i+1), Target: many[i].Target, Origin: Local}); err != nil {
			t.Fatal(err)
		}
	}
	r.Lineage = "l"
	if _, _, err := r.Add(Rule{ID: "x", Target: Target{All: true}, Origin: Local}); !errors.Is(err, ErrTooMany) {
		t.Error(err)
	}
	if err := r.Validate(); err != nil {
		t.Error(err)
	}
}

// anyRecord is one of few, so that two are often versions of one another.
func anyRecord(t *rapid.T) Record {
	r := Record{
		Lineage:    rapid.SampledFrom([]string{"a", "b"}).Draw(t, "lineage"),
		Generation: rapid.Uint64Range(1, 3).Draw(t, "generation"),
		Lost:       rapid.SampledFrom([]string{"", "", "why"}).Draw(t, "lost"),
	}
	for _, module := range rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"x", "y", "z"}), 0, 3,
		rapid.ID[string]).Draw(t, "modules") {
		origin := rapid.SampledFrom([]Origin{Local, Twin, Method}).Draw(t, "origin")
		r.Rules = append(r.Rules, Rule{ID: module, Target: Target{Module: module}, Origin: origin})
	}
	return r
}

// Of two versions neither of which is the newer, nothing is forgotten that one of them denies. Either way round it is
// the same, and can be kept.
func TestNothingDeniedIsForgotten(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		x, y := anyRecord(t), anyRecord(t)
		for _, pair := range [][2]Record{{x, y}, {y, x}} {
			newest := Newest(pair[0], pair[1])
			if err := newest.Validate(); err != nil {
				t.Fatal(err)
			}
			list := Compile(newest, names())
			for _, r := range pair {
				isOlder := x.Lineage == y.Lineage && r.Generation < max(x.Generation, y.Generation)
				if isOlder {
					continue
				}
				if r.Lost != "" && newest.Lost == "" {
					t.Fatalf("%+v is lost, %+v is not", r, newest)
				}
				for _, rule := range r.Rules {
					caller := grants.Caller{Module: rule.Module}
					if list.Denies(&caller, &device, vault) == nil {
						t.Fatalf("%+v forgets %+v", newest, rule)
					}
				}
			}
			if newest.Generation < max(x.Generation, y.Generation) {
				t.Fatalf("%+v is older than what it is made of", newest)
			}
		}
	})
}

// Two records that together deny more than there is room for deny everything, and can be kept.
func TestTwoFullRecords(t *testing.T) {
	t.Parallel()
	full := func(lineage string) Record {
		r := Record{Lineage: lineage}
		for i := range maxKept {
			r.Rules = append(r.Rules, Rule{ID: lineage + strings.Repeat("i", i%50) + strings.Repeat("j", i/50),
				Target: Target{User: lineage + strings.Repeat("u", i%250), Module: "m" + strings.Repeat("x", i/250)},
				Origin: Local})
		}
		return r
	}
	both := Both(full("a"), full("b"))
	if err := both.Validate(); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(both.Rules, func(r Rule) bool { return r.All }) {
		t.Error("what there is no room for is not denied")
	}
}
