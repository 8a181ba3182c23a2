package grants

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Which grants decide about a caller:
//
//   - Grants are of five kinds, the most specific first: by module; by unit, or by container image;
//     by user or uid; by group or gid.
//   - The most specific kind that has a grant for the caller decides alone, whatever resource is asked for: what a
//     broader kind allows is not added to it. So a grant for a service narrows what its user may have to what that
//     service needs.
//   - Grants of the deciding kind add up.
//   - An idle grant, one with a fault, decides as it would without, and gives nothing. If it is not understood whom it
//     is for, it decides where no grant of a kind that it may be of is for the caller.

// Why a request is denied: one of these is a Denial's Err.
var (
	ErrBadResource       = errors.New("the resource is no App ID URI")
	ErrUnknownIdentity   = errors.New("no such identity is configured")
	ErrAmbiguousIdentity = errors.New("several identities are granted and none was named")
	ErrNotGranted        = errors.New("no grant allows it")
	ErrFaulty            = errors.New("what decides about it is faulty, and gives nothing")
)

// Denial is why a caller may not have a token.
type Denial struct {
	Err     error    // ErrBadResource, ErrUnknownIdentity, ErrAmbiguousIdentity, ErrNotGranted or ErrFaulty
	Detail  string   // fit for the caller's eyes; says what to do next
	Choices []string // identities to name, with ErrUnknownIdentity and ErrAmbiguousIdentity

	// ForAdministrator is Detail with what is not for every caller: folders, and the fault of a grant that may be for
	// others. Empty: it is the same.
	ForAdministrator string

	// Granted are these identities, in the same order.
	Granted []*Identity

	// NearMiss and Suggestion are what helps where no grant allows it, with ErrNotGranted; nil: nothing that is known.
	NearMiss   *NearMiss
	Suggestion *Suggestion
}

// SubjectOf returns the first of the subjects whose grants decide about caller; zero if no grant is for it. There are
// no more of them than the grants name, so that a caller's requests can be counted under it.
func (a *Authorizer) SubjectOf(caller *Caller) Subject {
	var room [4]Subject
	if found, _ := a.deciding(caller, room[:0]); len(found) > 0 {
		return found[0]
	}
	return Subject{}
}

// grantedTo returns the identities that caller may have tokens of for resource.
func (a *Authorizer) grantedTo(caller *Caller, resource string) []GrantedIdentity {
	var room [4]Subject
	var all []GrantedIdentity
	subjects, _ := a.deciding(caller, room[:0])
	for i, subject := range subjects {
		granted := a.granted[subject][resource]
		if i == 0 {
			all = slices.Clip(granted) // most callers match one subject: its list is shared, and copied before it grows
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

// MayHave reports whether caller may have tokens of that identity for resource.
func (a *Authorizer) MayHave(caller *Caller, identity *Identity, resource string) bool {
	return GrantedIdentity{Identity: identity}.in(a.grantedTo(caller, resource))
}

// AlternatesFor returns the resources whose token caller may be given in the place of one for resource: those that it
// has granted with the same identity.
func (a *Authorizer) AlternatesFor(caller *Caller, identity *Identity, resource string) []string {
	var all []string
	for _, alternate := range a.rules.Alternates[resource] {
		if a.MayHave(caller, identity, alternate) {
			all = append(all, alternate)
		}
	}
	return all
}

// Authorize returns the identity that a request is for, with the grant that allows it, or why caller may not have it.
func (a *Authorizer) Authorize(caller *Caller, r Request) (GrantedIdentity, *Denial) {
	if err := CheckResource(r.Resource); err != nil {
		return GrantedIdentity{}, &Denial{Err: ErrBadResource, Detail: err.Error() + a.wrongSpelling(caller, r)}
	}
	granted := a.grantedTo(caller, r.Resource)
	if r.NamesIdentity() {
		return a.chooseNamed(caller, r, granted)
	}
	for _, one := range granted {
		if one.Identity.Default {
			return one, nil
		}
	}
	switch len(granted) {
	case 0:
		return GrantedIdentity{}, a.nothingGranted(caller, r, nil)
	case 1:
		if grant := a.mayGiveAnother(caller, r.Resource, granted[0].Identity); grant != nil {
			return GrantedIdentity{}, unclearIdentity(grant, caller, granted)
		}
		return granted[0], nil
	}
	choices := identitiesOf(granted)
	return GrantedIdentity{}, &Denial{
		Err: ErrAmbiguousIdentity,
		Detail: fmt.Sprintf("several identities are granted for %s: name one of %s",
			r.Resource, strings.Join(namesOf(choices), ", ")),
		Choices: namesOf(choices), Granted: choices,
	}
}

func (a *Authorizer) chooseNamed(caller *Caller, r Request, granted []GrantedIdentity) (GrantedIdentity, *Denial) {
	for i := range a.rules.Identities {
		identity := &a.rules.Identities[i]
		if !r.Names(identity) {
			continue
		}
		if identity.Fault != "" {
			return GrantedIdentity{}, idleIdentity(identity)
		}
		for _, one := range granted {
			if one.Identity == identity {
				return one, nil
			}
		}
		return GrantedIdentity{}, a.nothingGranted(caller, r, identity)
	}
	choices := identitiesOf(granted)
	return GrantedIdentity{}, &Denial{
		Err: ErrUnknownIdentity, Detail: a.notFound(r, choices) + a.orIdle(),
		Choices: namesOf(choices), Granted: choices,
	}
}

// nothingGranted says that caller has no token of identity for the resource of r; nil: of any. The reason is an idle
// grant or module, or that no grant allows it.
func (a *Authorizer) nothingGranted(caller *Caller, r Request, identity *Identity) *Denial {
	if a.isOfIdleModule(caller) {
		return idleModule(caller)
	}
	if grant := a.mayGive(caller, r.Resource, identity); grant != nil {
		return idleGrant(grant, caller)
	}
	return a.notGranted(caller, r, identity)
}

// notGranted says that no grant allows r, of that identity; nil: of any. It says what helps.
func (a *Authorizer) notGranted(caller *Caller, r Request, identity *Identity) *Denial {
	of := ""
	if identity != nil {
		of = fmt.Sprintf(" of identity %q", identity.Name)
	}
	near := a.nearMiss(caller, r, false)
	d := &Denial{Err: ErrNotGranted, NearMiss: near, Suggestion: a.suggest(caller, r, near)}
	what := "an administrator can add one"
	switch {
	case near != nil:
		what = near.ForCaller()
	case UnusualSpelling(r.Resource) != "":
		what = fmt.Sprintf("Azure's own spelling of that resource is %s: ask for that one, once an administrator has "+
			"added a grant of it", UnusualSpelling(r.Resource))
	case d.Suggestion != nil && d.Suggestion.Why != "":
		what = d.Suggestion.Why
	}
	d.Detail = fmt.Sprintf("no [[grant]] lets %v have tokens%s for %s%s: %s",
		*caller, of, r.Resource, caller.butUser(), what)
	return d
}

// butUser adds to the reason of a denial why a grant for the caller's user or group does not count.
func (c *Caller) butUser() string {
	if !c.Nested {
		return ""
	}
	return ", whose uid and groups say nothing there"
}

// Evaluation is a grant that is for the caller, and its part in a decision.
type Evaluation struct {
	Ref
	Decides bool   // it is of the deciding kind
	Allows  bool   // it names the resource, and the identity if the request names one
	Why     string // what it does to the decision, in words
}

// Decision is the answer to a request, with its reasons.
type Decision struct {
	Allowed     bool
	Identity    string       // whose token it would be; empty when not allowed
	Grant       *Ref         // the one that allows it; nil when none does
	Evaluations []Evaluation // every grant that is for the caller, in the order of the configuration
	Reason      string       // in a sentence
	Denial      *Denial      // what the caller is answered; nil when allowed

	// NearMiss is Denial's, or that of a grant that is for others: for administrators.
	NearMiss *NearMiss
}

// Decide returns what Authorize decides, with its reasons.
func (a *Authorizer) Decide(caller *Caller, r Request) Decision {
	d := Decision{Evaluations: a.evaluations(caller, r)}
	one, denial := a.Authorize(caller, r)
	if denial != nil {
		d.Denial, d.Reason = denial, cmp.Or(denial.ForAdministrator, denial.Detail)
		if denial.Err == ErrNotGranted {
			d.NearMiss = a.nearMiss(caller, r, true)
			d.Reason = whyNot(caller, r, d.Evaluations, d.NearMiss)
		}
		return d
	}
	d.Allowed, d.Identity = true, one.Identity.Name
	d.Grant = a.Ref(one.Grant)
	d.Reason = fmt.Sprintf("%s lets %v have tokens of identity %q for %s",
		d.Grant, d.Grant.Caller, d.Identity, r.Resource)
	return d
}

// evaluations returns the grants that are for the caller, or may be.
func (a *Authorizer) evaluations(caller *Caller, r Request) []Evaluation {
	var room [4]Subject
	deciding, by := a.deciding(caller, room[:0])
	var all []Evaluation
	for i := range a.rules.Grants {
		e := Evaluation{Ref: *a.Ref(i)}
		subject := e.Caller.Subject()
		switch {
		case e.Unclear != 0:
			if !e.Unclear.mayBeFor(caller) {
				continue
			}
			e.Decides = e.Unclear.has(by)
		case !subject.matches(caller):
			continue
		default:
			e.Decides = slices.Contains(deciding, subject)
		}
		e.Allows = e.Fault == "" && slices.Contains(e.Resources, r.Resource) &&
			(!r.NamesIdentity() || r.Names(a.Named(e.Identity)))
		e.Why = e.role(by, r.Resource)
		all = append(all, e)
	}
	return all
}

// role says what a grant does to the decision.
func (e *Evaluation) role(deciding kind, resource string) string {
	switch {
	case deciding == 0:
		return "does not count: the [[module]] of this container is faulty"
	case e.Decides && e.Unclear != 0:
		return "is faulty, may be for this caller, decides and gives nothing: " + e.Fault
	case e.Decides && e.Fault != "":
		return "is faulty, decides and gives nothing: " + e.Fault
	case !e.Decides && e.Allows:
		return fmt.Sprintf("would allow it, but a grant by %v is more specific and decides alone", deciding)
	case !e.Decides:
		return fmt.Sprintf("does not count: a grant by %v is more specific and decides alone", deciding)
	case !slices.Contains(e.Resources, resource):
		for _, other := range e.Resources {
			if len(partsOf(resource).differences(partsOf(other))) > 0 {
				return "decides, and names " + other + ", which the back end takes for another resource"
			}
		}
		return "decides, and does not name this resource"
	case !e.Allows:
		return "decides, and is for another identity"
	}
	return "decides, and allows it"
}

// WhyNot says why no grant allows a request, for administrators.
func (a *Authorizer) WhyNot(caller *Caller, r Request) string {
	return whyNot(caller, r, a.evaluations(caller, r), a.nearMiss(caller, r, true))
}

func whyNot(caller *Caller, r Request, evaluations []Evaluation, near *NearMiss) string {
	butAs := ""
	switch {
	case near != nil && near.Decides:
		return fmt.Sprintf("no grant lets %v have tokens for %s: %s", *caller, r.Resource, near.ForAdministrator())
	case near != nil:
		butAs = "; " + near.ForAdministrator()
	case UnusualSpelling(r.Resource) != "":
		butAs = "; Azure's own spelling of that resource is " + UnusualSpelling(r.Resource)
	}
	if len(evaluations) == 0 {
		return fmt.Sprintf("no grant is for %v%s: what is not granted is denied%s", *caller, caller.butUser(), butAs)
	}
	var deciding []string
	var broader *Evaluation
	for i := range evaluations {
		switch e := &evaluations[i]; {
		case e.Decides:
			deciding = append(deciding, fmt.Sprintf("%v for %s", &e.Ref, e.For()))
		case e.Allows && broader == nil:
			broader = e
		}
	}
	what := "names " + r.Resource
	if r.NamesIdentity() {
		what += " with that identity"
	}
	why := fmt.Sprintf("none of the grants that decide over %v %s: %s", *caller, what, strings.Join(deciding, ", "))
	if broader != nil {
		why += fmt.Sprintf("; %v for %v would allow it, but it is less specific and does not count",
			&broader.Ref, broader.Caller)
	}
	return why + butAs
}
