package link

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/amenzhinsky/iothub/iotdevice/transport"
	iotmqtt "github.com/amenzhinsky/iothub/iotdevice/transport/mqtt"
	paho "github.com/eclipse/paho.mqtt.golang"
	"go.uber.org/zap"
)

const (
	methodsAtOnce = 16  // are answered at a time
	methodsQueued = 256 // wait, at most

	// maxWaiting bounds the memory of messages that came and were not handed on yet, in bytes, with messageCost for
	// each.
	maxWaiting  = 4 << 20
	messageCost = 4 << 10

	// maxUnacknowledged bounds the messages that the hub has not acknowledged yet. All of them are in memory.
	maxUnacknowledged = 512

	// farewell is how long a connection stays open after its session has ended, so that the last packet gets out.
	farewell = 300 * time.Millisecond
	// twinRetry is how soon the twin is read again after a read that failed, at first.
	twinRetry = time.Second
	// twinTries is after how many failed reads in a row the connection is given up.
	twinTries = 4
	// renewRetry is how soon credentials are read again that could not be read for a renewal.
	renewRetry = time.Minute
)

// session is one connection.
type session struct {
	options       *Options
	notifications *atomic.Int64 // handed on, over all sessions
	twinRead      func(error)
	log           *zap.Logger
	ctx           context.Context
	cancel        context.CancelCauseFunc
	login         Login
	made          time.Time     // when the signature was made, by a clock that nothing moves
	life          time.Duration // of the signature

	transport transport.Transport
	client    paho.Client // as of opened
	opened    chan struct{}
	began     time.Time // when it was open; zero: it never was
	unread    bool      // the hub was too busy to let the twin be read as it was made

	notified chan struct{} // the twin has changed
	methods  chan struct{} // one for each method that is being answered
	queued   atomic.Int64
	waiting  atomic.Int64  // see maxWaiting
	patching chan struct{} // holds one while a notification is handed on

	sent, acknowledged atomic.Int64 // messages that want a PUBACK, and PUBACKs
}

// newSession returns a session that is not open yet. notifications counts those of all sessions, and twinRead is called
// with how each read of the twin ended.
func newSession(ctx context.Context, o *Options, notifications *atomic.Int64, twinRead func(error)) *session {
	s := &session{
		options: o, notifications: notifications, twinRead: twinRead, log: o.Log, opened: make(chan struct{}),
		notified: make(chan struct{}, 1), methods: make(chan struct{}, methodsAtOnce),
		patching: make(chan struct{}, 1),
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	return s
}

// open connects, subscribes, and reads the twin. login is who signs in; nil: the credentials are read. named is called
// with it.
func (s *session) open(login *Login, named func(Login)) error {
	if login == nil {
		read, err := s.readLogin()
		if err != nil {
			return err
		}
		login = &read
	}
	s.login = *login
	named(s.login)
	if err := s.connect(); err != nil {
		return err
	}
	subscriptions := []struct {
		name string
		do   func(context.Context) error
	}{
		{"subscribing to methods", func(context.Context) error { return s.transport.RegisterDirectMethods(s.ctx, s) }},
		{"subscribing to the twin", func(context.Context) error {
			return s.transport.SubscribeTwinUpdates(s.ctx, desiredDispatcher{s})
		}},
	}
	for _, step := range subscriptions {
		if err := s.do(step.do); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	// It subscribes to answers, too. A hub that is too busy for it sends notifications and calls methods all the same.
	err := s.readTwin()
	if s.unread = isBusy(err); err != nil && !s.unread {
		return err
	}
	s.twinRead(err)
	if err := s.do(s.verify); err != nil {
		return fmt.Errorf("subscribing: %w", err)
	}
	s.began = time.Now()
	return nil
}

func (s *session) wasOpen() bool { return !s.began.IsZero() }

// lasted returns for how long the connection was open.
func (s *session) lasted() time.Duration {
	if !s.wasOpen() {
		return 0
	}
	return time.Since(s.began)
}

func (s *session) readLogin() (Login, error) {
	return within(s, func(ctx context.Context) (Login, error) { return readLogin(ctx, s.options.Credentials) })
}

// within returns what f does, which may ignore its context while it holds the library's lock, or an error when an
// operation may take no longer. What f returns then is dropped.
func within[T any](s *session, f func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.options.OperationTimeout)
	defer cancel()
	done := make(chan result, 1)
	go func() {
		value, err := f(ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, s.cause(r.err)
	case <-ctx.Done():
		var none T
		if s.ctx.Err() == nil {
			return none, fmt.Errorf("no answer within %v: %w", s.options.OperationTimeout, ctx.Err())
		}
		return none, s.cause(ctx.Err())
	}
}

// do is within for what returns an error alone.
func (s *session) do(f func(context.Context) error) error {
	_, err := within(s, func(ctx context.Context) (struct{}, error) { return struct{}{}, f(ctx) })
	return err
}

// cause returns why the session ended in the place of an error that follows from it.
func (s *session) cause(err error) error {
	if why := context.Cause(s.ctx); err != nil && why != nil {
		return why
	}
	return err
}

// connect makes the connection.
func (s *session) connect() error {
	s.made = time.Now()
	var password string
	if s.login.signs() {
		// Where the clock is set later, the hub still judges the signature by its own: the connection stays.
		wall := s.options.Now().Round(0)
		expires := wall.Add(s.options.TokenLife).Truncate(time.Second) // a signature has whole seconds
		s.life = expires.Sub(wall)
		var err error
		password, err = within(s, func(ctx context.Context) (string, error) { return s.login.sign(ctx, expires) })
		if err != nil {
			return err
		}
	}
	configure := iotmqtt.WithClientOptionsConfig(func(o *paho.ClientOptions) { s.configure(o, password) })
	if s.login.Module == "" {
		s.transport = iotmqtt.New(configure)
	} else {
		s.transport = iotmqtt.NewModuleTransport(configure)
	}
	s.transport.SetLogger(silence{})
	err := s.do(func(ctx context.Context) error {
		if err := s.transport.Connect(ctx, &libraryCredentials{&s.login}); err != nil {
			return err
		}
		select {
		case <-s.opened:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if err != nil {
		return explained(err, &s.login)
	}
	return nil
}

// configure has the last word on the options that the library sets.
func (s *session) configure(o *paho.ClientOptions, password string) {
	d := dialer{
		webSocket: s.options.WebSocket, proxy: s.options.Proxy, address: s.options.Address,
		tls:     &tls.Config{RootCAs: s.options.RootCAs, MinVersion: tls.VersionTLS12},
		timeout: s.options.OperationTimeout,
	}
	if s.login.Certificate != nil {
		d.tls.Certificates = []tls.Certificate{*s.login.Certificate}
		d.tls.Renegotiation = tls.RenegotiateOnceAsClient // the hub asks for it so over WebSocket
	}
	o.Servers = nil
	o.AddBroker("tcp://hub") // the name is not used: see the dial function
	o.SetTLSConfig(d.tls)
	o.SetClientID(s.login.client())
	o.SetCredentialsProvider(func() (string, string) { return s.login.userName(), password })
	o.SetOrderMatters(false) // or a method that waits for its PUBACK blocks the client for good
	o.SetAutoReconnect(false)
	o.SetConnectRetry(false)
	o.SetProtocolVersion(4) // MQTT 3.1.1; or each connect that is refused is tried again as MQTT 3.1
	o.SetKeepAlive(s.options.KeepAlive)
	o.SetPingTimeout(min(10*time.Second, s.options.KeepAlive))
	o.SetConnectTimeout(s.options.OperationTimeout)
	o.SetWriteTimeout(s.options.OperationTimeout)
	o.SetCustomOpenConnectionFn(func(*url.URL, paho.ClientOptions) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(s.ctx, s.options.OperationTimeout)
		defer cancel()
		c, err := d.dial(ctx, s.login.Identity)
		if err != nil {
			s.cancel(s.cause(err)) // the library keeps the text of it alone
			return nil, err
		}
		context.AfterFunc(s.ctx, func() { time.AfterFunc(farewell, func() { _ = c.Close() }) })
		return &guard{Conn: c, acknowledged: &s.acknowledged}, nil
	})
	o.SetOnConnectHandler(func(c paho.Client) {
		s.client = c
		close(s.opened)
	})
	o.SetConnectionLostHandler(func(_ paho.Client, err error) { s.cancel(&connectionLost{err}) })
}

// verify subscribes once more, since the library does not notice that a subscription is refused (SUBACK 0x80). Each
// SUBSCRIBE has one filter: see checkLength.
func (s *session) verify(ctx context.Context) error {
	for _, topic := range []string{topicMethod, topicTwinAnswer, topicDesired} {
		filter := topic + "#"
		token := s.client.Subscribe(filter, 1, nil)
		select {
		case <-token.Done():
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := token.Error(); err != nil {
			return err
		}
		if code := token.(*paho.SubscribeToken).Result()[filter]; code > 1 {
			return &subscriptionRefused{filter}
		}
	}
	return nil
}

// serve hands on what comes, until the connection ends, or is to be made anew by next. wake says that the credentials
// may differ.
func (s *session) serve(wake <-chan struct{}) (next *Login, err error) {
	var renew <-chan time.Time
	if s.login.signs() {
		timer := time.NewTimer(time.Until(s.made.Add(renewal(s.life, rand.Float64))))
		defer timer.Stop()
		renew = timer.C
	}
	var retry <-chan time.Time
	if s.unread {
		retry = time.After(busyPause(1, rand.Float64))
	}
	unanswered, busy := 0, 0
	for {
		select {
		case <-s.ctx.Done():
			return nil, context.Cause(s.ctx)
		case <-renew:
			login, err := s.readLogin()
			if err == nil && login.signs() {
				err = s.canSign(&login) // a service that reads may not sign
			}
			if err == nil {
				return &login, nil
			}
			s.log.Warn("the connection to IoT Hub cannot be renewed, and goes on for now",
				zap.String("error", bounded(err)))
			renew = time.After(renewRetry)
			continue
		case <-wake:
			if login, err := s.readLogin(); err == nil && !login.isSame(&s.login) {
				return &login, nil
			}
			continue
		case <-retry:
		case <-s.notified:
		}
		retry = nil
		switch err := s.readTwin(); {
		case err == nil:
			unanswered, busy = 0, 0
			s.twinRead(nil)
		case isBusy(err):
			busy++
			s.twinRead(err)
			retry = time.After(busyPause(busy, rand.Float64))
		default:
			if unanswered++; unanswered == twinTries || s.ctx.Err() != nil {
				return nil, err
			}
			retry = time.After(twinRetry << (unanswered - 1))
		}
	}
}

// canSign returns why there is no signature by login; nil: there is one.
func (s *session) canSign(login *Login) error {
	_, err := within(s, func(ctx context.Context) (string, error) {
		return login.sign(ctx, s.options.Now().Add(s.options.TokenLife))
	})
	return err
}

// close ends the session, and its connection soon after.
func (s *session) close() {
	select {
	case <-s.opened:
		var lost *connectionLost
		if !errors.As(context.Cause(s.ctx), &lost) {
			go s.client.Disconnect(uint(farewell.Milliseconds() / 2)) // it may block on a network that is silent
		}
	default:
	}
	s.cancel(ErrOffline)
}

// readTwin reads the twin and hands it on.
func (s *session) readTwin() error {
	asked := s.notifications.Load()
	s.sent.Add(1)
	text, err := within(s, s.transport.RetrieveTwinProperties)
	if err != nil {
		return refusal("reading the twin", err)
	}
	t, err := parseTwin(text)
	if err != nil {
		return fmt.Errorf("reading the twin: %w", err)
	}
	t.Identity, t.Asked = s.login.Identity, asked
	if !s.contained("the twin", func() { s.options.Twin(t) }) {
		return errors.New("what the twin holds led to a panic: see the log")
	}
	return nil
}

// parseTwin reads the answer to a GET of the twin.
func parseTwin(text []byte) (t Twin, err error) {
	var sections struct{ Desired, Reported map[string]json.RawMessage }
	if err := json.Unmarshal(text, &sections); err != nil {
		return t, errors.New("IoT Hub's twin is no JSON object of two")
	}
	if t.Desired, t.DesiredVersion, err = cutVersion(sections.Desired); err != nil {
		return t, fmt.Errorf("desired properties: %w", err)
	}
	if t.Reported, t.ReportedVersion, err = cutVersion(sections.Reported); err != nil {
		return t, fmt.Errorf("reported properties: %w", err)
	}
	return t, nil
}

func cutVersion(section map[string]json.RawMessage) (rest json.RawMessage, version int64, err error) {
	if section == nil {
		return nil, 0, errors.New("there are none")
	}
	if err := json.Unmarshal(section["$version"], &version); err != nil {
		return nil, 0, errors.New("they have no $version")
	}
	delete(section, "$version")
	rest, err = json.Marshal(section)
	return rest, version, err
}

// admit counts a message of the hub as waiting until done is called, or reports that too much waits already.
func (s *session) admit(message []byte) (done func(), ok bool) {
	cost := int64(len(message) + messageCost)
	done = func() { s.waiting.Add(-cost) }
	if s.waiting.Add(cost) > maxWaiting {
		done()
		return nil, false
	}
	return done, true
}

// contained calls f, and reports whether it returned. What the hub sends ends no daemon: a panic is logged.
func (s *session) contained(what string, f func()) (returned bool) {
	defer func() {
		if v := recover(); v != nil { // it may hold what was in hand when it came
			s.log.Error("what IoT Hub sent led to a panic", zap.String("in", what),
				zap.String("type", fmt.Sprintf("%T", v)), zap.Stack("stack"))
		}
	}()
	f()
	return true
}

// desiredDispatcher takes notifications of desired properties.
type desiredDispatcher struct{ *session }

// Dispatch hands a notification on, and requests a read of the twin, since a notification does not say whether it adds
// to the properties or replaces them all. While too much waits it hands nothing on: the read has what the notification
// says.
func (d desiredDispatcher) Dispatch(text []byte) {
	if done, ok := d.admit(text); ok {
		d.patching <- struct{}{}
		if d.ctx.Err() == nil {
			d.contained("a notification", func() {
				d.options.Patch(text, d.login.Identity, d.notifications.Add(1))
			})
		}
		<-d.patching
		done()
	}
	select {
	case d.notified <- struct{}{}:
	default:
	}
}

// errTooMany says that more calls of methods came than can wait.
var errTooMany = errors.New("too many calls of methods")

// Dispatch answers a direct method. Every name and every payload gets an answer; a panic is contained.
func (s *session) Dispatch(name string, payload []byte) (status int, answer []byte, err error) {
	defer s.queued.Add(-1)
	if s.queued.Add(1) > methodsAtOnce+methodsQueued || s.sent.Load()-s.acknowledged.Load() > maxUnacknowledged {
		return 0, nil, errTooMany
	}
	done, ok := s.admit(payload)
	if !ok {
		return 0, nil, errTooMany
	}
	defer done()
	select {
	case s.methods <- struct{}{}:
		defer func() { <-s.methods }()
	case <-s.ctx.Done():
		return 0, nil, s.ctx.Err()
	}
	status, answer = http.StatusInternalServerError, []byte(`null`)
	s.contained(fmt.Sprintf("the method %.64q", name), func() {
		code, value := s.options.Method(s.ctx, s.login.Identity, name, payload)
		if text, err := json.Marshal(value); err == nil {
			status, answer = code, text
		}
	})
	s.sent.Add(1)
	return status, answer, nil
}

// report sends a patch of reported properties.
func (s *session) report(ctx context.Context, patch json.RawMessage) (version int64, err error) {
	err = s.request(ctx, func(ctx context.Context) error {
		n, err := s.transport.UpdateTwinProperties(ctx, patch)
		version = int64(n)
		return refusal("reported properties", err)
	})
	return version, err
}

// send sends an event. The library sends those of a module as if they were the device's, so this does not use it.
func (s *session) send(ctx context.Context, e Event) error {
	properties := url.Values{"$.mid": {e.ID}}
	for name, value := range e.Properties {
		properties.Set(name, value)
	}
	// A plus sign is no blank in MQTT's topics.
	topic := s.login.events() + strings.ReplaceAll(properties.Encode(), "+", "%20")
	return s.request(ctx, func(ctx context.Context) error {
		token := s.client.Publish(topic, 1, false, []byte(e.Body))
		select {
		case <-token.Done():
			return token.Error()
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}

// request calls f, until ctx or the session ends or the time is up. What f sends may go out all the same.
func (s *session) request(ctx context.Context, f func(context.Context) error) error {
	if s.sent.Add(1)-s.acknowledged.Load() > maxUnacknowledged {
		s.sent.Add(-1)
		return errors.New("IoT Hub acknowledges nothing of what was sent to it")
	}
	ctx, cancel := context.WithTimeout(ctx, s.options.OperationTimeout)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	err := f(ctx)
	if s.ctx.Err() != nil { // the library takes what was under way for sent
		return ErrOffline
	}
	return err
}

// refusal returns the status in an error of the library, which has it in words alone.
func refusal(what string, err error) error {
	if err == nil {
		return nil
	}
	var status int
	if _, scan := fmt.Sscanf(err.Error(), "request failed with %d response code", &status); scan == nil {
		return &RefusedError{What: what, Status: status}
	}
	return err
}
