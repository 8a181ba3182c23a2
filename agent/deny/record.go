package deny

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"perceptd/tokencache"
)

// MaxRules is how many rules each origin may set.
const MaxRules = 64

// Record is all that is kept of deny rules. Its methods return it changed, and leave it as it is.
type Record struct {
	// Lineage names the record from its beginning on: the start of a process, or when that process read more. In one
	// lineage the newer version has the higher generation. Generations of two lineages have no order.
	Lineage string `json:"lineage"`
	// Origins are the records from which this one was taken when its lineage began, the latest last.
	Origins    []tokencache.Origin `json:"origins,omitempty"`
	Generation uint64              `json:"generation"`

	Rules []Rule `json:"rules"`

	Hub   string `json:"hub,omitempty"`   // this device's identity at the hub whose twin was read last
	Aside *Aside `json:"aside,omitempty"` // nil: what the hub sets is heeded

	// Lost is why rules may be missing that nobody has lifted; empty: none are.
	Lost string `json:"lost,omitempty"`
	// Unread is true if they are missing only until what is on the disk was read.
	Unread bool `json:"unread,omitempty"`
	// LostOn is since when Lost is so.
	LostOn time.Time `json:"lost_on,omitzero"`

	// Missing says that rules are missing since a hub's twin took the place of a lost record; nil: none are, or root
	// has ended it.
	Missing *Missing `json:"missing,omitempty"`
}

// Missing says that a record was lost, and that what a hub's twin denies was taken again: what was set on the device or
// by direct methods denies nothing any more.
type Missing struct {
	Why    string    `json:"why"`              // as Record.Lost was
	Unread bool      `json:"unread,omitempty"` // as Record.Unread was: it does again when the record was read
	LostOn time.Time `json:"lost_on"`          // as Record.LostOn was
	TwinOn time.Time `json:"twin_on"`          // when the twin was taken
	Hub    string    `json:"hub"`              // this device's identity there
}

// Aside says that what hubs set denies nothing.
type Aside struct {
	On time.Time `json:"on"`
	By string    `json:"by"`
	// Hubs are this device's identities at those hubs; none: that of the first that comes.
	Hubs []string `json:"hubs,omitempty"`
}

// HubSide is a hub that sets rules by the desired properties of a twin.
type HubSide struct {
	Hub     string // this device's identity there
	Version int64  // of the desired properties
}

// Wanted is a rule that is to be set.
type Wanted struct {
	Target
	Note string
}

// isSetAside reports whether root has set rule aside.
func (r Record) isSetAside(rule Rule) bool { return rule.Origin != Local && r.IsSetAside(rule.Hub) }

// IsSetAside reports whether what the hub sets is set aside, where this device has that identity there. An identity
// that is not known counts as one that was set aside.
func (r Record) IsSetAside(hub string) bool {
	return r.Aside != nil && (len(r.Aside.Hubs) == 0 || hub == "" || slices.Contains(r.Aside.Hubs, hub))
}

// ErrTooMany is why no more rules are set.
var ErrTooMany = fmt.Errorf("there would be more than %d deny rules of that side", MaxRules)

// count returns how many rules of an origin there are.
func (r Record) count(of Origin) (n int) {
	for _, rule := range r.Rules {
		if rule.Origin == of {
			n++
		}
	}
	return n
}

// find returns the index of the rule of that ID; -1: there is none.
func (r Record) find(id string) int {
	return slices.IndexFunc(r.Rules, func(rule Rule) bool { return rule.ID == id })
}

// Find returns the rule of that ID.
func (r Record) Find(id string) (Rule, bool) {
	if i := r.find(id); i >= 0 {
		return r.Rules[i], true
	}
	return Rule{}, false
}

// Add returns r with the rule, and the rule as it is there: where the same side denies the same already, that one
// stays, with the new note if there is one. The error is ErrTooMany.
func (r Record) Add(rule Rule) (Record, Rule, error) {
	r.Rules = slices.Clone(r.Rules)
	same := func(o Rule) bool { return o.Origin == rule.Origin && o.Hub == rule.Hub && o.Target == rule.Target }
	if i := slices.IndexFunc(r.Rules, same); i >= 0 {
		r.Rules[i].Note = cmp.Or(rule.Note, r.Rules[i].Note)
		return r, r.Rules[i], nil
	}
	if r.count(rule.Origin) >= MaxRules {
		return r, Rule{}, ErrTooMany
	}
	r.Rules = append(r.Rules, rule)
	return r, rule, nil
}

// ErrOtherSide is why a rule is not lifted: another side set it.
var ErrOtherSide = errors.New("another side set that rule")

// ErrUnknown is why a rule is not lifted: there is none of that ID.
var ErrUnknown = errors.New("there is no such rule")

// Lift returns r without the rule of that ID, and the rule. The error is ErrUnknown or ErrOtherSide.
func (r Record) Lift(by Origin, id string) (Record, Rule, error) {
	i := r.find(id)
	switch {
	case i < 0:
		return r, Rule{}, ErrUnknown
	case r.Rules[i].Origin != by:
		return r, r.Rules[i], ErrOtherSide
	}
	rule := r.Rules[i]
	r.Rules = slices.Delete(slices.Clone(r.Rules), i, i+1)
	return r, rule, nil
}

// twinID returns the ID of a twin's rule. A rule that comes again has the same.
func twinID(t Target) string {
	text, _ := json.Marshal(t) // never fails
	sum := sha256.Sum256(text)
	return "twin-" + hex.EncodeToString(sum[:8])
}

// twinRule returns a rule that a hub's twin sets, or as it is there already.
func (r Record) twinRule(from HubSide, wanted Wanted, now time.Time) Rule {
	id := twinID(wanted.Target)
	for _, rule := range r.Rules {
		if rule.ID == id && rule.Hub == from.Hub {
			rule.Note = wanted.Note
			return rule
		}
	}
	return Rule{
		ID: id, Target: wanted.Target, Origin: Twin, Note: wanted.Note, Since: now, By: from.Hub, Hub: from.Hub,
		Twin: from.Version,
	}
}

// Tighten returns r with what a twin denies besides what is denied already, as far as there is room, and how many of
// wanted have none, and deny nothing. What denies everything always has room. It lifts nothing: so what is to be lifted
// may take the room until the twin is read.
func (r Record) Tighten(from HubSide, wanted []Wanted, now time.Time) (after Record, noRoom int) {
	after = r
	after.Rules = slices.Clone(r.Rules)
	for _, w := range wanted {
		rule := r.twinRule(from, w, now)
		known := func(o Rule) bool { return o.ID == rule.ID && o.Hub == rule.Hub }
		switch {
		case slices.ContainsFunc(after.Rules, known):
		case w.All, after.count(Twin) < 2*MaxRules:
			after.Rules = append(after.Rules, rule)
		default:
			noRoom++
		}
	}
	return after, noRoom
}

// Replace returns r with what the twin of a hub denies in the place of what it denied before. It ends a loss, unless
// root has set the hub aside, and notes what is missing then. Where this device has another identity at the hub than
// before, what was set there is lifted, and no longer set aside. The error is ErrTooMany.
func (r Record) Replace(from HubSide, wanted []Wanted, now time.Time) (Record, error) {
	if len(wanted) > MaxRules {
		return r, ErrTooMany
	}
	after := r
	after.Hub, after.Rules = from.Hub, nil
	after.Aside = r.Aside.only(func(hub string) bool { return hub == from.Hub })
	if r.Aside != nil && len(r.Aside.Hubs) == 0 {
		after.Aside = &Aside{On: r.Aside.On, By: r.Aside.By, Hubs: []string{from.Hub}}
	}
	if after.Aside == nil {
		after = after.known()
		if r.Lost != "" {
			after.Missing = &Missing{Why: r.Lost, Unread: r.Unread, LostOn: r.LostOn, TwinOn: now, Hub: from.Hub}
		}
	}
	listed := make(map[string]Rule)
	for _, w := range wanted {
		rule := r.twinRule(from, w, now)
		listed[rule.ID] = rule
	}
	for _, rule := range r.Rules { // in the order in which they came
		ours := rule.Hub == "" || rule.Hub == from.Hub
		switch noted, is := listed[rule.ID]; {
		case rule.Origin == Local, rule.Origin == Method && ours:
			after.Rules = append(after.Rules, rule)
		case is && rule.Hub == from.Hub:
			after.Rules = append(after.Rules, noted)
			delete(listed, rule.ID)
		}
	}
	for _, w := range wanted {
		if rule, is := listed[twinID(w.Target)]; is {
			after.Rules = append(after.Rules, rule)
			delete(listed, rule.ID)
		}
	}
	return after, nil
}

// SetAside returns r with set aside what each hub sets that has set anything, or at which this device has the identity
// current; empty: that is not known.
func (r Record) SetAside(by string, now time.Time, current string) Record {
	hubs := []string{r.Hub, current}
	for _, rule := range r.Rules {
		hubs = append(hubs, rule.Hub)
	}
	hubs = slices.DeleteFunc(hubs, func(hub string) bool { return hub == "" })
	isNew := func(hub string) bool { return !r.IsSetAside(hub) }
	if r.Aside != nil && !slices.ContainsFunc(hubs, isNew) {
		return r
	}
	if r.Aside != nil {
		hubs = append(hubs, r.Aside.Hubs...)
	}
	slices.Sort(hubs)
	r.Aside = &Aside{On: now, By: by, Hubs: slices.Compact(hubs)}
	return r
}

// only returns a with those of its hubs that stay; nil: none does.
func (a *Aside) only(stays func(hub string) bool) *Aside {
	if a == nil {
		return nil
	}
	left := slices.DeleteFunc(slices.Clone(a.Hubs), func(hub string) bool { return !stays(hub) })
	if len(left) == 0 {
		return nil
	}
	return &Aside{On: a.On, By: a.By, Hubs: left}
}

// Heed returns r with what the hub sets heeded.
func (r Record) Heed() Record {
	r.Aside = nil
	return r
}

// known returns r as a record that is not lost.
func (r Record) known() Record {
	r.Lost, r.Unread, r.LostOn = "", false, time.Time{}
	return r
}

// Found returns r as a record of which nothing is missing for being unread: that was read.
func (r Record) Found() Record {
	if r.Unread {
		r = r.known()
	}
	if r.Missing != nil && r.Missing.Unread {
		r.Missing = nil
	}
	return r
}

// Forget returns r with nothing missing.
func (r Record) Forget() Record {
	r = r.known()
	r.Missing = nil
	return r
}

// Equal reports whether r and o say the same, whatever their lineages and generations.
func (r Record) Equal(o Record) bool {
	return r.Aside.equal(o.Aside) && r.Hub == o.Hub && r.Lost == o.Lost && r.LostOn.Equal(o.LostOn) &&
		r.Missing.equal(o.Missing) &&
		slices.EqualFunc(r.Rules, o.Rules, Rule.equal)
}

func (a *Aside) equal(o *Aside) bool {
	if a == nil || o == nil {
		return a == o
	}
	return a.By == o.By && a.On.Equal(o.On) && slices.Equal(a.Hubs, o.Hubs)
}

func (m *Missing) equal(o *Missing) bool {
	if m == nil || o == nil {
		return m == o
	}
	return m.Why == o.Why && m.Unread == o.Unread && m.Hub == o.Hub && m.LostOn.Equal(o.LostOn) &&
		m.TwinOn.Equal(o.TwinOn)
}

func (r Rule) equal(o Rule) bool {
	sameTime := r.Since.Equal(o.Since)
	r.Since, o.Since = time.Time{}, time.Time{}
	return sameTime && r == o
}

// maxKept bounds the rules of a record that is read: those of all sides, in two versions.
const maxKept = 8 * MaxRules

// Validate returns what is wrong with a record that was read, or is to be written, or nil.
func (r Record) Validate() error {
	if r.Lineage == "" {
		return errors.New("it has no lineage")
	}
	if len(r.Rules) > maxKept {
		return fmt.Errorf("%d deny rules are more than there can be", len(r.Rules))
	}
	type known struct{ id, hub string }
	seen := make(map[known]bool)
	for i, rule := range r.Rules {
		at := known{rule.ID, rule.Hub}
		switch {
		case rule.ID == "" || len(rule.ID) > 64:
			return fmt.Errorf("deny rule %d has no ID, or one that is too long", i+1)
		case seen[at]:
			return fmt.Errorf("deny rule %d has the ID of another", i+1)
		case rule.Origin != Local && rule.Origin != Twin && rule.Origin != Method:
			return fmt.Errorf("deny rule %d: nobody knows which side set it", i+1)
		}
		if err := rule.Check(); err != nil {
			return fmt.Errorf("deny rule %d: %w", i+1, err)
		}
		seen[at] = true
	}
	return nil
}

// Origin returns r as a record of which another may be taken.
func (r Record) Origin() tokencache.Origin {
	return tokencache.Origin{Lineage: r.Lineage, Generation: r.Generation}
}

// Named returns r as records that are taken from it name it: where nothing has changed since its lineage began, they
// name what it was taken from.
func (r Record) Named() tokencache.Origin {
	if n := len(r.Origins); n > 0 && r.Origins[n-1].Generation == r.Generation {
		return r.Origins[n-1]
	}
	return r.Origin()
}

// descent returns of r what policy changes have as well: from which records it was taken.
func (r Record) descent() tokencache.Record {
	return tokencache.Record{Lineage: r.Lineage, Origins: r.Origins, Generation: r.Generation}
}

// Has reports whether r has everything that the record of that name had, but for what was lifted since.
func (r Record) Has(o tokencache.Origin) bool {
	return r.descent().Has(tokencache.Record{Lineage: o.Lineage, Generation: o.Generation})
}

// IsNewer reports whether r came after o. If neither of two is newer, each may have what the other lacks.
func (r Record) IsNewer(o Record) bool { return r.descent().IsNewer(o.descent()) }

// Anew returns r, which was taken from those records, as the beginning of a lineage. Each start begins one, since the
// record that it read may go on elsewhere: in what systemd holds, or in a folder that comes back. Its generation stays
// if it is as the last of them, which has everything of the others.
func (r Record) Anew(from ...Record) Record {
	var all []tokencache.Record
	for _, f := range from {
		if f.Lineage != "" {
			all = append(all, f.descent())
		}
	}
	begun := r.descent().WithLineage(rand.Text(), all...)
	r.Lineage, r.Origins, r.Generation = begun.Lineage, begun.Origins, begun.Generation
	return r
}

// AreForks reports whether two records went on apart, and differ in their rules.
func AreForks(r, o Record) bool {
	return !r.IsNewer(o) && !o.IsNewer(r) && !slices.EqualFunc(r.Rules, o.Rules, Rule.equal)
}

// Newest returns the newer of two versions of a record. Where neither is the newer, it has the rules of both, and what
// only one sets aside is not.
func Newest(r, o Record) Record {
	switch {
	case r.IsNewer(o):
		return r
	case o.IsNewer(r):
		return o
	case r.descent().Has(o.descent()) && r.Equal(o):
		return r
	}
	return Both(r, o)
}

// Both returns a record with the rules of both, as the beginning of a lineage. Hub is r's.
func Both(r, o Record) Record {
	both := r
	both.Generation = max(r.Generation, o.Generation) + 1
	both = both.Anew(o, r)
	both.Hub, both.Lost = cmp.Or(r.Hub, o.Hub), cmp.Or(r.Lost, o.Lost)
	both.Unread = both.Lost != "" && (r.Lost == "" || r.Unread) && (o.Lost == "" || o.Unread)
	if both.Missing = cmp.Or(r.Missing, o.Missing); r.Lost == "" {
		both.LostOn = o.LostOn
	}
	if o.Aside == nil || len(o.Aside.Hubs) != 0 {
		both.Aside = r.Aside.only(o.IsSetAside)
	}
	both.Rules = slices.Clone(r.Rules)
	for _, rule := range o.Rules {
		isSame := func(k Rule) bool { return k.Origin == rule.Origin && k.Hub == rule.Hub && k.Target == rule.Target }
		if slices.ContainsFunc(both.Rules, isSame) {
			continue
		}
		taken := func(k Rule) bool { return k.ID == rule.ID && k.Hub == rule.Hub }
		for id, n := rule.ID, 2; slices.ContainsFunc(both.Rules, taken); n++ {
			rule.ID = fmt.Sprintf("%.56s-%d", id, n)
		}
		both.Rules = append(both.Rules, rule)
	}
	if len(both.Rules) > maxKept { // none is left out for it, but what was added last counts as all
		both.Rules = append(both.Rules[:maxKept-1:maxKept-1], Rule{
			ID: "more", Target: Target{All: true}, Origin: Local,
			Note:  "two records together deny more than there is room for",
			Since: both.Rules[maxKept-1].Since,
		})
	}
	return both
}
