package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"perceptd/agent/grants"
)

// elements is a Config while it is put together, element by element. What an element with a fault comes to:
//
//   - An identity, a grant, alternates: idle in its place (grants.Rules).
//   - A module: it has no socket, and its container matches nothing else.
//   - [source]: there is no source. [loopback] and [iothub]: there is none.
//   - [callers] and [tokens]: a value with a fault, and each that an unknown key may mean, is the stricter one. A value
//     in a file that is read later counts all the same.
//
// A table whose name is not known counts as one with a fault of each kind that may be meant, and so do keys that stand
// in a table of another kind.
type elements struct {
	Config
	counts map[string]int    // kind → how many tables there were
	places map[string]string // "source.kind" → "FILE:LINE", where it was set last
	last   string            // the file read last

	modulePlaces map[string]string // name → where its [[module]] stands

	withoutLoopback, withoutIoTHub bool // since what is written has a fault

	// What may be identities and grants, and is written as something else.
	suspectedIdentities []grants.Identity
	suspectedGrants     []grants.Grant
}

func newElements(path string) *elements {
	return &elements{
		Config: Config{Source: defaultSource, Callers: defaultCallers}, last: path,
		counts: make(map[string]int), places: make(map[string]string), modulePlaces: make(map[string]string),
	}
}

// read takes over what a file says.
func (e *elements) read(w *written) {
	e.last = w.name
	for _, kind := range tableKinds {
		for _, t := range w.tablesOf(kind) {
			if !kind.many {
				e.note(t)
			}
			e.take(t)
			e.takeFaults(t)
		}
	}
	for _, name := range w.top {
		if slices.ContainsFunc(tableKinds, func(kind tableKind) bool { return kind.name == name }) {
			continue
		}
		for _, t := range w.unknown(name) {
			e.faults.add(t.place, "["+name+"]", unknownTable(name))
			for _, kind := range mayBe(name, slices.Collect(maps.Keys(t.keys))) {
				e.suspect(t, kind, unknownTable(name))
			}
		}
	}
}

// note notes where the values of a table stand that there is one of.
func (e *elements) note(t *table) {
	e.places[t.kind] = t.place
	for key := range t.keys {
		e.places[t.kind+"."+key] = t.at(key)
	}
}

// take takes over a table.
func (e *elements) take(t *table) {
	switch t.kind {
	case "source":
		e.Source.take(t)
	case "tokens":
		takeTokens(t, &e.Rules)
	case "callers":
		e.Callers.take(t)
	case "loopback":
		e.Loopback.take(t)
	case "iothub":
		e.IoTHub.take(t)
	case "identity":
		to := &e.Rules.Identities
		if t.misnamed {
			to = &e.suspectedIdentities
		}
		*to = append(*to, takeIdentity(t))
	case "grant":
		to := &e.Rules.Grants
		if t.misnamed {
			to = &e.suspectedGrants
		}
		*to = append(*to, takeGrant(t))
	case "resource":
		takeResource(t, &e.Rules.Rules)
	case "module":
		e.modulePlaces[e.Callers.takeModule(t)] = t.place
	}
}

// takeFaults takes over the faults of a table, and looks whether its unknown keys are those of a table of another kind.
func (e *elements) takeFaults(t *table) {
	element := "[" + t.kind + "]"
	if t.many {
		e.counts[t.kind]++
		element = fmt.Sprintf("%s %d", t.kind, e.counts[t.kind])
	}
	for _, f := range t.faults {
		f.element = element
		e.faults.addFault(f)
	}
	stray := make(map[string]map[string]any) // kind → keys of it
	for _, key := range t.unknown {
		if kind := strayKeys[key]; kind != "" && kind != t.kind && stray[kind] == nil {
			stray[kind] = make(map[string]any)
		}
	}
	for _, kind := range tableKinds {
		if keys := stray[kind.name]; keys != nil {
			for _, key := range t.unknown {
				keys[key] = t.keys[key]
			}
			part := *t
			part.keys = keys
			e.suspect(&part, kind, t.why())
		}
	}
}

// suspect has a table count as one with a fault of a kind that it may be meant to be.
func (e *elements) suspect(t *table, kind tableKind, why string) {
	switch kind.name {
	case "source":
		e.Source.Fault = why
		return
	case "loopback":
		e.withoutLoopback = true
		return
	case "iothub":
		e.withoutIoTHub = true
		return
	}
	meant := &table{
		file: t.file, path: t.path, kind: kind.name, many: kind.many, place: t.place, keys: t.keys, misnamed: true,
	}
	meant.addFault("", "%s", why)
	e.take(meant)
}

// settle looks at what all files together say, and returns what is in force of it.
func (e *elements) settle() Config {
	e.settleTables()
	e.settleUnprovable()
	if m := &e.Callers; len(m.idleContainers) > 0 || m.anyContainerIdle {
		e.Rules.IdleContainers, e.Rules.AnyContainerIdle = m.idleContainers, m.anyContainerIdle
	}
	for i := range e.Rules.Grants {
		grant := &e.Rules.Grants[i]
		if name := grant.Caller.Module; name != "" && grant.Fault == "" && e.Callers.isIdle(name) {
			grant.Fault = fmt.Sprintf("the [[module]] of module %q is faulty, or one that may be its", name)
		}
	}
	e.Rules.Grants = append(e.Rules.Grants, e.suspectedGrants...)
	e.Rules.Identities = append(e.Rules.Identities, e.suspectedIdentities...)
	e.settleRules()
	e.Idle = e.faults.idle()
	for i, grant := range e.Rules.Grants[:len(e.Rules.Grants)-len(e.suspectedGrants)] {
		if element := fmt.Sprintf("grant %d", i+1); grant.Fault != "" && !e.faults.has(element) {
			e.Idle = append(e.Idle, Idle{Place: grant.Place, Element: element, Why: grant.Fault})
		}
	}
	e.Idle = named(e.Idle)
	return e.Config
}

// settleTables looks at the tables that there is one of. What has a fault is off.
func (e *elements) settleTables() {
	if key, err := e.Source.validate(); err != nil {
		e.faults.add(e.place(key), "[source]", err.Error())
	}
	if _, there := e.places["loopback"]; there && !e.faults.has("[loopback]") {
		if key, err := e.Loopback.validate(there); err != nil {
			e.faults.add(e.place(key), "[loopback]", err.Error())
		}
	}
	if _, there := e.places["iothub"]; there && !e.faults.has("[iothub]") {
		if key, err := e.IoTHub.validate(there); err != nil {
			e.faults.add(e.place(key), "[iothub]", err.Error())
		}
	}
	for _, idle := range e.faults.idle() {
		switch idle.Element {
		case "[source]":
			e.Source.Fault = idle.Why
		case "[loopback]":
			e.withoutLoopback = true
		case "[iothub]":
			e.withoutIoTHub = true
		}
	}
	if e.Source.Fault != "" && e.Source.Kind != Simulated {
		e.Source.Kind = ManagedIdentity
	}
	if e.withoutLoopback {
		e.Loopback = Loopback{}
	}
	if e.withoutIoTHub {
		e.IoTHub = IoTHub{}
	}
}

// place returns where a single value was set, or where the reading ended: it is set nowhere.
func (e *elements) place(key string) string {
	if place, known := e.places[key]; known {
		return place
	}
	return e.last
}

// settleUnprovable finds what no caller can ever be proved to be, where no engine is asked.
func (e *elements) settleUnprovable() {
	if e.Callers.engine != engineNone || e.Callers.engineFault {
		return
	}
	const none = `with callers.engine = "none" nobody can tell`
	seen := make(map[string]bool)
	for _, m := range slices.Clone(e.Callers.modules) {
		seen[m.name] = true
		if fault := m.unprovable(none); fault != nil {
			e.faults.add(e.modulePlaces[m.name], fmt.Sprintf("module %q", m.name), fault.Error())
			e.Callers.setIdle(m)
		}
	}
	for i := range e.Rules.Grants {
		grant := &e.Rules.Grants[i]
		var fault error
		switch name := grant.Caller.Module; {
		case grant.Fault != "":
		case grant.Caller.Image != "":
			fault = fmt.Errorf("%s which image a container was made of: name an engine, or the module by its socket",
				none)
		case name != "" && !seen[name] && !e.Callers.isIdle(name):
			fault = module{name: name}.unprovable(none)
			e.Callers.setIdle(module{name: name})
		}
		if fault != nil {
			e.faults.add(grant.Place, fmt.Sprintf("grant %d", i+1), fault.Error())
			grant.Fault = fault.Error()
		}
	}
}

// settleRules puts the faults of the rules into the elements that have them.
func (e *elements) settleRules() {
	for _, err := range unwrap(e.Rules.Validate()) {
		rule, known := errors.AsType[*grants.RuleError](err)
		if !known {
			e.faults.addFault(fault{place: e.last, element: "configuration", text: err.Error(), isOfAll: true})
			continue
		}
		for _, index := range append([]int{rule.Index}, rule.With...) {
			place, element := e.ruleAt(rule.Kind, index)
			e.faults.addFault(fault{place: place, element: element, text: rule.Detail, isOfAll: true})
		}
	}
	e.addFurther()
	e.Rules = e.Rules.Settle()
}

func unwrap(err error) []error {
	many, isMany := err.(interface{ Unwrap() []error })
	if !isMany {
		return nil
	}
	return many.Unwrap()
}

// addFurther finds what else is wrong with elements that have a fault already, as far as they are understood.
func (e *elements) addFurther() {
	const stand = "in-its-place"
	all := grants.Rules{
		Identities: append(slices.Clone(e.Rules.Identities), grants.Identity{Name: stand}),
		Grants:     slices.Clone(e.Rules.Grants),
	}
	for i := range all.Identities {
		all.Identities[i].Fault = ""
		all.Identities[i].Name = cmp.Or(all.Identities[i].Name, stand)
	}
	for i := range all.Grants {
		grant := &all.Grants[i]
		grant.Fault, grant.Identity = "", cmp.Or(grant.Identity, stand)
		if len(grant.Resources) == 0 {
			grant.Resources = []string{"api://" + stand}
		}
	}
	for _, err := range all.Faults() {
		rule, _ := errors.AsType[*grants.RuleError](err)
		place, element := e.ruleAt(rule.Kind, rule.Index)
		switch {
		case len(rule.With) > 0 || rule.IsMild || !e.faults.has(element):
		case rule.Kind == "grant" && rule.Detail == fmt.Sprint(all.Grants[rule.Index].Caller.Check()):
		default:
			e.faults.addFault(fault{place: place, element: element, text: rule.Detail, isOfAll: true})
		}
	}
}

// ruleAt returns where an element of the rules stands, and how people are told of it.
func (e *elements) ruleAt(kind string, index int) (place, element string) {
	element = fmt.Sprintf("%s %d", kind, index+1)
	switch {
	case kind == "identity" && index < len(e.Rules.Identities):
		return e.Rules.Identities[index].Place, element
	case kind == "grant" && index < len(e.Rules.Grants):
		return e.Rules.Grants[index].Place, element
	case kind == "sdk_life" || kind == "spread":
		return e.place("tokens." + kind), "[tokens]"
	}
	return e.last, "configuration"
}
