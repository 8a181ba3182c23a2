package link

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// device is a link to a hub on loopback, and what came over it.
type device struct {
	*Link
	hub  *hubtest.Hub
	id   string
	ctx  context.Context // ends before the test would
	logs *observer.ObservedLogs

	changed chan struct{}

	mu      sync.Mutex // protects what follows
	twins   []Twin
	patches []string
	method  func(ctx context.Context, name string, payload json.RawMessage) (int, any)
}

func startHub(t *testing.T, o hubtest.Options) *hubtest.Hub {
	t.Helper()
	hub, err := hubtest.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Close)
	return hub
}

// connectionFile writes a connection string to a file of its own.
func connectionFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "iothub")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// start returns a link of a device that the hub knows. set changes its options.
func start(t *testing.T, hub *hubtest.Hub, set func(*Options)) *device {
	t.Helper()
	o := Options{Credentials: SharedKeyFile{Path: connectionFile(t, hub.CreateDevice("cam"))}}
	return startWith(t, hub, "cam", o, set)
}

func startWith(t *testing.T, hub *hubtest.Hub, id string, o Options, set func(*Options)) *device {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	core, logs := observer.New(zapcore.DebugLevel)
	d := &device{hub: hub, id: id, ctx: ctx, logs: logs, changed: make(chan struct{}, 1)}
	o.RootCAs, o.Address = hub.RootCAs(), hub.MQTTAddress()
	o.MaxBackoff, o.OperationTimeout = 50*time.Millisecond, 5*time.Second
	o.Log = zap.New(core)
	o.Twin = func(twin Twin) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.twins = append(d.twins, twin)
		d.notice()
	}
	o.Patch = func(text json.RawMessage, _ Identity, _ int64) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.patches = append(d.patches, string(text))
		d.notice()
	}
	o.Method = func(ctx context.Context, _ Identity, name string, payload json.RawMessage) (int, any) {
		d.mu.Lock()
		method := d.method
		d.mu.Unlock()
		if method == nil {
			return http.StatusNotFound, name
		}
		return method(ctx, name, payload)
	}
	o.Changed = d.notice
	if set != nil {
		set(&o)
	}
	d.Link = New(o)
	t.Cleanup(d.Close)
	return d
}

func (d *device) notice() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// wait waits until holds.
func (d *device) wait(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for !holds() {
		select {
		case <-d.changed:
		case <-time.After(5 * time.Millisecond): // what the hub sees has no signal here
		case <-d.ctx.Done():
			t.Fatalf("%s: not so; the link: %+v", what, d.Status())
		}
	}
}

func (d *device) connected(t *testing.T) {
	t.Helper()
	d.wait(t, "it is connected", func() bool { return d.Status().Connected && d.hub.IsListening(d.id) })
}

// failed waits until the link failed with a text and kind.
func (d *device) failed(t *testing.T, kind api.HubFailure, text string) {
	t.Helper()
	d.wait(t, fmt.Sprintf("it fails by %q with %q", kind, text), func() bool {
		s := d.Status()
		return !s.Connected && s.Failure == kind && strings.Contains(s.LastError, text)
	})
}

func (d *device) lastTwin() (t Twin) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.twins) > 0 {
		t = d.twins[len(d.twins)-1]
	}
	return t
}

func (d *device) setMethod(f func(context.Context, string, json.RawMessage) (int, any)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.method = f
}

func TestTwinIsRead(t *testing.T) {
	t.Parallel()
	d := start(t, startHub(t, hubtest.Options{}), nil)
	d.connected(t)
	d.wait(t, "the twin is read", func() bool { return d.lastTwin().DesiredVersion == 1 })
	if _, err := d.hub.UpdateDesired("cam", []byte(`{"percept":{"deny":[]}}`)); err != nil {
		t.Fatal(err)
	}
	d.wait(t, "the change is read", func() bool { return d.lastTwin().DesiredVersion == 2 })
	twin := d.lastTwin()
	if string(twin.Desired) != `{"percept":{"deny":[]}}` || string(twin.Reported) != `{}` ||
		twin.Identity.String() != "hub.test/cam" {
		t.Errorf("%s, %s, %v", twin.Desired, twin.Reported, twin.Identity)
	}
	d.mu.Lock()
	if len(d.patches) != 1 || d.patches[0] != `{"$version":2,"percept":{"deny":[]}}` {
		t.Error(d.patches)
	}
	d.mu.Unlock()
	version, err := d.Report(d.ctx, json.RawMessage(`{"percept":{"list":[{"a":1}]}}`))
	if err != nil || version != 2 {
		t.Error(version, err)
	}
	_, err = d.Report(d.ctx, json.RawMessage(`{"a.b":1}`))
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Status != http.StatusBadRequest {
		t.Error(err)
	}
	if !d.Status().Connected {
		t.Error("a refused report ends the connection")
	}
}

// Each way to sign in, each way to the hub.
func TestWays(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	certificate, certPEM, keyPEM, err := hub.NewClientCertificate("x509")
	if err != nil {
		t.Fatal(err)
	}
	hub.CreateCertificateDevice("x509", certificate.Leaf)
	files := map[string][]byte{"/cert": certPEM, "/key": keyPEM}
	x509 := CertificateFiles{
		Identity: Identity{Hub: hub.Name(), Device: "x509"}, Certificate: "/cert", Key: "/key",
		Read: func(path string) ([]byte, error) { return bytes.Clone(files[path]), nil },
	}
	module := SharedKeyFile{Path: connectionFile(t, hub.CreateModule("cam", "percept"))}
	gateway := SharedKeyFile{
		Path: connectionFile(t, hub.CreateDevice("behind")+";GatewayHostName="+hub.MQTTAddress()),
	}
	for name, row := range map[string]struct {
		id          string
		credentials Credentials
		set         func(*Options)
	}{
		"module":      {"cam/percept", module, nil},
		"certificate": {"x509", x509, nil},
		"gateway":     {"behind", gateway, func(o *Options) { o.Address = "" }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, socket := range []bool{false, true} {
				if socket && name == "gateway" {
					continue // whose port is that of MQTT
				}
				d := startWith(t, hub, row.id, Options{Credentials: row.credentials}, func(o *Options) {
					if socket {
						o.WebSocket, o.Address = true, hub.HTTPSAddress()
					}
					if row.set != nil {
						row.set(o)
					}
				})
				d.connected(t)
				if _, err := d.Report(d.ctx, json.RawMessage(`{"list":[1]}`)); err != nil {
					t.Error(err)
				}
				err := d.Send(d.ctx, Event{ID: "1", Body: json.RawMessage(`{}`),
					Properties: map[string]string{"$.ct": "application/json", "kind": "a b&c"}})
				if err != nil {
					t.Error(err)
				}
				if all := hub.Events(row.id); len(all) == 0 || all[len(all)-1].Properties["kind"] != "a b&c" {
					t.Errorf("%+v", all)
				}
				d.setMethod(func(_ context.Context, name string, payload json.RawMessage) (int, any) {
					return 200, []string{name, string(payload)}
				})
				status, answer, err := hub.InvokeMethod(d.ctx, row.id, "percept.x", []byte(`{"a":1}`))
				if status != 200 || string(answer) != `["percept.x","{\"a\":1}"]` || err != nil {
					t.Error(status, string(answer), err)
				}
				d.Close()
			}
		})
	}
}

func TestHubRestarts(t *testing.T) {
	t.Parallel()
	d := start(t, startHub(t, hubtest.Options{}), nil)
	d.connected(t)
	for range 3 {
		d.hub.Stop()
		d.failed(t, api.HubFailureNetwork, "")
		if _, err := d.Report(d.ctx, json.RawMessage(`{}`)); !errors.Is(err, ErrOffline) {
			t.Error(err)
		}
		if err := d.hub.Resume(); err != nil {
			t.Fatal(err)
		}
		d.connected(t)
	}
	if warnings := d.logs.FilterLevelExact(zapcore.WarnLevel).Len(); warnings > 6 {
		t.Errorf("%d warnings of 3 outages", warnings)
	}
}

// The library deadlocks for good where a method is under way when the connection ends.
func TestDropWhileAMethodRuns(t *testing.T) {
	t.Parallel()
	d := start(t, startHub(t, hubtest.Options{}), nil)
	d.connected(t)
	for range 3 {
		entered, ended := make(chan struct{}), make(chan struct{})
		d.setMethod(func(ctx context.Context, _ string, _ json.RawMessage) (int, any) {
			close(entered)
			<-ctx.Done()
			close(ended)
			return 200, nil
		})
		ctx, cancel := context.WithCancel(d.ctx)
		go func() { _, _, _ = d.hub.InvokeMethod(ctx, "cam", "x", nil) }()
		<-entered
		d.hub.Drop("cam")
		<-ended
		d.connected(t)
		cancel()
	}
}

func TestManyMethodsAtOnce(t *testing.T) {
	t.Parallel()
	d := start(t, startHub(t, hubtest.Options{}), nil)
	d.connected(t)
	d.hub.Faults.PubackDelay.Store(int64(time.Millisecond))
	var now, most atomic.Int64
	d.setMethod(func(_ context.Context, _ string, payload json.RawMessage) (int, any) {
		most.Store(max(most.Load(), now.Add(1)))
		defer now.Add(-1)
		return 200, payload
	})
	var all sync.WaitGroup
	for n := range 200 {
		all.Go(func() {
			want := fmt.Sprint(n)
			status, answer, err := d.hub.InvokeMethod(d.ctx, "cam", "x", []byte(want))
			if status != 200 || string(answer) != want || err != nil {
				t.Error(n, status, string(answer), err)
			}
		})
	}
	all.Wait()
	if most.Load() > methodsAtOnce {
		t.Errorf("%d methods at a time", most.Load())
	}
	d.hub.Faults.PubackDelay.Store(0)
	if _, err := d.Report(d.ctx, json.RawMessage(`{"a":1}`)); err != nil {
		t.Error(err)
	}
}

func TestMethodPanics(t *testing.T) {
	t.Parallel()
	d := start(t, startHub(t, hubtest.Options{}), nil)
	d.connected(t)
	d.setMethod(func(context.Context, string, json.RawMessage) (int, any) { panic("canary") })
	status, answer, err := d.hub.InvokeMethod(d.ctx, "cam", "x", nil)
	if status != 500 || string(answer) != "null" || err != nil {
		t.Error(status, string(answer), err)
	}
	lines := d.logs.FilterMessage("what IoT Hub sent led to a panic").All()
	if len(lines) != 1 || strings.Contains(fmt.Sprint(lines[0].ContextMap()), "canary") {
		t.Errorf("the log does not say that a method panicked, or shows what it had in its hands: %v", lines)
	}
	d.setMethod(func(context.Context, string, json.RawMessage) (int, any) { return 200, func() {} })
	if status, _, err = d.hub.InvokeMethod(d.ctx, "cam", "x", nil); status != 500 || err != nil {
		t.Error(status, err)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	d := start(t, hub, nil)
	d.connected(t)
	hub.Faults.RefuseSubscribes.Store(3) // of each kind once, by the library's own and by verify
	hub.Drop("cam")
	d.wait(t, "the refused subscriptions are used up", func() bool { return hub.Faults.RefuseSubscribes.Load() == 0 })
	d.connected(t)
	hub.Faults.CutAtSubscribe.Store(3)
	hub.Drop("cam")
	d.wait(t, "the cuts are used up", func() bool { return hub.Faults.CutAtSubscribe.Load() == 0 })
	d.connected(t)
	hub.Faults.ThrottleTwin.Store(2)
	hub.Drop("cam")
	d.wait(t, "the throttled reads are used up", func() bool { return hub.Faults.ThrottleTwin.Load() == 0 })
	d.connected(t)

	hub.Faults.RefuseLogins.Store(true)
	hub.Drop("cam")
	d.failed(t, api.HubFailureRefused, "the key in the credentials")
	hub.Faults.RefuseLogins.Store(false)
	d.connected(t)
	hub.CreateDevice("cam") // with another key
	d.failed(t, api.HubFailureRefused, "clock of this device")
}

// A clock that is set, rightly or wrongly, costs no connection: the hub judges the signature by its own.
func TestClockThatIsSet(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	var ahead atomic.Int64
	d := start(t, hub, func(o *Options) {
		o.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	d.connected(t)
	for _, by := range []time.Duration{400 * 24 * time.Hour, -400 * 24 * time.Hour} {
		ahead.Store(int64(by))
		d.TryAgain()
		if _, err := d.Report(d.ctx, json.RawMessage(`{"a":1}`)); err != nil {
			t.Errorf("the clock is set by %v: %v", by, err)
		}
	}
	if n := hub.Counters("cam").Connects; n != 1 {
		t.Errorf("it has connected %d times", n)
	}
}

func TestErrorsAreBounded(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"x\n\x1b[31my":                "x  [31my",
		strings.Repeat("ä", maxError): strings.Repeat("ä", (maxError-len("…"))/2) + "…",
	} {
		if said := bounded(errors.New(text)); said != want {
			t.Errorf("%q, want %q", said, want)
		}
	}
}

// The hub is the same in whatever case its host's name is written, for what is kept of it.
func TestHostNameInUpperCase(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	text := strings.Replace(hub.CreateDevice("cam"), "HostName="+hub.Name(), "HostName="+strings.ToUpper(hub.Name()), 1)
	d := startWith(t, hub, "cam", Options{Credentials: SharedKeyFile{Path: "/etc/percept/iothub",
		Read: func(string) ([]byte,
			error) {
			return []byte(text), nil
		}}}, nil)
	d.connected(t)
	if s := d.Status().Identity.String(); s != hub.Name()+"/cam" {
		t.Errorf("it is %q", s)
	}
}

// The credentials are read anew: at each try, and where they may differ.
func TestOtherCredentials(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	var text atomic.Value
	text.Store("canary-of-a-secret")
	credentials := SharedKeyFile{Path: "/etc/percept/iothub", Read: func(string) ([]byte, error) {
		return []byte(text.Load().(string)), nil
	}}
	d := startWith(t, hub, "one", Options{Credentials: credentials}, func(o *Options) { o.MaxBackoff = time.Hour })
	d.failed(t, api.HubFailureCredentials, "/etc/percept/iothub is no connection string")
	for _, entry := range d.logs.FilterMessage("not connected to IoT Hub").All() {
		if identity, named := entry.ContextMap()["identity"]; named {
			t.Errorf("the log names %q as who the device is, which is not known", identity)
		}
	}
	if changed, err := d.HaveCredentialsChanged(d.ctx); err == nil || changed {
		t.Errorf("credentials that are none: %v %v", changed, err)
	}
	text.Store(hub.CreateDevice("one"))
	d.TryAgain()
	d.connected(t)
	first := d.Status()
	if changed, err := d.HaveCredentialsChanged(d.ctx); err != nil || changed {
		t.Errorf("the same credentials: %v %v", changed, err)
	}
	text.Store(strings.Replace(text.Load().(string), "HostName="+hub.Name(), "HostName="+strings.ToUpper(hub.Name()),
		1))
	if changed, err := d.HaveCredentialsChanged(d.ctx); err != nil || changed ||
		!strings.Contains(text.Load().(string), strings.ToUpper(hub.Name())) {
		t.Errorf("the same credentials with the host's name in upper case: %v %v", changed, err)
	}
	text.Store(hub.CreateDevice("two"))
	if changed, err := d.HaveCredentialsChanged(d.ctx); err != nil || !changed {
		t.Errorf("those of another device: %v %v", changed, err)
	}
	d.TryAgain()
	d.wait(t, "it is the other device", func() bool { return hub.IsListening("two") && !hub.IsConnected("one") })
	reports := func() bool {
		_, err := d.Report(d.ctx, json.RawMessage(`{"a":1}`))
		return err == nil
	}
	d.wait(t, "it reports as the other device", reports)
	if s := d.Status(); !s.Connected || s.Identity.Device != "two" || !s.Since.After(first.Since) ||
		first.LastError == "" || s.LastError != "" || !s.LastErrorOn.IsZero() || s.Failure != "" {
		t.Errorf("as the other device it is %+v, and before %+v", s, first)
	}
	before := hub.Counters("two").Connects
	d.TryAgain()
	d.wait(t, "it reports", reports)
	if after := hub.Counters("two").Connects; after != before {
		t.Error("it connects anew though the credentials are the same")
	}
	text.Store(strings.ReplaceAll(hub.CreateDevice("three"), "SharedAccessKey=", "SharedAccessKey=AAAA"))
	d.TryAgain()
	d.failed(t, api.HubFailureRefused, "")
	if last, s := d.Status().Since, d.Status(); s.Identity.Device != "three" || !last.After(first.Since) {
		t.Errorf("as a device that is refused it is %+v", s)
	}
	for _, entry := range d.logs.All() {
		if line := fmt.Sprint(entry.Message, entry.ContextMap()); strings.Contains(line, "canary") ||
			strings.Contains(line, "SharedAccessSignature") {
			t.Errorf("a secret is in the log: %s", line)
		}
	}
}

// A connection is renewed before its signature expires, and the hub never cuts it.
func TestRenewalOfTheConnection(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	d := start(t, hub, func(o *Options) { o.TokenLife = 4 * time.Second })
	d.connected(t)
	d.wait(t, "it is renewed", func() bool { return hub.Counters("cam").Connects >= 2 })
	d.connected(t)
	if s := d.Status(); s.LastError != "" {
		t.Errorf("%+v", s)
	}
}

// A connection goes on while nobody signs for the next one, as where IoT Edge's key service is away.
func TestRenewalWithoutASignature(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	whole, err := parseConnectionString(hub.CreateDevice("cam"))
	if err != nil {
		t.Fatal(err)
	}
	var away, asked atomic.Bool
	login := whole
	login.Sign = func(ctx context.Context, data []byte) ([]byte, error) {
		if away.Load() {
			asked.Store(true)
			return nil, errors.New("keyd is away")
		}
		return whole.Sign(ctx, data)
	}
	d := startWith(t, hub, "cam", Options{Credentials: ready{login}},
		func(o *Options) { o.TokenLife = 4 * time.Second })
	d.connected(t)
	away.Store(true)
	d.wait(t, "it is to be renewed", asked.Load)
	if _, err := d.Report(d.ctx, json.RawMessage(`{"a":1}`)); err != nil || hub.Counters("cam").Connects != 1 {
		t.Errorf("the connection was given up: %v, %+v", err, d.Status())
	}
}

// ready is credentials that were read.
type ready struct{ login Login }

func (r ready) Login(context.Context) (Login, error) { return r.login, nil }

func TestAnotherDeviceWithTheSameIdentity(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	file := connectionFile(t, hub.CreateDevice("cam"))
	one := startWith(t, hub, "cam", Options{Credentials: SharedKeyFile{Path: file}}, nil)
	two := startWith(t, hub, "cam", Options{Credentials: SharedKeyFile{Path: file}}, nil)
	one.wait(t, "one of them says so", func() bool {
		return one.Status().Failure == api.HubFailureReplaced || two.Status().Failure == api.HubFailureReplaced
	})
}

// A network that swallows everything is noticed, and keeps nothing from ending.
func TestSilentNetwork(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	hole := newHole(t, hub.MQTTAddress())
	d := start(t, hub, func(o *Options) {
		o.Address, o.KeepAlive, o.OperationTimeout = hole.address, time.Second, time.Second
	})
	d.connected(t)
	hole.swallow.Store(true)
	if _, err := d.Report(d.ctx, json.RawMessage(`{}`)); err == nil {
		t.Error("a report is taken by nobody")
	}
	d.failed(t, api.HubFailureNetwork, "")
	hole.swallow.Store(false)
	d.connected(t)
	hole.swallow.Store(true)
	d.Close()
}

// hole passes bytes on, unless it swallows them.
type hole struct {
	address string
	swallow atomic.Bool
}

func newHole(t *testing.T, to string) *hole {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hole{address: listener.Addr().String()}
	var all sync.WaitGroup
	t.Cleanup(func() { _ = listener.Close(); all.Wait() })
	pass := func(from, into net.Conn) {
		defer from.Close()
		defer into.Close()
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			if err != nil {
				return
			}
			if h.swallow.Load() {
				continue
			}
			if _, err := into.Write(buffer[:n]); err != nil {
				return
			}
		}
	}
	all.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				_ = near.Close()
				continue
			}
			all.Go(func() { pass(near, far) })
			all.Go(func() { pass(far, near) })
		}
	})
	return h
}

// A hub that sends megabytes ends its own connection, and nothing grows.
func TestLongPacket(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	d := start(t, hub, nil)
	d.connected(t)
	err := hub.SendRaw("cam", "$iothub/twin/PATCH/properties/desired/?$version=9", make([]byte, 10<<20))
	if err != nil {
		t.Fatal(err)
	}
	d.wait(t, "the connection ended", func() bool {
		return strings.Contains(d.Status().LastError, "a packet of more than 327680 bytes")
	})
	d.connected(t)
}

func TestCloseWhileNothingAnswers(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	hub := startHub(t, hubtest.Options{})
	d := start(t, hub, func(o *Options) { o.Address = listener.Addr().String() })
	c, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d.Close()
}

// A hub that throttles reads of twins, as one does while a whole fleet reads, keeps its devices: what it denies reaches
// them.
func TestBusyHub(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	hub.Faults.ThrottleTwin.Store(1000)
	d := start(t, hub, nil)
	d.connected(t)
	since := d.Status().TwinErrorOn
	if s := d.Status(); !strings.Contains(s.TwinError, "429") || since.IsZero() {
		t.Errorf("%+v", s)
	}
	if _, err := hub.UpdateDesired("cam", []byte(`{"percept":{"deny":[{"module":"vision"}]}}`)); err != nil {
		t.Fatal(err)
	}
	d.wait(t, "the notification is handed on", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.patches) == 1
	})
	d.wait(t, "it is read several times", func() bool { return hub.Faults.ThrottleTwin.Load() <= 1000-4 })
	if status, _, err := hub.InvokeMethod(d.ctx, "cam", "x", nil); status != http.StatusNotFound || err != nil {
		t.Error(status, err)
	}
	if s := d.Status(); !s.TwinErrorOn.Equal(since) {
		t.Errorf("since %v, and later since %v", since, s.TwinErrorOn)
	}
	hub.Faults.ThrottleTwin.Store(0)
	d.wait(t, "the twin is read", func() bool { return d.lastTwin().DesiredVersion == 2 && d.Status().TwinError == "" })
	if s := d.Status(); !s.TwinErrorOn.IsZero() {
		t.Errorf("%+v", s)
	}
	if n := hub.Counters("cam").Connects; n != 1 {
		t.Errorf("%d connections", n)
	}
}

// A twin says which notifications had come when it was asked for.
func TestReadsFollowNotifications(t *testing.T) {
	t.Parallel()
	d := start(t, startHub(t, hubtest.Options{}), nil)
	d.connected(t)
	for n := int64(1); n <= 3; n++ {
		if _, err := d.hub.UpdateDesired("cam", fmt.Appendf(nil, `{"n":%d}`, n)); err != nil {
			t.Fatal(err)
		}
		d.wait(t, "it is read", func() bool { return d.lastTwin().DesiredVersion == n+1 })
		if asked := d.lastTwin().Asked; asked != n {
			t.Errorf("after %d notifications it was asked for after %d", n, asked)
		}
		d.hub.Drop("cam")
		d.wait(t, "it connects anew", func() bool { return d.hub.Counters("cam").Connects == int(n)+1 })
		d.connected(t)
	}
}

func TestBusyPause(t *testing.T) {
	t.Parallel()
	most := func() float64 { return 0.999999 }
	for times, bound := range map[int]time.Duration{1: 2 * time.Second, 2: 4 * time.Second, 8: 256 * time.Second,
		90: 5 * time.Minute} {
		if pause := busyPause(times, most); pause > bound || pause < bound*99/100 {
			t.Errorf("after %d times it waits for %v", times, pause)
		}
	}
	if busyPause(9, func() float64 { return 0 }) != 0 {
		t.Error("the wait is not spread over all of it")
	}
}
