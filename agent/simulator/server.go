package simulator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"perceptd/agent/room"
)

const (
	headerTime = 10 * time.Second
	idleTime   = 2 * time.Minute
	closeGrace = time.Second // for answers under way when a Server closes

	connections = 256 // at once; beyond it one of another user leaves first
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
	secret := rand.Text()
	h, err := newHandler(o, secret)
	if err != nil {
		return nil, fmt.Errorf("simulator: %w", err)
	}
	listener, err := listen(ctx, o.Listen)
	if err != nil {
		h.close()
		return nil, fmt.Errorf("simulator: %w", err)
	}
	h.room = room.New(listener, connections, maySteer)
	s := &Server{
		handler: h, address: listener.Addr(), form: o.Form, secret: secret, served: make(chan struct{}),
		http: &http.Server{
			Handler: h, ReadHeaderTimeout: headerTime, IdleTimeout: idleTime,
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
	h.appPath = orElse(strings.TrimSuffix(o.AppServicePath, "/"), appServicePath)
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
		if h.keys, err = openKeyStore(orElse(o.ArcKeyDir, DefaultArcKeyDir)); err != nil {
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
	host, port, err := net.SplitHostPort(orElse(address, "127.0.0.1:0"))
	if err != nil {
		return nil, fmt.Errorf("listen address %q: %w", address, err)
	}
	if host == "localhost" {
		host = "127.0.0.1" // whatever the resolver says
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("listen address %q is not on loopback: a simulated back end answers this machine alone; use 127.0.0.1 or [::1]", address)
	}
	var config net.ListenConfig
	return config.Listen(ctx, "tcp", net.JoinHostPort(host, port))
}

// Backend returns what is served.
func (s *Server) Backend() *Backend { return s.handler.backend }

// Addr returns the address that is listened on.
func (s *Server) Addr() net.Addr { return s.address }

// URL returns that address as an URL without a path.
func (s *Server) URL() string { return "http://" + s.address.String() }

// URLVariable is the environment variable that names the URL of a simulated back end that runs. Who is pointed at one is told
// so by it, too.
const URLVariable = "PERCEPT_SIMULATOR"

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
		grace, cancel := context.WithTimeout(ctx, closeGrace)
		defer cancel()
		if s.http.Shutdown(grace) != nil {
			_ = s.http.Close() // of connections there is nothing left to hear
		}
		<-s.served
		s.handler.close()
	})
	return s.err
}
