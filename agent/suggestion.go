package agent

import (
	"os/user"
	"strconv"
	"strings"

	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// maxSuggested bounds what a suggestion repeats of the configuration, in bytes.
const maxSuggested = 4 << 10

// SuggestionOf returns a suggestion for people and programs; nil: there is nothing to suggest. Callers are not told in
// which folder the configuration is.
func SuggestionOf(s *grants.Suggestion, toCaller bool) *api.Suggestion {
	if s == nil || s.Why != "" {
		return nil
	}
	suggestion := &api.Suggestion{Repeats: s.Repeats}
	if s.AddTo != nil {
		suggestion.AddTo = &api.GrantPlace{Number: s.AddTo.Index + 1, Place: placeFor(s.AddTo.Place, toCaller)}
	}
	var parts, commands []string
	for _, grant := range s.Grants {
		g := api.NewGrant{Caller: grantCallerOf(grant.Caller), Identity: grant.Identity, Resources: grant.Resources}
		suggestion.Grants = append(suggestion.Grants, g)
		parts, commands = append(parts, g.TOML()), append(commands, g.Command())
	}
	suggestion.TOML = strings.Join(parts, "\n")
	if len(suggestion.TOML) > maxSuggested {
		return nil
	}
	suggestion.Command = strings.Join(commands, " && sudo ") // people run the first with sudo too
	return suggestion
}

// NearMissOf returns a near miss for people and programs; nil: there is none. Callers are not told in which folder the
// configuration is, and n is of a grant that decides about them.
func NearMissOf(n *grants.NearMiss, toCaller bool) *api.NearMiss {
	if n == nil {
		return nil
	}
	near := &api.NearMiss{
		Grant: n.Index + 1, Place: placeFor(n.Place, toCaller), Caller: n.Caller.String(), Spelling: n.Spelling,
		Differs: n.Differs, Usual: n.Usual, Advice: n.ForAdministrator(),
	}
	if toCaller {
		near.Advice = n.ForCaller()
	}
	return near
}

func placeFor(place string, toCaller bool) string {
	if toCaller {
		return grants.WithoutFolder(place)
	}
	return place
}

// grantCallerOf returns whom a grant is for as the configuration names it: users and groups by name, where they have
// one on this device.
func grantCallerOf(m grants.Match) api.GrantCaller {
	c := api.GrantCaller{Module: m.Module, Unit: m.Unit, Image: m.Image}
	switch {
	case m.UID != nil:
		name := m.User
		if account, err := user.LookupId(strconv.FormatUint(uint64(*m.UID), 10)); name == "" && err == nil {
			name = account.Username
		}
		c.User, c.UID = nameOrID(name, m.UID)
	case m.GID != nil:
		name := m.Group
		if group, err := user.LookupGroupId(strconv.FormatUint(uint64(*m.GID), 10)); name == "" && err == nil {
			name = group.Name
		}
		c.Group, c.GID = nameOrID(name, m.GID)
	}
	return c
}

// nameOrID returns the name of a user or group, or its ID where it has no name, or one of digits alone: perceptctl
// takes digits for an ID, which may be that of another.
func nameOrID(name string, id *uint32) (string, *uint32) {
	if strings.Trim(name, "0123456789") == "" {
		return "", id
	}
	return name, nil
}
