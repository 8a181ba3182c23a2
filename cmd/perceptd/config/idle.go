package config

import (
	"errors"
	"fmt"
	"slices"
)

// Idle is an element of the configuration that has a fault, and gives nothing while the rest is in force.
type Idle struct {
	Place   string // "FILE:LINE" of its first fault
	Element string // "grant 2", "[callers]"
	Why     string // every fault of it, in words
}

func (i Idle) String() string { return fmt.Sprintf("%s (%s): %s", i.Element, i.Place, i.Why) }

// faults are all faults of a configuration, in the order in which they were found.
type faults []fault

func (all *faults) add(place, element, text string) {
	all.addFault(fault{place: place, element: element, text: text})
}

func (all *faults) addFault(f fault) {
	if !slices.Contains(*all, f) {
		*all = append(*all, f)
	}
}

// has reports whether an element has a fault.
func (all faults) has(element string) bool {
	return slices.ContainsFunc(all, func(f fault) bool { return f.element == element })
}

// err names every fault in a line of its own; nil: there is none. Without isWhole some files were not read: then the
// faults that may come of that are left out.
func (all faults) err(isWhole bool) error {
	var lines []error
	for _, f := range all {
		if f.isOfAll && !isWhole {
			continue
		}
		if f.isBare {
			f.text = f.element + ": " + f.text
		}
		lines = append(lines, fmt.Errorf("%s: %s", f.place, f.text))
	}
	return errors.Join(lines...)
}

// idle returns every element that has a fault, with all of its faults.
func (all faults) idle() []Idle {
	var elements []Idle
	for _, f := range all {
		i := slices.IndexFunc(elements, func(e Idle) bool { return e.Element == f.element })
		if i < 0 {
			elements = append(elements, Idle{Place: f.place, Element: f.element, Why: f.text})
			continue
		}
		elements[i].Why += "; " + f.text
	}
	return elements
}
