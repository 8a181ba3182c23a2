package simulator

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"time"
)

const (
	controlPrefix = "/simulator/"
	maxControl    = 64 << 10 // bytes of a control body
)

// PermissionsChange is the body of POST /simulator/permissions. A field left out stays as it is, an
// empty one is taken away.
type PermissionsChange struct {
	Identity string `json:"identity"` // its name
	Permissions
}

// PermissionsChanged is the answer: from when on new tokens carry the change.
type PermissionsChanged struct {
	Reaches time.Time `json:"reaches"` // by the back end's clock
}

// faultBody is the body of POST /simulator/faults: a Fault, and its durations as Go writes them.
type faultBody struct {
	Fault
	For   string `json:"for"`
	Every string `json:"every"`
}

// serveControl answers on the paths that steer the simulation rather than ask it for tokens.
func (h *handler) serveControl(w http.ResponseWriter, r *http.Request, path string) {
	if err := h.admitControl(r); err != nil {
		controlError(w, http.StatusForbidden, err)
		return
	}
	switch r.Method + " " + path {
	case "GET /simulator/state":
		writeJSON(w, http.StatusOK, encodeJSON(h.backend.State()))
	case "POST /simulator/permissions":
		control(w, r, parsePermissions, func(c PermissionsChange) (any, error) {
			reaches, err := h.backend.ChangePermissions(c.Identity, c.Permissions)
			return PermissionsChanged{reaches}, err
		})
	case "POST /simulator/faults":
		control(w, r, parseFault, func(f Fault) (any, error) {
			err := h.backend.AddFault(f)
			return h.backend.State().Faults, err
		})
	case "DELETE /simulator/faults":
		h.backend.ClearFaults()
		w.WriteHeader(http.StatusNoContent)
	default:
		controlError(w, http.StatusNotFound, errors.New("the control paths are GET /simulator/state, "+
			"POST /simulator/permissions, POST /simulator/faults and DELETE /simulator/faults"))
	}
}

// Steerers says in words who may steer a simulation.
const Steerers = "the user that runs it and root"

// maySteer reports whether a user may.
func maySteer(uid uint32) bool { return uid == 0 || int64(uid) == int64(os.Geteuid()) }

// admitControl keeps other users out, and web pages, also those that made their name resolve to this address.
func (h *handler) admitControl(r *http.Request) error {
	switch uid, err := h.room.User(r); {
	case err != nil:
		return fmt.Errorf("only %s can steer the simulation, and which user asks is not known: %w", Steerers, err)
	case !maySteer(uid):
		return fmt.Errorf("only %s can steer the simulation, not uid %d", Steerers, uid)
	}
	if r.Header.Get("Simulator-Control") != "true" {
		return errors.New("the header Simulator-Control: true is missing")
	}
	for _, name := range [...]string{"Origin", "Referer", "Sec-Fetch-Site"} {
		if len(r.Header.Values(name)) > 0 {
			return errors.New("a web page may not steer the simulation: the request has the header " + name)
		}
	}
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = r.Host
	}
	if address, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !address.IsLoopback()) {
		return fmt.Errorf("the host %q is not loopback", r.Host)
	}
	return nil
}

// control reads a body, does what it says and answers with the result.
func control[T any](w http.ResponseWriter, r *http.Request, parse func([]byte) (T, error), do func(T) (any, error)) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxControl))
	if err != nil {
		controlError(w, http.StatusRequestEntityTooLarge, err)
		return
	}
	asked, err := parse(body)
	if err != nil {
		controlError(w, http.StatusBadRequest, err)
		return
	}
	result, err := do(asked)
	if err != nil {
		controlError(w, http.StatusBadRequest, err)
		return
	}
	writeJSON(w, http.StatusOK, encodeJSON(result))
}

func controlError(w http.ResponseWriter, status int, err error) {
	writeJSON(w, status, encodeJSON(struct {
		Error string `json:"error"`
	}{err.Error()}))
}

func parsePermissions(body []byte) (PermissionsChange, error) {
	var c PermissionsChange
	err := decode(body, &c)
	return c, err
}

func parseFault(body []byte) (Fault, error) {
	var b faultBody
	if err := decode(body, &b); err != nil {
		return Fault{}, err
	}
	var err error
	if b.Fault.For, err = duration("for", b.For); err != nil {
		return Fault{}, err
	}
	if b.Fault.Every, err = duration("every", b.Every); err != nil {
		return Fault{}, err
	}
	return b.Fault, nil
}

func duration(name, text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("%s %q is not a duration such as 90s or 10m", name, text)
	}
	return d, nil
}

// decode reads one JSON value and refuses fields it does not know.
func decode(body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("the body is not understood: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("the body has something after its JSON value")
	}
	return nil
}

// State is what a Backend knows, without any token's text: the body of GET /simulator/state.
type State struct {
	Simulated        string          `json:"simulated"` // the warning that stands in every token
	Now              time.Time       `json:"now"`       // by the back end's clock, like every time here
	Life             string          `json:"life"`      // a Go duration, like PropagationDelay
	PropagationDelay string          `json:"spread"`
	Rollover         Rollover        `json:"rollover"`
	Replicas         int             `json:"replicas"`
	Identities       []IdentityState `json:"identities"`
	Tokens           []TokenState    `json:"tokens"`
	Calls            CallsState      `json:"calls"`
	Faults           []FaultState    `json:"faults"`
}

// IdentityState is an identity and its permissions.
type IdentityState struct {
	Identity             // Permissions: as they were changed to last
	InForce  Permissions `json:"in_force"` // those of a token that is issued now
}

// TokenState is a cached token.
type TokenState struct {
	Key
	Serial    uint64    `json:"serial"`
	Replica   int       `json:"replica"`
	IssuedOn  time.Time `json:"issued_on"` // not dated back
	ExpiresOn time.Time `json:"expires_on"`
	RollsOn   time.Time `json:"rolls_on"`
}

// CallsState is Calls without its log.
type CallsState struct {
	Total  int        `json:"total"`
	Peak   int        `json:"peak"`
	PerKey []KeyCalls `json:"per_key"`
}

// KeyCalls is how often a key was asked for.
type KeyCalls struct {
	Key
	Calls int `json:"calls"`
}

// FaultState is a fault in force.
type FaultState struct {
	Fault
	Every  string    `json:"every"`
	Struck int       `json:"struck"`
	Until  time.Time `json:"until,omitzero"`
}

// State returns what the back end knows, in a stable order.
func (b *Backend) State() State {
	faults, calls := b.Faults(), b.Calls()
	b.mu.Lock()
	defer b.mu.Unlock()
	s := State{
		Simulated: warningText, Now: b.now(), Life: b.options.Life.String(),
		PropagationDelay: b.options.PropagationDelay.String(),
		Rollover:         b.options.Rollover, Replicas: len(b.replicas),
		Identities: []IdentityState{}, Tokens: []TokenState{}, Faults: []FaultState{},
		Calls: CallsState{calls.Total, calls.Peak, []KeyCalls{}},
	}
	for _, id := range b.identities {
		past := b.changes[id.Name]
		id.Permissions = past[len(past)-1].to.withDefaults(Permissions{})
		s.Identities = append(s.Identities, IdentityState{id, b.inForceLocked(id.Name, s.Now)})
	}
	for _, replica := range b.replicas {
		for key, t := range replica {
			s.Tokens = append(s.Tokens, TokenState{key, t.Serial, t.Replica, t.IssuedOn, t.ExpiresOn, t.RollsOn})
		}
	}
	slices.SortFunc(s.Tokens, func(a, b TokenState) int { return cmp.Compare(a.Serial, b.Serial) })
	for key, n := range calls.PerKey {
		s.Calls.PerKey = append(s.Calls.PerKey, KeyCalls{key, n})
	}
	slices.SortFunc(s.Calls.PerKey, func(a, b KeyCalls) int {
		return cmp.Or(cmp.Compare(a.Identity, b.Identity), cmp.Compare(a.Resource, b.Resource))
	})
	for _, f := range faults {
		s.Faults = append(s.Faults, FaultState{f.Fault, f.Every.String(), f.Struck, f.Until})
	}
	return s
}
