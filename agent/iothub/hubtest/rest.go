package hubtest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// restHandler answers the service's side, as Microsoft's SDKs for back-end applications ask it.
//
// Source: IoT Hub's REST reference, "IoT Hub Service".
func (h *Hub) restHandler() http.Handler {
	m := http.NewServeMux()
	for _, path := range []string{"/devices/{device}", "/devices/{device}/modules/{module}"} {
		m.HandleFunc("GET "+path, h.getIdentity)
		m.HandleFunc("PUT "+path, h.putIdentity)
		m.HandleFunc("DELETE "+path, h.deleteIdentity)
	}
	for _, path := range []string{"/twins/{device}", "/twins/{device}/modules/{module}"} {
		m.HandleFunc("GET "+path, h.getTwin)
		m.HandleFunc("PATCH "+path, h.updateTwin)
		m.HandleFunc("PUT "+path, h.updateTwin)
		m.HandleFunc("POST "+path+"/methods", h.callMethod)
	}
	m.HandleFunc("GET /devices", h.listIdentities)
	m.HandleFunc("GET /devices/{$}", h.listIdentities)
	m.HandleFunc("GET /devices/{device}/modules", h.listIdentities)
	m.HandleFunc("POST /devices/query", h.answerQuery)
	m.HandleFunc("GET /statistics/devices", h.statistics)
	m.HandleFunc("PUT /configurations/{id}", h.putConfiguration)
	m.HandleFunc("GET /configurations/{id}", h.getConfiguration)
	m.HandleFunc("DELETE /configurations/{id}", h.deleteConfiguration)
	m.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, http.StatusNotFound, "ResourceNotFound", r.Method+" "+r.URL.Path)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := parseSignature(r.Header.Get("Authorization"))
		switch {
		case err != nil || s.policy != policyName || !s.isBy(h.policyKey) || !s.covers(h.options.Name) ||
			!h.options.Now().Before(s.expires):
			h.options.Logf("%s %s is not authorized: %v", r.Method, r.URL.Path, err)
			fail(w, http.StatusUnauthorized, "IotHubUnauthorizedAccess", "Unauthorized")
		case r.URL.Query().Get("api-version") == "":
			fail(w, http.StatusBadRequest, "InvalidProtocolVersion", "api-version is missing")
		default:
			m.ServeHTTP(w, r)
		}
	})
}

// namedLocked returns the identity that a request's path names, or answers that there is none.
func (h *Hub) namedLocked(w http.ResponseWriter, r *http.Request) *identity {
	named := identity{device: r.PathValue("device"), module: r.PathValue("module")}
	i := h.identities[named.id()]
	if i == nil {
		code := "DeviceNotFound"
		if named.module != "" {
			code = "ModuleNotFound"
		}
		fail(w, http.StatusNotFound, code, named.id())
	}
	return i
}

func (h *Hub) getIdentity(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := h.namedLocked(w, r); i != nil {
		reply(w, i.etag, i.body())
	}
}

// listIdentities answers with all devices, or with the modules of one.
func (h *Hub) listIdentities(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := []object{}
	for _, id := range slices.Sorted(maps.Keys(h.identities)) {
		i := h.identities[id]
		if device := r.PathValue("device"); device == "" && i.module == "" || i.device == device && i.module != "" {
			all = append(all, i.body())
		}
	}
	reply(w, 0, all)
}

// putIdentity registers an identity, or changes one.
func (h *Hub) putIdentity(w http.ResponseWriter, r *http.Request) {
	body, ok := readBody(w, r)
	if !ok {
		return
	}
	named := identity{device: r.PathValue("device"), module: r.PathValue("module")}
	h.mu.Lock()
	defer h.mu.Unlock()
	i, condition := h.identities[named.id()], r.Header.Get("If-Match")
	switch {
	case i == nil && condition != "" && condition != "*", i != nil && condition != "" && !matchesETag(r, i.etag):
		fail(w, http.StatusPreconditionFailed, "PreconditionFailed", named.id())
		return
	case i != nil && condition == "":
		fail(w, http.StatusConflict, "DeviceAlreadyExists", named.id())
		return
	case i == nil && named.module != "" && h.identities[named.device] == nil:
		fail(w, http.StatusNotFound, "DeviceNotFound", named.device)
		return
	case i == nil:
		i = h.registerLocked(named.device, named.module)
	default:
		i.etag++
	}
	if err := i.take(body); err != nil {
		fail(w, http.StatusBadRequest, "ArgumentInvalid", err.Error())
		return
	}
	if i.disabled && i.session != nil {
		i.session.end("the identity was disabled")
	}
	h.configureOneLocked(i)
	reply(w, i.etag, i.body())
}

// take takes over what a registry's entry says of keys, certificates and status.
func (i *identity) take(body object) error {
	authentication, _ := body["authentication"].(object)
	keys, _ := authentication["symmetricKey"].(object)
	for name, key := range map[string]*[]byte{"primaryKey": &i.primary, "secondaryKey": &i.secondary} {
		if text, _ := keys[name].(string); text != "" {
			decoded, err := base64.StdEncoding.DecodeString(text)
			if err != nil {
				return err
			}
			*key = decoded
		}
	}
	thumbprints, _ := authentication["x509Thumbprint"].(object)
	if text, _ := thumbprints["primaryThumbprint"].(string); text != "" {
		i.thumbprint = strings.ToLower(text)
	}
	switch kind, _ := authentication["type"].(string); kind {
	case "certificateAuthority":
		i.primary, i.secondary, i.thumbprint, i.byAuthority = nil, nil, "", true
	case "selfSigned":
		i.byAuthority = false
	case "sas":
		i.byAuthority, i.thumbprint = false, ""
		for _, key := range []*[]byte{&i.primary, &i.secondary} {
			if *key == nil {
				*key = newKey()
			}
		}
	}
	if status, _ := body["status"].(string); status != "" {
		i.disabled = status == "disabled"
	}
	return nil
}

// deleteIdentity removes an identity, with its modules.
func (h *Hub) deleteIdentity(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.namedLocked(w, r)
	if i == nil {
		return
	}
	if !matchesETag(r, i.etag) {
		fail(w, http.StatusPreconditionFailed, "PreconditionFailed", i.id())
		return
	}
	for _, other := range h.identities {
		if other == i || i.module == "" && other.device == i.device {
			h.removeLocked(other)
		}
	}
	w.WriteHeader(http.StatusNoContent)
}

func (h *Hub) getTwin(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := h.namedLocked(w, r); i != nil {
		reply(w, i.twin.etag, h.twinBody(i))
	}
}

// updateTwin merges (PATCH) or replaces (PUT) tags and desired properties.
func (h *Hub) updateTwin(w http.ResponseWriter, r *http.Request) {
	body, ok := readBody(w, r)
	if !ok {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.namedLocked(w, r)
	switch {
	case i == nil:
		return
	case !matchesETag(r, i.twin.etag):
		fail(w, http.StatusPreconditionFailed, "PreconditionFailed", i.id())
		return
	case !h.throttles.twinUpdates.Allow():
		fail(w, http.StatusTooManyRequests, "ThrottlingException", "too many updates of twins a second")
		return
	}
	replace := r.Method == http.MethodPut
	if tags, there := body["tags"].(object); there {
		if err := i.twin.setTags(tags, replace); err != nil {
			fail(w, http.StatusBadRequest, "ArgumentInvalid", err.Error())
			return
		}
	}
	properties, _ := body["properties"].(object)
	if desired, there := properties["desired"].(object); there {
		if _, err := h.setDesiredLocked(i, desired, replace, r.URL.Query().Get("api-version")); err != nil {
			fail(w, http.StatusBadRequest, "ArgumentInvalid", err.Error())
			return
		}
	}
	h.configureOneLocked(i)
	reply(w, i.twin.etag, h.twinBody(i))
}

// Bounds of a method's times, in seconds.
const (
	minResponseTime, maxResponseTime, maxConnectTime = 5, 300, 300
	defaultResponseTime                              = 30
)

// callMethod calls a direct method.
func (h *Hub) callMethod(w http.ResponseWriter, r *http.Request) {
	var call struct {
		MethodName               string
		Payload                  json.RawMessage
		ResponseTimeoutInSeconds *int
		ConnectTimeoutInSeconds  int
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&call); err != nil {
		fail(w, http.StatusBadRequest, "ArgumentInvalid", err.Error())
		return
	}
	response := defaultResponseTime
	if call.ResponseTimeoutInSeconds != nil {
		response = *call.ResponseTimeoutInSeconds
	}
	if call.MethodName == "" || response < minResponseTime || response > maxResponseTime ||
		call.ConnectTimeoutInSeconds < 0 || call.ConnectTimeoutInSeconds > maxConnectTime {
		fail(w, http.StatusBadRequest, "ArgumentInvalid", "methodName, or responseTimeoutInSeconds (5 to 300), or "+
			"connectTimeoutInSeconds (0 to 300)")
		return
	}
	h.mu.Lock()
	i := h.namedLocked(w, r)
	h.mu.Unlock()
	if i == nil {
		return
	}
	connect := time.Duration(call.ConnectTimeoutInSeconds) * time.Second
	if err := h.waitOnline(r.Context(), i.id(), connect); err != nil {
		fail(w, http.StatusNotFound, "DeviceNotOnline", string(h.errorBody(404103, "the device is not online")))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Duration(response)*time.Second)
	defer cancel()
	status, answer, err := h.InvokeMethod(ctx, i.id(), call.MethodName, call.Payload)
	switch {
	case errors.Is(err, ErrNotOnline):
		fail(w, http.StatusNotFound, "DeviceNotOnline", string(h.errorBody(404103, err.Error())))
	case errors.Is(err, ErrMethodTimeout):
		fail(w, http.StatusGatewayTimeout, "GatewayTimeout", string(h.errorBody(504101, err.Error())))
	case err != nil:
		fail(w, http.StatusBadRequest, "ArgumentInvalid", err.Error())
	default:
		reply(w, 0, object{"status": status, "payload": answer})
	}
}

// waitOnline waits until an identity takes methods, for so long.
func (h *Hub) waitOnline(ctx context.Context, id string, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, max(patience, time.Millisecond))
	defer cancel()
	return h.wait(ctx, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		i := h.identities[id]
		return i != nil && i.session != nil && i.session.isSubscribed(topicMethod)
	})
}

// pageSize is how many rows an answer has, unless the request says so.
const pageSize = 100

// answerQuery answers a query, in pages.
func (h *Hub) answerQuery(w http.ResponseWriter, r *http.Request) {
	body, ok := readBody(w, r)
	if !ok {
		return
	}
	text, _ := body["query"].(string)
	q, err := parseQuery(text)
	if err != nil {
		fail(w, http.StatusBadRequest, "InvalidQuery", err.Error())
		return
	}
	size, from := pageSize, 0
	if given := r.Header.Get("x-ms-max-item-count"); given != "" {
		if size, err = strconv.Atoi(given); err != nil || size < 1 || size > 1000 {
			fail(w, http.StatusBadRequest, "ArgumentInvalid", "x-ms-max-item-count is 1 to 1000")
			return
		}
	}
	if token := r.Header.Get("x-ms-continuation"); token != "" {
		if from, err = strconv.Atoi(token); err != nil || from < 0 {
			fail(w, http.StatusBadRequest, "ArgumentInvalid", "x-ms-continuation is not of this hub")
			return
		}
	}
	rows := q.run(h.twins(q.modules))
	from = min(from, len(rows))
	page := append([]object{}, rows[from:min(from+size, len(rows))]...)
	if from+size < len(rows) {
		w.Header().Set("x-ms-continuation", strconv.Itoa(from+size))
	}
	kind := "twin"
	if q.fields != nil || q.count != "" {
		kind = "raw"
	}
	w.Header().Set("x-ms-item-type", kind)
	reply(w, 0, page)
}

// twins returns the twins of all devices, or of all modules, ordered by ID.
func (h *Hub) twins(modules bool) []object {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []object
	for _, id := range slices.Sorted(maps.Keys(h.identities)) {
		if i := h.identities[id]; (i.module != "") == modules {
			all = append(all, h.twinBody(i))
		}
	}
	return all
}

func (h *Hub) statistics(w http.ResponseWriter, _ *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	enabled, disabled := 0, 0
	for _, i := range h.identities {
		switch {
		case i.module != "":
		case i.disabled:
			disabled++
		default:
			enabled++
		}
	}
	reply(w, 0, object{
		"totalDeviceCount": enabled + disabled, "enabledDeviceCount": enabled, "disabledDeviceCount": disabled,
	})
}
