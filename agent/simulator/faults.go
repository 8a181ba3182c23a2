package simulator

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// FaultKind is one way of going wrong.
type FaultKind uint8

const (
	FaultStatus    FaultKind = iota + 1 // answers with Fault.Status
	FaultThrottle                       // answers 429
	FaultHang                           // answers when the faults are cleared, or never
	FaultSlowBody                       // sends the answer's body a byte at a time
	FaultReset                          // resets the connection
	FaultTruncated                      // ends the connection in the middle of the body
	// answers Fault.Status, or 200, with a page, as proxies, filters and captive portals do
	FaultHTML
	FaultNotJSON       // answers 200 with text that is not JSON
	FaultHugeBody      // answers 200 with JSON of Fault.Size bytes
	FaultGzipBomb      // answers 200 with few bytes that unpack to Fault.Size
	FaultRedirect      // sends the caller to Fault.Location
	FaultTimes         // lies in expires_in and expires_on
	FaultWrongIdentity // gives the token of an identity the device does not have
	FaultEmptyToken    // gives a token without text
	FaultUnavailable   // answers 400 and says that Entra ID is temporarily unavailable
	// gives a token that expired an hour ago by its own exp, with good times beside it
	FaultPastExp
	FaultKeyOutside   // Arc's key file is in another directory
	FaultKeySymlink   // Arc's key file is a symbolic link
	FaultKeyDirectory // Arc's key file is a directory
	FaultKeyFIFO      // Arc's key file is a named pipe without a writer
	FaultKeyTooBig    // Arc's key file is longer than the 4,096 bytes allowed
	FaultKeyNoHeader  // Arc's challenge names no key file
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

// altersToken reports whether the kind changes the token that is answered with.
func (k FaultKind) altersToken() bool {
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

	Status int `json:"status,omitempty"` // of FaultStatus, and FaultHTML where 0 is 200: 200 to 599
	// of FaultStatus, FaultThrottle and FaultUnavailable, as is; empty: no header
	RetryAfter   string `json:"retry_after,omitempty"`
	RetryAfterMS string `json:"retry_after_ms,omitempty"` // likewise, in the header x-ms-retry-after-ms

	Body     string        `json:"body,omitempty"`     // instead of the usual body, where the kind has one
	Size     int64         `json:"size,omitempty"`     // of FaultHugeBody and FaultGzipBomb, in bytes; 0: 64 MiB
	Location string        `json:"location,omitempty"` // of FaultRedirect; empty: a loopback port without a listener
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
	case f.Challenge && f.Kind.altersToken():
		return f, fmt.Errorf("a %s fault cannot strike the challenge, which carries no token", f.Kind)
	case strings.ContainsAny(f.RetryAfter+f.RetryAfterMS+f.Location, "\r\n"):
		return f, errors.New("a header value is one line")
	}
	return f, nil
}

// maxFaults bounds how many are in force at once.
const maxFaults = 256

// faultSet is the faults in force, in the order in which they were added. The Backend's lock protects it.
type faultSet struct {
	active   []*ActiveFault
	drawn    uint64        // odds drawn so far
	released chan struct{} // closed when the faults are cleared; nil until one strikes
}

// ActiveFault is a fault in force and what became of it.
type ActiveFault struct {
	Fault
	Struck int       // requests so far
	Until  time.Time // by the back end's clock; zero without an end
}

// strike is a fault that hit a request. The zero value is none.
type strike struct {
	Fault
	released <-chan struct{} // closed when the faults are cleared
}

// AddFault puts a fault in force, or says what is wrong with it.
func (b *Backend) AddFault(f Fault) error {
	f, err := f.check()
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	b.faults.dropEnded(now)
	if len(b.faults.active) == maxFaults {
		return fmt.Errorf("%d faults are in force already", maxFaults)
	}
	a := &ActiveFault{Fault: f}
	if f.For > 0 {
		a.Until = now.Add(f.For)
	}
	b.faults.active = append(b.faults.active, a)
	return nil
}

// ClearFaults ends every fault; requests that hang are answered.
func (b *Backend) ClearFaults() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults.active = nil
	if b.faults.released != nil {
		close(b.faults.released)
		b.faults.released = nil
	}
}

// Faults returns those in force, in the order in which they were added.
func (b *Backend) Faults() []ActiveFault {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults.dropEnded(b.now())
	var all []ActiveFault
	for _, a := range b.faults.active {
		all = append(all, *a)
	}
	return all
}

// strike returns the fault that hits a request for resource, on Arc's first leg or on any other.
func (b *Backend) strike(resource string, challenge bool) strike {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &b.faults
	s.dropEnded(b.now())
	for _, a := range s.active {
		if a.Resource != "" && a.Resource != resource || (a.Challenge || a.Kind.onChallenge()) != challenge {
			continue
		}
		s.drawn++
		if b.random("fault", s.drawn) >= a.Probability {
			continue
		}
		a.Struck++
		if s.released == nil {
			s.released = make(chan struct{})
		}
		return strike{a.Fault, s.released}
	}
	return strike{}
}

func (s *faultSet) dropEnded(now time.Time) {
	s.active = slices.DeleteFunc(s.active, func(a *ActiveFault) bool {
		return a.Count > 0 && a.Struck >= a.Count || !a.Until.IsZero() && !now.Before(a.Until)
	})
}

const (
	portalPage = "<!DOCTYPE html>\n<title>Simulated portal</title>\n<p>Please sign in to use this network.\n"
	notJSON    = "this is not JSON"
	chunk      = 32 << 10 // bytes of a huge body written at once
)

// replaceAnswer does what a fault does instead of an answer, and reports whether it did: a request that
// hung until the faults were cleared is answered after all.
func (h *handler) replaceAnswer(w http.ResponseWriter, r *http.Request, p protocol, f strike) bool {
	switch f.Kind {
	case FaultStatus:
		h.fail(w, p, f, refusal{f.Status, "simulated_fault", "Simulated fault: status " + strconv.Itoa(f.Status)})
	case FaultThrottle:
		h.fail(w, p, f, refusal{http.StatusTooManyRequests, "invalid_request",
			"Temporarily throttled, too many requests"})
	case FaultUnavailable:
		h.fail(w, p, f, refusal{http.StatusBadRequest, "temporarily_unavailable",
			"AADSTS90033: A transient error has occurred. Please try again."})
	case FaultHang:
		select {
		case <-f.released:
			return false
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	case FaultReset:
		reset(w)
	case FaultHTML:
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(max(f.Status, http.StatusOK))
		_, _ = io.WriteString(w, cmp.Or(f.Body, portalPage))
	case FaultNotJSON:
		writeJSON(w, http.StatusOK, []byte(cmp.Or(f.Body, notJSON)))
	case FaultHugeBody:
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		writeHuge(r.Context(), w, f.Size)
	case FaultGzipBomb:
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Content-Encoding", "gzip") // whether it was asked for or not
		unpacked, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		writeHuge(r.Context(), unpacked, f.Size)
		_ = unpacked.Close()
	case FaultRedirect:
		w.Header().Set("Location", f.Location)
		w.WriteHeader(http.StatusFound)
	default:
		return false
	}
	return true
}

// fail answers with an error, and with the fault's own body and Retry-After where it has them.
func (h *handler) fail(w http.ResponseWriter, p protocol, f strike, as refusal) {
	if f.RetryAfter != "" {
		w.Header().Set("Retry-After", f.RetryAfter)
	}
	if f.RetryAfterMS != "" {
		w.Header().Set("x-ms-retry-after-ms", f.RetryAfterMS)
	}
	body := p.failure(as)
	if f.Body != "" {
		body = []byte(f.Body)
	}
	writeJSON(w, as.status, body)
}

// reset ends the connection so that the peer sees a reset rather than an end of file.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil { // not a connection of its own: ending the answer is all there is
		panic(http.ErrAbortHandler)
	}
	if wrapped, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = wrapped.NetConn()
	}
	if tcp, ok := conn.(interface{ SetLinger(seconds int) error }); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// writeHuge writes a JSON object of size bytes, or less when the peer has had enough.
func writeHuge(ctx context.Context, w io.Writer, size int64) {
	const head, tail = `{"access_token":"`, `"}`
	filler := bytes.Repeat([]byte{'A'}, chunk)
	if _, err := io.WriteString(w, head); err != nil {
		return
	}
	for left := size - int64(len(head)+len(tail)); left > 0; {
		if ctx.Err() != nil {
			panic(http.ErrAbortHandler)
		}
		n, err := w.Write(filler[:min(left, chunk)])
		if err != nil {
			return
		}
		left -= int64(n)
	}
	_, _ = io.WriteString(w, tail)
}

// alter changes an answer's fields as the fault says.
func (f strike) alter(fields []field) []field {
	var altered []field
	for _, o := range fields {
		present := true
		switch {
		case f.Kind == FaultEmptyToken && o.name == "access_token":
			o.value = ""
		case f.Kind == FaultTimes && o.name == "expires_in":
			o.value, present = alterSeconds(o.value, f.ExpiresIn)
		case f.Kind == FaultTimes && o.name == "expires_on":
			o.value, present = alterSeconds(o.value, f.ExpiresOn)
		}
		if present {
			altered = append(altered, o)
		}
	}
	return altered
}

// alterSeconds returns what is written instead of a number of seconds; present: it is not left out. See
// Fault.ExpiresIn.
func alterSeconds(truth, how string) (value string, present bool) {
	switch {
	case how == "":
		return truth, true
	case how == missing:
		return "", false
	case how[0] != '+' && how[0] != '-':
		return how, true
	}
	by, err := time.ParseDuration(how)
	if err != nil {
		return how, true
	}
	seconds, _ := strconv.ParseInt(truth, 10, 64) // we wrote it
	return strconv.FormatInt(seconds+int64(by/time.Second), 10), true
}

// send writes a body whole, or as FaultSlowBody and FaultTruncated do.
func (h *handler) send(w http.ResponseWriter, r *http.Request, f strike, status int, body []byte) {
	if f.Kind != FaultSlowBody && f.Kind != FaultTruncated {
		writeJSON(w, status, body)
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if f.Kind == FaultTruncated {
		writeJSON(w, status, body[:len(body)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	writeJSON(w, status, nil)
	tick := time.NewTicker(f.Every)
	defer tick.Stop()
	for i := range body {
		select {
		case <-tick.C:
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(body[i : i+1]); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
	}
}
