package agent

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"perceptd/tokencache"
)

// Which grants decide over a caller:
//
//   - Grants are of five kinds, the most specific first: by module; by unit, or by container image;
//     by user or uid; by group or gid.
//   - The most specific kind of which any grant is for the caller decides alone, whatever resource is
//     asked for: what a broader kind allows is not added to it. So a grant for a service narrows what its
//     user may have to what that service needs.
//   - Grants of the deciding kind add up.

// deciding appends to found those by which grants know the caller, of the most specific kind of which
// there are any.
func (s *ruleset) deciding(c *Caller, found []who) []who {
	look := func(w who) {
		if s.granted[w] != nil && !slices.Contains(found, w) {
			found = append(found, w)
		}
	}
	if c.Module != "" {
		look(who{kind: byModule, name: c.Module})
	}
	if len(found) == 0 && c.Container != nil {
		look(who{kind: byImage, name: c.Container.Digest})
		for _, digest := range c.Container.RepoDigests {
			look(who{kind: byImage, name: digest})
		}
	}
	if len(found) == 0 && c.isLocal() && c.Unit != "" {
		look(who{kind: byUnit, name: c.Unit})
	}
	if len(found) > 0 || !c.HasUser() {
		return found // nothing that is left says who is in a container, or in a pid namespace of its own
	}
	look(who{kind: byUID, id: c.UID})
	if len(found) == 0 {
		look(who{kind: byGID, id: c.GID})
		for _, gid := range c.Groups {
			look(who{kind: byGID, id: gid})
		}
	}
	return found
}

// entitled lists the identities that caller may have tokens of for resource.
func (s *ruleset) entitled(caller *Caller, resource string) []entitlement {
	var room [4]who
	var all []entitlement
	for i, w := range s.deciding(caller, room[:0]) {
		granted := s.granted[w][resource]
		if i == 0 {
			all = slices.Clip(granted) // the usual caller is known by one thing: shared, and copied before it grows
			continue
		}
		for _, one := range granted {
			if !one.in(all) {
				all = append(all, one)
			}
		}
	}
	return all
}

// mayHave reports whether caller may have tokens of that identity for resource.
func (s *ruleset) mayHave(caller *Caller, identity *Identity, resource string) bool {
	return entitlement{identity: identity}.in(s.entitled(caller, resource))
}

// alternatesFor lists the resources whose token may be given to caller in the place of one for resource:
// those that it has granted with the same identity.
func (s *ruleset) alternatesFor(caller *Caller, identity *Identity, resource string) []string {
	var all []string
	for _, alternate := range s.rules.Alternates[resource] {
		if s.mayHave(caller, identity, alternate) {
			all = append(all, alternate)
		}
	}
	return all
}

// account returns what a caller's reports are counted under: no more than the grants name.
func (s *ruleset) account(caller *Caller) who {
	var room [4]who
	if found := s.deciding(caller, room[:0]); len(found) > 0 {
		return found[0]
	}
	return who{}
}

// choose returns the identity that a request is for, provided that the caller has it granted, and the
// grant that says so.
func (s *ruleset) choose(caller *Caller, r Request) (entitlement, *Error) {
	if err := CheckResource(r.Resource); err != nil {
		return entitlement{}, &Error{Reason: BadResource, Detail: err.Error()}
	}
	granted := s.entitled(caller, r.Resource)
	if r.namesIdentity() {
		return s.chooseNamed(caller, r, granted)
	}
	switch len(granted) {
	case 0:
		return entitlement{}, s.notGranted(caller, r.Resource, "")
	case 1:
		return granted[0], nil
	}
	for _, one := range granted {
		if one.identity.Default {
			return one, nil
		}
	}
	names := namesOf(granted)
	return entitlement{}, &Error{
		Reason:  AmbiguousIdentity,
		Detail:  fmt.Sprintf("several identities are granted for %s: name one of %s", r.Resource, strings.Join(names, ", ")),
		Choices: names,
	}
}

func (s *ruleset) chooseNamed(caller *Caller, r Request, granted []entitlement) (entitlement, *Error) {
	for i := range s.rules.Identities {
		identity := &s.rules.Identities[i]
		if !r.names(identity) {
			continue
		}
		for _, one := range granted {
			if one.identity == identity {
				return one, nil
			}
		}
		return entitlement{}, s.notGranted(caller, r.Resource, identity.Name)
	}
	return entitlement{}, &Error{Reason: UnknownIdentity, Detail: s.notFound(r), Choices: namesOf(granted)}
}

// notFound says that no identity is what r asks for, and whether that is a name in the place of an ID.
func (s *ruleset) notFound(r Request) string {
	const most = 100 // characters of the caller's own that are repeated
	asked := r.identityText()
	field := r.identityField()
	text := fmt.Sprintf("Identity not found: no [[identity]] of the configuration has the %s %.*q", field, most, asked)
	if field != "name" && s.named(asked) != nil {
		text += fmt.Sprintf(": that is the name of one, and %s takes its ID", field)
	}
	return text
}

func namesOf(granted []entitlement) []string {
	var names []string
	for _, one := range granted {
		names = append(names, one.identity.Name)
	}
	slices.Sort(names)
	return names
}

func (s *ruleset) notGranted(caller *Caller, resource, identity string) *Error {
	of := ""
	if identity != "" {
		of = fmt.Sprintf(" of identity %q", identity)
	}
	return &Error{
		Reason: NotGranted,
		Detail: fmt.Sprintf("no [[grant]] lets %v have tokens%s for %s%s: an administrator can add one%s", *caller, of, resource, caller.butUser(), s.butAs(caller, resource)),
	}
}

// butAs adds to a denial that the caller has the resource granted in another spelling, where it has.
func (s *ruleset) butAs(caller *Caller, resource string) string {
	var room [4]who
	for _, w := range s.deciding(caller, room[:0]) {
		if other := spelt(slices.Sorted(maps.Keys(s.granted[w])), resource); other != "" && other != resource {
			return fmt.Sprintf("; granted is %s, and the back end takes another spelling for another resource", other)
		}
	}
	return ""
}

// spelt returns the one of all that is resource in this or another spelling, the same one first; empty for none.
func spelt(all []string, resource string) string {
	if slices.Contains(all, resource) {
		return resource
	}
	wanted := tokencache.Canonical(resource)
	if i := slices.IndexFunc(all, func(other string) bool { return tokencache.Canonical(other) == wanted }); i >= 0 {
		return all[i]
	}
	return ""
}

// butUser adds to the reason of a denial why a grant for the caller's user or group does not count.
func (c *Caller) butUser() string {
	if !c.Nested {
		return ""
	}
	return ", whose uid and groups say nothing there"
}

// GrantRef is a grant and where it stands.
type GrantRef struct {
	Index int // from 0, in the order of the configuration
	Grant
}

// Considered is a grant that is for the caller, and what became of it.
type Considered struct {
	GrantRef
	Decides bool   // it is of the deciding kind
	Allows  bool   // it names the resource, and the identity if the request names one
	Why     string // what it does to the decision, in words
}

// Decision is what the grants say to a request, and why. It is made of the same rules as the answer to
// a request for a token.
type Decision struct {
	Allowed    bool
	Identity   string       // whose token it would be; empty when not allowed
	Grant      *GrantRef    // the one that allows it; nil when none does
	Considered []Considered // every grant that is for the caller, in the order of the configuration
	Reason     string       // in a sentence
	Err        *Error       // what the caller is told; nil when allowed
}

// Decide returns what the grants in force say to a request. It fetches nothing and counts nothing.
func (a *Agent) Decide(caller Caller, r Request) Decision {
	r.Resource = strings.TrimSuffix(r.Resource, "/.default")
	return a.rules.Load().explain(&caller, r)
}

func (s *ruleset) explain(caller *Caller, r Request) Decision {
	d := Decision{Considered: s.considered(caller, r)}
	one, denial := s.choose(caller, r)
	if denial != nil {
		d.Err, d.Reason = denial, denial.Detail
		if denial.Reason == NotGranted {
			d.Reason = s.whyNot(caller, r, d.Considered)
		}
		return d
	}
	d.Allowed, d.Identity = true, one.identity.Name
	d.Grant = s.ref(one.grant)
	d.Reason = fmt.Sprintf("%s lets %v have tokens of identity %q for %s", d.Grant, d.Grant.Caller, d.Identity, r.Resource)
	return d
}

func (s *ruleset) ref(index int) *GrantRef {
	return &GrantRef{Index: index, Grant: s.rules.Grants[index]}
}

// String names a grant as people find it.
func (g *GrantRef) String() string {
	if g.Place == "" {
		return fmt.Sprintf("grant %d", g.Index+1)
	}
	return fmt.Sprintf("grant %d (%s)", g.Index+1, g.Place)
}

// considered lists the grants that are for the caller.
func (s *ruleset) considered(caller *Caller, r Request) []Considered {
	var room [4]who
	deciding := s.deciding(caller, room[:0])
	var all []Considered
	for i := range s.rules.Grants {
		w := s.rules.Grants[i].Caller.who()
		if !w.covers(caller) {
			continue
		}
		c := Considered{GrantRef: *s.ref(i), Decides: slices.Contains(deciding, w)}
		c.Allows = slices.Contains(c.Resources, r.Resource) && (!r.namesIdentity() || r.names(s.named(c.Identity)))
		c.Why = c.role(deciding[0].kind, r.Resource)
		all = append(all, c)
	}
	return all
}

// role says what a grant does to the decision.
func (c *Considered) role(deciding kind, resource string) string {
	switch {
	case !c.Decides && c.Allows:
		return fmt.Sprintf("would allow it, but a grant by %v is more specific and decides alone", deciding)
	case !c.Decides:
		return fmt.Sprintf("does not count: a grant by %v is more specific and decides alone", deciding)
	case !slices.Contains(c.Resources, resource):
		if other := spelt(c.Resources, resource); other != "" {
			return "decides, and names " + other + ", which the back end takes for another resource"
		}
		return "decides, and does not name this resource"
	case !c.Allows:
		return "decides, and is for another identity"
	}
	return "decides, and allows it"
}

// whyNot says why no grant allows a request.
func (s *ruleset) whyNot(caller *Caller, r Request, considered []Considered) string {
	if len(considered) == 0 {
		return fmt.Sprintf("no grant is for %v%s: what is not granted is denied", *caller, caller.butUser())
	}
	var deciding []string
	var broader *Considered
	for i := range considered {
		switch c := &considered[i]; {
		case c.Decides:
			deciding = append(deciding, fmt.Sprintf("%v for %v", &c.GrantRef, c.Caller))
		case c.Allows && broader == nil:
			broader = c
		}
	}
	what := "names " + r.Resource
	if r.namesIdentity() {
		what += " with that identity"
	}
	why := fmt.Sprintf("none of the grants that decide over %v %s: %s", *caller, what, strings.Join(deciding, ", "))
	if broader != nil {
		why += fmt.Sprintf("; %v for %v would allow it, but it is less specific and does not count", &broader.GrantRef, broader.Caller)
	}
	return why
}

// Holdings lists the grants that decide over a caller, in the order of the configuration: all that it
// may have.
func (a *Agent) Holdings(caller Caller) []GrantRef {
	var all []GrantRef
	for _, c := range a.rules.Load().considered(&caller, Request{}) {
		if c.Decides {
			all = append(all, c.GrantRef)
		}
	}
	return all
}

// Grants lists every grant in force.
func (a *Agent) Grants() []GrantRef {
	rules := a.rules.Load()
	all := make([]GrantRef, len(rules.rules.Grants))
	for i := range all {
		all[i] = *rules.ref(i)
	}
	return all
}
