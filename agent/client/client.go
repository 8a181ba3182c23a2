// Package client talks to perceptd over its Unix sockets: it gets tokens, watches them, and reports
// those that a resource refused; on the admin socket it reads the status, notes policy changes, and asks
// for refreshes and reloads. It needs the standard library and agent/api and nothing else.
//
// Every call opens its own connection and closes it, waits as long as its context allows, and reads
// at most 1 MiB of answer; a Watch stays open, and reads at most 64 KiB for each event. No error of
// this package carries token text.
//
// What the caller must do: give each context a deadline, and keep an api.Token out of logs. It is
// the wire's own type with the text in a plain string, so printing it with fmt prints the secret.
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"perceptd/agent/api"
)

// Client names the sockets of one daemon. Its zero value talks to the daemon of this device, or,
// inside a module's container, to the socket that is mounted there. It holds nothing open and may be
// used by many goroutines.
type Client struct {
	// Socket is the path of the token socket. Empty means api.DefaultTokenSocket.
	Socket string

	// AdminSocket is the path of the admin socket. Empty means admin.sock beside the token socket.
	AdminSocket string
}

// FromEnvironment returns a client of the token socket that $PERCEPT_SOCKET names, or of the default
// one when the variable is unset or empty.
func FromEnvironment() *Client {
	return &Client{Socket: os.Getenv(api.SocketVariable)}
}

// TokenSocketPath returns the path that Token, Watch, Rejected, WhoAmI and Loopback connect to.
func (c *Client) TokenSocketPath() string {
	if c.Socket == "" {
		return api.DefaultTokenSocket
	}
	return c.Socket
}

// AdminSocketPath returns the path that every method but Token, Watch, Rejected, WhoAmI and Loopback connects to.
func (c *Client) AdminSocketPath() string {
	if c.AdminSocket == "" {
		return filepath.Join(filepath.Dir(c.TokenSocketPath()), api.AdminSocketName)
	}
	return c.AdminSocket
}

// TokenRequest says which token is wanted.
type TokenRequest struct {
	// Resource is the App ID URI that the token is for, such as https://vault.azure.net. Required.
	Resource string

	// Identity is the configured name of the identity. Empty leaves the choice to the caller's grants
	// and the default identity.
	Identity string

	// MinTTL is the life that the token must have left; the daemon answers short_life rather than give
	// less. Zero or less asks for nothing.
	MinTTL time.Duration

	// IssuedAfter is a moment, by the issuer's clock and in whole seconds, after which the token must have
	// been issued; the daemon answers not_yet rather than give an older one. Zero asks for nothing.
	IssuedAfter time.Time

	// Wait is how long the daemon is to wait for a token that meets all this, and that no revocation
	// withholds, before it refuses: 10 minutes at most. Zero or less: for one call to the back end. Give
	// the context ten seconds more.
	Wait time.Duration
}

// Token returns a token that this process was granted. The daemon distinguishes callers by socket and
// uid, so the same request may bring another process something else, or nothing.
//
// It returns an *Error when the daemon refuses, an *UnreachableError when none could be talked to,
// and the context's error when that ended first.
func (c *Client) Token(ctx context.Context, r TokenRequest) (api.Token, error) {
	query := url.Values{"resource": {r.Resource}}
	if r.Identity != "" {
		query.Set("identity", r.Identity)
	}
	if r.MinTTL > 0 {
		query.Set("min_ttl", r.MinTTL.String())
	}
	if !r.IssuedAfter.IsZero() {
		query.Set("issued_after", strconv.FormatInt(r.IssuedAfter.Unix(), 10))
	}
	if r.Wait > 0 {
		query.Set("wait", r.Wait.String())
	}
	call := call{socket: c.TokenSocketPath(), method: http.MethodGet, path: api.PathToken, query: query}
	var token api.Token
	if err := call.do(ctx, &token); err != nil {
		return api.Token{}, err
	}
	if token.AccessToken == "" {
		return api.Token{}, call.contractError()
	}
	return token, nil
}

// Rejected reports to the daemon that a resource refused a token, and returns why that may be and what to do.
// The report changes nothing for other callers. A caller that reports too often gets an *Error with
// api.CodeBusy. Other errors are as for Token.
func (c *Client) Rejected(ctx context.Context, r api.Rejection) (api.Advice, error) {
	call := call{socket: c.TokenSocketPath(), method: http.MethodPost, path: api.PathRejected, body: r}
	return answerTo[api.Advice](ctx, call)
}

// WhoAmI returns how the daemon sees this process and what it may have. Errors are as for Token; that who
// calls could not be proved is an answer, not an error.
func (c *Client) WhoAmI(ctx context.Context) (api.WhoAmI, error) {
	call := call{socket: c.TokenSocketPath(), method: http.MethodGet, path: api.PathWhoAmI}
	return answerTo[api.WhoAmI](ctx, call)
}

// Grants returns every grant in force. Errors are as for Token.
func (c *Client) Grants(ctx context.Context) (api.Grants, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathGrants}
	return answerTo[api.Grants](ctx, call)
}

// Subject is a caller as far as an administrator describes it. A module and an image may stand together, and so may
// unit, uid and groups.
type Subject struct {
	Module, Unit, Image string
	UID, GID            *uint32  // nil: not said
	Groups              []uint32 // beside GID, without which they do not count
}

// CheckGrants returns what the grants in force say to a request of such a caller, and why. identity may be
// empty, as in TokenRequest. Being denied is an answer, not an error. Errors are as for Token.
func (c *Client) CheckGrants(ctx context.Context, who Subject, resource, identity string) (api.Decision, error) {
	query := who.query()
	query.Set("resource", resource)
	if identity != "" {
		query.Set("identity", identity)
	}
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathGrantsCheck, query: query}
	return answerTo[api.Decision](ctx, call)
}

// Loopback returns what an unmodified SDK in this process needs to get its tokens on the daemon's loopback listener.
// Without one the error is an *Error of api.CodeNoLoopback. Other errors are as for Token. The answer holds a secret.
func (c *Client) Loopback(ctx context.Context) (api.Loopback, error) {
	call := call{socket: c.TokenSocketPath(), method: http.MethodGet, path: api.PathLoopback}
	return answerTo[api.Loopback](ctx, call)
}

// LoopbackOf returns what Loopback returns to such a caller. It asks on the admin socket.
func (c *Client) LoopbackOf(ctx context.Context, who Subject) (api.Loopback, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathLoopback, query: who.query()}
	return answerTo[api.Loopback](ctx, call)
}

func (who Subject) query() url.Values {
	query := make(url.Values)
	for name, value := range map[string]string{"module": who.Module, "unit": who.Unit, "container_image": who.Image} {
		if value != "" {
			query.Set(name, value)
		}
	}
	for name, id := range map[string]*uint32{"uid": who.UID, "gid": who.GID} {
		if id != nil {
			query.Set(name, strconv.FormatUint(uint64(*id), 10))
		}
	}
	if who.GID != nil {
		for _, gid := range who.Groups {
			query.Set("gid", query.Get("gid")+","+strconv.FormatUint(uint64(gid), 10))
		}
	}
	return query
}

// Status returns what the daemon says of itself, its identities and its tokens. Errors are as for
// Token.
func (c *Client) Status(ctx context.Context) (api.Status, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathStatus}
	return answerTo[api.Status](ctx, call)
}

// Version returns the daemon's version, also where this client cannot read the rest of its status. Errors are as for
// Token.
func (c *Client) Version(ctx context.Context) (string, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathStatus}
	answer, err := answerTo[struct {
		Version string `json:"version"`
	}](ctx, call)
	return answer.Version, err
}

// Refresh asks the back end anew for the cached tokens that r names and returns what each call
// brought; a call that failed is a result, not an error. Errors are as for Token.
func (c *Client) Refresh(ctx context.Context, r api.RefreshRequest) (api.RefreshResponse, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodPost, path: api.PathRefresh, body: r}
	return answerTo[api.RefreshResponse](ctx, call)
}

// PolicyChanges returns the policy changes on record, the latest first. Errors are as for Token.
func (c *Client) PolicyChanges(ctx context.Context) (api.PolicyChanges, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathPolicyChanges}
	return answerTo[api.PolicyChanges](ctx, call)
}

// RecordPolicyChange puts a policy change on record and in force, and returns the recorded change. With an
// *Error of api.CodeNotKept the change is in force and returned, but lost at the daemon's next start. Other
// errors are as for Token; nothing has changed then.
func (c *Client) RecordPolicyChange(ctx context.Context, r api.PolicyChangeRequest) (api.PolicyChangeAnswer, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodPost, path: api.PathPolicyChanges, body: r}
	return call.change(ctx)
}

// WithdrawPolicyChange takes a policy change off the record, as if it had never been noted, and returns
// it as it was. With an *Error of api.CodeNotKept it is withdrawn, but back after the
// daemon's next start; with api.CodeUnknownChange there is none of that ID. Other errors are as for Token.
func (c *Client) WithdrawPolicyChange(ctx context.Context, id string) (api.PolicyChangeAnswer, error) {
	call := call{
		socket: c.AdminSocketPath(), method: http.MethodDelete, path: api.PathPolicyChanges,
		query: url.Values{"id": {id}},
	}
	return call.change(ctx)
}

// change returns the policy change that the answer is about, also with the error that it is not kept.
func (c call) change(ctx context.Context) (api.PolicyChangeAnswer, error) {
	answer, err := answerTo[api.PolicyChangeAnswer](ctx, c)
	var refusal *Error
	if errors.As(err, &refusal) && refusal.PolicyChange != nil {
		answer = *refusal.PolicyChange
	}
	return answer, err
}

// Reload makes the daemon read its configuration again and returns what changed. A bad configuration
// is an *Error with api.CodeInvalidConfig and changes nothing. Other errors are as for Token.
func (c *Client) Reload(ctx context.Context) (api.ReloadResponse, error) {
	call := call{socket: c.AdminSocketPath(), method: http.MethodPost, path: api.PathReload}
	return answerTo[api.ReloadResponse](ctx, call)
}

// Ready returns whether the daemon is ready to hand out tokens, and why not. Not being ready is an
// answer, not an error. Errors are as for Token.
func (c *Client) Ready(ctx context.Context) (api.Health, error) {
	call := call{
		socket: c.AdminSocketPath(), method: http.MethodGet, path: api.PathReady,
		alsoOK: http.StatusServiceUnavailable,
	}
	return answerTo[api.Health](ctx, call)
}

// Error is the daemon's refusal. Every method returns it when the daemon answered, but not with what
// was asked for. Branch on Code; it is empty when the answer was no problem document, which means
// that something else or another version is at the socket.
type Error struct {
	api.Problem

	// RetryAfter is when the daemon thinks that asking again may help. Zero: it does not say.
	RetryAfter time.Duration
}

// Error returns the daemon's detail, which says what to do next.
func (e *Error) Error() string {
	switch {
	case e.Detail != "":
		return e.Detail
	case e.Code == "":
		return fmt.Sprintf("what answers at the socket is not perceptd, or another version of it: it answered %d %s",
			e.Status, http.StatusText(e.Status))
	case e.Title != "":
		return fmt.Sprintf("perceptd answered %d %s", e.Status, e.Title)
	}
	return fmt.Sprintf("perceptd answered %d %s", e.Status, http.StatusText(e.Status))
}

// UnreachableError says that no daemon answered at the socket. Every method returns it. Its cause
// is why: errors.Is(err, fs.ErrNotExist) when there is no socket, syscall.ECONNREFUSED when
// no process listens on it, fs.ErrPermission when this process may not connect,
// context.DeadlineExceeded when there was no answer in time.
type UnreachableError struct {
	Socket string
	Err    error
}

func (e *UnreachableError) Error() string { return e.Socket + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

const (
	maxAnswer = api.MaxAnswer // bytes of body
	maxHeader = 64 << 10      // bytes of header

	jsonType    = "application/json"
	problemType = "application/problem+json"
	eventType   = "text/event-stream"
)

// call is one request to one socket.
type call struct {
	socket string
	method string
	path   string
	query  url.Values
	body   any // nil: none

	// alsoOK is a status beside 200 that carries an answer. Zero: none.
	alsoOK int
}

func answerTo[T any](ctx context.Context, c call) (T, error) {
	var answer T
	if err := c.do(ctx, &answer); err != nil {
		var none T
		return none, err
	}
	return answer, nil
}

// do sends the request and decodes the answer into answer.
func (c call) do(ctx context.Context, answer any) error {
	response, err := c.send(ctx, jsonType)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	switch {
	case err != nil:
		return c.transportError(ctx, err)
	case len(body) > maxAnswer:
		return fmt.Errorf("%s %s on %s: the answer is longer than %d bytes", c.method, c.path, c.socket, maxAnswer)
	case !c.isAnswer(response):
		return c.refusal(response, body)
	// The decoder's error is left out, since it may quote what it read.
	case !hasMediaType(response, jsonType) || json.Unmarshal(body, answer) != nil:
		return c.contractError()
	}
	return nil
}

const (
	maxTries   = 4                     // of one request that the daemon asks to repeat to know who is calling
	retryPause = 50 * time.Millisecond // before a try that needs a new connection
)

// send sends the request and returns the answer as it begins. wanted is the media type of an answer that
// is no refusal. The answer's body is to be closed, which closes the connection.
func (c call) send(ctx context.Context, wanted string) (*http.Response, error) {
	var to *connection
	for left := maxTries - 1; ; left-- {
		response, err := c.sendOn(ctx, &to, wanted)
		var again bool
		if err == nil {
			again, err = mustAskAgain(response)
		}
		switch {
		case err != nil:
			if to != nil {
				to.close()
			}
			return nil, c.transportError(ctx, err)
		case response.StatusCode == http.StatusSwitchingProtocols: // its body is the connection, which nothing ends
			_ = response.Body.Close()
			to.close()
			return nil, c.contractError()
		case !again || left == 0:
			response.Body = connectionBody{response.Body, to}
			return response, nil
		case response.Close:
			to.close()
			to = nil
			select {
			case <-time.After(retryPause):
			case <-ctx.Done(): // the next try returns its error
			}
		}
	}
}

// sendOn sends the request on a connection, a new one where there is none.
func (c call) sendOn(ctx context.Context, to **connection, wanted string) (*http.Response, error) {
	request, err := c.request(ctx)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", wanted)
	if *to == nil {
		if *to, err = connect(ctx, c.socket); err != nil {
			return nil, err
		}
	}
	return (*to).roundTrip(request)
}

// mustAskAgain reports whether the daemon can attest the caller only at its next request, as a young process on an old
// kernel. The body can still be read afterwards.
func mustAskAgain(response *http.Response) (bool, error) {
	if response.StatusCode != http.StatusServiceUnavailable || !hasMediaType(response, problemType) {
		return false, nil
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return false, err
	}
	response.Body = io.NopCloser(bytes.NewReader(body))
	var problem api.Problem
	return json.Unmarshal(body, &problem) == nil && problem.Code == api.CodeAskAgain, nil
}

// isAnswer reports whether the response is what was asked for and not a refusal.
func (c call) isAnswer(response *http.Response) bool {
	switch response.StatusCode {
	case http.StatusOK:
		return true
	case c.alsoOK:
		return !hasMediaType(response, problemType)
	}
	return false
}

func (c call) request(ctx context.Context) (*http.Request, error) {
	// Unix sockets have no host; "localhost" is what the daemon expects there.
	target := url.URL{Scheme: "http", Host: "localhost", Path: c.path, RawQuery: c.query.Encode()}
	var body io.Reader
	if c.body != nil {
		encoded, err := json.Marshal(c.body)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, c.method, target.String(), body)
	if err != nil {
		return nil, err
	}
	if c.body != nil {
		request.Header.Set("Content-Type", jsonType)
	}
	return request, nil
}

// transportError sorts what went wrong before a whole answer was there.
func (c call) transportError(ctx context.Context, err error) error {
	cause := ctx.Err()
	var dial *net.OpError
	switch {
	// Package net looks at the deadline itself, and may be ahead of the context's timer.
	case errors.Is(cause, context.DeadlineExceeded), cause == nil && errors.Is(err, context.DeadlineExceeded):
		return &UnreachableError{Socket: c.socket, Err: context.DeadlineExceeded}
	case cause != nil:
		return cause
	case errors.As(err, &dial) && dial.Op == "dial":
		// The operation's own text repeats the path.
		err = dial.Err
	case errors.As(err, &dial):
		// Its address is the path to which the daemon bound its socket, which differs from the one that was dialled.
		err = fmt.Errorf("the connection was closed before a whole answer: %w", dial.Err)
	case !errors.As(err, &dial) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		err = errNotHTTP // net/http quotes what was sent, which may be a token
	}
	return &UnreachableError{Socket: c.socket, Err: err}
}

// refusal makes an *Error of an answer that is none.
func (c call) refusal(response *http.Response, body []byte) error {
	refusal := &Error{RetryAfter: retryAfter(response)}
	if !hasMediaType(response, problemType) || json.Unmarshal(body, &refusal.Problem) != nil {
		refusal.Problem = api.Problem{Title: http.StatusText(response.StatusCode)}
	}
	// What was sent counts, not what the body repeats of it.
	refusal.Status = response.StatusCode
	return refusal
}

// ContractError is returned for an answer that is not of the wire contract, as this client knows it.
type ContractError struct {
	Method, Path string
	Socket       string // that was asked
}

func (e *ContractError) Error() string {
	return fmt.Sprintf("%s %s on %s: the answer is not one of perceptd's; do the versions differ?",
		e.Method, e.Path, e.Socket)
}

func (c call) contractError() error { return &ContractError{c.method, c.path, c.socket} }

func hasMediaType(response *http.Response, want string) bool {
	got, _, err := mime.ParseMediaType(response.Header.Get("Content-Type"))
	return err == nil && got == want
}

// retryAfter reads the seconds form of Retry-After, the only one that the daemon writes.
func retryAfter(response *http.Response) time.Duration {
	seconds, err := strconv.ParseUint(response.Header.Get("Retry-After"), 10, 31)
	if err != nil {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// connection is one connection to the daemon, which answers requests on it one after the other. net/http's Transport is
// not used: it writes unsolicited bytes, which may be a token, to the standard logger, and that is the module's own
// output. Here they are not read. No redirect is followed, and no proxy is used.
type connection struct {
	conn        net.Conn
	answers     *bufio.Reader
	headerLimit *io.LimitedReader // below answers: bounds what a header may still have
	stop        func() bool       // stops watching the context
}

// connect opens a connection that breaks when ctx ends.
func connect(ctx context.Context, socket string) (*connection, error) {
	conn, err := Dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	w := &connection{conn: conn, headerLimit: &io.LimitedReader{R: conn}}
	w.answers = bufio.NewReader(w.headerLimit)
	w.stop = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return w, nil
}

var errNotHTTP = errors.New("what answers there does not speak HTTP as perceptd does")

// roundTrip sends a request and returns the answer as it begins. The answer before must have been read to its end.
func (w *connection) roundTrip(request *http.Request) (*http.Response, error) {
	if w.answers.Buffered() > 0 {
		return nil, errNotHTTP
	}
	sendErr := request.Write(w.conn) // what refuses a request may not have read all of it
	w.headerLimit.N = maxHeader
	_, err := w.answers.Peek(1) // distinguishes a connection that was closed from an answer that broke off
	var response *http.Response
	if err == nil {
		response, err = http.ReadResponse(w.answers, request)
	}
	switch {
	case err != nil && w.headerLimit.N == 0:
		return nil, errNotHTTP
	case err != nil && sendErr != nil:
		return nil, sendErr
	case err != nil:
		return nil, err
	}
	w.headerLimit.N = math.MaxInt64 // the reader of the body bounds it
	return response, nil
}

func (w *connection) close() {
	w.stop()
	_ = w.conn.Close() // nothing can be done about it, and nothing is lost
}

// connectionBody is a body whose end is its connection's.
type connectionBody struct {
	io.Reader
	conn *connection
}

// Close closes the connection, whatever is left of the body.
func (b connectionBody) Close() error {
	b.conn.close()
	return nil
}

// Dial connects to one of the daemon's sockets. When the kernel's queue of those who want to connect there is full, as
// during a flood, a plain net.Dial fails at once; Dial waits for a place until ctx ends.
func Dial(ctx context.Context, socket string) (net.Conn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if !errors.Is(err, syscall.EAGAIN) {
		return conn, err
	}
	conn, err = dialQueued(ctx, socket)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Name: socket, Net: "unix"}, Err: err}
	}
	return conn, nil
}

// dialPollInterval is how long a wait in the kernel lasts before the context is checked again.
const dialPollInterval = 50 * time.Millisecond

// dialQueued waits for its turn in the kernel's queue: a client that only tried again and again would find the room
// taken by those that wait.
func dialQueued(ctx context.Context, socket string) (net.Conn, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), socket)
	defer file.Close() // the connection has a duplicate
	timeout := syscall.NsecToTimeval(int64(dialPollInterval))
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &timeout); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	for {
		err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: socket})
		switch {
		case err == nil:
			return net.FileConn(file)
		case err != syscall.EAGAIN && err != syscall.EINTR:
			return nil, os.NewSyscallError("connect", err)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
	}
}
