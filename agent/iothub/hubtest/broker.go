package hubtest

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
)

const (
	maxPacket       = 256<<10 + 4<<10 // bytes; the hub's messages have 256 KB at most
	maxSubscription = 5               // of one connection
)

// hubs counts the hubs of this process, which have an address each.
var hubs atomic.Uint32

// ownAddress returns an address of 127.0.0.0/8 that no hub of another running process has.
func ownAddress() string {
	pid, n := os.Getpid(), hubs.Add(1)
	return fmt.Sprintf("127.%d.%d.%d", 1+pid>>8%250, pid&0xff, 1+n%250)
}

// Start returns a hub that listens.
func Start(o Options) (*Hub, error) {
	o.Name = cmp.Or(o.Name, "hub.test")
	o.Address = cmp.Or(o.Address, ownAddress())
	o.MQTTPort, o.HTTPSPort = cmp.Or(o.MQTTPort, 8883), cmp.Or(o.HTTPSPort, 8443)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logf == nil {
		o.Logf = func(string, ...any) {}
	}
	made, err := makeCertificates(o.Name, o.Address, o.Now())
	if err != nil {
		return nil, err
	}
	h := &Hub{
		options: o, certificates: made, policyKey: newKey(),
		identities: make(map[string]*identity), configurations: make(map[string]*configuration),
		methods: make(map[string]chan<- methodAnswer),
		changed: make(chan struct{}), throttles: o.Limits.throttles(),
	}
	return h, h.Resume()
}

// Stop ends every connection and listens no more. What is registered, and the twins, stay.
func (h *Hub) Stop() {
	h.mu.Lock()
	b := h.broker
	h.broker = nil
	h.mu.Unlock()
	if b != nil {
		b.close()
	}
}

// Resume listens again after Stop, at the same addresses.
func (h *Hub) Resume() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || h.broker != nil {
		return errors.New("the hub is closed, or listens already")
	}
	b, err := h.newBroker()
	if err != nil {
		return err
	}
	h.broker = b
	return nil
}

// Close is Stop for good.
func (h *Hub) Close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.Stop()
}

// broker is the hub while it listens. Every client has a name space of its own among its topics, since the hub's own
// topics are the same for all: filters get the client's prefix when it subscribes, and topics lose it when a packet is
// encoded for it.
type broker struct {
	hub    *Hub
	hook   *hook
	server *mqtt.Server
	mqtt   net.Listener
	https  net.Listener
	rest   *http.Server
	serve  http.Handler // of the service's side
	conns  connections
	ended  sync.WaitGroup
	done   chan struct{} // closed when it ends
}

func (h *Hub) newBroker() (*broker, error) {
	capabilities := mqtt.NewDefaultServerCapabilities()
	capabilities.MaximumQos = 2 // a publish with it ends the connection: see OnPacketRead
	capabilities.MaximumPacketSize = maxPacket
	capabilities.MinimumProtocolVersion = 4
	b := &broker{
		hub: h, serve: h.restHandler(), done: make(chan struct{}),
		conns: connections{open: make(map[net.Conn]struct{})},
		server: mqtt.New(&mqtt.Options{
			InlineClient: true, Capabilities: capabilities, SysTopicResendInterval: 3600,
			Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		}),
	}
	b.hook = &hook{broker: b}
	if err := b.server.AddHook(b.hook, nil); err != nil {
		return nil, err
	}
	var err error
	if b.mqtt, err = h.listen(h.MQTTAddress()); err != nil {
		return nil, err
	}
	if b.https, err = h.listen(h.HTTPSAddress()); err != nil {
		_ = b.mqtt.Close()
		return nil, err
	}
	if err := b.server.Serve(); err != nil {
		return nil, err
	}
	b.rest = &http.Server{
		Handler: b, ReadHeaderTimeout: 10 * time.Second,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	b.ended.Go(func() { _ = b.rest.Serve(b.https) })
	b.ended.Go(b.accept)
	return b, nil
}

func (b *broker) accept() {
	for {
		c, err := b.mqtt.Accept()
		if err != nil {
			return
		}
		b.ended.Go(func() { b.conns.serve(c, func() { b.converse(c) }) })
	}
}

// converse speaks MQTT until the connection ends.
func (b *broker) converse(c net.Conn) {
	err := b.server.EstablishConnection("hub", c)
	if s, ok := b.hook.byConnection.LoadAndDelete(c); ok {
		b.hook.forget(s.(*session))
	} else {
		b.hub.options.Logf("connection from %s ended before it was accepted: %v", c.RemoteAddr(), err)
	}
}

func (b *broker) close() {
	close(b.done)
	_ = b.mqtt.Close()
	_ = b.rest.Close()
	b.conns.close()
	b.ended.Wait()
	_ = b.server.Close()
}

// ServeHTTP answers the service's side, and devices that speak MQTT over WebSocket.
func (b *broker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != pathWebSocket {
		b.serve.ServeHTTP(w, r)
		return
	}
	socket, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	c := &webSocketConn{Conn: socket.NetConn(), socket: socket}
	b.conns.serve(c, func() { b.converse(c) })
}
