package deny

import (
	"cmp"
	"slices"
	"strings"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Names say what the names in rules mean on this device.
type Names struct {
	Rules grants.Rules // the identities, the grants, and the resources' other names
	// LookupUser returns the uid of a user. It returns false where there is no such user, and an error where that
	// cannot be found out.
	LookupUser func(name string) (uid uint32, found bool, err error)
}

// List is rules as they are matched. It never changes and is safe for concurrent use. The zero List denies nothing.
type List struct {
	lost     string // why the rules are not known; empty: they are
	standing []standing
	names    bool // some rule names a user by name
}

// standing is a rule in force.
type standing struct {
	rule Rule

	unit     string // as systemd writes it
	uid      uint32
	anyUser  bool     // who that user is cannot be found out: it may be any
	selector string   // of the identity, to be compared
	names    []string // canonical forms of all that goes by the resource's name, where it has other names
	anyName  bool     // whatever resource it names, each other may go by that name

	idle string // why it matches nothing; empty: it may match
}

// Compile returns the rules of a record that are in force, for what the names in them mean now.
func Compile(r Record, names Names) *List {
	l := &List{lost: r.Lost}
	for _, rule := range r.Rules {
		if !r.isSetAside(rule) {
			l.standing = append(l.standing, names.compile(rule))
			l.names = l.names || rule.User != "" && !isNumber(rule.User)
		}
	}
	return l
}

func (n Names) compile(rule Rule) standing {
	s := standing{rule: rule, unit: grants.UnitName(rule.Unit)}
	if rule.User != "" {
		n.setUser(&s)
	}
	if rule.Identity != "" {
		i := slices.IndexFunc(n.Rules.Identities, func(i grants.Identity) bool { return i.Name == rule.Identity })
		switch {
		case i < 0:
			s.idle = cmp.Or(s.idle, "no [[identity]] of the configuration is named "+rule.Identity)
		case n.Rules.Identities[i].Fault != "": // nor is it known how the back end is asked for it
			s.idle = cmp.Or(s.idle, n.Rules.Identities[i].String()+" is faulty, and no caller gets its tokens")
		default:
			s.selector = selectorOf(n.Rules.Identities[i])
		}
	}
	if rule.Resource != "" {
		s.names, s.anyName = n.spellings(grants.TrimScope(rule.Resource)), n.Rules.AnyAlternate
	}
	if s.idle == "" {
		s.idle = n.whyIdle(rule, s.names)
	}
	return s
}

// setUser finds out whom the rule means by a user.
func (n Names) setUser(s *standing) {
	if uid, ok := uidOf(s.rule.User); ok {
		s.uid = uid
		return
	}
	uid, found, err := n.LookupUser(s.rule.User)
	switch {
	case err != nil:
		s.anyUser = true
	case !found:
		s.uid, s.idle = grants.NoID, "/etc/passwd has no user "+s.rule.User+" (of users from elsewhere name the uid)"
	default:
		s.uid = uid
	}
}

// spellings returns the canonical forms of all that goes by a resource's name, itself included and in order; none where
// it has no other names.
func (n Names) spellings(resource string) (all []string) {
	alternates := n.Rules.OtherNames()
	for one, others := range alternates {
		for _, name := range append([]string{one}, others...) {
			if tokencache.GoesBy(alternates, resource, name) {
				all = append(all, tokencache.Canonical(name))
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// whyIdle says why a rule matches nothing though all that it names can be told, for people; it is matched all the same.
func (n Names) whyIdle(rule Rule, resources []string) string {
	granted := func(is func(grants.Grant) bool) bool { return slices.ContainsFunc(n.Rules.Grants, is) }
	names := func(g grants.Grant) bool {
		return slices.ContainsFunc(g.Resources, func(r string) bool { return rule.IsForResource(r, resources) })
	}
	switch {
	case rule.Module != "" && !granted(func(g grants.Grant) bool { return mayBeOfModule(g.Caller, rule.Module) }):
		return "no grant is for a module named " + rule.Module
	case rule.Unit != "" && !granted(func(g grants.Grant) bool { return mayBeOfUnit(g.Caller, rule.Unit) }):
		return "no grant is for a unit named " + grants.UnitName(rule.Unit)
	case rule.Resource != "" && !granted(names):
		return "no grant names " + rule.Resource
	}
	return ""
}

// mayBeOfModule reports whether a caller that m matches may be that module. A container of any image may be a module of
// IoT Edge: its name is known when it asks.
func mayBeOfModule(m grants.Match, module string) bool { return m.Module == module || m.Image != "" }

// mayBeOfUnit reports whether a caller that m matches may be of that unit: not where m names another, or an image,
// since a container is of none.
func mayBeOfUnit(m grants.Match, unit string) bool {
	return m.Image == "" && (m.Unit == "" || m.Unit == grants.UnitName(unit))
}

// selectorOf returns how two identities are compared: by what the source is asked with.
func selectorOf(i grants.Identity) string { return strings.ToLower(i.Selector().String()) }

// Lost returns why the rules are not known, which denies everything; empty: they are known.
func (l *List) Lost() string {
	if l == nil {
		return ""
	}
	return l.lost
}

// NamesUsers reports whether some rule in force names a user by name, so that it matters who has that name.
func (l *List) NamesUsers() bool { return l != nil && l.names }

// MovedUsers returns the IDs of the rules that mean other users than in before, a list of the same record.
func (l *List) MovedUsers(before *List) (ids []string) {
	for i := range l.standing {
		s := &l.standing[i]
		if was := before.find(s.rule.ID); was.uid != s.uid || was.anyUser != s.anyUser {
			ids = append(ids, s.rule.ID)
		}
	}
	return ids
}

// Denies returns the first rule that takes a token of identity for resource away from caller; nil: none does.
func (l *List) Denies(caller *grants.Caller, identity *grants.Identity, resource string) *Rule {
	if l == nil {
		return nil
	}
	for i := range l.standing {
		if s := &l.standing[i]; s.matchesToken(identity, resource) && s.matchesCaller(caller) {
			return &s.rule
		}
	}
	return nil
}

// DeniesAll returns the first rule that takes a token of identity for resource away from every caller; nil: none does.
func (l *List) DeniesAll(identity *grants.Identity, resource string) *Rule {
	if l == nil {
		return nil
	}
	for i := range l.standing {
		if s := &l.standing[i]; !s.rule.namesCaller() && s.matchesToken(identity, resource) {
			return &s.rule
		}
	}
	return nil
}

// OfGrant returns the IDs of the rules that take a token of identity for resource away from callers that a grant is
// for, in the order of the rules. All reports whether one of them takes it from each of these callers; else it depends
// on what the grant does not say: which user runs the unit, or which module runs the image.
func (l *List) OfGrant(of grants.Match, identity *grants.Identity, resource string) (ids []string, all bool) {
	if l == nil {
		return nil, false
	}
	caller := of.Caller()
	unknown := caller
	unknown.Via = "a secret" // where what is not known may be what the rule names
	for i := range l.standing {
		s := &l.standing[i]
		isFor := s.matchesCaller(&caller)
		mayBeFor := s.matchesCaller(&unknown) && (of.Module == "" || s.rule.Unit == "") // on its socket it is no unit
		if s.matchesToken(identity, resource) && (isFor || mayBeFor) {
			ids, all = append(ids, s.rule.ID), all || isFor
		}
	}
	return ids, all
}

// Idle returns why the rule of that ID matches nothing now; empty: it may match.
func (l *List) Idle(id string) string { return l.find(id).idle }

// NamesOfResource returns, for the rule of that ID, the canonical forms of all that goes by the name of its resource;
// none where it has no other names. They are not to be changed.
func (l *List) NamesOfResource(id string) []string { return l.find(id).names }

// find returns the rule of that ID as it is matched; the zero standing: it is not in force.
func (l *List) find(id string) standing {
	i := slices.IndexFunc(l.standing, func(s standing) bool { return s.rule.ID == id })
	if i < 0 {
		return standing{}
	}
	return l.standing[i]
}

func (s *standing) matchesToken(identity *grants.Identity, resource string) bool {
	if s.rule.Identity != "" && identity.Name != s.rule.Identity && selectorOf(*identity) != s.selector {
		return false
	}
	return s.anyName || s.rule.IsForResource(resource, s.names)
}

// matchesCaller reports whether c may be one that the rule names. What is not known of a caller may be what the rule
// names: on the loopback listener all but what its secret is for. A module is known by its socket, and is no unit
// there.
//
// A user is who the kernel says runs the process, wherever it runs: a unit of that user, a container without an own
// user namespace, a rootless one. It is more than a grant by user matches.
func (s *standing) matchesCaller(c *grants.Caller) bool {
	return s.mayBeModule(c) && s.mayBeUnit(c) && s.mayBeUser(c)
}

func (s *standing) mayBeModule(c *grants.Caller) bool {
	m := s.rule.Module
	return m == "" || c.Module == m || c.Container != nil && c.Container.EdgeModule == m || isModuleUnknown(c)
}

func (s *standing) mayBeUnit(c *grants.Caller) bool {
	return s.rule.Unit == "" || c.Unit == s.unit || isUnitUnknown(c)
}

func (s *standing) mayBeUser(c *grants.Caller) bool {
	switch {
	case s.rule.User == "" || s.anyUser:
		return true
	case c.UID != grants.NoID:
		return c.UID == s.uid
	case c.Peer != nil:
		return *c.Peer == s.uid
	}
	return isUserUnknown(c) && s.uid != grants.NoID
}

// Unknown returns which of what t names is not known of a caller, so that the caller may be the one: "unit"; empty: all
// of it is known.
func (t Target) Unknown(c *grants.Caller) string {
	switch {
	case t.Module != "" && t.Module != c.Module && isModuleUnknown(c):
		return "module"
	case t.Unit != "" && isUnitUnknown(c):
		return "unit"
	case t.User != "" && isUserUnknown(c):
		return "user"
	}
	return ""
}

// isModuleUnknown reports whether c may be a module of any name: a container on the loopback listener is known by its
// image alone.
func isModuleUnknown(c *grants.Caller) bool { return c.Via != "" && c.Container != nil }

// isUnitUnknown reports whether c may be of any unit. In a container it is of none.
func isUnitUnknown(c *grants.Caller) bool { return c.Via != "" && c.Unit == "" && c.Container == nil }

// isUserUnknown reports whether c may be of any user.
func isUserUnknown(c *grants.Caller) bool {
	return c.Via != "" && c.UID == grants.NoID && c.Peer == nil
}
