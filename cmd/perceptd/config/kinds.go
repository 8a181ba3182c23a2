package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// tableKind is one kind of table that a configuration has.
type tableKind struct {
	name string
	many bool // there may be several, each with two brackets
	keys []string
	has  string // for people, where it is not the keys
}

// tableKinds are all of them.
var tableKinds = []tableKind{
	{name: "source", keys: []string{"kind", "endpoint", "speed", "rollover", "spread"}},
	{name: "tokens", keys: []string{"sdk_life", "spread", "lost_record"}},
	{name: "callers", keys: []string{"engine", "cgroup_parents", "requests_per_second", "young"}},
	{name: "loopback", keys: []string{"address"}},
	{name: "iothub", keys: iothubKeys},
	{name: "identity", many: true, keys: []string{"name", "default", "client_id", "object_id", "resource_id"}},
	{name: "grant", many: true, keys: []string{"caller", "identity", "resources", "prefetch"},
		has: "caller (by module, unit, container_image, user, uid, group or gid), identity, resources and prefetch"},
	{name: "resource", many: true, keys: []string{"uri", "alternates"}},
	{name: "module", many: true, keys: []string{"name", "require", "container"}},
}

// inBrackets is how a table of that kind begins.
func (k tableKind) inBrackets() string {
	if k.many {
		return "[[" + k.name + "]]"
	}
	return "[" + k.name + "]"
}

// theTables says which tables there are.
func theTables() string {
	var all []string
	for _, kind := range tableKinds {
		all = append(all, kind.inBrackets())
	}
	return "the tables are " + listed(all)
}

// listed writes several as a sentence does.
func listed(all []string) string {
	last := len(all) - 1
	if last < 1 {
		return strings.Join(all, "")
	}
	return strings.Join(all[:last], ", ") + " and " + all[last]
}

// hint says what may be meant by an unknown key of a table, or of one inside of it.
func hint(kind, key string) string {
	name, _, _ := strings.Cut(kind, ".")
	if name == "iothub" {
		if secret := secretHint(key); secret != "" {
			return secret
		}
	}
	known := kindNamed(name)
	return known.inBrackets() + " has " + cmp.Or(known.has, listed(known.keys))
}

// secretHint says where the secret is kept that an unknown key of [iothub] seems to hold; empty: it seems to hold none.
func secretHint(key string) string {
	switch key {
	case "connection_string", "shared_access_key":
		return "a connection string is a secret, and this file is none: keep the secret in " + ownFile +
			", and name that as connection_string_file, or have systemd give it as a credential"
	case "proxy_password":
		return "a password is a secret, and this file is none: keep it in " + ownFile + ", and name that " +
			"as proxy_password_file"
	}
	return ""
}

// mayBe returns the kinds that a table of an unknown name may be meant to be: those with a name like it; or else those
// that have all of its keys; or else all. A value that is not in a table may belong to the kinds with such a key.
func mayBe(name string, keys []string) []tableKind {
	const slips = 2 // of the hand, in a name
	var alike []tableKind
	least := slips
	for _, kind := range tableKinds {
		switch d := distance(strings.ToLower(name), kind.name); {
		case d < least:
			least, alike = d, []tableKind{kind}
		case d == least:
			alike = append(alike, kind)
		}
	}
	if len(alike) > 0 {
		return alike
	}
	if len(keys) == 0 {
		keys = []string{name}
	}
	for _, kind := range tableKinds {
		if !slices.ContainsFunc(keys, func(key string) bool { return !slices.Contains(kind.keys, key) }) {
			alike = append(alike, kind)
		}
	}
	if len(alike) > 0 {
		return alike
	}
	return tableKinds
}

// distance counts the letters to put in, take out or change that make one word of another.
func distance(from, to string) int {
	row := make([]int, len(to)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(from) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(to) {
			changed := diagonal
			if from[i] != to[j] {
				changed++
			}
			diagonal = row[j+1]
			row[j+1] = min(changed, row[j]+1, diagonal+1)
		}
	}
	return row[len(to)]
}

// strayKeys are the keys by which a table is known whose header is missing, so that they stand in the table before it.
var strayKeys = map[string]string{
	"caller": "grant", "resources": "grant", "identity": "grant", "engine": "callers", "cgroup_parents": "callers",
	"young": "callers", "kind": "source", "endpoint": "source", "require": "module", "container": "module",
	"uri": "resource", "alternates": "resource", "sdk_life": "tokens", "spread": "tokens", "lost_record": "tokens",
}

func kindNamed(name string) tableKind {
	i := slices.IndexFunc(tableKinds, func(kind tableKind) bool { return kind.name == name })
	return tableKinds[i]
}

// unknownTable is the fault of a table whose name is not known.
func unknownTable(name string) string { return fmt.Sprintf("unknown key %s: %s", name, theTables()) }
