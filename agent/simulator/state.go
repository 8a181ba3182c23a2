package simulator

import (
	"cmp"
	"slices"
	"time"
)

// State is what a Backend knows, without any token's text: the body of GET /simulator/state.
type State struct {
	Simulated  string          `json:"simulated"` // the warning that stands in every token
	Now        time.Time       `json:"now"`       // by the back end's clock, like every time here
	Life       string          `json:"life"`      // a Go duration, like Spread
	Spread     string          `json:"spread"`
	Rollover   Rollover        `json:"rollover"`
	Replicas   int             `json:"replicas"`
	Identities []IdentityState `json:"identities"`
	Tokens     []TokenState    `json:"tokens"`
	Calls      CallsState      `json:"calls"`
	Faults     []FaultState    `json:"faults"`
}

// IdentityState is an identity and its permissions.
type IdentityState struct {
	Identity             // Permissions: as they were changed to last
	InForce  Permissions `json:"in_force"` // what a token minted now carries
}

// TokenState is a cached token.
type TokenState struct {
	Key
	Serial    uint64    `json:"serial"`
	Replica   int       `json:"replica"`
	IssuedOn  time.Time `json:"issued_on"` // the true minting
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
		Simulated: warning, Now: b.now(), Life: b.options.Life.String(), Spread: b.options.Spread.String(),
		Rollover: b.options.Rollover, Replicas: len(b.replicas),
		Identities: []IdentityState{}, Tokens: []TokenState{}, Faults: []FaultState{},
		Calls: CallsState{calls.Total, calls.Peak, []KeyCalls{}},
	}
	for _, id := range b.identities {
		past := b.changes[id.Name]
		id.Permissions = past[len(past)-1].to.over(Permissions{})
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
