package identityproxy

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"

	"perceptd/agent/api"
)

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

// reply is a whole answer.
type reply struct {
	status int
	header map[string]string // by canonical name
	body   []byte
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

// same compares two secrets in a time that tells nothing of them, nor of their lengths.
func same(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}
