package api

// Names of the direct methods that IoT Hub calls. They are compared without case.
const (
	MethodStatus        = "percept.status"
	MethodExplain       = "percept.explain"
	MethodPolicyChanged = "percept.policyChanged"
	MethodRefresh       = "percept.refresh"
	MethodDeny          = "percept.deny"
)

const (
	// CodeUnknownMethod is 404: there is no direct method of that name.
	CodeUnknownMethod Code = "unknown_method"
	// CodeNotCached is 404: no such token is cached.
	CodeNotCached Code = "not_cached"
	// CodeHubSetAside is 403: root on the device has set aside what IoT Hub sets.
	CodeHubSetAside Code = "hub_set_aside"
)

// MaxMethodAnswer is a length in bytes that no answer of a direct method exceeds. IoT Hub takes 128 KB.
const MaxMethodAnswer = 120 << 10

// MethodError is the answer of a direct method with any other status than 200.
type MethodError struct {
	Error MethodProblem `json:"error"`

	// PolicyChange or DenyRule is what was done all the same, with CodeNotKept.
	PolicyChange *PolicyChangeAnswer `json:"policy_change,omitempty"`
	DenyRule     *DenyAnswer         `json:"deny_rule,omitempty"`
}

// MethodProblem says why a direct method was not done. Message says what to do next.
type MethodProblem struct {
	Code       Code     `json:"code"`
	Message    string   `json:"message"`
	Choices    []string `json:"choices,omitempty"`     // identities to name, or the methods that there are
	RetryAfter int64    `json:"retry_after,omitempty"` // seconds after which calling again may help
}

// LeftOut counts by a list's name what an answer has no room for.
type LeftOut map[string]int

// StatusAnswer is the answer of percept.status, whose payload is empty. Of the tokens' claims it has the IDs alone.
type StatusAnswer struct {
	Status
	LeftOut LeftOut `json:"leftOut,omitempty"` // tokens with trouble are left out last
}

// ExplainRequest is the payload of percept.explain.
type ExplainRequest struct {
	Resource string `json:"resource"`
	Identity string `json:"identity,omitempty"` // configured name; empty: all that have a token for the resource
}

// RefreshAnswer is the answer of percept.refresh, whose payload is a RefreshRequest.
type RefreshAnswer struct {
	RefreshResponse
	LeftOut LeftOut `json:"leftOut,omitempty"`
}

// DenyMethodRequest is the payload of percept.deny: what to deny, or the ID of a rule to lift. Empty, it lists
// the rules.
type DenyMethodRequest struct {
	DenyRequest
	Lift string `json:"lift,omitempty"`
}

// DenyRulesAnswer is the answer of percept.deny that lists the rules. Where it adds or lifts one, the answer is a
// DenyAnswer.
type DenyRulesAnswer struct {
	DenyRules
	LeftOut LeftOut `json:"leftOut,omitempty"`
}
