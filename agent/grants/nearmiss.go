package grants

import (
	"fmt"
	"path/filepath"
	"slices"
)

// NearMiss is a resource that a grant names and that differs from the one asked for in its spelling alone. The back end
// takes every spelling for a resource of its own, so that the grant does not allow it.
type NearMiss struct {
	Ref
	Spelling string   // as the grant has it
	Differs  []string // in what, as people say it: "the slash at the end"
	Decides  bool     // the grant is one that decides about the caller

	// Usual is which of the two Azure's documents and SDKs use, where they use one of them alone.
	Usual string
}

// ForCaller says what the caller can do about it, in a part of a sentence. It names no file's folder.
func (n *NearMiss) ForCaller() string {
	return n.says(n.base())
}

// base is String without the folder, which is not for callers.
func (r *Ref) base() string {
	short := *r
	short.Place = WithoutFolder(r.Place)
	return short.String()
}

// WithoutFolder returns the file and line of a place: where an administrator's files are is not for callers.
func WithoutFolder(place string) string {
	if place == "" {
		return ""
	}
	return filepath.Base(place)
}

// ForAdministrator is ForCaller with whom the grant is for, which callers are told of their own alone.
func (n *NearMiss) ForAdministrator() string {
	return n.says(fmt.Sprintf("%v for %v", &n.Ref, n.Caller))
}

func (n *NearMiss) says(grant string) string {
	text := fmt.Sprintf("%s names %s, which differs in %s alone: ", grant, n.Spelling, inWords(n.Differs))
	switch {
	case n.Usual == n.Spelling && n.Decides:
		return text + "ask for that one, which is Azure's own spelling"
	case n.Usual == n.Spelling:
		return text + "that one is Azure's own spelling"
	case n.Usual != "":
		return text + "have the one that was asked for granted, which is Azure's own spelling"
	case n.Decides:
		return text + "ask for that one, or have this one granted too, since Azure takes them for two resources"
	}
	return text + "Azure takes them for two resources"
}

// nearMiss returns the closest near miss of a request among the grants that decide about the caller; nil: there is
// none. An administrator may see those of others too, which come second.
func (a *Authorizer) nearMiss(caller *Caller, r Request, ofOthers bool) *NearMiss {
	var room [4]Subject
	deciding, _ := a.deciding(caller, room[:0])
	asked := partsOf(r.Resource)
	var best *NearMiss
	for i := range a.rules.Grants {
		grant := &a.rules.Grants[i]
		if grant.Fault != "" {
			continue
		}
		decides := slices.Contains(deciding, grant.Caller.Subject())
		if !decides && !ofOthers || r.NamesIdentity() && !r.Names(a.Named(grant.Identity)) {
			continue
		}
		for _, resource := range grant.Resources {
			differs := asked.differences(partsOf(resource))
			if len(differs) == 0 || best != nil && !decides && best.Decides ||
				best != nil && decides == best.Decides && len(differs) >= len(best.Differs) {
				continue
			}
			best = &NearMiss{
				Ref: *a.Ref(i), Spelling: resource, Differs: differs, Decides: decides,
				Usual: usualOf(r.Resource, resource),
			}
		}
	}
	return best
}

// usualOf returns the one of two spellings that is Azure's own, where the other is not.
func usualOf(one, other string) string {
	first, second := UnusualSpelling(one), UnusualSpelling(other)
	switch {
	case first == "" && second != "":
		return one
	case first != "" && second == "":
		return other
	}
	return ""
}

// wrongSpelling says that a resource which is none was meant for one that is granted to the caller; or "".
func (a *Authorizer) wrongSpelling(caller *Caller, r Request) string {
	if near := a.nearMiss(caller, r, false); near != nil {
		return "; " + near.ForCaller()
	}
	return ""
}
