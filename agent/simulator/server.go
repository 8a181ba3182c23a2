package simulator

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"perceptd/agent/room"
)

const (
	headerTimeout   = 10 * time.Second
	idleTimeout     = 2 * time.Minute
	shutdownTimeout = time.Second // for answers under way when a Server closes

	maxConns = 256 // at once; beyond it one of another user leaves first
)

// ServerOptions say where and how a Backend is served. The zero value answers as IMDS on a free
// port of 127.0.0.1.
type ServerOptions struct {
	// Backend is what is served. Nil: one of its own, of zero Options.
	Backend *Backend
	// Listen is a loopback address with its port. Empty: 127.0.0.1:0.
	Listen string
	// Form is what the Server answers as. Zero: FormIMDS.
	Form Form
	// AppServicePath is where the App Service form is answered. Empty: /msi/token.
	AppServicePath string
	// Secret is what the App Service form wants in its header. Empty: one of its own.
	Secret string
	// ArcKeyDir is where FormArc puts its key files; it is made where it is missing, and what was made is removed
	// again. Empty: DefaultArcKeyDir.
	ArcKeyDir string
	// LegacyArc makes FormArc an agent from before user-assigned identities, which answers every
	// request with the system-assigned one and does not say so.
	LegacyArc bool
	// DateSkew is added to the Date header, which otherwise is the Backend's clock.
	DateSkew time.Duration
}

// Server is a Backend on a loopback port.
type Server struct {
	handler *handler
	http    *http.Server
	address net.Addr
	form    Form
	secret  string

	served chan struct{} // closed when Serve has returned
	err    error         // why, if Close was not the reason; set before served is closed
	unbind func() bool   // undoes the tie to Start's context
	once   sync.Once
}

// Start serves a Backend until Close is called or ctx is done, whichever comes first. It refuses any
// address but loopback.
func Start(ctx context.Context, o ServerOptions) (*Server, error) {
	secret := cmp.Or(o.Secret, rand.Text())
	h, err := newHandler(o, secret)
	if err != nil {
		return nil, fmt.Errorf("simulator: %w", err)
	}
	listener, err := listen(ctx, o.Listen)
	if err != nil {
		h.close()
		return nil, fmt.Errorf("simulator: %w", err)
	}
	h.room = room.New(listener, maxConns, maySteer)
	s := &Server{
		handler: h, address: listener.Addr(), form: o.Form, secret: secret, served: make(chan struct{}),
		http: &http.Server{
			Handler: h, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
			ErrorLog: log.New(io.Discard, "", 0), // of connections that the faults broke
		},
	}
	go func() {
		defer close(s.served)
		if err := h.room.Serve(s.http); !errors.Is(err, http.ErrServerClosed) {
			s.err = fmt.Errorf("simulator: %w", err)
		}
	}()
	tied := make(chan struct{})
	s.unbind = context.AfterFunc(ctx, func() {
		<-tied // Close needs unbind
		_ = s.Close(ctx)
	})
	close(tied)
	return s, nil
}

func newHandler(o ServerOptions, secret string) (*handler, error) {
	h := &handler{backend: o.Backend, form: o.Form, skew: o.DateSkew, appService: appService(secret)}
	if h.backend == nil {
		h.backend = New(Options{})
	}
	h.appPath = cmp.Or(strings.TrimSuffix(o.AppServicePath, "/"), appServicePath)
	if h.appPath[0] != '/' || h.appPath == metadataPath || strings.HasPrefix(h.appPath+"/", controlPrefix) {
		return nil, fmt.Errorf("the App Service path %q is not a path of its own", h.appPath)
	}
	switch o.Form {
	case FormIMDS:
		h.metadata = imds()
	case FormArc:
		h.metadata = arc()
		if o.LegacyArc {
			h.metadata = legacyArc()
		}
		var err error
		if h.keys, err = openKeyStore(cmp.Or(o.ArcKeyDir, DefaultArcKeyDir)); err != nil {
			return nil, err
		}
	case FormAppService:
	default:
		return nil, fmt.Errorf("%s: choose one of %s", o.Form, strings.Join(forms[:], ", "))
	}
	h.stopped, h.stop = context.WithCancel(context.Background())
	return h, nil
}

// listen opens a port on loopback.
func listen(ctx context.Context, address string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(cmp.Or(address, "127.0.0.1:0"))
	if err != nil {
		return nil, fmt.Errorf("listen address %q: %w", address, err)
	}
	if host == "localhost" {
		host = "127.0.0.1" // whatever the resolver says
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("listen address %q is not on loopback: a simulated back end answers this machine "+
			"alone; use 127.0.0.1 or [::1]", address)
	}
	var config net.ListenConfig
	return config.Listen(ctx, "tcp", net.JoinHostPort(host, port))
}

// Backend returns what is served.
func (s *Server) Backend() *Backend { return s.handler.backend }

// URL returns the address that is listened on, as an URL without a path.
func (s *Server) URL() string { return "http://" + s.address.String() }

// URLVariable is the environment variable that names the URL of a simulated back end that runs. It also shows a client
// that its back end is simulated.
const URLVariable = "PERCEPT_SIMULATOR"

// ClockVariable names the origin of the clock of a simulated back end that runs, where that is not the device's clock:
// who keeps its tokens has to live by it.
const ClockVariable = "PERCEPT_SIMULATOR_CLOCK"

// CheckURL refuses whatever cannot be a Server's URL: they are on loopback.
func CheckURL(text string) error {
	target, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("%q is not a URL", text)
	}
	address, err := netip.ParseAddr(target.Hostname())
	if target.Scheme != "http" || target.Path != "" || err != nil || !address.IsLoopback() {
		return fmt.Errorf("%q is not a simulated back end's URL: it would be like http://127.0.0.1:40342", text)
	}
	return nil
}

// Environment returns the variables, as NAME=value, that point clients at the Server in its form.
// The value of IDENTITY_HEADER lets its bearer have tokens, which open nothing.
func (s *Server) Environment() []string {
	switch s.form {
	case FormArc:
		return []string{"IDENTITY_ENDPOINT=" + s.URL() + metadataPath, "IMDS_ENDPOINT=" + s.URL()}
	case FormAppService:
		return []string{"IDENTITY_ENDPOINT=" + s.URL() + s.handler.appPath, "IDENTITY_HEADER=" + s.secret}
	}
	return []string{"AZURE_POD_IDENTITY_AUTHORITY_HOST=" + s.URL()}
}

// Wait returns when the Server has closed; its error is nil after Close and when Start's context was done.
func (s *Server) Wait() error {
	<-s.served
	return s.err
}

// Close stops listening, lets go of requests that hang, gives answers under way until ctx is done,
// but at most a second, and removes Arc's key files. No goroutine of the Server is left when it
// returns. It may be called more than once.
func (s *Server) Close(ctx context.Context) error {
	s.once.Do(func() {
		s.unbind()
		s.handler.stop()
		grace, cancel := context.WithTimeout(ctx, shutdownTimeout)
		defer cancel()
		if s.http.Shutdown(grace) != nil {
			_ = s.http.Close() // of connections there is nothing left to hear
		}
		<-s.served
		s.handler.close()
	})
	return s.err
}

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
	if !h.beginRequest() {
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

// beginRequest counts a request as running, unless the handler is closed.
func (h *handler) beginRequest() bool {
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
		if !shown || !h.keys.redeem(text) {
			h.challenge(w, r, p, q)
			return
		}
	}
	defer h.backend.beginCall(q.sel, q.resource)()
	f := h.backend.strike(q.resource, false)
	if !h.replaceAnswer(w, r, p, f) {
		h.answer(w, r, p, q, f)
	}
}

// challenge is Arc's first leg: it names the file whose content the second leg has to show.
func (h *handler) challenge(w http.ResponseWriter, r *http.Request, p protocol, q tokenRequest) {
	f := h.backend.strike(q.resource, true)
	if h.replaceAnswer(w, r, p, f) {
		return
	}
	if f.Kind != FaultKeyNoHeader {
		path, err := h.keys.issue(f.Kind)
		if err != nil {
			h.refuse(w, p, refusal{http.StatusInternalServerError, "server_error", "The key file could not be made: " +
				err.Error()})
			return
		}
		w.Header().Set("WWW-Authenticate", "Basic realm="+path)
	}
	body := p.failure(refusal{http.StatusUnauthorized, "unauthorized", "Show the content of the key file"})
	h.send(w, r, f, http.StatusUnauthorized, body)
}

// answer gives the token, bent as f says.
func (h *handler) answer(w http.ResponseWriter, r *http.Request, p protocol, q tokenRequest, f strike) {
	id, err := find(h.backend.identities, q.sel)
	if err != nil {
		h.refuse(w, p, *refusalFor(err))
		return
	}
	if f.Kind == FaultWrongIdentity {
		id = foreignIdentity()
	}
	m, err := h.backend.cached(id, q.resource)
	if err != nil {
		h.refuse(w, p, *refusalFor(err))
		return
	}
	if f.Kind == FaultPastExp {
		m.Text = h.backend.expiredText(m)
	}
	fields := f.alter(p.fields(q, m, h.backend.now()))
	h.send(w, r, f, http.StatusOK, encodeFields(fields))
}

// refuse answers with an error in the form's words.
func (h *handler) refuse(w http.ResponseWriter, p protocol, f refusal) {
	writeJSON(w, f.status, p.failure(f))
}
