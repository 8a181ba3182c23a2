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
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
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

func randomHex() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails: it would end the program
	return hex.EncodeToString(b[:])
}
