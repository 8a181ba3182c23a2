// Package identityproxy stands in for Azure App Service's identity endpoint, or Azure Arc's, inside a module: on a
// loopback port of the module's own network, for SDKs that cannot dial a Unix socket. It hands each request for a token
// on to perceptd's token socket, which sees the module's own process there, and decides.
//
// The forms are those of
// https://learn.microsoft.com/azure/app-service/overview-managed-identity#rest-endpoint-reference and
// https://learn.microsoft.com/azure/azure-arc/servers/managed-identity-authentication.
package identityproxy

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/agent/room"
)

// Bounds of what others on the same network can take.
const (
	headerTimeout  = 5 * time.Second                // for a request's header; a client without the secret has no other
	writeTimeout   = answerTimeout + 10*time.Second // for a whole answer
	idleTimeout    = 2 * time.Minute                // of a kept connection
	maxConns       = 256
	maxSocketConns = 32 // connections to perceptd
)

// Options configure a Proxy.
type Options struct {
	// Socket is the token socket's path.
	Socket string
	// Arc makes the proxy speak Azure Arc's form instead of App Service's.
	Arc bool
	// KeyFolder is where the keys of Arc's challenge are written. Empty: ArcKeyFolder, where clients look for them.
	KeyFolder string
}

// Proxy is an identity endpoint. It must be closed.
type Proxy struct {
	room   *room.Room
	holder *os.File // of the port
	server *http.Server
	socket *http.Transport
	port   string
	secret string // what IDENTITY_HEADER has
	keys   *keys  // nil: App Service's form is spoken
}

// Listen opens a Proxy on a free port of 127.0.0.1. Serve answers there.
func Listen(o Options) (*Proxy, error) {
	p := &Proxy{secret: newSecret()}
	if o.Arc {
		var err error
		if p.keys, err = newKeys(o.KeyFolder); err != nil {
			return nil, err
		}
	}
	l, holder, err := listen()
	if err != nil {
		return nil, err
	}
	p.room, p.holder = room.New(l, maxConns, nil), holder
	p.port = strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	p.socket = &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return client.Dial(ctx, o.Socket) },
		MaxConnsPerHost: maxSocketConns, MaxIdleConnsPerHost: maxSocketConns, IdleConnTimeout: idleTimeout,
		DisableCompression: true,
	}
	p.server = &http.Server{
		Handler: http.HandlerFunc(p.serve), ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(io.Discard, "", 0), // what strangers send is not the module's output
	}
	return p, nil
}

// Serve answers requests until Close.
func (p *Proxy) Serve() error {
	if err := p.room.Serve(p.server); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close ends the proxy and the requests under way, and removes the keys that were not used.
func (p *Proxy) Close() error {
	err := p.server.Close()
	_ = p.room.Close() // it is closed already where Serve was called
	_ = p.holder.Close()
	p.socket.CloseIdleConnections()
	if p.keys != nil {
		p.keys.close()
	}
	return err
}

// Holder returns a socket that holds the proxy's port: as long as any process has it open, no other can listen there.
// So a command that inherits it asks no other process for its tokens when the proxy is gone. It is closed with the
// proxy.
func (p *Proxy) Holder() *os.File { return p.holder }

// Variables returns the variables that make SDKs use the proxy, as name=value. The header's value is a secret.
func (p *Proxy) Variables() []string {
	at := "http://127.0.0.1:" + p.port
	if p.keys != nil {
		return []string{"IDENTITY_ENDPOINT=" + at + api.PathIMDSToken, "IMDS_ENDPOINT=" + at}
	}
	return []string{"IDENTITY_ENDPOINT=" + at + api.PathAppServiceToken, "IDENTITY_HEADER=" + p.secret}
}

// serve answers one request: with a refusal, or with perceptd's answer as it is.
func (p *Proxy) serve(w http.ResponseWriter, r *http.Request) {
	answer, refused := p.respond(r)
	if refused != nil {
		answer = refused.reply()
	}
	for name, value := range answer.header {
		w.Header()[name] = []string{value}
	}
	w.WriteHeader(answer.status)
	_, _ = w.Write(answer.body) // a client that has gone needs no answer
}

func (p *Proxy) respond(r *http.Request) (reply, *refusal) {
	if no := p.check(r); no != nil {
		return reply{}, no
	}
	to, _, _ := strings.Cut(r.RequestURI, "?")
	if p.keys != nil {
		return p.handleArc(r, to)
	}
	switch {
	case to != api.PathAppServiceToken:
		return reply{}, refuse(http.StatusBadRequest, "no such path here: tokens are at "+api.PathAppServiceToken+
			", spelled exactly so")
	case !hasOne(r, "X-Identity-Header"):
		return reply{}, refuse(http.StatusBadRequest,
			"the X-IDENTITY-HEADER header must be there once, with the value of IDENTITY_HEADER")
	case !sameSecret(r.Header.Get("X-Identity-Header"), p.secret):
		return reply{}, refuse(http.StatusUnauthorized,
			"the X-IDENTITY-HEADER header is not the value of IDENTITY_HEADER that perceptctl exec has set")
	}
	p.room.Asks(r.Context(), true)
	return p.forward(r, api.PathAppServiceToken, "X-Identity-Header", "exec")
}

// handleArc answers as Azure Arc's agent does: a client must show that it can read a file of this user.
func (p *Proxy) handleArc(r *http.Request, to string) (reply, *refusal) {
	switch {
	case to != api.PathIMDSToken:
		return reply{}, refuse(http.StatusBadRequest, "no such path here: tokens are at "+api.PathIMDSToken+
			", spelled exactly so")
	case !hasOne(r, "Metadata") || !strings.EqualFold(strings.TrimSpace(r.Header.Get("Metadata")), "true"):
		return reply{}, refuse(http.StatusBadRequest,
			"Required metadata header not specified: send Metadata: true, once")
	case r.Header["Authorization"] == nil:
		return reply{}, p.challenge()
	}
	key, basic := strings.CutPrefix(r.Header.Get("Authorization"), "Basic ")
	if !hasOne(r, "Authorization") || !basic || !p.keys.redeem(key) {
		return reply{}, refuse(http.StatusUnauthorized,
			"the Authorization header must be there once, with Basic and the content of the file that the challenge "+
				"named, unchanged and for the first time")
	}
	p.room.Asks(r.Context(), true)
	return p.forward(r, api.PathIMDSToken, "Metadata", "true")
}

func (p *Proxy) challenge() *refusal {
	path, err := p.keys.issue()
	if err != nil {
		return unavailable("the key of the challenge could not be written: " + err.Error())
	}
	no := refuse(http.StatusUnauthorized,
		"the Authorization header must have Basic and the content of the file that WWW-Authenticate names")
	no.header["Www-Authenticate"] = "Basic realm=" + path
	return no
}

// check refuses what no SDK sends: a page in a browser, a name that was made to resolve to this device, a proxy.
func (p *Proxy) check(r *http.Request) *refusal {
	foreign, why := api.ForeignHeader(r.Header)
	switch {
	case r.ProtoMajor != 1 || r.ProtoMinor != 1:
		return refuse(http.StatusBadRequest, "only HTTP/1.1 is spoken here")
	case r.Host != "127.0.0.1:"+p.port && r.Host != "localhost:"+p.port:
		return refuse(http.StatusForbidden,
			"the Host header must be 127.0.0.1 or localhost, with the port of this endpoint")
	case foreign != "":
		return refuse(http.StatusForbidden, "requests with the header "+foreign+" are refused: "+why)
	case r.Method != http.MethodGet:
		no := refuse(http.StatusMethodNotAllowed, "tokens are asked for with GET")
		no.header["Allow"] = http.MethodGet
		return no
	case !strings.HasPrefix(r.RequestURI, "/"):
		return refuse(http.StatusBadRequest, "the request must name a path on this server: this is no proxy")
	case r.ContentLength != 0:
		return refuse(http.StatusBadRequest, "a request for a token has no body")
	}
	return nil
}

// hasOne reports whether a request has a header exactly once, and not empty. name is canonical.
func hasOne(r *http.Request, name string) bool {
	values := r.Header[name]
	return len(values) == 1 && values[0] != ""
}
