package simulator

import (
	"fmt"
	"slices"
	"strings"
)

// Permissions are the claims that a token carries from its issue on.
type Permissions struct {
	Groups []string `json:"groups"` // object IDs of groups
	Roles  []string `json:"roles"`  // app roles
	WIDs   []string `json:"wids"`   // template IDs of directory roles
}

// withDefaults returns p with what it leaves nil taken from old; an empty slice takes away.
func (p Permissions) withDefaults(old Permissions) Permissions {
	pick := func(changed, kept []string) []string {
		if changed == nil {
			changed = kept
		}
		return slices.Clone(changed)
	}
	return Permissions{pick(p.Groups, old.Groups), pick(p.Roles, old.Roles), pick(p.WIDs, old.WIDs)}
}

// Identity is one managed identity of the simulated device. An ID left empty selects nothing.
type Identity struct {
	Name           string      `json:"name"` // ours, for ChangePermissions, Calls and the control path
	ClientID       string      `json:"client_id"`
	ObjectID       string      `json:"object_id"`
	ResourceID     string      `json:"resource_id"`
	TenantID       string      `json:"tenant_id"` // empty: the default identities' tenant
	SystemAssigned bool        `json:"system_assigned"`
	Permissions    Permissions `json:"permissions"` // in force from the start
}

const (
	tenantID      = "00000000-0000-0000-0009-000000000000"
	resourceGroup = "/subscriptions/00000000-0000-0000-0008-000000000000/resourcegroups/simulated/providers/"
	userAssigned  = resourceGroup + "Microsoft.ManagedIdentity/userAssignedIdentities/"
)

// DefaultIdentities returns the identities of a Backend that was given none: the system-assigned
// "device", and the user-assigned "vision" and "speech", whose client IDs are
// 00000000-0000-0000-0000-00000000000N with N = 9, 1 and 2. Their object IDs have 0001 in the
// fourth place, their groups 0002 and directory roles 0003.
func DefaultIdentities() []Identity {
	device := exampleIdentity("device", resourceGroup+"Microsoft.HybridCompute/machines/percept", 9)
	device.SystemAssigned = true
	return []Identity{device, exampleIdentity("vision", userAssigned+"vision", 1),
		exampleIdentity("speech", userAssigned+"speech", 2)}
}

func exampleIdentity(name, resourceID string, n int) Identity {
	guid := func(kind int) string { return fmt.Sprintf("00000000-0000-0000-%04d-%012d", kind, n) }
	return Identity{
		Name: name, ClientID: guid(0), ObjectID: guid(1), ResourceID: resourceID, TenantID: tenantID,
		Permissions: Permissions{Groups: []string{guid(2)}, Roles: []string{"Simulated.Read"}, WIDs: []string{guid(3)}},
	}
}

// foreignIdentity is an identity the device does not have, for FaultWrongIdentity.
func foreignIdentity() Identity {
	s := exampleIdentity("stranger", userAssigned+"stranger", 666)
	s.Permissions = Permissions{}
	return s
}

// SelectBy says how a request chooses its identity.
type SelectBy uint8

const (
	ByDefault      SelectBy = iota // as IMDS: the system-assigned one, else the only user-assigned one
	SystemAssigned                 // that one and no other, as App Service and Arc mean a request that chooses none
	ByClientID
	ByObjectID
	ByResourceID
)

func (s SelectBy) String() string {
	switch s {
	case ByDefault:
		return "default"
	case SystemAssigned:
		return "system-assigned"
	case ByClientID:
		return "client_id"
	case ByObjectID:
		return "object_id"
	case ByResourceID:
		return "resource_id"
	}
	return "unknown selection"
}

// Selection is which identity a request asks for. The zero value chooses none, which IMDS answers
// with its default identity.
type Selection struct {
	By SelectBy
	ID string // compared without regard to case; unused by ByDefault and SystemAssigned
}

func (s Selection) String() string {
	if s.ID == "" {
		return s.By.String()
	}
	return s.By.String() + " " + s.ID
}

// UnknownIdentityError is returned when the device has no such identity.
type UnknownIdentityError struct {
	Wanted string // the name or selection that was asked for
}

func (e *UnknownIdentityError) Error() string {
	return "the simulated device has no identity " + e.Wanted
}

// AmbiguousIdentityError is returned when a request chooses no identity and there is no default.
type AmbiguousIdentityError struct {
	Choices []string // the identities' names
}

func (e *AmbiguousIdentityError) Error() string {
	return "several user-assigned identities and none chosen: " + strings.Join(e.Choices, ", ")
}

// find returns the identity that sel means.
func find(identities []Identity, sel Selection) (Identity, error) {
	if sel.By == ByDefault {
		return findDefault(identities)
	}
	for _, id := range identities {
		if sel.matches(id) {
			return id, nil
		}
	}
	return Identity{}, &UnknownIdentityError{sel.String()}
}

func findDefault(identities []Identity) (Identity, error) {
	for _, id := range identities {
		if id.SystemAssigned {
			return id, nil
		}
	}
	switch len(identities) {
	case 0:
		return Identity{}, &UnknownIdentityError{ByDefault.String()}
	case 1:
		return identities[0], nil
	}
	e := &AmbiguousIdentityError{}
	for _, id := range identities {
		e.Choices = append(e.Choices, id.Name)
	}
	return Identity{}, e
}

func (s Selection) matches(id Identity) bool {
	same := func(given string) bool { return given != "" && strings.EqualFold(given, s.ID) }
	switch s.By {
	case SystemAssigned:
		return id.SystemAssigned
	case ByClientID:
		return same(id.ClientID)
	case ByObjectID:
		return same(id.ObjectID)
	case ByResourceID:
		return same(id.ResourceID)
	}
	return false
}
