// Package link keeps a device, or a module of it, connected to IoT Hub: it signs in, hands on the twin and calls of
// direct methods, sends reported properties and events, and connects again when a connection ends. It knows nothing of
// tokens.
//
// It uses the MQTT transport of github.com/amenzhinsky/iothub, one for each connection, so that nothing of the
// library's state outlives a connection.
package link

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
)

// Defaults of Options.
const (
	defaultKeepAlive        = 4 * time.Minute
	defaultOperationTimeout = 15 * time.Second
	defaultTokenLife        = 24 * time.Hour
	defaultMaxBackoff       = 5 * time.Minute
)

// Options is what a Link is made of. Credentials, Twin, Patch and Method are set.
type Options struct {
	Credentials Credentials // read anew before each connection

	WebSocket bool           // MQTT over WebSocket on port 443, and not MQTT on port 8883
	Proxy     *url.URL       // http, https or socks5, with user and password; nil: none. The environment's is not used
	RootCAs   *x509.CertPool // nil: those of the system
	Address   string         // host:port to dial, in the place of the hub's; empty: the hub's

	KeepAlive        time.Duration // zero: 4 minutes; IoT Hub allows 1177 s
	OperationTimeout time.Duration // of each step of a connection, and of each request; zero: 15 s
	TokenLife        time.Duration // of a signature; zero: 24 hours
	MaxBackoff       time.Duration // the longest wait between two tries to connect; zero: 5 minutes

	Now func() time.Time // the wall clock; nil: time.Now
	Log *zap.Logger      // nil: none

	// Twin takes the whole twin: after each connect, and after each notification. One call at a time.
	Twin func(Twin)
	// Patch takes a notification of desired properties as it came, before the twin is read again. Notifications may
	// come out of order. One call at a time; it does not wait for the network. number counts the notifications over the
	// link's life, from 1.
	Patch func(desired json.RawMessage, identity Identity, number int64)
	// Method answers a direct method: a status, and what becomes JSON. payload is empty where there is none. Up to
	// 16 are called at a time. ctx ends with the connection.
	Method func(ctx context.Context, as Identity, name string, payload json.RawMessage) (status int, answer any)
	// Connecting is called before each try to connect. What was read of the twin may be of a former life of it by then:
	// its versions may begin at 1 again. It does not block. Nil: it is not called.
	Connecting func()
	// Changed is called when Status may differ. It does not block. Nil: it is not called.
	Changed func()
}

// Twin is what the hub has of an identity.
type Twin struct {
	Identity          Identity
	Desired, Reported json.RawMessage // objects, without $version
	DesiredVersion    int64
	ReportedVersion   int64

	// Asked is how many notifications the link had handed on when it asked for this twin, which has what they say. It
	// may lack what later ones do.
	Asked int64
}

// Status says how the link is.
type Status struct {
	Identity    Identity // of the last credentials that were read
	Connected   bool
	Since       time.Time      // connected, or not connected, since then, as Identity
	LastError   string         // why it is not connected, or last was not
	LastErrorOn time.Time      // zero: there was none
	Failure     api.HubFailure // of LastError
	NextTry     time.Time      // zero: it is connected, or is being tried
	TwinError   string         // why the twin could not be read; it is tried again; empty: it was read
	TwinErrorOn time.Time      // since when that is so; zero: it was read
}

// ErrOffline is returned for what is to be sent while there is no connection.
var ErrOffline = errors.New("the device is not connected to IoT Hub")

// stableAfter is how long a connection lasts at least for the next waits to begin from the shortest one.
const stableAfter = api.HubStable

// Link is safe for concurrent use.
type Link struct {
	options Options
	ended   chan struct{}
	stop    context.CancelFunc
	wake    chan struct{} // a try is wanted now, or the credentials may differ

	notifications atomic.Int64 // handed on

	mu      sync.Mutex // protects what follows
	status  Status
	session *session // nil: there is no connection
	login   *Login   // of the last credentials that were read; nil: none could be
}

// New returns a Link, which begins to connect. Close it.
func New(o Options) *Link {
	o.KeepAlive = cmp.Or(o.KeepAlive, defaultKeepAlive)
	o.OperationTimeout = cmp.Or(o.OperationTimeout, defaultOperationTimeout)
	o.TokenLife = cmp.Or(o.TokenLife, defaultTokenLife)
	o.MaxBackoff = cmp.Or(o.MaxBackoff, defaultMaxBackoff)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Connecting == nil {
		o.Connecting = func() {}
	}
	if o.Changed == nil {
		o.Changed = func() {}
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &Link{options: o, ended: make(chan struct{}), stop: stop, wake: make(chan struct{}, 1)}
	l.status.Since = o.Now()
	go l.run(ctx)
	return l
}

// Close ends the connection and what belongs to it, within a second or so, whatever the network does.
func (l *Link) Close() {
	l.stop()
	<-l.ended
}

// Status returns how the link is now.
func (l *Link) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status
}

// TryAgain makes the link read its credentials again, and connect at once where there is no connection or they differ.
func (l *Link) TryAgain() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// HaveCredentialsChanged reads the credentials, and reports whether they differ from those of the last try, so that
// TryAgain connects anew. The error is why they cannot be read.
func (l *Link) HaveCredentialsChanged(ctx context.Context) (bool, error) {
	login, err := readLogin(ctx, l.options.Credentials)
	if err != nil {
		return false, errors.New(bounded(err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.login == nil { // the first try is under way, or could not read them
		return l.status.LastError != "", nil
	}
	return !login.isSame(l.login), nil
}

// run makes one connection after the other.
func (l *Link) run(ctx context.Context) {
	defer close(l.ended)
	schedule := NewSchedule(l.options.MaxBackoff, rand.Float64)
	var next *Login // of a connection that is renewed; nil: the credentials are read
	var cuts int    // connections in a row that the other side soon ended
	for {
		l.options.Connecting()
		s := newSession(ctx, &l.options, &l.notifications, l.twinRead)
		err := s.open(next, l.setLogin)
		next = nil
		if err == nil {
			l.connected(s)
			next, err = s.serve(l.wake)
			l.disconnected()
		}
		s.close()
		if ctx.Err() != nil {
			return
		}
		if next != nil { // renewed: there is no error
			schedule.Reset()
			continue
		}
		switch stable := s.lasted() >= stableAfter; {
		case stable:
			schedule.Reset()
			cuts = 0
		case s.wasOpen():
			cuts++
		}
		wait := schedule.Next()
		l.failed(err, cuts, wait)
		if !l.pause(ctx, wait) {
			return
		}
	}
}

// pause waits for the next try. It returns false when the link is closed.
func (l *Link) pause(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.wake:
	case <-ctx.Done():
		return false
	}
	l.mu.Lock()
	l.status.NextTry = time.Time{}
	l.mu.Unlock()
	l.options.Changed()
	return true
}

// setLogin notes who signs in. How the link was as another is no news of this one.
func (l *Link) setLogin(login Login) {
	l.mu.Lock()
	moved := l.status.Identity != login.Identity
	switch {
	case !moved:
	case l.status.Identity == Identity{}: // until now it was not known
		l.status.Identity = login.Identity
	default:
		l.status = Status{Identity: login.Identity, Since: l.options.Now()}
	}
	l.login = &login
	l.mu.Unlock()
	if moved {
		l.options.Changed()
	}
}

// twinRead notes how a read of the twin ended. The log has what is news.
func (l *Link) twinRead(err error) {
	text := ""
	if err != nil {
		text = bounded(err)
	}
	l.mu.Lock()
	news := l.status.TwinError != text
	switch l.status.TwinError = text; {
	case err == nil:
		l.status.TwinErrorOn = time.Time{}
	case l.status.TwinErrorOn.IsZero():
		l.status.TwinErrorOn = l.options.Now()
	}
	l.mu.Unlock()
	if news && err != nil {
		l.options.Log.Warn("the twin cannot be read from IoT Hub now, and is read again; what it denies meanwhile is "+
			"heard", zap.Error(err))
	}
	if news {
		l.options.Changed()
	}
}

// connected notes that s is the connection.
func (l *Link) connected(s *session) {
	l.mu.Lock()
	l.session = s
	if !l.status.Connected {
		l.status.Connected, l.status.Since = true, l.options.Now()
	}
	l.mu.Unlock()
	l.options.Log.Info("connected to IoT Hub", zap.Stringer("identity", s.login.Identity))
	l.options.Changed()
}

func (l *Link) disconnected() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session = nil
}

// cutsForReplaced is how many connections in a row the hub soon ends where another device has the same identity.
const cutsForReplaced = 3

// failed notes why there is no connection. The log has what is news.
func (l *Link) failed(err error, cuts int, wait time.Duration) {
	failure := failureOf(err)
	text := bounded(err)
	if lost := (*connectionLost)(nil); cuts >= cutsForReplaced && errors.As(err, &lost) {
		failure = api.HubFailureReplaced
		text += "; it ends soon after each connect: another device, or another process, may use the same identity"
	}
	now := l.options.Now()
	l.mu.Lock()
	news := l.status.Connected || l.status.LastError != text
	if l.status.Connected {
		l.status.Connected, l.status.Since = false, now
	}
	l.status.LastError, l.status.LastErrorOn, l.status.Failure = text, now, failure
	l.status.NextTry = now.Add(wait)
	identity := l.status.Identity
	l.mu.Unlock()
	fields := []zap.Field{zap.String("error", text), zap.Duration("next", wait.Round(time.Second))}
	if identity != (Identity{}) { // empty: no credentials were read
		fields = append(fields, zap.Stringer("identity", identity))
	}
	if news {
		l.options.Log.Warn("not connected to IoT Hub", fields...)
	} else {
		l.options.Log.Debug("still not connected to IoT Hub", fields...)
	}
	l.options.Changed()
}

// current returns the connection, or ErrOffline.
func (l *Link) current() (*session, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session == nil {
		return nil, ErrOffline
	}
	return l.session, nil
}

// Report merges patch, a JSON object in which null removes, into the reported properties, and returns their version.
// The error is a *RefusedError where the hub refused it.
func (l *Link) Report(ctx context.Context, patch json.RawMessage) (version int64, err error) {
	s, err := l.current()
	if err != nil {
		return 0, err
	}
	return s.report(ctx, patch)
}

// Event is a message from the device to the cloud.
type Event struct {
	ID   string // by which the hub's readers recognise an event that comes twice
	Body json.RawMessage
	// Properties are for routing. Names that begin with "$." are the system's: "$.ct" is the content type.
	Properties map[string]string
}

// Send sends an event. It returns nil when the hub has stored it. After an error it may have been stored, too: sent
// again, it has the same ID.
func (l *Link) Send(ctx context.Context, e Event) error {
	s, err := l.current()
	if err != nil {
		return err
	}
	return s.send(ctx, e)
}
