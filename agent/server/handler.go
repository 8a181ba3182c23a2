package server

import (
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
)

// door is where the requests of one listener come in: it does every check that all paths share.
type door struct {
	server *Server
	socket socket
	module string          // whose own socket it is, if one's
	answer time.Duration   // until a request must be answered
	down   <-chan struct{} // closed when the listener's connections are to end

	arrivals arrivals
	accepted chan struct{} // closed when nobody accepts any more, and whoever was accepted is among arrivals
}

// ServeHTTP answers one request.
func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := connectionIn(r.Context())
	isLast := !c.Begin()
	path, raw, _ := strings.Cut(r.RequestURI, "?")
	to := find(d.socket, path, r.Method)
	x := d.server.spare.take()
	x.request, x.raw, x.w, x.down, x.connection, x.closes = r, raw, w, d.down, c, isLast
	switch f := d.serve(x, to); {
	case x.streamed: // all is said
	case f != nil:
		d.refuse(w, x, to.form, f)
	default:
		x.answer()
	}
	d.server.spare.giveBack(x)
}

// serve checks the request and lets its route answer.
func (d *door) serve(x *exchange, to *route) (f *fault) {
	defer func() {
		if v := recover(); v != nil {
			f = d.server.panicked(v)
		}
	}()
	if x.connection.Waits() {
		if f := awaitPlace(x); f != nil {
			x.closes = true
			return f
		}
	}
	if f := d.checkCaller(x, to); f != nil {
		return f
	}
	if d.socket == onAdmin && to.path != api.PathHealth {
		if f := d.server.administer(x); f != nil {
			return f
		}
		defer d.server.quotas().administering.Release(x.connection.Key())
	}
	if f := checkOrigin(x.request); f != nil {
		return f
	}
	if d.socket == onLoopback {
		if f := checkLoopback(x.request); f != nil {
			return f
		}
	}
	if f := checkMethod(x.request, to); f != nil {
		return f
	}
	due := &dueContext{Context: x.request.Context(), due: time.Now().Add(d.answer)}
	defer due.stop()
	x.ctx = due
	if f := to.handle(d.server, x); f != nil || x.streamed || !due.waited() || d.socket == onLoopback {
		return f // what a header proved does not end while a request waits
	}
	return d.checkStill(x)
}

// checkStill refuses a caller whose proof has ended while its request waited, or who is proved to be another by now.
func (d *door) checkStill(x *exchange) *fault {
	now, err := provedIn(x.request.Context())
	x.unproved = err
	switch {
	case err != nil:
		return d.refuseUnproved(now, err)
	case err == nil && !now.IsSame(x.caller):
		return &fault{status: http.StatusServiceUnavailable, code: api.CodeUnknownCaller, detail: anotherCaller}
	}
	return nil
}

// anotherCaller is the detail for those who are proved to be somebody else than at first.
const anotherCaller = "who is calling has become another meanwhile: ask again"

// checkCaller makes who asks too often wait or come back, and refuses whoever cannot be proved. The wait comes first: a
// proof may cost more than an answer.
func (d *door) checkCaller(x *exchange, to *route) *fault {
	ctx := x.request.Context()
	if d.socket == onLoopback {
		x.caller = peerIn(ctx).caller()
		return d.server.awaitTurn(x)
	}
	seen, _ := seenIn(ctx)
	x.caller = seen
	if d.socket == onToken && x.isRateLimited(to) {
		if f := d.server.awaitTurn(x); f != nil {
			return f
		}
	}
	if x.caller, x.unproved = provedIn(ctx); x.unproved == nil {
		return nil
	}
	f := d.refuseUnproved(x.caller, x.unproved)
	if to.path == api.PathWhoAmI && d.socket == onToken && !f.again {
		x.closes = true // who connects anew is proved anew, and until then keeps no place
		return nil
	}
	return f
}

// refuseUnproved notes a caller that could not be proved, and returns what it is told. known is what is known all the same. Who
// can be proved by asking again is not denied, and so not noted.
func (d *door) refuseUnproved(known agent.Caller, err error) *fault {
	var why *attest.UnprovedError
	if errors.As(err, &why) && why.Again {
		return &fault{
			status: http.StatusServiceUnavailable, code: api.CodeAskAgain, retryAfter: time.Second, again: true,
			detail: why.Error() + ": " + why.Hint,
		}
	}
	known.Module = d.module
	d.server.Agent.Unproved(known, err)
	return &fault{
		status: http.StatusForbidden, code: api.CodeUnknownCaller,
		detail: "who is calling could not be proved: call from a process on this device that the daemon can see; GET " + api.PathWhoAmI + " tells what is missing",
	}
}

// refuse writes f in the form's shape.
func (d *door) refuse(w http.ResponseWriter, x *exchange, shape form, f *fault) {
	if d.socket != onAdmin && !f.counted {
		d.server.count(f)
	}
	h := w.Header()
	if f.allow != "" {
		h.Set("Allow", f.allow)
	}
	if f.status == http.StatusServiceUnavailable || f.status == http.StatusTooManyRequests {
		h.Set("Retry-After", strconv.Itoa(f.retrySeconds()))
	}
	if x.closes || !(f.again && hearsAgain(x.request)) && (x.request.ContentLength != 0 || x.unproved != nil) {
		h.Set("Connection", "close") // else net/http reads the body before it answers; and who cannot be proved keeps no place
	}
	if shape == formV1 {
		d.server.logRefusal(f, "")
		write(w, f.status, problemContent, f.problem())
		return
	}
	correlationID := newCorrelationID()
	d.server.logRefusal(f, correlationID)
	write(w, f.status, jsonContent, f.sdkError(correlationID))
}

// hearsAgain reads what there is of a request and reports whether the next one on its connection proves the caller.
func hearsAgain(r *http.Request) bool {
	if _, err := io.CopyN(io.Discard, r.Body, maxBody+1); err != io.EOF {
		return false
	}
	proof, err := attest.FromContext(r.Context())
	return err == nil && proof.HearAgain()
}

// count counts a request on a token socket that the agent did not see.
func (s *Server) count(f *fault) {
	switch f.code {
	case api.CodeUnknownCaller, api.CodeAskAgain, api.CodeNotGranted:
		s.denied.Add(1)
	case api.CodeInternal, api.CodeUnreachable:
		s.failed.Add(1)
	default:
		s.invalid.Add(1)
	}
}
