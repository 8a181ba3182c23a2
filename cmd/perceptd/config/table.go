package config

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// table is one table of a configuration file while it is read: a key is asked for by its type, and what is not of that
// type, or never asked for, is a fault.
type table struct {
	file    *written
	path    string
	kind    string // "grant", or "grant.caller"
	place   string // "FILE:LINE"
	keys    map[string]any
	many    bool // there may be several of its kind
	asked   []string
	wrong   map[string]bool // keys with a fault
	unknown []string
	faults  []fault

	// misnamed is true for a table whose name is not known, which may be meant to be of this kind.
	misnamed bool
}

// fault is one fault of an element.
type fault struct {
	place, element, text string

	isBare  bool // the text does not say of which element
	isOfAll bool // it is of what all files say, so that one that is not read may be the reason
}

// tablesOf returns the tables of a kind. What does not have the form of such a table is one with a fault.
func (w *written) tablesOf(kind tableKind) []*table {
	value, there := w.keys[kind.name]
	list, isList := value.([]any)
	switch {
	case !there:
		return nil
	case kind.many && isList:
		all := w.tablesIn(kind, list)
		for i, t := range all {
			if t.keys == nil {
				t.addBare("", "it must be a table, below %s, and is %s", kind.inBrackets(), inWords(list[i]))
			}
		}
		return all
	}
	t := w.tableAt(kind, kind.name, value)
	switch {
	case kind.many:
		t.addBare("", "write it with two brackets, %s: there may be several", kind.inBrackets())
	case t.keys == nil:
		t.addFault("", "%s must be a table with one bracket, and is %s", kind.inBrackets(), inWords(value))
	}
	return []*table{t}
}

// unknown returns what stands below a name that is not known.
func (w *written) unknown(name string) []*table {
	kind := tableKind{name: name}
	if list, isList := w.keys[name].([]any); isList && len(list) > 0 {
		return w.tablesIn(kind, list)
	}
	return []*table{w.tableAt(kind, name, w.keys[name])}
}

func (w *written) tablesIn(kind tableKind, list []any) (all []*table) {
	for i, value := range list {
		all = append(all, w.tableAt(kind, below(kind.name, strconv.Itoa(i)), value))
	}
	return all
}

func (w *written) tableAt(kind tableKind, path string, value any) *table {
	keys, _ := value.(map[string]any)
	return &table{file: w, path: path, kind: kind.name, many: kind.many, place: w.place(path), keys: keys}
}

func (t *table) at(key string) string {
	if key == "" {
		return t.place
	}
	return t.file.place(below(t.path, key))
}

// named is how people are told of a key.
func (t *table) named(key string) string {
	if _, inside, isInside := strings.Cut(t.kind, "."); isInside {
		return inside + "." + key
	}
	if t.many {
		return key
	}
	return t.kind + "." + key
}

// addFault notes a fault of a key; empty: of the table.
func (t *table) addFault(key, format string, values ...any) {
	t.addWrong(key)
	switch n := len(t.faults); {
	case n < maxNamed:
		t.faults = append(t.faults, fault{place: t.at(key), text: fmt.Sprintf(format, values...)})
	case n == maxNamed:
		t.faults = append(t.faults, fault{place: t.at(key), text: "there are further faults: mend these first"})
	}
}

// addBare is addFault with a text that does not say of which of several tables it is.
func (t *table) addBare(key, format string, values ...any) {
	t.addFault(key, format, values...)
	t.faults[len(t.faults)-1].isBare = t.many
}

func (t *table) addWrong(key string) {
	if t.wrong == nil {
		t.wrong = make(map[string]bool)
	}
	t.wrong[key] = true
}

// ask returns a key's value; nil: it has none.
func (t *table) ask(key string) any {
	if !slices.Contains(t.asked, key) {
		t.asked = append(t.asked, key)
	}
	return t.keys[key]
}

// has reports whether a key is written.
func (t *table) has(key string) bool { return t.keys[key] != nil }

// isSound reports whether a key is written and has no fault.
func (t *table) isSound(key string) bool {
	return t.has(key) && !t.wrong[key] && !t.misnamed
}

func (t *table) addWrongType(key, wanted string, value any) {
	t.addBare(key, "%s must be %s, and is %s", t.named(key), wanted, inWords(value))
}

// text returns a text; ok is false where there is none. such is one, for people.
func (t *table) text(key, such string) (text string, ok bool) {
	switch value := t.ask(key).(type) {
	case nil:
	case string:
		return value, true
	default:
		t.addWrongType(key, fmt.Sprintf("a text in quotes, such as %q", such), value)
	}
	return "", false
}

// filled is text for a key whose absence has a meaning of its own: one that is written and empty may have been meant
// for anything, as where a template's variable was not set.
func (t *table) filled(key, such string) (text string, ok bool) {
	if text, ok = t.text(key, such); ok && text == "" {
		t.addBare(key, "%s is empty: write a value, such as %q, or take the line out", t.named(key), such)
		return "", false
	}
	return text, ok
}

// texts returns a list of texts as far as it is one; whole is false where it is not all, and where there is none.
func (t *table) texts(key, such string) (texts []string, whole bool) {
	wanted := fmt.Sprintf("a list of texts, such as [%q]", such)
	switch value := t.ask(key).(type) {
	case nil:
		return nil, false
	case []any:
		whole = true
		for _, element := range value {
			text, isText := element.(string)
			if !isText {
				whole = false
				t.addBare(key, "%s must be %s, and %s is in it", t.named(key), wanted, inWords(element))
				continue
			}
			texts = append(texts, text)
		}
	default:
		t.addWrongType(key, wanted, value)
	}
	return texts, whole
}

// flag returns true or false; ok is false where there is neither.
func (t *table) flag(key string) (flag, ok bool) {
	switch value := t.ask(key).(type) {
	case nil:
	case bool:
		return value, true
	default:
		t.addWrongType(key, "true or false, without quotes", value)
	}
	return false, false
}

// whole returns a whole number between two others; ok is false where there is none.
func (t *table) whole(key string, low, high int64) (n int64, ok bool) {
	switch value := t.ask(key).(type) {
	case nil:
	case int64:
		if value >= low && value <= high {
			return value, true
		}
		t.addBare(key, "%s is %d: it must be between %d and %d", t.named(key), value, low, high)
	default:
		t.addWrongType(key, "a whole number, without quotes", value)
	}
	return 0, false
}

// number returns a number; ok is false where there is none.
func (t *table) number(key string) (n float64, ok bool) {
	switch value := t.ask(key).(type) {
	case nil:
	case int64:
		return float64(value), true
	case float64:
		return value, true
	default:
		t.addWrongType(key, "a number, without quotes", value)
	}
	return 0, false
}

// duration returns a duration between two others; ok is false where there is none. It is a text in TOML, whose numbers
// have no unit.
func (t *table) duration(key string, low, high time.Duration) (d time.Duration, ok bool) {
	value := t.ask(key)
	if value == nil {
		return 0, false
	}
	text, isText := value.(string)
	d, err := time.ParseDuration(text)
	switch {
	case err != nil && isText:
		t.addFault(key, "%s is %q: write a duration in quotes, such as \"50m\" or \"1h30m\"", t.named(key), text)
	case err != nil:
		t.addFault(key, "%s is %v: write a duration in quotes, such as \"50m\" or \"1h30m\"", t.named(key), value)
	case d < low || d > high:
		t.addFault(key, "%s is %v: it must be between %v and %v", t.named(key), d, low, high)
	default:
		return d, true
	}
	return 0, false
}

// inside returns the table that is a key's value; nil: there is none.
func (t *table) inside(key, such string) *table {
	value := t.ask(key)
	if value == nil {
		return nil
	}
	keys, isTable := value.(map[string]any)
	if !isTable {
		t.addWrongType(key, "a table, such as "+such, value)
		return nil
	}
	return &table{
		file: t.file, path: below(t.path, key), kind: t.kind + "." + key, place: t.at(key), keys: keys, many: t.many,
	}
}

// finish notes as faults the keys that were not asked for.
func (t *table) finish() {
	for _, key := range slices.Sorted(maps.Keys(t.keys)) {
		if !slices.Contains(t.asked, key) {
			t.unknown = append(t.unknown, key)
			t.addFault(key, "unknown key %s.%s: %s", t.kind, key, hint(t.kind, key))
		}
	}
}

// addInside takes over the faults of a table inside.
func (t *table) addInside(in *table) { t.faults = append(t.faults, in.faults...) }

// inWords says of what type a value is.
func inWords(value any) string {
	switch value.(type) {
	case string:
		return "a text"
	case bool:
		return "true or false"
	case int64, float64:
		return "a number"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}
