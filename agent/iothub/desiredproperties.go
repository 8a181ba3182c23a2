package iothub

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"perceptd/agent"
	"perceptd/agent/api"
)

const (
	// maxDesired is what the desired properties have at most, in bytes: of more nothing is read. IoT Hub has 32 KB for
	// the keys and values in them, and counts neither quotes nor commas.
	maxDesired = 256 << 10
	// maxPercept is what percept has of that at most.
	maxPercept = 64 << 10
)

// ownKeys are the keys of percept.
var ownKeys = []string{"policyChanges", "deny", "prefetch", "logLevel"}

// readDesired reads the desired properties of a twin, and returns what is for perceptd: all of it, or nothing. The
// error says where what is wrong, of deny first, and how much is wrong besides. It shows no value of it.
func readDesired(text json.RawMessage) (api.DesiredProperties, error) {
	var none, desired api.DesiredProperties
	percept, err := perceptIn(text)
	if err != nil || percept == nil {
		return none, err
	}
	switch {
	case len(percept) > maxPercept:
		return none, &fault{"percept", fmt.Sprintf("it has %d bytes, more than %d", len(percept), maxPercept)}
	case !utf8.Valid(percept):
		return none, &fault{"percept", "it is not UTF-8"}
	}
	members, twice, err := membersOf(percept, "percept")
	if err != nil {
		return none, err
	}
	var wrong [4]faults
	desired.Deny, wrong[0] = readList(members, "deny", api.MaxDenyRules, readDeny)
	desired.PolicyChanges, wrong[1] = readList(members, "policyChanges", agent.MaxTwinChanges, readChange)
	desired.Prefetch, wrong[2] = readList(members, "prefetch", agent.MaxTwinPrefetch, readPrefetch)
	if desired.LogLevel, err = readLogLevel(members); err != nil {
		wrong[3] = faults{err}
	}
	keys := wrongKeys(members, twice, "percept", ownKeys...) // one of which may be another case of deny
	if all := slices.Concat(wrong[0], keys, wrong[1], wrong[2], wrong[3]); len(all) > 0 {
		return none, all
	}
	return desired, nil
}

// strayKeys returns in words which of percept's keys stand beside percept in desired properties, where they mean
// nothing.
func strayKeys(text json.RawMessage) (stray []string) {
	if len(text) > maxDesired || !json.Valid(text) {
		return nil
	}
	members, _, _ := membersOf(bytes.TrimSpace(text), "desired")
	for _, key := range slices.Sorted(maps.Keys(members)) {
		isOwn := func(own string) bool { return strings.EqualFold(own, key) }
		if i := slices.IndexFunc(ownKeys, isOwn); i >= 0 {
			stray = append(stray, fmt.Sprintf("%s: it stands beside percept, where it means nothing to perceptd: "+
				"move it to percept.%s", key, ownKeys[i]))
		}
	}
	return stray
}

// soundDeny returns the deny rules in desired properties that are sound, whatever else is wrong in them: a mistake in
// one place keeps nothing from being denied that another one denies, and one in a note not what it is about.
func soundDeny(text json.RawMessage) (sound []api.DenyRequest) {
	percept, _ := perceptIn(text)
	if percept == nil {
		return nil
	}
	members, _, _ := membersOf(percept, "percept")
	list, there := members["deny"]
	if !there {
		return nil
	}
	rules, _ := elementsOf(list, "percept.deny")
	for _, rule := range rules {
		r, err := readDeny(rule, "percept.deny")
		if err != nil {
			r, err = readDeny(withoutNote(rule), "percept.deny")
		}
		if err == nil {
			sound = append(sound, r)
		}
	}
	return sound
}

// withoutNote returns a JSON object without its note; what is no object stays as it is.
func withoutNote(object json.RawMessage) json.RawMessage {
	members, twice, err := membersOf(object, "percept.deny")
	if err != nil || len(twice) > 0 {
		return object
	}
	delete(members, "note")
	text, err := json.Marshal(members)
	if err != nil {
		return object
	}
	return text
}

// perceptIn returns the value of percept in desired properties, without white space around it; nil: there is none, or
// it is null. The error says what is wrong, there may be a value beside it. What else is in them is the business of
// others.
func perceptIn(text json.RawMessage) (json.RawMessage, error) {
	if len(text) > maxDesired {
		return nil, fmt.Errorf("the desired properties have %d bytes, more than %d", len(text), maxDesired)
	}
	text = bytes.TrimSpace(text)
	if !json.Valid(text) || text[0] != '{' {
		return nil, errors.New("the desired properties are no JSON object")
	}
	const percept = "percept"
	members, twice, err := membersOf(text, "desired")
	if slices.Contains(twice, percept) {
		err = &fault{percept, "it is there twice"}
	}
	for _, key := range slices.Sorted(maps.Keys(members)) {
		if err == nil && key != percept && strings.EqualFold(key, percept) {
			err = &fault{key, "it is percept in another case, which means nothing: write percept"}
		}
	}
	if value := members[percept]; value != nil && value[0] != 'n' {
		return value, err
	}
	return nil, err
}

// readList reads a list of at most so many objects; nil: there is none. Of each object that is wrong it returns one
// fault.
func readList[T any](
	members map[string]json.RawMessage, key string, most int, read func(value json.RawMessage, path string) (T, error),
) (all []T, wrong faults) {
	value, there := members[key]
	if !there {
		return nil, nil
	}
	path := "percept." + key
	elements, err := elementsOf(value, path)
	if err != nil {
		return nil, faults{err}
	}
	if len(elements) > most {
		return nil, faults{&fault{path, fmt.Sprintf("it lists %d, and can list at most %d", len(elements), most)}}
	}
	all = make([]T, len(elements))
	for i, element := range elements {
		if all[i], err = read(element, fmt.Sprintf("%s[%d]", path, i)); err != nil {
			wrong = append(wrong, err)
		}
	}
	return all, wrong
}

const (
	nameForm     = "it must be letters, digits, dots, dashes and underscores, at most 63"
	resourceForm = "it must be an App ID URI, such as https://vault.azure.net, or a GUID"
	noteForm     = "it must be one line of at most 256 bytes"
	unitForm     = "it must be a systemd service, as systemctl shows it"
	userForm     = "it must be a user's name, or a uid"
	timeForm     = "it must be a time with its zone, such as 2026-11-28T08:00:00Z"
)

// readDeny reads a deny rule, and checks it whatever is configured here.
func readDeny(value json.RawMessage, path string) (api.DenyRequest, error) {
	e := openEntry(value, path, "module", "unit", "user", "identity", "resource", "all", "note")
	var r api.DenyRequest
	r.Module = e.checked("module", nameForm, func(t *api.DenyRequest, text string) { t.Module = text })
	r.Unit = e.checked("unit", unitForm, func(t *api.DenyRequest, text string) { t.Unit = text })
	r.User = e.checked("user", userForm, func(t *api.DenyRequest, text string) { t.User = text })
	r.Identity, r.Resource, r.Note = e.identity(), e.resource(), e.note()
	r.All = e.truth("all")
	switch {
	case r.DenyTarget == api.DenyTarget{}:
		e.fail("", "it names nothing: name a module, unit, user, identity or resource, or all")
	case r.All && r.DenyTarget != api.DenyTarget{All: true}:
		e.fail("all", "it denies all, and the rule names something besides: do one of the two")
	}
	return r, e.err
}

// readChange reads a policy change, and checks it whatever is configured here.
func readChange(value json.RawMessage, path string) (api.PolicyChangeRequest, error) {
	e := openEntry(value, path, "resource", "allResources", "identity", "at", "effect", "note")
	c := api.PolicyChangeRequest{
		Resource: e.resource(), AllResources: e.truth("allResources"), Identity: e.identity(),
		Effect: api.Effect(e.text("effect")), Note: e.note(),
	}
	switch at := e.text("at"); {
	case at == "":
		e.fail("at", "it is missing: write when it happened, such as 2026-11-28T08:00:00Z")
	case c.At.UnmarshalText([]byte(at)) != nil || strings.Contains(at, ","): // Go takes a comma for a dot there
		e.fail("at", timeForm)
	}
	isSound := func(c api.PolicyChangeRequest) bool {
		return agent.CheckTwinChanges([]api.PolicyChangeRequest{c}) == nil
	}
	plain := api.PolicyChangeRequest{AllResources: true, At: c.At, Effect: api.EffectChanged}
	if !isSound(plain) {
		e.fail("at", timeForm)
	}
	plain.Effect = c.Effect
	switch {
	case c.Effect == "":
		e.fail("effect", "it is missing: it is granted, revoked or changed")
	case !isSound(plain):
		e.fail("effect", "it must be granted, revoked or changed")
	case !isSound(c):
		e.fail("", "it must name a resource, or say allResources, and not both")
	}
	return c, e.err
}

// readPrefetch reads what is to be prefetched, and checks it whatever is configured here.
func readPrefetch(value json.RawMessage, path string) (api.PrefetchRequest, error) {
	e := openEntry(value, path, "resource", "identity")
	p := api.PrefetchRequest{Resource: e.resource(), Identity: e.identity()}
	if p.Resource == "" {
		e.fail("resource", "it is missing: "+resourceForm)
	}
	return p, e.err
}

// readLogLevel reads the level of the log; empty: there is none.
func readLogLevel(members map[string]json.RawMessage) (api.LogLevel, error) {
	levels := []api.LogLevel{api.LogDebug, api.LogInfo, api.LogWarn, api.LogError}
	e := &entry{path: "percept", members: members}
	level := api.LogLevel(e.text("logLevel"))
	if level != "" && !slices.Contains(levels, level) {
		e.fail("logLevel", "it must be debug, info, warn or error")
	}
	return level, e.err
}

func (e *entry) identity() string {
	return e.checked("identity", nameForm, func(t *api.DenyRequest, text string) { t.Identity = text })
}

// resource reads a resource, which may come without its scheme.
func (e *entry) resource() string {
	return api.FullResource(e.checked("resource", resourceForm, func(t *api.DenyRequest, text string) {
		t.Resource = api.FullResource(text)
	}))
}

func (e *entry) note() string {
	return e.checked("note", noteForm, func(t *api.DenyRequest, text string) { t.All, t.Note = true, text })
}

// checked reads a text that can be what put makes of it in a deny rule, which has the strictest rules for names.
func (e *entry) checked(key, form string, put func(t *api.DenyRequest, text string)) string {
	text := e.text(key)
	if text == "" {
		return ""
	}
	var r api.DenyRequest
	if put(&r, text); agent.CheckDeny(r) != nil {
		e.fail(key, form)
	}
	return text
}
