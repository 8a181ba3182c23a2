// Package api is the wire contract between perceptd and everything that talks to it: the paths, the
// bodies of the /v1 form and the admin socket, and every enumeration's words. The enumerations by which the
// cache decides are the cache's, named here by alias; nothing else of it is part of the contract.
//
// The two SDK forms (IMDS and App Service) are Azure's contract, not ours; agent/server writes them.
package api

import (
	"strings"
	"time"

	"perceptd/tokencache"
)

// Where the sockets are, unless a flag or a variable says otherwise.
const (
	RuntimeDir         = "/run/percept"
	TokenSocketName    = "token.sock"
	AdminSocketName    = "admin.sock"
	ModulesDirName     = "modules"      // modules/NAME/token.sock, one folder a module
	FoldersSocketName  = "folders.sock" // where perceptd has root give it those of the folders that an engine made
	DefaultTokenSocket = RuntimeDir + "/" + TokenSocketName
	DefaultAdminSocket = RuntimeDir + "/" + AdminSocketName
	SocketVariable     = "PERCEPT_SOCKET" // environment variable that names the token socket
)

// Paths on the token sockets.
const (
	PathIMDSToken       = "/metadata/identity/oauth2/token"
	PathAppServiceToken = "/msi/token"
	PathToken           = "/v1/token"
	PathWatch           = "/v1/watch"
	PathRejected        = "/v1/rejected"
	PathWhoAmI          = "/v1/whoami"   // answered also where who calls could not be proved
	PathLoopback        = "/v1/loopback" // on the admin socket too, with what is known of the caller
)

// PermissionsHeader stands on every answer that carries a token: "current", or "stale; changed=UNIX;
// current-by=UNIX", or the same with "uncertain".
const PermissionsHeader = "Percept-Permissions"

// AudienceHeader stands beside it when the token is that of an alternate: the resource that the token was
// asked for, which differs from the one that the caller asked for.
const AudienceHeader = "Percept-Audience"

// Paths on the admin socket.
const (
	PathStatus        = "/v1/status"
	PathRefresh       = "/v1/refresh"
	PathReload        = "/v1/reload"
	PathPolicyChanges = "/v1/policy-changes" // GET lists, POST notes, DELETE ?id= withdraws
	PathGrants        = "/v1/grants"
	PathGrantsCheck   = "/v1/grants/check" // ?resource= and what is known of the caller
	PathHealth        = "/healthz"         // on the token sockets too
	PathReady         = "/readyz"
)

// Code tells programs what went wrong; the text beside it tells people. Codes are stable.
type Code string

const (
	CodeBadRequest      Code = "bad_request"         // 400: the request is not of the form's shape
	CodeUnknownPath     Code = "unknown_path"        // 404 under /v1, 400 elsewhere: SDKs retry 404 for minutes
	CodeMethod          Code = "method_not_allowed"  // 405
	CodeForeignOrigin   Code = "foreign_origin"      // 403: a foreign Host, or a header of a browser or a proxy
	CodeUnknownIdentity Code = "unknown_identity"    // 400: no such identity in the configuration
	CodeAmbiguous       Code = "ambiguous_identity"  // 400: several identities are granted; name one
	CodeNotGranted      Code = "not_granted"         // 403: no grant names this caller, identity and resource
	CodeFaultyGrant     Code = "faulty_grant"        // 403: what decides about it is faulty in the configuration
	CodeNoConfiguration Code = "no_configuration"    // 503: no configuration is in force, and why
	CodeUnknownCaller   Code = "unknown_caller"      // 403: who is calling could not be proved
	CodeAskAgain        Code = "ask_again"           // 503: the next request on the connection proves the caller
	CodeShortLife       Code = "short_life"          // 503: min_ttl is more than the newest token has left
	CodeNotYet          Code = "not_yet"             // 503: the back end has no token issued after issued_after yet
	CodeRevoked         Code = "permissions_revoked" // 403: a revocation withholds the token; a current one ends that
	CodeBusy            Code = "too_many_requests"   // 429: this caller asks too much at once
	CodeFutureChange    Code = "future_change"       // 422: a policy change dated ahead of a right clock
	CodeTooManyChanges  Code = "too_many_changes"    // 422: withdraw some, or name all resources at once
	CodeNoLoopback      Code = "no_loopback"         // 404: no [loopback] listener is configured
	CodeUnknownChange   Code = "unknown_change"      // 404: no policy change of that ID is on record
	CodeNotKept         Code = "not_kept"            // 507: in force, but it could not be written to the disk
	CodeInvalidConfig   Code = "invalid_config"      // 422: reload found a bad configuration; nothing changed
	CodeInternal        Code = "internal"            // 500
)

// The codes of failed fetches are the cache's.
const (
	CodeThrottled        = Code(tokencache.Throttled)        // 503: the back end throttles this device
	CodeUnreachable      = Code(tokencache.Unreachable)      // 503: no token is cached, and no answer came
	CodeMalformedAnswer  = Code(tokencache.Malformed)        // 503: the back end's answer has no token that can be used
	CodeIdentityNotFound = Code(tokencache.IdentityNotFound) // 400: the back end does not know the identity
	CodeRefused          = Code(tokencache.Refused)          // 403: the back end refuses this token
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

	// NearMiss and Suggestion are what helps, with CodeNotGranted.
	NearMiss   *NearMiss   `json:"near_miss,omitempty"`
	Suggestion *Suggestion `json:"suggestion,omitempty"`

	// PolicyChange is what was recorded, or withdrawn, all the same, with CodeNotKept.
	PolicyChange *PolicyChangeAnswer `json:"policy_change,omitempty"`
	// DenyRule is what was added, or lifted, all the same, with CodeNotKept.
	DenyRule *DenyAnswer `json:"deny_rule,omitempty"`
}

// Token is the answer of GET /v1/token. Times are by the device's clock: ExpiresOn is the device's now plus the life
// left, so that a caller on the same wrong clock judges it rightly.
type Token struct {
	AccessToken string    `json:"access_token"`
	TokenType   string    `json:"token_type"` // always "Bearer"
	Identity    string    `json:"identity"`   // configured name
	ClientID    string    `json:"client_id,omitempty"`
	Resource    string    `json:"resource"`
	ExpiresIn   int64     `json:"expires_in"` // seconds left, the true ones
	ExpiresOn   time.Time `json:"expires_on"`

	// Unconfirmed says that ExpiresIn is what there may be at most: the device was off for a time that its clock cannot
	// tell, and the back end has not answered since.
	Unconfirmed bool `json:"unconfirmed,omitempty"`

	RefreshIn  int64     `json:"refresh_in"`  // seconds until asking again is worth while
	ReceivedOn time.Time `json:"received_on"` // when the daemon got it from the back end
	SHA256     string    `json:"token_sha256"`

	// Audience is the resource that the token was asked for where that is not Resource: an alternate,
	// whose token is current while that of Resource is not.
	Audience    string      `json:"audience,omitempty"`
	Permissions Permissions `json:"permissions"`
}

// PermissionState says whether a token carries the policy changes on record. It is empty where there is no valid token.
type PermissionState = tokencache.PermissionState

const (
	PermissionsCurrent   = tokencache.Current
	PermissionsStale     = tokencache.Stale
	PermissionsUncertain = tokencache.Uncertain
)

// Permissions is what is known of the permissions that a token carries. Times are by the device's clock, and absent
// when the token is current.
type Permissions struct {
	State   PermissionState `json:"standing"`
	Changed time.Time       `json:"changed,omitzero"` // the latest change that the token may lack
	// CurrentBy is when a current token is here at the latest, if the back end answers.
	CurrentBy time.Time `json:"current_by,omitzero"`
	Likely    time.Time `json:"likely,omitzero"`    // and probably by then; absent when nothing was learnt yet
	Withheld  bool      `json:"withheld,omitempty"` // a revocation withholds the token from all callers
}

// WatchEvent is the data of an event on /v1/watch: what is there now. It carries no token text. Times are by the
// device's clock. Its event name is "token" for a new token, "permissions" for a change of these alone, "expired" when
// there is no valid token any more, "ended" when the grant is gone or the daemon goes down.
type WatchEvent struct {
	Identity    string      `json:"identity"`
	Resource    string      `json:"resource"`
	SHA256      string      `json:"token_sha256,omitempty"` // absent without a valid token
	ExpiresOn   time.Time   `json:"expires_on,omitzero"`
	ReceivedOn  time.Time   `json:"received_on,omitzero"`
	Permissions Permissions `json:"permissions"`
	Now         time.Time   `json:"now"`              // when the event was sent
	Detail      string      `json:"detail,omitempty"` // with "ended": why
	Code        Code        `json:"code,omitempty"`   // with "ended": that of a request which is refused so
}

// Names of the events on /v1/watch.
const (
	EventToken       = "token"
	EventPermissions = "permissions"
	EventExpired     = "expired"
	EventEnded       = "ended"
)

// Rejection is the body of POST /v1/rejected: a resource refused a token.
type Rejection struct {
	Resource string `json:"resource"`
	Identity string `json:"identity,omitempty"` // configured name; empty as on /v1/token
	// SHA256 is the hash of the refused token's text, in hexadecimal; empty: the token is the one held now.
	SHA256 string `json:"token_sha256,omitempty"`
	Status int    `json:"status"`           // 401 or 403
	Claims string `json:"claims,omitempty"` // the claims challenge of WWW-Authenticate, as sent or decoded
}

// Cause is why a resource may have refused a token.
type Cause string

const (
	CauseOldToken      Cause = "old_token"      // the daemon has a newer token than the refused one
	CauseStale         Cause = "stale"          // minted before a known policy change
	CauseStaleClaims   Cause = "stale_claims"   // groups, roles or wids in the token may be outdated
	CauseRBACDelay     Cause = "rbac_delay"     // a role assignment takes up to 10 minutes to reach the resource
	CauseWrongAudience Cause = "wrong_audience" // the token is for another resource
	CauseWrongIdentity Cause = "wrong_identity" // the token is another identity's
	// CauseRevoked is a claims challenge: the resource wants a token from after a revocation.
	CauseRevoked      Cause = "revoked_token"
	CauseClock        Cause = "clock"         // the token is expired, or not valid yet, by some clock
	CauseNoPermission Cause = "no_permission" // nothing here is outdated: the permission is missing
	CauseUnknownToken Cause = "unknown_token" // the daemon does not know that token
)

// Finding is one reason that a resource may have had, and what to do.
type Finding struct {
	Cause  Cause  `json:"cause"`
	Detail string `json:"detail"` // what is known, in a sentence
	Action string `json:"action"` // what to do, in a sentence
}

// Advice is the answer of POST /v1/rejected, the likeliest finding first.
type Advice struct {
	Identity    string      `json:"identity"`
	Resource    string      `json:"resource"`
	SHA256      string      `json:"token_sha256,omitempty"` // of the token held now; ask for it when it differs
	Findings    []Finding   `json:"findings"`
	Retry       bool        `json:"retry"`             // whether a token that may be accepted is there now
	RetryOn     time.Time   `json:"retry_on,omitzero"` // when asking again is worth while
	Fetched     Outcome     `json:"fetched,omitempty"` // what the fetch for a revocation challenge brought
	Claims      TokenClaims `json:"claims"`            // what the token held now carries
	Permissions Permissions `json:"permissions"`
}

// TokenClaims is what a token says of itself that decides permissions.
type TokenClaims struct {
	Issuer   string   `json:"issuer,omitempty"`
	Audience string   `json:"audience,omitempty"`
	ClientID string   `json:"client_id,omitempty"`
	ObjectID string   `json:"object_id,omitempty"`
	TenantID string   `json:"tenant_id,omitempty"`
	Groups   []string `json:"groups,omitempty"`
	Roles    []string `json:"roles,omitempty"`
	WIDs     []string `json:"wids,omitempty"`
	// Omitted names the claims, as the token does, that it has and that are left out, since they are too long, or no
	// text that can be shown: they count as missing.
	Omitted []string `json:"omitted,omitempty"`
}

// MaxAnswer is a length in bytes that no answer of the daemon exceeds. The longest is the status where every key has a
// token, another one before it, and claims as long as they are kept.
const MaxAnswer = 16 << 20

// Effect is what a policy change did.
type Effect = tokencache.Effect

const (
	EffectGranted = tokencache.Granted
	EffectRevoked = tokencache.Revoked
	EffectChanged = tokencache.Changed
	EffectUnknown = tokencache.Unknown // not for entering
)

// RecordState is what is wrong with the record of policy changes.
type RecordState string

const (
	RecordLost   RecordState = "lost"   // what was on it is not known
	RecordUnread RecordState = "unread" // it cannot be read now
)

// PolicyChangeRequest is the body of POST /v1/policy-changes.
type PolicyChangeRequest struct {
	Resource     string    `json:"resource,omitempty"` // either this
	AllResources bool      `json:"all_resources,omitempty"`
	Identity     string    `json:"identity,omitempty"` // configured name; empty: all
	At           time.Time `json:"at,omitzero"`        // absent: now
	Effect       Effect    `json:"effect"`
	Note         string    `json:"note,omitempty"`
}

// PolicyChange is a policy change on record.
type PolicyChange struct {
	ID       string `json:"id"`
	Resource string `json:"resource,omitempty"` // empty: all
	// Identity is a configured name, or the selector of one that is configured no more; empty: all.
	Identity      string    `json:"identity,omitempty"`
	At            time.Time `json:"at"`
	Effect        Effect    `json:"effect"`
	Note          string    `json:"note,omitempty"`
	RecordedOn    time.Time `json:"noted_on"`
	Unsure        bool      `json:"unsure,omitempty"`     // At was read off a clock that was not known to be right
	AsOfRecording bool      `json:"as_of_note,omitempty"` // so it counts as of RecordedOn, and not as of At
	Joined        int       `json:"joined,omitempty"`     // how many others it stands for, since the record was full

	// Record is set where it stands for the record itself, with EffectUnknown: "lost", or "unread",
	// as long as that cannot be read. Withholds then says that tokens from before are withheld, and Mend what a person
	// does about it.
	Record    RecordState `json:"record,omitempty"`
	Withholds bool        `json:"withholds,omitempty"`
	Mend      string      `json:"mend,omitempty"`

	EndsOn  time.Time `json:"ends_on"`
	Touched int       `json:"touched"` // valid tokens held that it is about
	Waiting int       `json:"waiting"` // of these, those that are not current yet
}

// TwinChangePrefix begins the IDs of policy changes that the twin of this device in IoT Hub has set, and of no others.
const TwinChangePrefix = "twin-"

// IsOfTwin reports whether the twin of this device in IoT Hub has set the change, so that it is withdrawn there alone.
func (c PolicyChange) IsOfTwin() bool { return strings.HasPrefix(c.ID, TwinChangePrefix) }

// PolicyChanges is the answer of GET /v1/policy-changes, the latest first.
type PolicyChanges struct {
	Now     time.Time      `json:"now"` // by the clock that the changes' times are of
	Changes []PolicyChange `json:"changes"`
}

// PolicyChangeAnswer is the answer of POST and DELETE /v1/policy-changes: the change that they are about.
type PolicyChangeAnswer struct {
	PolicyChange
	Now time.Time `json:"now"` // as in PolicyChanges
}

// RefreshRequest is the body of POST /v1/refresh. The zero value asks for every cached key.
type RefreshRequest struct {
	Identity string `json:"identity,omitempty"` // configured name; empty for all
	Resource string `json:"resource,omitempty"` // empty for all

	// Now fetches even while a policy change is still spreading, though the token that comes may lack it and then stay
	// for a day. With Forget it drops a token before it fetches, even while fetches fail: callers wait meanwhile.
	Now bool `json:"now,omitempty"`

	// Forget drops the token that is held, and what was learnt of its life, when another has come that can be used.
	// Where nothing may be fetched now, or while fetches fail and without Now, nothing is dropped.
	Forget bool `json:"forget,omitempty"`
}

// RefreshResult says what one refresh brought.
type RefreshResult struct {
	Identity string  `json:"identity"`
	Resource string  `json:"resource"`
	Outcome  Outcome `json:"outcome"`
	Detail   string  `json:"detail,omitempty"` // why it failed or was held
}

// RefreshResponse is the answer of POST /v1/refresh, one result for each key.
type RefreshResponse struct {
	Results []RefreshResult `json:"results"`
}

// Outcome is what a fetch brought.
type Outcome = tokencache.Outcome

const (
	OutcomeNewer     = tokencache.Newer
	OutcomeUnchanged = tokencache.Unchanged
	OutcomeOlder     = tokencache.Older
	OutcomeFormer    = tokencache.Former
	OutcomeSimulated = tokencache.Simulated
	OutcomeFailed    = tokencache.Failed
	OutcomeHeld      = tokencache.Held
)

// ReloadResponse is the answer of POST /v1/reload when the new configuration is in force.
type ReloadResponse struct {
	Changes  []string `json:"changes"`            // one line for each thing that changed; empty when nothing did
	Warnings []string `json:"warnings,omitempty"` // of what is in force and not as it should be, a sentence each
}

// Status is the answer of GET /v1/status. It carries no token text.
type Status struct {
	Version    string           `json:"version"`
	Now        time.Time        `json:"now"`
	StartedOn  time.Time        `json:"started_on"`
	Ready      bool             `json:"ready"`
	Simulated  bool             `json:"simulated"` // the source is, or a token held is of a simulated back end
	Trouble    []string         `json:"trouble"`   // what needs a person, in sentences; empty when all is well
	Source     SourceStatus     `json:"source"`
	Config     ConfigStatus     `json:"config"`
	Identities []IdentityStatus `json:"identities"`
	Tokens     []TokenStatus    `json:"tokens"`
	Changes    []PolicyChange   `json:"policy_changes"`
	Requests   RequestCounts    `json:"requests"`
	Denials    []Denial         `json:"denials"` // the latest, the last first; repeats are counted
	Callers    CallersStatus    `json:"callers"`
	Loopback   *LoopbackStatus  `json:"loopback,omitempty"` // absent: none is configured

	Connections []ConnectionsStatus `json:"connections"` // by listener; those of all modules' sockets together

	Kept  KeptStatus  `json:"kept"`
	Clock ClockStatus `json:"clock"`
	Deny  *DenyStatus `json:"deny,omitempty"` // absent: a daemon that knows no deny rules
	Hub   *HubStatus  `json:"hub,omitempty"`  // absent: no [iothub] is configured
}

// LoopbackStatus says where tokens are served over TCP, to callers that are known by a header secret.
type LoopbackStatus struct {
	Address string `json:"address"`
	Open    bool   `json:"open"` // false: why is trouble
}

// ConnectionsStatus says how many connections a listener has, and whose fault it is when some are turned away.
type ConnectionsStatus struct {
	Listener   string `json:"listener"`
	Open       int    `json:"open"`
	Limit      int    `json:"limit"`
	TurnedAway int64  `json:"turned_away"` // since the start

	// Of the last one that was turned away: when and whose it was, who had taken the places and how many.
	TurnedAwayOn  time.Time `json:"turned_away_on,omitzero"`
	TurnedAwayFor string    `json:"turned_away_for,omitempty"`
	HeldBy        string    `json:"held_by,omitempty"`
	Holds         int       `json:"holds,omitempty"`
}

// KeptStatus says over what the tokens that are cached are kept.
type KeptStatus struct {
	Restart bool   `json:"restart"`
	Reboot  bool   `json:"reboot"`
	Why     string `json:"why,omitempty"` // they are not kept over both

	// BoundTo is what of the device those on the disk are bound to: "product-uuid", "device-tree-serial", "machine-id",
	// or "none". Absent: there are none.
	BoundTo string `json:"bound_to,omitempty"`

	// Untold says that root has told perceptd nothing of the device, so that they are bound to what perceptd can read
	// itself: perceptd-cache-key.service has not run, or a version before started what is active of it.
	Untold bool `json:"untold,omitempty"`
}

// ClockStatus says what is known of the device's wall clock.
type ClockStatus struct {
	Known bool `json:"known"` // to be right: it is synchronised
	// By is who says whether it is: "kernel", or "systemd-timesyncd" where the kernel cannot be asked. Absent: nobody
	// can be asked, or the clock is the simulated back end's own.
	By string `json:"by,omitempty"`

	// Skew is by how many seconds it was ahead of the back end's when that was asked last; negative: behind. Absent:
	// the back end was not asked since the start, or tells only one of the times that it takes.
	Skew *int64 `json:"skew,omitempty"`
}

// SourceStatus says where tokens come from.
type SourceStatus struct {
	Kind     string `json:"kind"`     // "managed-identity" or "simulated"
	Endpoint string `json:"endpoint"` // "arc", "app-service" or "imds"
	Address  string `json:"address,omitempty"`
}

// ConfigStatus says which configuration is in force and whether the last reload took.
type ConfigStatus struct {
	Files []string `json:"files"`
	// SHA256 is the hash of what Files say, one after the other, in hexadecimal: that of "cat FILES | sha256sum".
	SHA256   string    `json:"sha256"`
	LoadedOn time.Time `json:"loaded_on"`
	Error    string    `json:"error,omitempty"` // why the last reload changed nothing
	ErrorOn  time.Time `json:"error_on,omitzero"`

	// Idle are the elements in force that have a fault, and give nothing.
	Idle []IdleElement `json:"idle,omitempty"`
	// Faults are of files that could not be read at the start, or that were refused. Then the last configuration goes
	// on since LastSince, and what was taken out of the files is still in force; or none is in force, for the reason in
	// None.
	Faults    []string  `json:"faults,omitempty"`
	LastSince time.Time `json:"last_since,omitzero"`
	None      string    `json:"none,omitempty"`
	Gone      []string  `json:"gone,omitempty"` // files of the last configuration that are gone, and do not go on
	// EditedOn is when the files were edited and not reloaded since; zero: they were not.
	EditedOn time.Time `json:"edited_on,omitzero"`
	Unread   []string  `json:"unread,omitempty"`  // what is in config.d and is not read, with why
	NoCopy   string    `json:"no_copy,omitempty"` // why no copy goes on when a file cannot be read at the next start
}

// IdleElement is an element of the configuration that has a fault.
type IdleElement struct {
	Place   string `json:"place"`   // "FILE:LINE"
	Element string `json:"element"` // "grant 2", "[callers]"
	Why     string `json:"why"`
}

// IdentityStatus is one configured identity.
type IdentityStatus struct {
	Name     string `json:"name"`
	Default  bool   `json:"default"`
	Selector string `json:"selector"` // "system-assigned", "client_id 0000…"
	Grants   int    `json:"grants"`   // how many grants name it

	Place string `json:"place,omitempty"` // file and line
	Fault string `json:"fault,omitempty"` // why no caller gets its tokens; absent: it is sound

	Principal *Principal `json:"principal,omitempty"` // absent: no token has said so yet
}

// Principal is whom an identity's tokens speak for, as far as they say.
type Principal struct {
	ObjectID string `json:"object_id,omitempty"`
	TenantID string `json:"tenant_id,omitempty"`
	ClientID string `json:"client_id,omitempty"`

	Simulated bool `json:"simulated,omitempty"` // a simulated back end says so: it stands for no real principal
}

// TokenState is the state of a cached key.
type TokenState = tokencache.State

const (
	StateFresh    = tokencache.Fresh
	StateRefresh  = tokencache.Refreshing
	StateFailing  = tokencache.Failing
	StateFetching = tokencache.Fetching
	StateMissing  = tokencache.Missing
	StateIdle     = tokencache.Idle
)

// TokenStatus is one cached key. Durations are seconds.
type TokenStatus struct {
	Identity    string     `json:"identity"`
	Resource    string     `json:"resource"`
	State       TokenState `json:"state"`
	Prefetch    bool       `json:"prefetch"`
	SHA256      string     `json:"token_sha256,omitempty"` // of the text of the token held, in hexadecimal
	ReceivedOn  time.Time  `json:"received_on,omitzero"`
	ExpiresOn   time.Time  `json:"expires_on,omitzero"`   // by the device's clock
	ExpiresIn   int64      `json:"expires_in"`            // 0: no valid token
	Unconfirmed bool       `json:"unconfirmed,omitempty"` // ExpiresIn is what there may be at most, as in Token
	NextRefresh time.Time  `json:"next_refresh,omitzero"` // by the device's clock; absent: none planned
	LastFetch   time.Time  `json:"last_fetch,omitzero"`
	LastOutcome Outcome    `json:"last_outcome,omitempty"`
	LastError   string     `json:"last_error,omitempty"`
	Failures    int        `json:"failures"` // in a row
	Fetches     int        `json:"fetches"`  // calls made to the back end for this key
	Served      int64      `json:"served"`   // answers given to callers

	Permissions Permissions `json:"permissions"`
	// Changes tells whether the token carries policy changes on record that touch it, the latest first: a few, those
	// that it may lack before others. MoreChanges is how many touch it besides. A daemon that sends none knows nothing
	// of this.
	Changes     []TokenChange `json:"policy_changes"`
	MoreChanges int           `json:"more_policy_changes,omitempty"`
	// IssuedFrom and IssuedTo bound when the token held was issued, by the issuer's clock.
	IssuedFrom time.Time    `json:"minted_from,omitzero"`
	IssuedTo   time.Time    `json:"minted_to,omitzero"`
	Claims     *TokenClaims `json:"claims,omitempty"` // of the token held
	// Before are the claims of the token held before it, where groups, roles or wids differ.
	Before    *TokenClaims   `json:"before,omitempty"`
	Former    bool           `json:"former,omitempty"` // the token held is of a former principal of the identity
	Life      int64          `json:"life,omitempty"`   // seconds that the token had when it was minted
	Rollover  RolloverStatus `json:"rollover"`
	Ended     *EndedStretch  `json:"ended,omitempty"`     // absent: the token before this one lacked no policy change
	HeldUntil time.Time      `json:"held_until,omitzero"` // no fetch before: a policy change is still spreading
	// Refused is when a module last reported that a resource refused this token.
	Refused time.Time `json:"refused,omitzero"`
	// Denied is true if a deny rule takes it away from every caller, or nobody knows what is denied.
	Denied bool `json:"denied,omitempty"`
}

// EndedStretch is a time in which tokens lacked a policy change, until the token held replaced the last of them.
type EndedStretch struct {
	From     time.Time       `json:"from"`
	To       time.Time       `json:"to"`
	State    PermissionState `json:"standing"`           // the worst
	Withheld bool            `json:"withheld,omitempty"` // they were handed out to nobody
}

// InTrouble reports whether a person should look at the key. A single failed refresh of a token with much life left is
// weather, not trouble.
func (t TokenStatus) InTrouble() bool {
	const fewFailures, littleLife = 2, 60 * 60
	return t.LastOutcome == OutcomeFailed && (t.Failures > fewFailures || t.ExpiresIn < littleLife)
}

// TokenChange is whether a token carries a policy change.
type TokenChange struct {
	ID    string          `json:"id"`                 // of the change
	State PermissionState `json:"standing,omitempty"` // absent without a valid token
}

// RolloverPattern is what was learnt of when the back end hands out newer tokens.
type RolloverPattern = tokencache.PatternKind

const (
	RolloverUnlearnt  = tokencache.Unlearnt
	RolloverRegular   = tokencache.Regular
	RolloverIrregular = tokencache.Irregular
)

// RolloverStatus is what was learnt of a key's rollovers.
type RolloverStatus struct {
	Pattern RolloverPattern `json:"pattern"`
	Seen    int             `json:"seen"` // rollovers that were observed for this key
	// Age is the seconds of a token's life at which it rolls over, with RolloverRegular.
	Age      int64     `json:"age,omitempty"`
	Expected time.Time `json:"expected,omitzero"` // when the token held is expected to be followed by a newer one
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
