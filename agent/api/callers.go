package api

import "time"

// WhoAmI is the answer of GET /v1/whoami: how the daemon sees the process that asks, and what it may have.
type WhoAmI struct {
	Proved     bool        `json:"proved"`             // whether tokens are answered at all
	Unattested *Unattested `json:"unproved,omitempty"` // what is missing, when not proved
	Caller     Caller      `json:"caller"`             // as far as it is known
	Grants     []Grant     `json:"grants"`             // those that decide over it; none: it gets nothing
	Refused    string      `json:"refused,omitempty"`  // why it gets nothing, whatever grants decide; or absent
	Code       Code        `json:"code,omitempty"`     // with Refused, as a request would be told
	Denials    []Denial    `json:"denials,omitempty"`  // the latest of it that the grants in force deny still
	Now        time.Time   `json:"now"`
}

// Unattested is why it could not be proved who calls.
type Unattested struct {
	What string `json:"what"`           // the part of the attestation that is missing
	Why  string `json:"why,omitempty"`  // what stands against it
	Hint string `json:"hint,omitempty"` // what to do
}

// Caller is a process as the daemon sees it. Inside a container, and in a pid namespace of its own, its uid, gid and
// groups say nothing, and have no names.
type Caller struct {
	Module    string     `json:"module,omitempty"` // whose own socket it came in on
	Unit      string     `json:"unit,omitempty"`   // systemd service
	Container *Container `json:"container,omitempty"`
	UID       *uint32    `json:"uid,omitempty"` // absent, as gid and pid, when not known
	User      string     `json:"user,omitempty"`
	GID       *uint32    `json:"gid,omitempty"`
	Group     string     `json:"group,omitempty"`
	Groups    []uint32   `json:"groups"` // supplementary ones
	PID       int32      `json:"pid,omitempty"`
	Nested    bool       `json:"nested,omitempty"` // it is in a pid namespace of its own
}

// Container is what the container engine says of the caller's container.
type Container struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	Image       string    `json:"image"`  // as it was asked for
	Digest      string    `json:"digest"` // image ID, sha256:…
	RepoDigests []string  `json:"repo_digests,omitempty"`
	EdgeModule  string    `json:"edge_module,omitempty"` // IoT Edge module, where its owner is edgeAgent
	StartedOn   time.Time `json:"started_on"`
}

// Loopback is the answer of GET /v1/loopback: what an unmodified SDK needs to get tokens on the loopback listener.
// Whoever has it is the caller of that grant there: keep it out of logs and argument lists.
type Loopback struct {
	Endpoint string `json:"identity_endpoint"` // the value of IDENTITY_ENDPOINT
	Header   string `json:"identity_header"`   // the value of IDENTITY_HEADER, a secret
	Grant    string `json:"grant"`             // whom the grant is for, in words
}

// Grant is a grant in force.
type Grant struct {
	Number    int      `json:"number"`          // from 1, in the order of the configuration
	Place     string   `json:"place,omitempty"` // file and line; for callers of a faulty one alone, without the folder
	Caller    string   `json:"caller"`          // whom it is for, in words
	Identity  string   `json:"identity"`
	Resources []string `json:"resources"`
	Prefetch  bool     `json:"prefetch,omitempty"`
	Fault     string   `json:"fault,omitempty"` // why it is idle: it decides, and gives nothing; absent: it is sound

	// Denied are those of Resources that the caller, or each that the grant is for, is denied by deny rules, or since
	// their record is lost.
	Denied []string `json:"denied,omitempty"`
	// MayBeDenied are those of Resources that some callers that the grant is for may be denied: those of the user,
	// module or unit that a rule names; only in Grants.
	MayBeDenied []string `json:"may_be_denied,omitempty"`
	// DeniedBy are the IDs of the rules that deny these; only in Grants.
	DeniedBy []string `json:"denied_by,omitempty"`
}

// Grants is the answer of GET /v1/grants, in the order of the configuration.
type Grants struct {
	Grants []Grant   `json:"grants"`
	Now    time.Time `json:"now"` // by the clock that the rules' times are of
	// NoConfiguration is why no configuration is in force, so that every request is refused. Absent: one is.
	NoConfiguration string      `json:"no_configuration,omitempty"`
	Deny            *DenyStatus `json:"deny,omitempty"` // absent: there are no deny rules, and that is known
}

// Decision is the answer of GET /v1/grants/check: what the grants say to a request, and why.
type Decision struct {
	Allowed    bool              `json:"allowed"`
	Code       Code              `json:"code,omitempty"`     // why not, as the caller would be told
	Identity   string            `json:"identity,omitempty"` // whose token it would be
	Grant      *Grant            `json:"grant,omitempty"`    // the one that allows it
	Considered []ConsideredGrant `json:"considered"`         // every grant that is for such a caller
	Reason     string            `json:"reason"`

	// NearMiss and Suggestion are what helps where no grant allows it.
	NearMiss   *NearMiss   `json:"near_miss,omitempty"`
	Suggestion *Suggestion `json:"suggestion,omitempty"`
}

// ConsideredGrant is a grant and what became of it.
type ConsideredGrant struct {
	Grant
	Decides bool   `json:"decides"` // it is of the most specific kind there is for this caller
	Why     string `json:"why"`
}

// Denial is one kind of denial, with how often it happened of late.
type Denial struct {
	On       time.Time `json:"on"` // the last time
	Caller   string    `json:"caller"`
	Identity string    `json:"identity,omitempty"` // as it was asked for
	Resource string    `json:"resource,omitempty"` // absent where who calls was not proved
	Code     Code      `json:"code,omitempty"`     // as the caller was told
	Reason   string    `json:"reason"`
	Count    int       `json:"count"`

	// ID is a number that no other kind of denial has while the daemon runs.
	ID int `json:"id"`
	// NearMiss and Suggestion are what helps, by the grants in force now; GrantedNow says that they allow it.
	NearMiss   *NearMiss   `json:"near_miss,omitempty"`
	Suggestion *Suggestion `json:"suggestion,omitempty"`
	GrantedNow bool        `json:"granted_now,omitempty"`
}

// CallersStatus says how callers are proved.
type CallersStatus struct {
	// Engine is the path of the container engine's socket; empty: none is there.
	Engine      string `json:"engine,omitempty"`
	EngineError string `json:"engine_error,omitempty"` // why it could not be asked the last time
	Kernel      string `json:"kernel,omitempty"`       // its release
	Pidfd       bool   `json:"pidfd"`                  // by the kernel's own handles of processes
	// RefuseYoung says that processes younger than 20 ms have to ask twice, since the kernel gives no handles of them.
	RefuseYoung bool         `json:"refuse_young,omitempty"`
	Limitations []Limitation `json:"blind"` // what keeps callers from being proved here; empty: nothing
}

// Limitation is something that keeps callers from being proved. They are denied, and each is trouble as well.
type Limitation struct {
	What string `json:"what"` // that cannot be told of callers
	Why  string `json:"why"`
	Hint string `json:"hint"` // what to do about it
}
