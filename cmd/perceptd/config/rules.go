package config

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"

	"perceptd/agent"
	"perceptd/agent/grants"
)

// takeIdentity reads an [[identity]]. One with a fault may be the default, unless it says that it is not.
func takeIdentity(t *table) grants.Identity {
	i := grants.Identity{Place: t.place}
	i.Name, _ = t.text("name", "device")
	i.Default, _ = t.flag("default")
	i.ClientID, _ = t.filled("client_id", exampleGUID)
	i.ObjectID, _ = t.filled("object_id", exampleGUID)
	i.ResourceID, _ = t.filled("resource_id", "/subscriptions/…")
	t.finish()
	if i.Fault = t.why(); i.Fault != "" && !t.isSound("default") {
		i.Default = true
	}
	return i
}

const exampleGUID = "6f1d9c0a-0000-0000-0000-000000000000"

// takeGrant reads a [[grant]]. One with a fault is for whom and for what it can be understood.
func takeGrant(t *table) grants.Grant {
	g := grants.Grant{Place: t.place}
	var unclear grants.Kinds
	g.Caller, unclear = takeCaller(t)
	g.Identity, _ = t.text("identity", "device")
	var whole bool
	g.Resources, whole = t.texts("resources", "https://vault.azure.net")
	g.Prefetch, _ = t.flag("prefetch")
	t.finish()
	if g.Fault = t.why(); g.Fault != "" {
		g.Unclear, g.AnyResource = unclear, !whole || len(t.unknown) > 0 // an unknown key may name resources
	}
	return g
}

// takeCaller reads the caller of a grant. unclear is which kinds of caller it may be instead, where it has a fault.
func takeCaller(t *table) (m grants.Match, unclear grants.Kinds) {
	caller := t.inside("caller", `{ unit = "camera.service" }`)
	if caller == nil {
		return m, grants.AllKinds
	}
	m.Module, _ = caller.filled("module", "camera")
	if unit, written := caller.filled("unit", "camera.service"); written {
		m.Unit = grants.UnitName(unit)
	}
	m.Image, _ = caller.filled("container_image", "sha256:…")
	m.UID, m.User = takeAccount(caller, "uid", "user", uidOf)
	m.GID, m.Group = takeAccount(caller, "gid", "group", gidOf)
	caller.finish()
	t.addInside(caller)
	for key, kind := range map[string]grants.Kinds{
		"module": grants.Modules, "unit": grants.Units, "container_image": grants.Images,
		"user": grants.Users, "uid": grants.Users, "group": grants.Groups, "gid": grants.Groups,
	} {
		if caller.has(key) {
			unclear |= kind
		}
	}
	switch {
	case len(caller.unknown) > 0 || unclear == 0:
		return grants.Match{}, grants.AllKinds
	case len(caller.faults) > 0:
		return grants.Match{}, unclear
	case m.Check() != nil: // which the rules name
		return m, unclear
	}
	return m, 0
}

// takeAccount reads a user or group by its number or its name.
func takeAccount(caller *table, number, name string, find func(string) (uint32, error)) (*uint32, string) {
	written, isNumber := caller.whole(number, 0, math.MaxUint32-1)
	called, isName := caller.filled(name, "root")
	switch id := uint32(written); {
	case isName && caller.has(number):
		caller.addFault(name, "%v", grants.Match{}.Check()) // exactly one
	case isName:
		id, err := find(called)
		if err != nil {
			caller.addFault(name, "%v", err)
			return nil, called
		}
		return &id, called
	case isNumber:
		return &id, ""
	}
	return nil, ""
}

// takeResource reads a [[resource]] into the alternates.
func takeResource(t *table, r *grants.Rules) {
	uri, named := t.text("uri", "https://vault.azure.net")
	alternates, whole := t.texts("alternates", "https://vault.azure.net")
	t.finish()
	understood := named && whole && !slices.ContainsFunc(append([]string{uri}, alternates...), isFaultyResource)
	if err := grants.CheckAlternates(uri, alternates); err != nil && len(t.faults) == 0 {
		t.addFault("", "%v", err)
	}
	sound, twice := r.Alternates[uri]
	if _, idle := r.IdleAlternates[uri]; (twice || idle) && len(t.faults) == 0 {
		t.addFault("", "resource %s is there twice", uri)
		r.AnyAlternate = true // one of the two may be meant for another
	}
	if twice {
		r.IdleAlternates = withAlternates(r.IdleAlternates, uri, sound)
		delete(r.Alternates, uri)
	}
	switch {
	case len(t.faults) == 0:
		r.Alternates = withAlternates(r.Alternates, uri, alternates)
	case understood:
		r.AnyAlternate = r.AnyAlternate || len(t.unknown) > 0 // which may name others
		r.IdleAlternates = withAlternates(r.IdleAlternates, uri, alternates)
	default:
		r.AnyAlternate = true
	}
}

func isFaultyResource(uri string) bool {
	return grants.CheckResource(uri) != nil || grants.TrimScope(uri) != uri
}

func withAlternates(all map[string][]string, uri string, alternates []string) map[string][]string {
	if all == nil {
		all = make(map[string][]string)
	}
	all[uri] = append(all[uri], alternates...)
	return all
}

// What becomes of tokens from before when the record of policy changes is lost.
const (
	serveLost    = "serve" // as uncertain
	withholdLost = "withhold"
)

// The values of [tokens] that hand out the least.
const (
	strictSDKLife = 20 * time.Minute
	strictSpread  = 24 * time.Hour
)

// takeTokens reads a [tokens]. What has a fault, or may be meant by an unknown key, takes the stricter value.
func takeTokens(t *table, r *agent.Rules) {
	const any = math.MaxInt64 // the rules know the bounds
	life, isLife := t.duration("sdk_life", -any, any)
	spread, isSpread := t.duration("spread", -any, any)
	lost, isLost := t.text("lost_record", withholdLost)
	if isLost && lost != serveLost && lost != withholdLost {
		t.addFault("lost_record", "tokens.lost_record is %q: it must be %q or %q", lost, serveLost, withholdLost)
	}
	t.finish()
	switch {
	case isLife && !t.misnamed:
		r.SDKLife = life
	case t.mayMean("sdk_life"):
		r.SDKLife = strictSDKLife
	}
	switch {
	case isSpread && !t.misnamed:
		r.Spread = cmp.Or(spread, noSpread)
	case t.mayMean("spread"):
		r.Spread = strictSpread
	}
	switch {
	case t.isSound("lost_record"):
		r.WithholdLost = lost == withholdLost
	case t.mayMean("lost_record"):
		r.WithholdLost = true
	}
}

// noSpread is what stands for no spread at all where zero stands for the default.
const noSpread = time.Nanosecond

// why is every fault of t, as its element is said to have; empty: it has none.
func (t *table) why() string {
	var all []string
	for i, fault := range t.faults {
		if i == 0 || !t.misnamed {
			all = append(all, fault.text)
		}
	}
	return strings.Join(all, "; ")
}

// mayMean reports whether t sets a key wrongly, or may mean to set it: by a key that is not known.
func (t *table) mayMean(key string) bool {
	return !t.isSound(key) && (t.has(key) || len(t.unknown) > 0 || t.keys == nil || t.misnamed)
}
