// Package api is the wire contract between perceptd and everything that talks to it: the paths, the
// bodies of the /v1 form and the admin socket, and the error codes. It imports nothing of ours, so
// that a client costs its importer nothing else.
//
// The two SDK forms (IMDS and App Service) are Azure's contract, not ours; agent/server writes them.
package api

import "time"

// Where the sockets are, unless a flag or a variable says otherwise.
const (
	RuntimeDir         = "/run/percept"
	TokenSocketName    = "token.sock"
	AdminSocketName    = "admin.sock"
	ModulesDirName     = "modules" // modules/NAME/token.sock, one folder a module
	DefaultTokenSocket = RuntimeDir + "/" + TokenSocketName
	DefaultAdminSocket = RuntimeDir + "/" + AdminSocketName
	SocketVariable     = "PERCEPT_SOCKET" // environment variable that names the token socket
)

// Paths on the token sockets.
const (
	PathIMDSToken       = "/metadata/identity/oauth2/token"
	PathAppServiceToken = "/msi/token"
	PathToken           = "/v1/token"
)

// Paths on the admin socket.
const (
	PathStatus  = "/v1/status"
	PathRefresh = "/v1/refresh"
	PathReload  = "/v1/reload"
	PathHealth  = "/healthz" // on the token sockets too
	PathReady   = "/readyz"
)

// Code tells programs what went wrong; the text beside it tells people. Codes are stable.
type Code string

const (
	CodeBadRequest       Code = "bad_request"        // 400: the request is not of the form's shape
	CodeUnknownPath      Code = "unknown_path"       // 404 under /v1, 400 elsewhere: SDKs retry 404 for minutes
	CodeMethod           Code = "method_not_allowed" // 405
	CodeForeignOrigin    Code = "foreign_origin"     // 403: a foreign Host, an Origin, a proxy's header
	CodeUnknownIdentity  Code = "unknown_identity"   // 400: no such identity in the configuration
	CodeAmbiguous        Code = "ambiguous_identity" // 400: several identities are granted; name one
	CodeNotGranted       Code = "not_granted"        // 403: no grant names this caller, identity and resource
	CodeUnknownCaller    Code = "unknown_caller"     // 403: who is calling could not be proved
	CodeShortLife        Code = "short_life"         // 503: min_ttl is more than the newest token has left
	CodeThrottled        Code = "throttled"          // 503: the back end throttles this device
	CodeUnreachable      Code = "unreachable"        // 503: no token cached and no answer from the back end
	CodeMalformedAnswer  Code = "malformed_answer"   // 503: what answered is not a token endpoint
	CodeIdentityNotFound Code = "identity_not_found" // 400: the back end does not know the identity
	CodeRefused          Code = "refused"            // 403: the back end refuses this token
	CodeBusy             Code = "too_many_requests"  // 429: this caller asks too much at once
	CodeInvalidConfig    Code = "invalid_config"     // 422: reload found a bad configuration; nothing changed
	CodeInternal         Code = "internal"           // 500
)

// Problem is an error of the /v1 form and the admin socket: RFC 9457 problem details, content type
// application/problem+json. Detail says what to do next.
type Problem struct {
	Type    string   `json:"type"` // "urn:percept:problem:" + Code
	Title   string   `json:"title"`
	Status  int      `json:"status"`
	Detail  string   `json:"detail"`
	Code    Code     `json:"code"`
	Choices []string `json:"choices,omitempty"` // identities to choose from, with CodeAmbiguous and CodeUnknownIdentity
}

// Token is the answer of GET /v1/token. Times are Unix seconds of the device's clock: expires_on is
// the device's now plus the life left, so that a caller on the same wrong clock judges it rightly.
type Token struct {
	AccessToken string `json:"access_token"`
	TokenType   string `json:"token_type"` // always "Bearer"
	Identity    string `json:"identity"`   // configured name
	ClientID    string `json:"client_id,omitempty"`
	Resource    string `json:"resource"`
	ExpiresIn   int64  `json:"expires_in"` // seconds left, the true ones
	ExpiresOn   int64  `json:"expires_on"`
	RefreshIn   int64  `json:"refresh_in"`  // seconds until asking again is worth while
	ReceivedOn  int64  `json:"received_on"` // when the daemon got it from the back end
	SHA256      string `json:"token_sha256"`
}

// RefreshRequest is the body of POST /v1/refresh. The zero value asks for every cached key.
type RefreshRequest struct {
	Identity string `json:"identity,omitempty"` // configured name; empty for all
	Resource string `json:"resource,omitempty"` // empty for all
}

// RefreshResult says what one refresh brought.
type RefreshResult struct {
	Identity string  `json:"identity"`
	Resource string  `json:"resource"`
	Outcome  Outcome `json:"outcome"`
	Detail   string  `json:"detail,omitempty"` // why it failed
}

// RefreshResponse is the answer of POST /v1/refresh, one result for each key.
type RefreshResponse struct {
	Results []RefreshResult `json:"results"`
}

// Outcome is what a fetch brought.
type Outcome string

const (
	OutcomeNewer     Outcome = "newer"     // a newer token than before
	OutcomeUnchanged Outcome = "unchanged" // the back end's cached copy of the token already held
	OutcomeOlder     Outcome = "older"     // one minted before the token held, which stays
	OutcomeFailed    Outcome = "failed"
)

// ReloadResponse is the answer of POST /v1/reload when the new configuration is in force.
type ReloadResponse struct {
	Changes []string `json:"changes"` // one line for each thing that changed; empty when nothing did
}

// Status is the answer of GET /v1/status. It carries no token text.
type Status struct {
	Version    string           `json:"version"`
	Now        time.Time        `json:"now"`
	StartedOn  time.Time        `json:"started_on"`
	Ready      bool             `json:"ready"`
	Simulated  bool             `json:"simulated"`
	Trouble    []string         `json:"trouble"` // what needs a person, in sentences; empty when all is well
	Source     SourceStatus     `json:"source"`
	Config     ConfigStatus     `json:"config"`
	Identities []IdentityStatus `json:"identities"`
	Tokens     []TokenStatus    `json:"tokens"`
	Requests   RequestCounts    `json:"requests"`
}

// SourceStatus says where tokens come from.
type SourceStatus struct {
	Kind     string `json:"kind"`     // "managed-identity" or "simulated"
	Endpoint string `json:"endpoint"` // "arc", "app-service" or "imds"
	Address  string `json:"address,omitempty"`
}

// ConfigStatus says which configuration is in force and whether the last reload took.
type ConfigStatus struct {
	Files    []string   `json:"files"`
	LoadedOn time.Time  `json:"loaded_on"`
	Error    string     `json:"error,omitempty"` // why the last reload changed nothing
	ErrorOn  *time.Time `json:"error_on,omitempty"`
}

// IdentityStatus is one configured identity.
type IdentityStatus struct {
	Name     string `json:"name"`
	Default  bool   `json:"default"`
	Selector string `json:"selector"` // "system-assigned", "client_id 0000…"
	Grants   int    `json:"grants"`   // how many grants name it
}

// TokenState is a token's state in a word.
type TokenState string

const (
	StateFresh    TokenState = "fresh"    // valid, no refresh due
	StateRefresh  TokenState = "refresh"  // valid, a refresh is due or under way
	StateFailing  TokenState = "failing"  // valid, but refreshing it fails
	StateFetching TokenState = "fetching" // none yet, being fetched
	StateMissing  TokenState = "missing"  // none, and the last fetch failed
	StateIdle     TokenState = "idle"     // valid, but nobody asks: left to expire
)

// TokenStatus is one cached key. Durations are seconds.
type TokenStatus struct {
	Identity    string     `json:"identity"`
	Resource    string     `json:"resource"`
	State       TokenState `json:"state"`
	Prefetch    bool       `json:"prefetch"`
	SHA256      string     `json:"token_sha256,omitempty"` // first 12 hexadecimal digits
	ReceivedOn  *time.Time `json:"received_on,omitempty"`
	ExpiresOn   *time.Time `json:"expires_on,omitempty"`   // by the device's clock
	ExpiresIn   int64      `json:"expires_in"`             // 0: no valid token
	NextRefresh *time.Time `json:"next_refresh,omitempty"` // by the device's clock; absent: none planned
	LastFetch   *time.Time `json:"last_fetch,omitempty"`
	LastOutcome Outcome    `json:"last_outcome,omitempty"`
	LastError   string     `json:"last_error,omitempty"`
	Failures    int        `json:"failures"` // in a row
	Fetches     int        `json:"fetches"`  // calls made to the back end for this key
	Served      int64      `json:"served"`   // answers given to callers
}

// RequestCounts counts the requests on the token sockets since the start.
type RequestCounts struct {
	Served  int64 `json:"served"`
	Denied  int64 `json:"denied"`
	Invalid int64 `json:"invalid"`
	Failed  int64 `json:"failed"` // no token could be had
}

// Health is the answer of GET /healthz and /readyz: status 200 when OK, else 503.
type Health struct {
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}
