// Package identityproxy stands in for Azure App Service's identity endpoint, or Azure Arc's, inside a module: on a loopback port of
// the module's own network, for SDKs that cannot dial a Unix socket. It hands each request for a token on to perceptd's
// token socket, which sees the module's own process there, and decides.
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
	headerTime  = 5 * time.Second          // until a request's header is there; who shows no secret has no other
	answerTime  = longest + 10*time.Second // until an answer has left
	idleTime    = 2 * time.Minute          // of a kept connection
	connections = 256
	onSocket    = 32 // connections to perceptd
)

// Options say how a relay is to be.
type Options struct {
	// Socket is the token socket's path.
	Socket string
	// Arc has the relay speak Azure Arc's form instead of App Service's.
	Arc bool
	// KeyFolder is where the keys of Arc's challenge are written. Empty: ArcKeyFolder, which is where clients look for them.
	KeyFolder string
}

// Relay is one endpoint. Close it.
type Relay struct {
	room   *room.Room
	holder *os.File // of the port
	server *http.Server
	socket *http.Transport
	port   string
	secret string // what IDENTITY_HEADER has
	keys   *keys  // nil: App Service's form is spoken
}

// Listen opens a relay on a port of 127.0.0.1 that is free. Serve answers there.
func Listen(o Options) (*Relay, error) {
	r := &Relay{secret: randomHex()}
	if o.Arc {
		var err error
		if r.keys, err = newKeys(o.KeyFolder); err != nil {
			return nil, err
		}
	}
	l, holder, err := listen()
	if err != nil {
		return nil, err
	}
	r.room, r.holder = room.New(l, connections, nil), holder
	r.port = strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	r.socket = &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return client.Dial(ctx, o.Socket) },
		MaxConnsPerHost: onSocket, MaxIdleConnsPerHost: onSocket, IdleConnTimeout: idleTime, DisableCompression: true,
	}
	r.server = &http.Server{
		Handler: http.HandlerFunc(r.answer), ReadHeaderTimeout: headerTime, ReadTimeout: headerTime,
		WriteTimeout: answerTime, IdleTimeout: idleTime,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(io.Discard, "", 0), // what strangers send is not the module's output
	}
	return r, nil
}

// Serve answers requests until Close.
func (r *Relay) Serve() error {
	if err := r.room.Serve(r.server); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close ends the relay, with the requests under way, and takes away the keys that nobody used.
func (r *Relay) Close() error {
	err := r.server.Close()
	_ = r.room.Close() // it is closed already where Serve was called
	_ = r.holder.Close()
	r.socket.CloseIdleConnections()
	if r.keys != nil {
		r.keys.close()
	}
	return err
}

// Holder returns a socket that holds the relay's port: as long as any process has it open, no other can listen there. A command
// that inherits it asks nobody else for its tokens when the relay is gone. It is closed with the relay.
func (r *Relay) Holder() *os.File { return r.holder }

// Variables returns what leads SDKs to the relay, as name=value. The header's value is a secret.
func (r *Relay) Variables() []string {
	at := "http://127.0.0.1:" + r.port
	if r.keys != nil {
		return []string{"IDENTITY_ENDPOINT=" + at + api.PathIMDSToken, "IMDS_ENDPOINT=" + at}
	}
	return []string{"IDENTITY_ENDPOINT=" + at + api.PathAppServiceToken, "IDENTITY_HEADER=" + r.secret}
}

// answer answers one request: it is refused, or perceptd's answer is given as it is.
func (r *Relay) answer(w http.ResponseWriter, q *http.Request) {
	given, refused := r.handle(q)
	if refused != nil {
		given = refused.reply()
	}
	for name, value := range given.header {
		w.Header()[name] = []string{value}
	}
	w.WriteHeader(given.status)
	_, _ = w.Write(given.body) // who has gone misses nothing
}

func (r *Relay) handle(q *http.Request) (reply, *refusal) {
	if no := r.check(q); no != nil {
		return reply{}, no
	}
	to, _, _ := strings.Cut(q.RequestURI, "?")
	if r.keys != nil {
		return r.handleArc(q, to)
	}
	switch {
	case to != api.PathAppServiceToken:
		return reply{}, refuse(http.StatusBadRequest, "no such path here: tokens are at "+api.PathAppServiceToken+", spelled exactly so")
	case !once(q, "X-Identity-Header"):
		return reply{}, refuse(http.StatusBadRequest, "the X-IDENTITY-HEADER header must be there once, with the value of IDENTITY_HEADER")
	case !same(q.Header.Get("X-Identity-Header"), r.secret):
		return reply{}, refuse(http.StatusUnauthorized, "the X-IDENTITY-HEADER header is not the value of IDENTITY_HEADER that perceptctl exec has set")
	}
	r.room.Asks(q.Context(), true)
	return r.forward(q, api.PathAppServiceToken, "X-Identity-Header", "exec")
}

// handleArc answers as Azure Arc's agent does: who asks must show that it can read a file of this user's.
func (r *Relay) handleArc(q *http.Request, to string) (reply, *refusal) {
	switch {
	case to != api.PathIMDSToken:
		return reply{}, refuse(http.StatusBadRequest, "no such path here: tokens are at "+api.PathIMDSToken+", spelled exactly so")
	case !once(q, "Metadata") || q.Header.Get("Metadata") != "true":
		return reply{}, refuse(http.StatusBadRequest, "Required metadata header not specified: send Metadata: true, once")
	case q.Header["Authorization"] == nil:
		return reply{}, r.challenge()
	}
	key, basic := strings.CutPrefix(q.Header.Get("Authorization"), "Basic ")
	if !once(q, "Authorization") || !basic || !r.keys.redeem(key) {
		return reply{}, refuse(http.StatusUnauthorized, "the Authorization header must be there once, with Basic and the content of the file that the challenge named, unchanged and for the first time")
	}
	r.room.Asks(q.Context(), true)
	return r.forward(q, api.PathIMDSToken, "Metadata", "true")
}

func (r *Relay) challenge() *refusal {
	path, err := r.keys.issue()
	if err != nil {
		return away("the key of the challenge could not be written: " + err.Error())
	}
	no := refuse(http.StatusUnauthorized, "the Authorization header must have Basic and the content of the file that WWW-Authenticate names")
	no.header["Www-Authenticate"] = "Basic realm=" + path
	return no
}

// check refuses what no SDK sends: a page in a browser, a name that was made to resolve to this device, a proxy.
func (r *Relay) check(q *http.Request) *refusal {
	foreign, why := api.ForeignHeader(q.Header)
	switch {
	case q.ProtoMajor != 1 || q.ProtoMinor != 1:
		return refuse(http.StatusBadRequest, "only HTTP/1.1 is spoken here")
	case q.Host != "127.0.0.1:"+r.port && q.Host != "localhost:"+r.port:
		return refuse(http.StatusForbidden, "the Host header must be 127.0.0.1 or localhost, with the port of this endpoint")
	case foreign != "":
		return refuse(http.StatusForbidden, "requests with the header "+foreign+" are refused: "+why)
	case q.Method != http.MethodGet:
		no := refuse(http.StatusMethodNotAllowed, "tokens are asked for with GET")
		no.header["Allow"] = http.MethodGet
		return no
	case !strings.HasPrefix(q.RequestURI, "/"):
		return refuse(http.StatusBadRequest, "the request must name a path on this server: this is no proxy")
	case q.ContentLength != 0:
		return refuse(http.StatusBadRequest, "a request for a token has no body")
	}
	return nil
}

// once reports whether a header is there once, and not empty. name is canonical.
func once(q *http.Request, name string) bool {
	values := q.Header[name]
	return len(values) == 1 && values[0] != ""
}
