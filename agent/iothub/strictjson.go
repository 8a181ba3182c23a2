package iothub

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// fault is what is wrong in a document, and where in it. It shows no values, and of the keys those that look like one.
type fault struct{ path, says string }

func (f *fault) Error() string { return f.path + ": " + f.says }

// faults are what is wrong in a document, what matters most first.
type faults []error

func (f faults) Error() string {
	switch others := len(f) - 1; others {
	case 0:
		return f[0].Error()
	case 1:
		return f[0].Error() + "; and 1 fault besides"
	default:
		return fmt.Sprintf("%v; and %d faults besides", f[0], others)
	}
}

// entry is an object in a list, as its members are read. err is the first thing that is wrong with it.
type entry struct {
	path    string
	members map[string]json.RawMessage
	err     error
}

// openEntry begins to read an object that has none but these keys.
func openEntry(value json.RawMessage, path string, keys ...string) *entry {
	members, err := onlyMembers(value, path, keys...)
	return &entry{path, members, err}
}

// text reads a member that is a text. Empty: there is none.
func (e *entry) text(key string) (text string) {
	value, there := e.members[key]
	switch {
	case !there:
		return ""
	case value[0] != '"':
		e.fail(key, "it is "+kindOf(value)+", and must be a text")
	case !utf8.Valid(value):
		e.fail(key, "it is not UTF-8")
	case json.Unmarshal(value, &text) != nil:
		e.fail(key, "it is no JSON")
	case text == "" && key != "note":
		e.fail(key, "it is empty: leave it out, or write something")
	}
	return text
}

// truth reads a member that is true or false. False: there is none.
func (e *entry) truth(key string) bool {
	value, there := e.members[key]
	if there && value[0] != 't' && value[0] != 'f' {
		e.fail(key, "it is "+kindOf(value)+", and must be true or false")
	}
	return there && value[0] == 't'
}

// fail notes what is wrong with a member, or with the whole where key is empty, unless something is already.
func (e *entry) fail(key, says string) {
	if e.err != nil {
		return
	}
	path := e.path
	if key != "" {
		path = below(path, key)
	}
	e.err = &fault{path, says}
}

// onlyMembers returns the members of an object that has none but these keys, each once.
func onlyMembers(value json.RawMessage, path string, keys ...string) (map[string]json.RawMessage, error) {
	all, twice, err := membersOf(value, path)
	if err != nil {
		return nil, err
	}
	if wrong := wrongKeys(all, twice, path, keys...); len(wrong) > 0 {
		return nil, wrong[0]
	}
	return all, nil
}

// wrongKeys returns which members are none of these keys, and which keys are there twice.
func wrongKeys(all map[string]json.RawMessage, twice []string, path string, keys ...string) (wrong faults) {
	last := len(keys) - 1
	says := fmt.Sprintf("there is no such key: it is one of %s and %s", strings.Join(keys[:last], ", "), keys[last])
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains(keys, key) {
			wrong = append(wrong, &fault{below(path, key), says})
		}
	}
	for _, key := range twice {
		wrong = append(wrong, &fault{below(path, key), "it is there twice"})
	}
	return wrong
}

// membersOf returns the members of a JSON object by their keys, which are taken as they are written, in no other case.
// Of a key that is there twice it returns the first, and the key in twice. The error says that value is no object. It
// is valid JSON, without white space around it.
func membersOf(value json.RawMessage, path string) (all map[string]json.RawMessage, twice []string, err error) {
	if value[0] != '{' {
		return nil, nil, &fault{path, "it is " + kindOf(value) + ", and must be an object"}
	}
	d := json.NewDecoder(bytes.NewReader(value))
	_, _ = d.Token() // the brace
	all = make(map[string]json.RawMessage)
	for d.More() {
		key, err := d.Token()
		var member json.RawMessage
		if err == nil {
			err = d.Decode(&member)
		}
		if err != nil {
			return nil, nil, &fault{path, "it is no JSON"}
		}
		name := key.(string)
		if _, known := all[name]; known {
			twice = append(twice, name)
		} else {
			all[name] = member
		}
	}
	return all, twice, nil
}

// elementsOf returns the elements of a JSON list. The error says that it is none.
func elementsOf(value json.RawMessage, path string) (all []json.RawMessage, err error) {
	if value[0] != '[' {
		return nil, &fault{path, "it is " + kindOf(value) + ", and must be a list"}
	}
	if json.Unmarshal(value, &all) != nil {
		return nil, &fault{path, "it is no JSON"}
	}
	return all, nil
}

var keyForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,32}$`)

// below returns the path of a member. Of a key that looks like none it shows nothing: somebody may have pasted a secret
// in its place.
func below(path, key string) string {
	if !keyForm.MatchString(key) {
		return path + ".…"
	}
	return path + "." + key
}

// kinds are what JSON values are, for people, by their first byte. What is not here is a number.
var kinds = map[byte]string{
	'{': "an object", '[': "a list", '"': "a text", 't': "true", 'f': "false", 'n': "null",
}

func kindOf(value json.RawMessage) string {
	if kind, known := kinds[value[0]]; known {
		return kind
	}
	return "a number"
}
