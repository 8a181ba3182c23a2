package config

import (
	"errors"
	"fmt"
	"strings"
)

// Idle is an element of the configuration that has a fault, and gives nothing while the rest is in force.
type Idle struct {
	Place   string // "FILE:LINE" of its first fault
	Element string // "grant 2", "[callers]"
	Why     string // every fault of it, in words
}

func (i Idle) String() string { return fmt.Sprintf("%s (%s): %s", i.Element, i.Place, i.Why) }

// maxNamed is how many faults, or elements with one, are named: a person mends those first.
const maxNamed = 100

// faults are all faults of a configuration, in the order in which they were found.
type faults struct {
	all      []fault
	known    map[fault]bool
	elements map[string]bool // that have one
}

func (f *faults) add(place, element, text string) {
	f.addFault(fault{place: place, element: element, text: text})
}

func (f *faults) addFault(one fault) {
	if f.known[one] {
		return
	}
	if f.known == nil {
		f.known, f.elements = make(map[fault]bool), make(map[string]bool)
	}
	f.all, f.known[one], f.elements[one.element] = append(f.all, one), true, true
}

// has reports whether an element has a fault.
func (f *faults) has(element string) bool { return f.elements[element] }

// err names the faults, each in a line of its own; nil: there is none. Without isWhole some files were not read: then
// those that may come of that are left out.
func (f *faults) err(isWhole bool) error {
	var lines []error
	further := 0
	for _, one := range f.all {
		switch {
		case one.isOfAll && !isWhole:
			continue
		case len(lines) == maxNamed:
			further++
			continue
		case one.isBare:
			one.text = one.element + ": " + one.text
		}
		lines = append(lines, fmt.Errorf("%s: %s", one.place, one.text))
	}
	if further > 0 {
		lines = append(lines, fmt.Errorf("and %d further faults: mend these first", further))
	}
	return errors.Join(lines...)
}

// idle returns every element that has a fault, with its faults.
func (f *faults) idle() []Idle {
	var elements []Idle
	why := make(map[string][]string)
	for _, one := range f.all {
		if why[one.element] == nil {
			elements = append(elements, Idle{Place: one.place, Element: one.element})
		}
		if len(why[one.element]) <= maxNamed {
			why[one.element] = append(why[one.element], one.text)
		}
	}
	for i, e := range elements {
		elements[i].Why = strings.Join(why[e.Element], "; ")
	}
	return elements
}

// named returns the first of the idle elements, and how many more there are.
func named(all []Idle) []Idle {
	if len(all) <= maxNamed {
		return all
	}
	further := Idle{
		Place: all[maxNamed].Place, Element: fmt.Sprintf("each of %d further elements", len(all)-maxNamed),
		Why: "it has a fault: mend those that are named first",
	}
	return append(all[:maxNamed:maxNamed], further)
}
