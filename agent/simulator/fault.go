package simulator

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// FaultKind is one way of going wrong.
type FaultKind uint8

const (
	FaultStatus        FaultKind = iota + 1 // answers with Fault.Status
	FaultThrottle                           // answers 429
	FaultHang                               // answers when the faults are cleared, or never
	FaultSlowBody                           // sends the answer's body a byte at a time
	FaultReset                              // resets the connection
	FaultTruncated                          // ends the connection in the middle of the body
	FaultHTML                               // answers Fault.Status, or 200, with a page, as proxies, filters and captive portals do
	FaultNotJSON                            // answers 200 with text that is not JSON
	FaultHugeBody                           // answers 200 with JSON of Fault.Size bytes
	FaultGzipBomb                           // answers 200 with few bytes that unpack to Fault.Size
	FaultRedirect                           // sends the caller to Fault.Location
	FaultTimes                              // lies in expires_in and expires_on
	FaultWrongIdentity                      // gives the token of an identity the device does not have
	FaultEmptyToken                         // gives a token without text
	FaultUnavailable                        // answers 400 and says that Entra ID is temporarily unavailable
	FaultPastExp                            // gives a token that expired an hour ago by its own exp, with good times beside it
	FaultKeyOutside                         // Arc's key file is in another directory
	FaultKeySymlink                         // Arc's key file is a symbolic link
	FaultKeyDirectory                       // Arc's key file is a directory
	FaultKeyFIFO                            // Arc's key file is a named pipe that nobody writes to
	FaultKeyTooBig                          // Arc's key file is longer than the 4,096 bytes allowed
	FaultKeyNoHeader                        // Arc's challenge names no key file
)

var faultNames = [...]string{
	FaultStatus: "status", FaultThrottle: "throttle", FaultHang: "hang", FaultSlowBody: "slow-body",
	FaultReset: "reset", FaultTruncated: "truncated", FaultHTML: "html", FaultNotJSON: "not-json",
	FaultHugeBody: "huge-body", FaultGzipBomb: "gzip-bomb", FaultRedirect: "redirect", FaultTimes: "times",
	FaultWrongIdentity: "wrong-identity", FaultEmptyToken: "empty-token",
	FaultUnavailable: "unavailable", FaultPastExp: "past-exp",
	FaultKeyOutside: "key-outside", FaultKeySymlink: "key-symlink", FaultKeyDirectory: "key-directory",
	FaultKeyFIFO: "key-fifo", FaultKeyTooBig: "key-too-big", FaultKeyNoHeader: "key-no-header",
}

// FaultKinds returns every kind, in the order of the constants.
func FaultKinds() []FaultKind {
	var kinds []FaultKind
	for k := FaultStatus; int(k) < len(faultNames); k++ {
		kinds = append(kinds, k)
	}
	return kinds
}

func (k FaultKind) String() string {
	if !k.known() {
		return "no fault"
	}
	return faultNames[k]
}

func (k FaultKind) known() bool { return k > 0 && int(k) < len(faultNames) }

// ParseFaultKind is String's inverse; its error lists the choices.
func ParseFaultKind(s string) (FaultKind, error) {
	for _, k := range FaultKinds() {
		if s == k.String() {
			return k, nil
		}
	}
	return 0, fmt.Errorf("unknown fault %q: choose one of %s", s, strings.Join(faultNames[1:], ", "))
}

// MarshalText is String, for the control path.
func (k FaultKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText is ParseFaultKind, for the control path.
func (k *FaultKind) UnmarshalText(text []byte) (err error) {
	*k, err = ParseFaultKind(string(text))
	return err
}

// onChallenge reports whether the kind concerns Arc's first leg alone, which names the key file.
func (k FaultKind) onChallenge() bool { return k >= FaultKeyOutside }

// bends reports whether the kind changes the token that is answered with.
func (k FaultKind) bends() bool {
	return k == FaultTimes || k == FaultWrongIdentity || k == FaultEmptyToken || k == FaultPastExp
}

// Fault is something that goes wrong with well-formed token requests. Where several match a request,
// the one that was added first strikes.
type Fault struct {
	Kind FaultKind `json:"kind"`

	Count       int           `json:"count,omitempty"`       // requests it strikes; 0: no limit
	For         time.Duration `json:"-"`                     // by the back end's clock; 0: until cleared
	Probability float64       `json:"probability,omitempty"` // above 0 and up to 1; 0: 1
	Resource    string        `json:"resource,omitempty"`    // only requests for it; empty: all
	Challenge   bool          `json:"challenge,omitempty"`   // on Arc, the first leg instead of the second

	Status       int    `json:"status,omitempty"`         // of FaultStatus, and FaultHTML where 0 is 200: 200 to 599
	RetryAfter   string `json:"retry_after,omitempty"`    // of FaultStatus, FaultThrottle and FaultUnavailable, as is; empty: no header
	RetryAfterMS string `json:"retry_after_ms,omitempty"` // likewise, in the header x-ms-retry-after-ms

	Body     string        `json:"body,omitempty"`     // instead of the usual body, where the kind has one
	Size     int64         `json:"size,omitempty"`     // of FaultHugeBody and FaultGzipBomb, in bytes; 0: 64 MiB
	Location string        `json:"location,omitempty"` // of FaultRedirect; empty: a loopback port where nobody listens
	Every    time.Duration `json:"-"`                  // of FaultSlowBody, between bytes in real time; 0: 50 ms

	// Of FaultTimes: empty leaves the field true, "missing" leaves it out, a signed duration such as
	// "-25h" or "+90s" is added to the truth, anything else is written as is ("never", "0").
	ExpiresIn string `json:"expires_in,omitempty"`
	ExpiresOn string `json:"expires_on,omitempty"`
}

// missing is what leaves a time out of an answer.
const missing = "missing"

// check returns f with its defaults filled in, or what is wrong with it.
func (f Fault) check() (Fault, error) {
	if f.Probability == 0 {
		f.Probability = 1
	}
	if f.Size == 0 {
		f.Size = 64 << 20
	}
	if f.Every == 0 {
		f.Every = 50 * time.Millisecond
	}
	if f.Location == "" {
		f.Location = "http://127.0.0.1:9/elsewhere"
	}
	switch {
	case !f.Kind.known():
		return f, fmt.Errorf("a fault needs a kind: choose one of %s", strings.Join(faultNames[1:], ", "))
	case f.Count < 0, f.For < 0, f.Size < 0, f.Every < 0:
		return f, errors.New("a fault's count, size and durations are not negative")
	case !(f.Probability > 0 && f.Probability <= 1):
		return f, errors.New("a fault's probability is above 0 and at most 1")
	case f.Kind == FaultStatus && (f.Status < http.StatusOK || f.Status > 599):
		return f, errors.New("a status fault needs a status from 200 to 599")
	case f.Kind == FaultHTML && f.Status != 0 && (f.Status < http.StatusOK || f.Status > 599):
		return f, errors.New("a page comes with a status from 200 to 599")
	case f.Kind == FaultTimes && f.ExpiresIn == "" && f.ExpiresOn == "":
		return f, errors.New("a times fault needs expires_in or expires_on")
	case f.Challenge && f.Kind.bends():
		return f, fmt.Errorf("a %s fault cannot strike the challenge, which carries no token", f.Kind)
	case strings.ContainsAny(f.RetryAfter+f.RetryAfterMS+f.Location, "\r\n"):
		return f, errors.New("a header value is one line")
	}
	return f, nil
}
