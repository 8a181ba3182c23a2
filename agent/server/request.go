package server

import (
	"context"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/server/limit"
)

// request is one request and the answer to it.
type request struct {
	ctx    *lazyDeadline // ends when the answer is due or the caller has gone
	caller grants.Caller
	conn   *limit.Conn

	unattested error // why the caller could not be proved; then caller is what is known of it
	http       *http.Request
	raw        string // the request's query as it was sent
	query      query
	stopping   <-chan struct{} // the handler's

	status      int      // of the answer; 0 means 200
	body        []byte   // of the answer: JSON
	permissions []string // of the answer: the value of api.PermissionsHeader; nil: none
	audience    string   // of the answer: the value of api.AudienceHeader; empty: none

	w        http.ResponseWriter // for what comes before the answer, or instead of it
	streamed bool                // the handler has written the answer to w
	closes   bool                // the connection ends with the answer
}

// Header values that are the same on every answer. net/http only reads them.
var (
	jsonContent    = []string{"application/json"}
	problemContent = []string{"application/problem+json"}
	noStore        = []string{"no-store"}
)

// answer sends what the route left.
func (req *request) answer() {
	if req.permissions != nil {
		req.w.Header()[api.PermissionsHeader] = req.permissions
	}
	if req.audience != "" {
		req.w.Header().Set(api.AudienceHeader, req.audience)
	}
	if req.closes {
		req.w.Header().Set("Connection", "close")
	}
	write(req.w, req.status, jsonContent, req.body)
}

// write sends a whole answer at once. Status 0 is 200.
func write(w http.ResponseWriter, status int, content []string, body []byte) {
	h := w.Header()
	h["Content-Type"] = content
	h["Cache-Control"] = noStore
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	if status != 0 {
		w.WriteHeader(status)
	}
	_, _ = w.Write(body) // a caller that has gone needs no answer
}

// requestPool holds requests whose buffers later ones can use.
type requestPool struct{ pool sync.Pool }

func (s *requestPool) get() *request {
	if req, ok := s.pool.Get().(*request); ok {
		return req
	}
	return new(request)
}

// maxPooledBody bounds the buffers that the pool keeps: a single large answer is not one of them.
const maxPooledBody = 64 << 10

func (s *requestPool) put(req *request) {
	if cap(req.body) > maxPooledBody {
		return
	}
	clear(req.body) // a token's text stays no longer than needed
	*req = request{body: req.body[:0]}
	s.pool.Put(req)
}

// lazyDeadline is a request's context that also ends when the answer is due. Unlike context.WithDeadline it starts its
// timer only when a caller of Done or Err waits. A request whose token is there does not.
type lazyDeadline struct {
	context.Context // the request's
	deadline        time.Time

	once   sync.Once
	timed  context.Context
	cancel context.CancelFunc
}

func (c *lazyDeadline) start() {
	c.timed, c.cancel = context.WithDeadline(c.Context, c.deadline)
}

// extend moves the deadline. Call it before Done and Err.
func (c *lazyDeadline) extend(by time.Duration) { c.deadline = c.deadline.Add(by) }

// Deadline returns when the answer is due.
func (c *lazyDeadline) Deadline() (time.Time, bool) { return c.deadline, true }

// Done starts the timer.
func (c *lazyDeadline) Done() <-chan struct{} {
	c.once.Do(c.start)
	return c.timed.Done()
}

// Err agrees with Done.
func (c *lazyDeadline) Err() error {
	c.once.Do(c.start)
	return c.timed.Err()
}

// isStarted reports whether the request has waited. Call it when nothing waits any more.
func (c *lazyDeadline) isStarted() bool { return c.cancel != nil }

// stop frees the timer. Call it when nothing waits any more.
func (c *lazyDeadline) stop() {
	if c.cancel != nil {
		c.cancel()
	}
}

// untilStopping returns the request's context, ended as well when the daemon goes down.
func (req *request) untilStopping() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(req.ctx)
	down := req.stopping // req is used for the next request soon
	go func() {
		select {
		case <-down:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// extendDeadline moves when the answer is due, and when net/http cuts the connection. For the next request on it
// net/http sets its deadlines anew.
func (req *request) extendDeadline(by time.Duration) {
	req.ctx.extend(by)
	due, _ := req.ctx.Deadline()
	c := http.NewResponseController(req.w)
	// Where there is no deadline to move, nothing will cut.
	_ = c.SetReadDeadline(due.Add(transferTime))
	_ = c.SetWriteDeadline(due.Add(transferTime))
}

// checkOrigin refuses what a process of this device would not send of itself: a page in a browser, a
// proxy that serves others, a name that was made to resolve to this device.
func checkOrigin(r *http.Request) *apiError {
	foreign := func(detail string) *apiError {
		return &apiError{status: http.StatusForbidden, code: api.CodeForeignOrigin, detail: detail}
	}
	switch {
	case r.ProtoMajor != 1 || r.ProtoMinor != 1:
		return badRequest("only HTTP/1.1 is spoken here")
	case !localHost(r.Host):
		return foreign("the Host header must be localhost, 127.0.0.1, [::1] or 169.254.169.254, with or without a port")
	}
	if name, why := api.ForeignHeader(r.Header); name != "" {
		return foreign("requests with the header " + name + " are refused: " + why)
	}
	return nil
}

// localHost reports whether a Host header is one that an SDK sends to a local token endpoint. Their
// names are in lower case everywhere.
func localHost(host string) bool {
	for _, name := range [...]string{"localhost", "127.0.0.1", "169.254.169.254", "[::1]"} {
		if rest, ok := strings.CutPrefix(host, name); ok {
			return rest == "" || rest[0] == ':' && isPort(rest[1:])
		}
	}
	return false
}

func isPort(s string) bool {
	if s == "" || len(s) > 5 {
		return false
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// onlyValue returns the value of a header that must be there exactly once. name is in canonical form.
func onlyValue(r *http.Request, name string) (value string, once bool) {
	values := r.Header[name]
	if len(values) != 1 {
		return "", false
	}
	return values[0], true
}

// maxParameters is more than any client sends.
const maxParameters = 16

// query is a request's parameters, each once, in the order they came in.
type query struct {
	count int
	list  [maxParameters]parameter
}

type parameter struct{ name, value string }

// get returns a parameter's value, and whether it is there.
func (q *query) get(name string) (string, bool) {
	for i := range q.list[:q.count] {
		if q.list[i].name == name {
			return q.list[i].value, true
		}
	}
	return "", false
}

// parse reads the part of a request URI behind the "?". It is stricter than a form has to be: whatever
// two readers could understand differently is refused. Empty pieces between ampersands are skipped.
func (q *query) parse(raw string) *apiError {
	q.count = 0
	for raw != "" {
		var piece string
		piece, raw, _ = strings.Cut(raw, "&")
		if piece == "" {
			continue
		}
		if q.count == maxParameters {
			return badRequest(fmt.Sprintf("more than %d query parameters", maxParameters))
		}
		name, value, _ := strings.Cut(piece, "=")
		name, okName := unescape(name)
		value, okValue := unescape(value)
		switch {
		case !okName || !okValue:
			return badRequest("the query is malformed: write special characters as %XX")
		case name == "":
			return badRequest("the query has a parameter without a name")
		}
		if _, twice := q.get(name); twice {
			return badRequest(fmt.Sprintf("query parameter %q is there twice", name))
		}
		q.list[q.count] = parameter{name, value}
		q.count++
	}
	return nil
}

// unescape undoes the form's encoding. It reports false for a broken escape and for bytes that no
// client leaves unescaped.
func unescape(s string) (string, bool) {
	escaped := false
	for i := range len(s) {
		switch c := s[i]; {
		case c <= ' ' || c >= 0x7f || c == '#':
			return "", false
		case c == '%' || c == '+':
			escaped = true
		}
	}
	if !escaped {
		return s, true
	}
	plain := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '+':
			plain = append(plain, ' ')
		case '%':
			if i+2 >= len(s) {
				return "", false
			}
			high, low := hexDigit(s[i+1]), hexDigit(s[i+2])
			if high > 15 || low > 15 {
				return "", false
			}
			plain = append(plain, high<<4|low)
			i += 2
		default:
			plain = append(plain, c)
		}
	}
	return string(plain), true
}

// hexDigit returns a hexadecimal digit's value, or 255.
func hexDigit(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 255
}

// readID reads the one parameter of a request about one thing: its ID. done says in an error what is done to it, and
// list is the path that has the IDs.
func readID(req *request, done, list string) (string, *apiError) {
	if e := req.query.parse(req.raw); e != nil {
		return "", e
	}
	id, ok := req.query.get("id")
	if !ok || id == "" || req.query.count != 1 {
		return "", badRequest("the id parameter, and no other, says which " + done + ": GET " + list + " lists them")
	}
	return id, nil
}

// noQuery refuses parameters where there are none to give.
func noQuery(req *request) *apiError {
	if req.raw != "" {
		return badRequest("this path takes no query parameters")
	}
	return nil
}

// maxBody bounds the body of a POST request.
const maxBody = 64 << 10

// readBody reads a request's body as one JSON object of T's fields and no others. No body is T's zero
// value.
func readBody[T any](req *request) (T, *apiError) {
	text, e := readText(req)
	if e != nil {
		var none T
		return none, e
	}
	return decodeBody[T](text)
}

// readText reads a request's body, which must be JSON by its type.
func readText(req *request) ([]byte, *apiError) {
	if e := noQuery(req); e != nil {
		return nil, e
	}
	if e := checkContentType(req.http); e != nil {
		return nil, e
	}
	text, err := io.ReadAll(io.LimitReader(req.http.Body, maxBody+1))
	switch {
	case err != nil:
		return nil, badRequest("the body did not arrive whole")
	case len(text) > maxBody:
		return nil, badRequest(fmt.Sprintf("the body is larger than %d bytes", maxBody))
	}
	return text, nil
}

// decodeBody is readBody of a text.
func decodeBody[T any](text []byte) (T, *apiError) {
	value, err := api.Decode[T](text)
	if err != nil {
		return value, badBody(err)
	}
	return value, nil
}

func badBody(err error) *apiError {
	return badRequest("the body is not what this path takes: " + err.Error())
}

func checkContentType(r *http.Request) *apiError {
	values := r.Header["Content-Type"]
	if len(values) == 0 {
		return nil
	}
	if kind, _, err := mime.ParseMediaType(values[0]); len(values) > 1 || err != nil || kind != "application/json" {
		return badRequest("the body must be JSON: send Content-Type: application/json, once, or none")
	}
	return nil
}
