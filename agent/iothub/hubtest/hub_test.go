package hubtest

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"strings"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// started returns a hub, and a context that ends before the test would.
func started(t *testing.T, o Options) (*Hub, context.Context) {
	t.Helper()
	o.Logf = t.Logf
	h, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return h, ctx
}

// password returns a signature for an identity by the key of its connection string, good for a life.
func password(connection string, life time.Duration) (id, text string) {
	fields := map[string]string{}
	for _, field := range strings.Split(connection, ";") {
		name, value, _ := strings.Cut(field, "=")
		fields[name] = value
	}
	resource := fields["HostName"] + "/devices/" + fields["DeviceId"]
	id = fields["DeviceId"]
	if module := fields["ModuleId"]; module != "" {
		resource += "/modules/" + module
		id += "/" + module
	}
	key, _ := base64.StdEncoding.DecodeString(fields["SharedAccessKey"])
	expires := time.Now().Add(life).Unix()
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s\n%d", url.QueryEscape(resource), expires)
	return id, fmt.Sprintf("SharedAccessSignature sr=%s&sig=%s&se=%d", url.QueryEscape(resource),
		url.QueryEscape(base64.StdEncoding.EncodeToString(mac.Sum(nil))), expires)
}

// device is a client of the hub.
type device struct {
	paho.Client
	lost chan error
	got  chan paho.Message
}

// dial returns a client that is not connected. scheme is tls or wss.
func dial(h *Hub, scheme, id, password string, certificates ...tls.Certificate) device {
	d := device{lost: make(chan error, 1), got: make(chan paho.Message, 100)}
	address := "tls://" + h.MQTTAddress()
	if scheme == "wss" {
		address = "wss://" + h.HTTPSAddress() + "/$iothub/websocket"
	}
	d.Client = paho.NewClient(paho.NewClientOptions().AddBroker(address).SetClientID(id).
		SetUsername(h.Name() + "/" + id + "/?api-version=2021-04-12").SetPassword(password).
		SetAutoReconnect(false).SetProtocolVersion(4).SetConnectTimeout(5 * time.Second).
		SetTLSConfig(&tls.Config{RootCAs: h.RootCAs(), ServerName: h.Name(), Certificates: certificates}).
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { d.got <- m }).
		SetConnectionLostHandler(func(_ paho.Client, err error) { d.lost <- err }))
	return d
}

// done waits for what a client does, and fails the test where that failed.
func done(t *testing.T, token paho.Token) {
	t.Helper()
	if !token.WaitTimeout(10*time.Second) || token.Error() != nil {
		t.Fatal(token.Error())
	}
}

// connected returns a client that is connected and subscribed to everything.
func connected(t *testing.T, h *Hub, connection string) device {
	t.Helper()
	id, pass := password(connection, time.Hour)
	d := dial(h, "tls", id, pass)
	done(t, d.Connect())
	t.Cleanup(func() { d.Disconnect(0) })
	done(t, d.SubscribeMultiple(map[string]byte{topicMethod + "#": 0, topicTwinAnswer + "#": 0, topicDesired + "#": 0},
		nil))
	return d
}

// next returns the topic and payload of the next message.
func (d device) next(t *testing.T, ctx context.Context) (topic, payload string) {
	t.Helper()
	select {
	case m := <-d.got:
		return m.Topic(), string(m.Payload())
	case <-ctx.Done():
		t.Fatal("no message came")
		return "", ""
	}
}

func TestTwin(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	d := connected(t, h, h.CreateDevice("cam"))
	done(t, d.Publish("$iothub/twin/PATCH/properties/reported/?$rid=a", 1, false, `{"up":true,"list":[{"x":1}]}`))
	if topic, _ := d.next(t, ctx); topic != "$iothub/twin/res/204/?$rid=a&$version=2" {
		t.Error(topic)
	}
	if _, err := h.UpdateDesired("cam", []byte(`{"percept":{"deny":[{"module":"vision"}],"gone":null}}`)); err != nil {
		t.Fatal(err)
	}
	topic, body := d.next(t, ctx)
	if topic != "$iothub/twin/PATCH/properties/desired/?$version=2" ||
		body != `{"$version":2,"percept":{"deny":[{"module":"vision"}],"gone":null}}` {
		t.Error(topic, body)
	}
	done(t, d.Publish("$iothub/twin/GET/?$rid=b", 1, false, ""))
	topic, body = d.next(t, ctx)
	const want = `{"desired":{"$version":2,"percept":{"deny":[{"module":"vision"}]}},` +
		`"reported":{"$version":2,"list":[{"x":1}],"up":true}}`
	if topic != "$iothub/twin/res/200/?$rid=b" || body != want {
		t.Error(topic, body)
	}
	for _, bad := range []string{
		`{"a.b":1}`, `{"a":[null]}`, `{"a":4503599627370497}`, `{"a":"` + strings.Repeat("x", 4097) + `"}`, `[]`, `{`,
		``,
		strings.Repeat(`{"a":`, 11) + "1" + strings.Repeat("}", 11), `{"a":[` +
			strings.Repeat(`"`+strings.Repeat("x", 4000)+`",`, 9) + `1]}`,
	} {
		done(t, d.Publish("$iothub/twin/PATCH/properties/reported/?$rid=c", 1, false, bad))
		if topic, _ := d.next(t, ctx); topic != "$iothub/twin/res/400/?$rid=c" {
			t.Errorf("%.40s: %s", bad, topic)
		}
	}
	if c := h.Counters("cam"); c.Connects != 1 || c.TwinReads.Messages != 1 || c.Notifications.Messages != 1 ||
		c.Reported.Messages != 10 || c.BytesIn == 0 || c.BytesOut == 0 {
		t.Errorf("%+v", c)
	}
}

func TestMethods(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	connection := h.CreateModule("cam", "percept")
	short, cancel := context.WithCancel(ctx)
	cancel()
	if _, _, err := h.InvokeMethod(short, "cam/percept", "x", nil); err != ErrNotOnline {
		t.Error(err)
	}
	d := connected(t, h, connection)
	go func() {
		topic, payload := d.next(t, ctx)
		rid := topic[strings.Index(topic, "$rid="):]
		d.Publish("$iothub/methods/res/207/?"+rid, 1, false, `{"got":`+payload+`}`)
	}()
	status, answer, err := h.InvokeMethod(ctx, "cam/percept", "percept.status", []byte(`[1]`))
	if status != 207 || string(answer) != `{"got":[1]}` || err != nil {
		t.Error(status, string(answer), err)
	}
}

func TestLogins(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	connection := h.CreateDevice("cam")
	id, good := password(connection, time.Hour)
	_, expired := password(connection, -time.Second)
	_, other := password(h.CreateDevice("other"), time.Hour)
	for name, pass := range map[string]string{"expired": expired, "another's": other, "none": ""} {
		if d := dial(h, "tls", id, pass); d.Connect().WaitTimeout(10*time.Second) && d.IsConnected() {
			t.Errorf("%s: it is connected", name)
		}
	}
	for _, scheme := range []string{"tls", "wss"} {
		d := dial(h, scheme, id, good)
		done(t, d.Connect())
		d.Disconnect(0)
	}
	certificate, _, _, err := h.NewClientCertificate("x509")
	if err != nil {
		t.Fatal(err)
	}
	h.CreateCertificateDevice("x509", certificate.Leaf)
	for _, scheme := range []string{"tls", "wss"} {
		d := dial(h, scheme, "x509", "", certificate)
		done(t, d.Connect())
		d.Disconnect(0)
	}
	if d := dial(h, "tls", "x509", ""); d.Connect().WaitTimeout(10*time.Second) && d.IsConnected() {
		t.Error("a device without its certificate is connected")
	}
	h.CreateAuthorityDevice("by-authority")
	named, _, _, err := h.NewClientCertificate("by-authority")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, _ := started(t, Options{})
	foreign, _, _, err := elsewhere.NewClientCertificate("by-authority")
	if err != nil {
		t.Fatal(err)
	}
	d := dial(h, "tls", "by-authority", "", named)
	done(t, d.Connect())
	d.Disconnect(0)
	for name, wrong := range map[string]tls.Certificate{
		"of another name": certificate, "of another authority": foreign, "the hub's own": h.certificates.server,
	} {
		if d := dial(h, "tls", "by-authority", "", wrong); d.Connect().WaitTimeout(10*time.Second) && d.IsConnected() {
			t.Errorf("a certificate %s is taken", name)
		}
	}
	// The hub cuts at the second at which the signature expires.
	_, brief := password(connection, 2*time.Second)
	d = dial(h, "tls", id, brief)
	done(t, d.Connect())
	select {
	case <-d.lost:
	case <-ctx.Done():
		t.Error("the connection outlives its signature")
	}
}

func TestOneConnectionAnIdentity(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	connection := h.CreateDevice("cam")
	for range 5 {
		first := connected(t, h, connection)
		second := connected(t, h, connection)
		select {
		case <-first.lost:
		case <-ctx.Done():
			t.Fatal("the first connection stays beside the second")
		}
		if _, err := h.UpdateDesired("cam", []byte(`{"a":1}`)); err != nil {
			t.Fatal(err)
		}
		if topic, _ := second.next(t, ctx); !strings.HasPrefix(topic, topicDesired) {
			t.Error(topic)
		}
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	connection := h.CreateDevice("cam")
	d := connected(t, h, connection)
	h.Faults.ThrottleTwin.Store(1)
	done(t, d.Publish("$iothub/twin/GET/?$rid=b", 1, false, ""))
	if topic, _ := d.next(t, ctx); topic != "$iothub/twin/res/429/?$rid=b" {
		t.Error(topic)
	}
	h.Faults.RefuseSubscribes.Store(1)
	token := d.Subscribe("devices/cam/messages/devicebound/#", 1, nil).(*paho.SubscribeToken)
	done(t, token)
	if code := token.Result()["devices/cam/messages/devicebound/#"]; code != 0x80 {
		t.Errorf("%#x", code)
	}
	h.Stop()
	select {
	case <-d.lost:
	case <-ctx.Done():
		t.Fatal("the connection outlives the hub")
	}
	if err := h.Resume(); err != nil {
		t.Fatal(err)
	}
	connected(t, h, connection)
	if !h.Drop("cam") || h.Drop("nobody") {
		t.Error("Drop")
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	d := connected(t, h, h.CreateDevice("cam"))
	done(t, d.Publish("devices/cam/messages/events/$.mid=1&type=trouble%20began", 1, false, `{"a":1}`))
	if err := h.WaitEvents(ctx, "cam", func(all []Event) bool { return len(all) == 1 }); err != nil {
		t.Fatal(err)
	}
	e := h.Events("cam")[0]
	if e.Properties["$.mid"] != "1" || e.Properties["type"] != "trouble began" || string(e.Body) != `{"a":1}` {
		t.Errorf("%+v", e)
	}
	d.Publish("devices/other/messages/events/", 1, false, "x")
	select {
	case <-d.lost:
	case <-ctx.Done():
		t.Error("a client publishes as another")
	}
}

// Messages wait until there is a subscription, in bounded number, and then come in order, once each.
func TestMessagesToDevices(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	connection := h.CreateDevice("cam")
	if err := h.SendMessage("nobody", nil, nil); err == nil {
		t.Error("a message to nobody")
	}
	for n := range messagesWaiting {
		if err := h.SendMessage("cam", []byte{byte(n)}, map[string]string{"kind of": "a+b"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.SendMessage("cam", nil, nil); err == nil {
		t.Error("one message too many")
	}
	d := connected(t, h, connection)
	done(t, d.Subscribe("devices/cam/messages/devicebound/#", 1, nil))
	for n := range messagesWaiting {
		topic, body := d.next(t, ctx)
		const bag = "devices/cam/messages/devicebound/%24.to=%2Fdevices%2Fcam%2Fmessages%2Fdevicebound&kind%20of=a%2Bb"
		if topic != bag || body != string([]byte{byte(n)}) {
			t.Fatalf("message %d: %q on %s", n, body, topic)
		}
	}
	if err := h.SendMessage("cam", []byte("at once"), nil); err != nil {
		t.Fatal(err)
	}
	if _, body := d.next(t, ctx); body != "at once" {
		t.Errorf("%q came", body)
	}
}

// A hub knows no QoS 2: it ends the connection. RETAIN it takes for a property of the event, and keeps nothing.
func TestWhatAHubKnowsOfMQTT(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	connection := h.CreateDevice("cam")
	d := connected(t, h, connection)
	const events = "devices/cam/messages/events/"
	done(t, d.Publish(events, 1, true, "kept?"))
	done(t, d.Publish(events+"a=1", 0, true, "kept?"))
	done(t, d.Publish(events, 1, false, "not"))
	if err := h.WaitEvents(ctx, "cam", func(all []Event) bool { return len(all) == 3 }); err != nil {
		t.Fatal(err)
	}
	for n, want := range []map[string]string{{"mqtt-retain": "true"}, {"a": "1", "mqtt-retain": "true"}, {}} {
		if got := h.Events("cam")[n]; !maps.Equal(got.Properties, want) {
			t.Errorf("event %d: %v", n, got.Properties)
		}
	}
	done(t, d.Publish("$iothub/twin/PATCH/properties/reported/?$rid=a", 1, true, `{"a":1}`))
	if topic, _ := d.next(t, ctx); topic != "$iothub/twin/res/204/?$rid=a&$version=2" {
		t.Error(topic)
	}
	again := connected(t, h, connection)
	done(t, again.Publish("$iothub/twin/GET/?$rid=b", 1, false, ""))
	if topic, _ := again.next(t, ctx); topic != "$iothub/twin/res/200/?$rid=b" {
		t.Errorf("%s was retained", topic)
	}
	again.Publish(events, 2, false, "x")
	select {
	case <-again.lost:
	case <-ctx.Done():
		t.Fatal("the connection outlives QoS 2")
	}
	if all := h.Events("cam"); len(all) != 3 {
		t.Errorf("%d events", len(all))
	}
}

// Beyond a limit a hub answers twin requests with 429 and refuses CONNECTs, each by itself, until the limit is lifted.
func TestThrottling(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{Limits: Limits{Connects: 1e-6, TwinReads: 1e-6, TwinUpdates: 1e-6}})
	s := newService(t, h)
	connection := h.CreateDevice("cam")
	d := connected(t, h, connection)
	id, pass := password(connection, time.Hour)
	late := dial(h, "tls", id, pass)
	token := late.Connect()
	if !token.WaitTimeout(10*time.Second) || !errors.Is(token.Error(), packets.ErrorRefusedServerUnavailable) {
		t.Errorf("a CONNECT beyond the limit: %v", token.Error())
	}
	for n, want := range []string{"200", "429", "429"} {
		done(t, d.Publish(fmt.Sprintf("$iothub/twin/GET/?$rid=%d", n), 1, false, ""))
		if topic, _ := d.next(t, ctx); topic != fmt.Sprintf("$iothub/twin/res/%s/?$rid=%d", want, n) {
			t.Errorf("read %d: %s", n, topic)
		}
	}
	for n, want := range []string{"204/?$rid=0&$version=2", "429/?$rid=1"} {
		done(t, d.Publish(fmt.Sprintf("$iothub/twin/PATCH/properties/reported/?$rid=%d", n), 1, false, `{"a":1}`))
		if topic, _ := d.next(t, ctx); topic != "$iothub/twin/res/"+want {
			t.Errorf("patch %d: %s", n, topic)
		}
	}
	s.expect(t, 429, "PATCH", "/twins/cam", `{"properties":{"desired":{"a":1}}}`)
	h.SetLimits(Limits{})
	s.expect(t, 200, "PATCH", "/twins/cam", `{"properties":{"desired":{"a":1}}}`)
	if topic, _ := d.next(t, ctx); !strings.HasPrefix(topic, topicDesired) {
		t.Error(topic)
	}
	done(t, dial(h, "tls", id, pass).Connect())
	select {
	case <-d.lost:
	case <-ctx.Done():
		t.Error("the first connection stays beside the second")
	}
}
