package hubtest

import (
	"cmp"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
)

// configuration is an automatic device or module configuration: properties that the hub sets in the twins of all
// devices, or modules, that meet a condition.
type configuration struct {
	id       string
	priority int64
	made     int // the number of its making; of two with one priority the later counts
	modules  bool
	meets    condition // nil: all
	content  map[string]any
	body     object // as it was sent
	etag     uint64
}

const (
	desiredPrefix     = "properties.desired."
	maxConfigurations = 100
)

// readConfiguration reads the body of PUT /configurations/ID.
func readConfiguration(id string, body object) (*configuration, error) {
	c := &configuration{id: id, body: body, etag: 1}
	condition, _ := body["targetCondition"].(string)
	var err error
	if c.modules, c.meets, err = parseCondition(condition); err != nil {
		return nil, fmt.Errorf("targetCondition: %w", err)
	}
	if priority := numberOf(body["priority"]); priority != nil {
		c.priority, _ = priority.Int64()
	}
	content, _ := body["content"].(object)
	kind := "deviceContent"
	if c.modules {
		kind = "moduleContent"
	}
	if c.content, _ = content[kind].(object); len(c.content) == 0 {
		return nil, fmt.Errorf("content.%s is missing", kind)
	}
	for path := range c.content {
		if !strings.HasPrefix(path, desiredPrefix) || path == desiredPrefix {
			return nil, fmt.Errorf("content.%s has a path %q that does not begin with %s", kind, path, desiredPrefix)
		}
	}
	return c, nil
}

// configureLocked has every twin be as the configurations say. A property that none sets any more is removed.
func (h *Hub) configureLocked() {
	for _, i := range h.identities {
		h.configureOneLocked(i)
	}
}

func (h *Hub) configureOneLocked(i *identity) {
	var matching []*configuration
	twin := h.twinBody(i)
	for _, c := range h.configurations {
		if c.modules == (i.module != "") && (c.meets == nil || c.meets(twin) == isTrue) {
			matching = append(matching, c)
		}
	}
	slices.SortFunc(matching, func(x, y *configuration) int {
		return cmp.Or(cmp.Compare(x.priority, y.priority), cmp.Compare(x.made, y.made))
	})
	want := make(map[string]any)
	for _, c := range matching {
		for path, value := range c.content {
			want[path] = value
		}
	}
	change := object{}
	for path := range i.configured {
		if _, there := want[path]; !there {
			place(change, path, nil)
		}
	}
	for path, value := range want {
		if before, there := i.configured[path]; !there || !reflect.DeepEqual(before, value) {
			place(change, path, value)
		}
	}
	i.configured = want
	if len(change) == 0 {
		return
	}
	if _, err := h.setDesiredLocked(i, change, false, arraysSince); err != nil {
		h.options.Logf("configuration of %s: %v", i.id(), err)
	}
}

// place puts a value at a path of desired properties.
func place(change object, path string, value any) {
	names := strings.Split(strings.TrimPrefix(path, desiredPrefix), ".")
	for _, name := range names[:len(names)-1] {
		within, _ := change[name].(object)
		if within == nil {
			within = object{}
			change[name] = within
		}
		change = within
	}
	change[names[len(names)-1]] = value
}

// putConfiguration answers PUT /configurations/ID.
func (h *Hub) putConfiguration(w http.ResponseWriter, r *http.Request) {
	body, ok := readBody(w, r)
	if !ok {
		return
	}
	c, err := readConfiguration(r.PathValue("id"), body)
	if err != nil {
		fail(w, http.StatusBadRequest, "ArgumentInvalid", err.Error())
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.configurations[c.id]
	switch {
	case before == nil && len(h.configurations) == maxConfigurations:
		fail(w, http.StatusForbidden, "ConfigurationCountLimitExceeded", "a hub has 100 configurations at most")
		return
	case before != nil && !matchesETag(r, before.etag):
		fail(w, http.StatusPreconditionFailed, "PreconditionFailed", c.id)
		return
	case before != nil:
		c.etag = before.etag + 1
	}
	h.made++
	c.made = h.made
	h.configurations[c.id] = c
	h.configureLocked()
	reply(w, c.etag, c.answer())
}

func (c *configuration) answer() object {
	body := clone(c.body)
	body["id"], body["etag"] = c.id, etag(c.etag)
	return body
}

// getConfiguration answers GET /configurations/ID.
func (h *Hub) getConfiguration(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.configurations[r.PathValue("id")]
	if c == nil {
		fail(w, http.StatusNotFound, "ConfigurationNotFound", r.PathValue("id"))
		return
	}
	reply(w, c.etag, c.answer())
}

// deleteConfiguration answers DELETE /configurations/ID.
func (h *Hub) deleteConfiguration(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.configurations[r.PathValue("id")]
	switch {
	case c == nil:
		fail(w, http.StatusNotFound, "ConfigurationNotFound", r.PathValue("id"))
	case !matchesETag(r, c.etag):
		fail(w, http.StatusPreconditionFailed, "PreconditionFailed", c.id)
	default:
		delete(h.configurations, c.id)
		h.configureLocked()
		w.WriteHeader(http.StatusNoContent)
	}
}
