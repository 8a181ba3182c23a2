package api

import "time"

// HubStatus says how the device and IoT Hub are connected.
type HubStatus struct {
	Hub       string `json:"hub"` // host name
	Device    string `json:"device"`
	Module    string `json:"module,omitempty"`
	Transport string `json:"transport"` // "mqtt" or "websocket"

	// Now is the time by the clock that the times here are of: the device's own, however fast a simulated source's
	// runs.
	Now time.Time `json:"now"`

	Connected   bool       `json:"connected"`
	Since       time.Time  `json:"since"`                // connected, or not connected, since then
	LastError   string     `json:"last_error,omitempty"` // why it is not connected, or why it last was not
	LastErrorOn time.Time  `json:"last_error_on,omitzero"`
	Failure     HubFailure `json:"failure,omitempty"` // of LastError
	Mend        string     `json:"mend,omitempty"`    // what a person does about it; absent: as for each such Failure
	NextTry     time.Time  `json:"next_try,omitzero"` // absent: it is connected, or is being tried

	// TwinError is why the twin cannot be read, though the device is connected: what it says newly is not known, but
	// for what notifications add to deny, which is in force. It is tried again. Absent: it was read.
	TwinError      string    `json:"twin_error,omitempty"`
	TwinErrorSince time.Time `json:"twin_error_since,omitzero"`

	Desired  DesiredStatus `json:"desired"`
	Reported time.Time     `json:"reported,omitzero"` // when reported properties were last taken by the hub
	Events   *EventsStatus `json:"events,omitempty"`  // absent: events are off

	ReportError string `json:"report_error,omitempty"` // why the last report was not taken; it is sent again
}

// HubFailure is what kind of thing keeps a device from IoT Hub, and so who heals it. Empty: another, or not known.
type HubFailure string

const (
	HubFailureCredentials HubFailure = "credentials"      // they cannot be read, or are no credentials
	HubFailureRefused     HubFailure = "refused"          // the hub refuses them, or knows no such device
	HubFailureName        HubFailure = "name"             // the hub's name, or the proxy's, is not found
	HubFailureCertificate HubFailure = "certificate"      // the hub's certificate does not verify
	HubFailureClock       HubFailure = "clock"            // it does, but not at the time that the clock here says
	HubFailureProxy       HubFailure = "proxy"            // the proxy is not reached, or refuses
	HubFailureIdentity    HubFailure = "identity_service" // IoT Edge's identity service does not answer, or refuses
	HubFailureNetwork     HubFailure = "network"          // nobody answers, or the connection breaks
	HubFailureReplaced    HubFailure = "replaced"         // another connection with the same identity took its place
)

// HubPatience is how long a hub may be away before that needs a person: networks come and go.
const HubPatience = 5 * time.Minute

// namePatience is HubPatience for a name that is not found, of a hub that was never reached: it may be misspelt. At a
// start the network may not be there yet.
const namePatience = 30 * time.Second

// HubStable is how long a connection lasts that is none of those that end soon after each connect.
const HubStable = time.Minute

// NeedsPerson reports whether a person is needed for the device to be connected, and to stay so: no time heals what
// keeps it away, or it has been away for long.
func (h *HubStatus) NeedsPerson(now time.Time) bool {
	away := now.Sub(h.Since)
	switch {
	case h.IsCutSoon(now):
		return true
	case h.Connected:
		return false
	case away >= HubPatience:
		return true
	}
	switch h.Failure {
	case HubFailureCredentials, HubFailureRefused, HubFailureCertificate:
		return true
	case HubFailureName:
		return away >= namePatience && h.Desired.ReadOn.IsZero() && h.Reported.IsZero()
	}
	return false
}

// IsCutSoon reports whether one connection after the other ends soon, as where two devices have one identity. It stays
// so during a connection that has not lasted yet.
func (h *HubStatus) IsCutSoon(now time.Time) bool {
	return h.Failure == HubFailureReplaced && (!h.Connected || now.Sub(h.Since) < HubStable)
}

// DesiredStatus says what became of the twin's desired properties.
type DesiredStatus struct {
	Version int64     `json:"version,omitempty"` // of the last document that was read; absent: none was
	ReadOn  time.Time `json:"read_on,omitzero"`
	Applied int64     `json:"applied,omitempty"` // version that is in force
	Refused string    `json:"refused,omitempty"` // why Version is not in force; empty: it is
	Denies  int       `json:"denies,omitempty"`  // with Refused: entries of its deny that are in force all the same
	NoRoom  int       `json:"no_room,omitempty"` // entries of deny, also of a later notification, without room
	Idle    []string  `json:"idle,omitempty"`    // what of it concerns nothing that is configured here, a sentence each
}

// EventsStatus counts the events of this device.
type EventsStatus struct {
	Sent    int64 `json:"sent"`
	Waiting int   `json:"waiting"`
	Dropped int64 `json:"dropped"` // the oldest of the least important, when the queue was full

	Suppressed int64 `json:"suppressed"` // that came too often
}

// PrefetchRequest is a token that is to be fetched before anyone asks for it.
type PrefetchRequest struct {
	Resource string `json:"resource"`
	Identity string `json:"identity,omitempty"` // configured name; empty: each that the grants allow for Resource
}

// DesiredProperties is what perceptd takes from "percept" in the desired properties of a twin. Lists are replaced
// whole.
type DesiredProperties struct {
	PolicyChanges []PolicyChangeRequest `json:"policyChanges"`
	Deny          []DenyRequest         `json:"deny"`
	Prefetch      []PrefetchRequest     `json:"prefetch"`
	LogLevel      LogLevel              `json:"logLevel"` // empty: the configured one
}

// LogLevel is the least level of what perceptd's log writes.
type LogLevel string

const (
	LogDebug LogLevel = "debug"
	LogInfo  LogLevel = "info"
	LogWarn  LogLevel = "warn"
	LogError LogLevel = "error"
)
