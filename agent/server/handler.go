package server

import (
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
)

// handler is the HTTP handler of one listener: it does every check that all paths share.
type handler struct {
	server     *Server
	socket     socket
	module     string          // the module whose own socket it is, or empty
	answerTime time.Duration   // until a request must be answered
	stopping   <-chan struct{} // closed when the listener's connections are to end

	open     openConns
	accepted chan struct{} // closed when nothing is accepted any more, and every accepted connection is among open
}

// ServeHTTP answers one request.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := connectionIn(r.Context())
	isLast := !c.Begin()
	path, raw, _ := strings.Cut(r.RequestURI, "?")
	to := findRoute(h.socket, path, r.Method)
	req := h.server.pool.get()
	req.http, req.raw, req.w, req.stopping, req.conn, req.closes = r, raw, w, h.stopping, c, isLast
	switch e := h.serve(req, to); {
	case req.streamed: // all is said
	case e != nil:
		h.refuse(w, req, to.form, e)
	default:
		req.answer()
	}
	h.server.pool.put(req)
}

// serve checks the request and lets its route answer.
func (h *handler) serve(req *request, to *route) (e *apiError) {
	defer func() {
		if v := recover(); v != nil {
			e = h.server.panicked(v)
		}
	}()
	if req.conn.Waits() {
		if e := awaitPlace(req); e != nil {
			req.closes = true
			return e
		}
	}
	if e := h.checkCaller(req, to); e != nil {
		return e
	}
	if h.socket == onAdmin && to.path != api.PathHealth {
		if e := h.server.administer(req); e != nil {
			return e
		}
		defer h.server.quotas().administering.Release(req.conn.Key())
	}
	if e := checkOrigin(req.http); e != nil {
		return e
	}
	if h.socket == onLoopback {
		if e := checkLoopback(req.http); e != nil {
			return e
		}
	}
	if e := checkMethod(req.http, to); e != nil {
		return e
	}
	due := &lazyDeadline{Context: req.http.Context(), deadline: time.Now().Add(h.answerTime)}
	defer due.stop()
	req.ctx = due
	if e := to.handle(h.server, req); e != nil || req.streamed || !due.isStarted() || h.socket == onLoopback {
		return e // what a header attests does not end while a request waits
	}
	return h.checkStill(req)
}

// checkStill refuses a caller whose attestation ended while its request waited, or shows a different caller now.
func (h *handler) checkStill(req *request) *apiError {
	now, err := attestedCaller(req.http.Context())
	req.unattested = err
	switch {
	case err != nil:
		return h.refuseUnattested(now, err)
	case !now.IsSame(req.caller):
		return &apiError{status: http.StatusServiceUnavailable, code: api.CodeUnknownCaller, detail: callerChanged}
	}
	return nil
}

// callerChanged is the detail for callers whose attestation shows a different caller than at first.
const callerChanged = "who is calling has become another meanwhile: ask again"

// checkMethod refuses another method than the route's, if that has one, and a body where there is to be none.
func checkMethod(r *http.Request, to *route) *apiError {
	switch {
	case to.method != "" && r.Method != to.method:
		allow := strings.Join(to.methods(), ", ")
		return &apiError{
			status: http.StatusMethodNotAllowed, code: api.CodeMethod, allow: allow,
			detail: "this path answers " + allow + " only",
		}
	case r.Method != http.MethodPost && r.ContentLength != 0: // -1: chunked
		return badRequest("a " + r.Method + " request must not have a body")
	}
	return nil
}

// checkCaller lets a caller that asks too often wait or come back, and refuses one that cannot be proved. The wait
// comes first: an attestation may cost more than an answer.
func (h *handler) checkCaller(req *request, to *route) *apiError {
	ctx := req.http.Context()
	if h.socket == onLoopback {
		req.caller = peerIn(ctx).caller()
		return h.server.awaitTurn(req)
	}
	seen, _ := presumedCaller(ctx)
	req.caller = seen
	if h.socket == onToken && req.isRateLimited(to) {
		if e := h.server.awaitTurn(req); e != nil {
			return e
		}
	}
	if req.caller, req.unattested = attestedCaller(ctx); req.unattested == nil {
		return nil
	}
	e := h.refuseUnattested(req.caller, req.unattested)
	if to.path == api.PathWhoAmI && h.socket == onToken && !e.again {
		req.closes = true // a new connection is proved anew, and until then the caller keeps no place
		return nil
	}
	return e
}

// refuseUnattested records a caller that could not be proved, and returns its answer. known is what is known of it. A
// caller that can be proved by asking again is not denied, and so not recorded.
func (h *handler) refuseUnattested(known grants.Caller, err error) *apiError {
	var why *attest.Error
	if errors.As(err, &why) && why.Retryable {
		return &apiError{
			status: http.StatusServiceUnavailable, code: api.CodeAskAgain, retryAfter: time.Second, again: true,
			detail: why.Error() + ": " + why.Hint,
		}
	}
	known.Module = h.module
	h.server.Agent.AuditUnattested(known, err)
	return &apiError{
		status: http.StatusForbidden, code: api.CodeUnknownCaller,
		detail: "who is calling could not be proved: call from a process on this device that the daemon can see; GET " +
			api.PathWhoAmI + " tells what is missing",
	}
}

// refuse writes e in the form's shape.
func (h *handler) refuse(w http.ResponseWriter, req *request, shape form, e *apiError) {
	if h.socket != onAdmin && !e.counted {
		h.server.count(e)
	}
	header := w.Header()
	if e.allow != "" {
		header.Set("Allow", e.allow)
	}
	if e.status == http.StatusServiceUnavailable || e.status == http.StatusTooManyRequests {
		header.Set("Retry-After", strconv.Itoa(e.retrySeconds()))
	}
	if req.closes || !(e.again && drainForRetry(req.http)) && (req.http.ContentLength != 0 || req.unattested != nil) {
		// Else net/http reads the body before it answers; and a caller that cannot be proved keeps no place.
		header.Set("Connection", "close")
	}
	if shape == formV1 {
		h.server.logRefusal(e, "")
		write(w, e.status, problemContent, e.problem())
		return
	}
	correlationID := newCorrelationID()
	h.server.logRefusal(e, correlationID)
	write(w, e.status, jsonContent, e.sdkError(shape, correlationID))
}

// drainForRetry reads what there is of a request and reports whether the next one on its connection proves the caller.
func drainForRetry(r *http.Request) bool {
	if _, err := io.CopyN(io.Discard, r.Body, maxBody+1); err != io.EOF {
		return false
	}
	attestation, err := attest.FromContext(r.Context())
	return err == nil && attestation.AttestByNextRequest()
}

// count counts a request on a token socket that the agent did not see.
func (s *Server) count(e *apiError) {
	switch e.code {
	case api.CodeUnknownCaller, api.CodeAskAgain, api.CodeNotGranted, api.CodeFaultyGrant, api.CodeDenied:
		s.denied.Add(1)
	case api.CodeInternal, api.CodeUnreachable, api.CodeNoConfiguration:
		s.failed.Add(1)
	default:
		s.invalid.Add(1)
	}
}
