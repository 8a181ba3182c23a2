// Package deny takes tokens away from callers, whatever the grants allow: deny rules, who set them, and the record that
// keeps them. The package is pure: it compares values, and neither reads nor writes anything.
package deny

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"perceptd/agent/grants"
	"perceptd/tokencache"
)

// Rule is a deny rule on record.
type Rule struct {
	ID string `json:"id"`
	Target
	Origin Origin    `json:"origin"`
	Note   string    `json:"note,omitempty"`
	Since  time.Time `json:"since"`          // when this device took it
	By     string    `json:"by,omitempty"`   // who set it
	Hub    string    `json:"hub,omitempty"`  // with Twin and Method: this device's identity at the hub that set it
	Twin   int64     `json:"twin,omitempty"` // with Twin: the version of the desired properties that set it
}

// Target says which tokens a rule denies: those for which all holds that it names. It names at least one thing.
type Target struct {
	All      bool   `json:"all,omitempty"`      // every token of every caller; then it names nothing else
	Module   string `json:"module,omitempty"`   // configured name of the calling module
	Unit     string `json:"unit,omitempty"`     // the caller's systemd service
	User     string `json:"user,omitempty"`     // the caller's user, by name or uid
	Identity string `json:"identity,omitempty"` // configured name of the identity
	Resource string `json:"resource,omitempty"` // the resource, in any spelling
}

const maxName = 256 // bytes of a user's name

// Check returns what is wrong with what t names, or nil. It looks nothing up: what is not configured is not wrong.
func (t Target) Check() error {
	plain := t
	plain.All = false
	switch {
	case t == Target{}:
		return errors.New("it names nothing: name a module, unit, user, identity or resource, or all")
	case t.All && plain != Target{}:
		return errors.New("it is for all, and names something besides: do one of the two")
	}
	if t.Module != "" {
		if err := (grants.Match{Module: t.Module}).Check(); err != nil {
			return err
		}
	}
	if t.Unit != "" {
		if err := (grants.Match{Unit: grants.UnitName(t.Unit)}).Check(); err != nil {
			return err
		}
	}
	if err := checkUser(t.User); err != nil {
		return err
	}
	if t.Identity != "" && !grants.IsName(t.Identity) {
		return fmt.Errorf("identity name %.64q: letters, digits, dot, dash and underscore, at most 63", t.Identity)
	}
	if t.Resource != "" {
		return grants.CheckResource(grants.TrimScope(t.Resource))
	}
	return nil
}

func checkUser(name string) error {
	isOdd := func(r rune) bool { return !unicode.IsPrint(r) || r == ':' || unicode.IsSpace(r) }
	switch {
	case len(name) > maxName:
		return fmt.Errorf("the user's name is %d bytes long, more than %d", len(name), maxName)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, isOdd):
		return fmt.Errorf("user %q has a character that no user's name has", name)
	case isNumber(name):
		if _, ok := uidOf(name); !ok {
			return fmt.Errorf("user %s is no uid", name)
		}
	}
	return nil
}

func isNumber(text string) bool {
	return text != "" && !strings.ContainsFunc(text, func(r rune) bool { return r < '0' || r > '9' })
}

// uidOf returns the uid that a number is, if it is one.
func uidOf(number string) (uint32, bool) {
	id, err := strconv.ParseUint(number, 10, 32)
	return uint32(id), err == nil && uint32(id) != grants.NoID
}

// String names what a rule denies: "module vision, identity device for https://vault.azure.net", "everything".
func (t Target) String() string {
	if t.All {
		return "everything"
	}
	var parts []string
	for _, named := range []struct{ kind, name string }{
		{"module", t.Module}, {"unit", t.Unit}, {"user", t.User}, {"identity", t.Identity},
	} {
		if named.name != "" {
			parts = append(parts, named.kind+" "+named.name)
		}
	}
	switch text := strings.Join(parts, ", "); {
	case t.Resource == "":
		return text
	case text == "":
		return "resource " + t.Resource
	default:
		return text + " for " + t.Resource
	}
}

// IsForResource reports whether t is about tokens for resource, as far as that goes: it names none, or names resource
// in any spelling. names are the canonical forms of all that goes by the name of the one that t names; with none,
// nothing else does.
func (t Target) IsForResource(resource string, names []string) bool {
	if t.Resource == "" {
		return true
	}
	canonical := tokencache.Canonical(grants.TrimScope(resource))
	return canonical == tokencache.Canonical(grants.TrimScope(t.Resource)) || slices.Contains(names, canonical)
}

// namesCaller reports whether t is about some callers only.
func (t Target) namesCaller() bool { return t.Module != "" || t.Unit != "" || t.User != "" }

// Origin is who set a rule, and so who lifts it.
type Origin string

const (
	Local  Origin = "local"  // a person on the device
	Twin   Origin = "twin"   // the desired properties of the IoT Hub twin
	Method Origin = "method" // a direct method from IoT Hub
)

// Side is who sets rules, and lifts those that it has set.
type Side struct {
	Origin Origin
	Hub    string // of Twin and Method: this device's identity at the hub
}
