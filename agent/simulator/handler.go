package simulator

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"time"

	"perceptd/agent/room"
)

// handler puts a Backend on HTTP. Its close must be called.
type handler struct {
	backend *Backend
	room    *room.Room
	form    Form
	skew    time.Duration

	metadata   protocol // on metadataPath, unless form is FormAppService
	appService protocol
	appPath    string
	keys       *keyStore // nil unless form is FormArc

	stopped context.Context // done when close begins
	stop    context.CancelFunc

	mu      sync.Mutex // protects closed, and running.Add against running.Wait
	closed  bool
	running sync.WaitGroup
}

// ServeHTTP answers one request; after close it ends the connection.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !h.enter() {
		panic(http.ErrAbortHandler)
	}
	defer h.running.Done()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(h.stopped, cancel)()
	r = r.WithContext(ctx)
	h.room.Asks(ctx, false)

	w.Header().Set("Server", "simulated-managed-identity")
	w.Header().Set("Date", h.backend.now().Add(h.skew).UTC().Format(http.TimeFormat))
	path := r.URL.Path
	if path != "/" {
		path = strings.TrimSuffix(path, "/") // an SDK sends one
	}
	switch {
	case strings.HasPrefix(path, controlPrefix):
		h.serveControl(w, r, path)
	case path == h.appPath:
		h.serveToken(w, r, h.appService)
	case path == metadataPath && h.form != FormAppService:
		h.serveToken(w, r, h.metadata)
	default:
		http.NotFound(w, r)
	}
}

// enter counts a request as running, unless the handler is closed.
func (h *handler) enter() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.running.Add(1)
	return true
}

// close lets go of whatever hangs, waits for every request and removes Arc's key files. Requests that
// wait for their peer end only with their connection, so those must be closed by then.
func (h *handler) close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.stop()
	h.running.Wait()
	if h.keys != nil {
		h.keys.close()
	}
}

// serveToken answers a token request in one form.
func (h *handler) serveToken(w http.ResponseWriter, r *http.Request, p protocol) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		h.refuse(w, p, refusal{http.StatusMethodNotAllowed, "invalid_request", "The method must be GET"})
		return
	}
	if refused := p.admit(r); refused != nil {
		h.refuse(w, p, *refused)
		return
	}
	q, refused := p.parse(r.URL.RawQuery)
	if refused != nil {
		h.refuse(w, p, *refused)
		return
	}
	if p.arc {
		text, shown := strings.CutPrefix(r.Header.Get("Authorization"), "Basic ")
		if !shown || !h.keys.use(text) {
			h.challenge(w, r, p, q)
			return
		}
	}
	defer h.backend.begin(q.sel, q.resource)()
	f := h.backend.strike(q.resource, false)
	if !h.instead(w, r, p, f) {
		h.answer(w, r, p, q, f)
	}
}

// challenge is Arc's first leg: it names the file whose content the second leg has to show.
func (h *handler) challenge(w http.ResponseWriter, r *http.Request, p protocol, q tokenRequest) {
	f := h.backend.strike(q.resource, true)
	if h.instead(w, r, p, f) {
		return
	}
	if f.Kind != FaultKeyNoHeader {
		path, err := h.keys.issue(f.Kind)
		if err != nil {
			h.refuse(w, p, refusal{http.StatusInternalServerError, "server_error", "The key file could not be made: " + err.Error()})
			return
		}
		w.Header().Set("WWW-Authenticate", "Basic realm="+path)
	}
	body := p.failure(refusal{http.StatusUnauthorized, "unauthorized", "Show the content of the key file"})
	h.send(w, r, f, http.StatusUnauthorized, body)
}

// answer gives the token, bent as f says.
func (h *handler) answer(w http.ResponseWriter, r *http.Request, p protocol, q tokenRequest, f struck) {
	id, err := find(h.backend.identities, q.sel)
	if err != nil {
		h.refuse(w, p, *refuse(err))
		return
	}
	if f.Kind == FaultWrongIdentity {
		id = stranger()
	}
	m, err := h.backend.issue(id, q.resource)
	if err != nil {
		h.refuse(w, p, *refuse(err))
		return
	}
	if f.Kind == FaultPastExp {
		m.Text = h.backend.expired(m)
	}
	fields := f.bend(p.fields(q, m, h.backend.now()))
	h.send(w, r, f, http.StatusOK, encodeFields(fields))
}

// refuse answers with an error in the form's words.
func (h *handler) refuse(w http.ResponseWriter, p protocol, f refusal) {
	writeJSON(w, f.status, p.failure(f))
}

// writeJSON sends a body; whether the peer got it is the peer's affair.
func writeJSON(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
