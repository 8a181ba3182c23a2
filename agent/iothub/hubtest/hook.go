package hubtest

import (
	"encoding/json"
	"errors"
	"fmt"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// hook has the broker behave as IoT Hub.
type hook struct {
	mqtt.HookBase
	broker       *broker
	sessions     sync.Map // *mqtt.Client → *session
	byConnection sync.Map // net.Conn → *session, until the broker has forgotten it
	refused      sync.Map // *mqtt.Client → byte, what its CONNACK says
}

// What a CONNACK says.
const (
	serverUnavailable byte = 3
	notAuthorized     byte = 5
)

// ID names the hook for the broker.
func (k *hook) ID() string { return "iothub" }

// Provides reports which events the hook takes part in.
func (k *hook) Provides(event byte) bool {
	return slices.Contains([]byte{
		mqtt.OnConnectAuthenticate, mqtt.OnACLCheck, mqtt.OnSessionEstablished, mqtt.OnPacketRead,
		mqtt.OnPacketEncode, mqtt.OnSubscribe, mqtt.OnSubscribed, mqtt.OnUnsubscribe, mqtt.OnPublish, mqtt.OnPublished,
		mqtt.OnWill,
	}, event)
}

func (k *hook) session(cl *mqtt.Client) *session {
	if s, ok := k.sessions.Load(cl); ok {
		return s.(*session)
	}
	return nil
}

// OnConnectAuthenticate accepts or refuses a CONNECT. An older connection of the same identity is cut first: the broker
// would forget the new one together with it.
func (k *hook) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) bool {
	h := k.broker.hub
	delay(&h.Faults.LoginDelay, k.broker.done)
	under := tlsOf(cl.Net.Conn)
	h.mu.Lock()
	defer h.mu.Unlock()
	i, l, expires, err := h.authenticateLocked(
		cl.ID, string(pk.Connect.Username), string(pk.Connect.Password), peerCertificates(under))
	answer := notAuthorized
	switch {
	case err != nil:
	case h.Faults.RefuseLogins.Load():
		err = errors.New("logins are refused")
	case h.broker != k.broker || !h.throttles.connects.Allow():
		err, answer = errors.New("too many connections a second, or going down"), serverUnavailable
	}
	if err != nil {
		h.options.Logf("CONNECT of %q refused: %v", cl.ID, err)
		k.refused.Store(cl, answer)
		if named := h.identities[cl.ID]; named != nil {
			named.counters.Refused++
		}
		return false
	}
	s := &session{
		client: cl, identity: i, apiVersion: l.apiVersion, wire: under.NetConn().(*wireCounter),
		over: make(chan struct{}),
	}
	for i.session != nil {
		older := i.session
		older.end("another connection of the same identity")
		h.mu.Unlock()
		<-older.over
		h.mu.Lock()
	}
	if !expires.IsZero() {
		s.expiry = time.AfterFunc(expires.Sub(h.options.Now()), func() { s.end("the signature expired") })
	}
	k.sessions.Store(cl, s)
	k.byConnection.Store(cl.Net.Conn, s)
	return true
}

// OnSessionEstablished notes that the CONNACK is sent.
func (k *hook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	s, h := k.session(cl), k.broker.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if s == nil || h.identities[s.identity.id()] != s.identity {
		cl.Stop(errors.New("the identity was removed"))
		return
	}
	s.identity.session = s
	s.identity.counters.connected(h.options.Now())
	h.options.Logf("%s is connected", s.identity.id())
	h.changedLocked()
}

// forget notes that a connection is over, and that the broker has forgotten it.
func (k *hook) forget(s *session) {
	h := k.broker.hub
	k.sessions.Delete(s.client)
	if s.expiry != nil {
		s.expiry.Stop()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s.identity.counters.BytesIn += s.wire.in.Load()
	s.identity.counters.BytesOut += s.wire.out.Load()
	if s.identity.session == s {
		s.identity.session = nil
	}
	h.options.Logf("%s is not connected any more: %v", s.identity.id(), s.client.StopCause())
	h.changedLocked()
	close(s.over)
}

// OnPacketRead ends a connection that publishes with QoS 2, and one that a fault is for.
func (k *hook) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	cut := pk.FixedHeader.Type == packets.Publish && pk.FixedHeader.Qos == 2 ||
		pk.FixedHeader.Type == packets.Subscribe && take(&k.broker.hub.Faults.CutAtSubscribe)
	if cut {
		cl.Stop(errors.New("cut"))
		return pk, packets.ErrRejectPacket
	}
	return pk, nil
}

// OnPacketEncode takes the client's name space off topics, and says why a CONNECT was refused.
func (k *hook) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	switch pk.FixedHeader.Type {
	case packets.Publish:
		pk.TopicName = strings.TrimPrefix(pk.TopicName, nameSpace(cl.ID))
	case packets.Connack:
		if code, ok := k.refused.LoadAndDelete(cl); ok {
			pk.ReasonCode = code.(byte)
		}
	}
	return pk
}

// OnWill stores a last will that is an event; others are dropped.
func (k *hook) OnWill(cl *mqtt.Client, will mqtt.Will) (mqtt.Will, error) {
	if s := k.session(cl); s != nil && s.isEventTopic(will.TopicName) {
		k.event(s, will.TopicName, will.Payload, map[string]string{"iothub-MessageType": "Will"})
	}
	will.TopicName = nameSpace(cl.ID) + "will" // nothing is subscribed to it
	return will, nil
}

// OnSubscribe puts the filters that IoT Hub knows into the client's name space. What stays outside is refused.
func (k *hook) OnSubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	s := k.session(cl)
	if s == nil {
		return pk
	}
	refuse := take(&k.broker.hub.Faults.RefuseSubscribes)
	known := []string{
		topicMethod + "#", topicTwinAnswer + "#", topicDesired + "#", s.identity.path() + "/messages/devicebound/#",
		s.identity.path() + "/inputs/#",
	}
	pk.Filters = slices.Clone(pk.Filters)
	there := cl.State.Subscriptions.Len()
	for n := range pk.Filters {
		filter := &pk.Filters[n]
		filter.Qos = min(filter.Qos, 1)
		if refuse || !slices.Contains(known, filter.Filter) {
			continue
		}
		named := nameSpace(cl.ID) + filter.Filter
		if _, has := cl.State.Subscriptions.Get(named); !has {
			there++
		}
		if there <= maxSubscription {
			filter.Filter = named
		}
	}
	return pk
}

// OnSubscribed wakes those that wait for a subscription, and hands over messages that waited for it.
func (k *hook) OnSubscribed(cl *mqtt.Client, _ packets.Packet, _ []byte) {
	k.broker.hub.mu.Lock()
	defer k.broker.hub.mu.Unlock()
	k.broker.hub.changedLocked()
	if s := k.session(cl); s != nil && s.identity.session == s {
		k.broker.hub.deliverLocked(s.identity)
	}
}

// OnUnsubscribe finds the filters in the client's name space.
func (k *hook) OnUnsubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	pk.Filters = slices.Clone(pk.Filters)
	for n := range pk.Filters {
		pk.Filters[n].Filter = nameSpace(cl.ID) + pk.Filters[n].Filter
	}
	return pk
}

// OnACLCheck ends a connection that publishes where it may not.
func (k *hook) OnACLCheck(cl *mqtt.Client, topic string, write bool) bool {
	if !write {
		return strings.HasPrefix(topic, nameSpace(cl.ID))
	}
	s := k.session(cl)
	if s == nil {
		return false
	}
	if s.isEventTopic(topic) || strings.HasPrefix(topic, topicTwinRead+"?") ||
		strings.HasPrefix(topic, topicReported+"?") || strings.HasPrefix(topic, topicMethodReply) {
		return true
	}
	s.end(fmt.Sprintf("it published on %q", topic))
	return false
}

// OnPublish stores an event before its PUBACK. Nothing that devices publish reaches another.
func (k *hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	s := k.session(cl)
	if cl.Net.Inline || s == nil {
		return pk, nil
	}
	h := k.broker.hub
	delay(&h.Faults.PubackDelay, k.broker.done)
	if s.isEventTopic(pk.TopicName) {
		extra := map[string]string{}
		if pk.FixedHeader.Retain {
			extra["mqtt-retain"] = "true"
		}
		k.event(s, pk.TopicName, pk.Payload, extra)
	} else if h.Faults.AnswerBeforePuback.Load() {
		k.request(s, pk.TopicName, pk.Payload)
	}
	pk.FixedHeader.Retain = false
	return pk, packets.CodeSuccessIgnore
}

// OnPublished answers a request after its PUBACK.
func (k *hook) OnPublished(cl *mqtt.Client, pk packets.Packet) {
	s := k.session(cl)
	if cl.Net.Inline || s == nil || s.isEventTopic(pk.TopicName) || k.broker.hub.Faults.AnswerBeforePuback.Load() {
		return
	}
	k.request(s, pk.TopicName, pk.Payload)
}

// request takes a twin request, or the answer of a method.
func (k *hook) request(s *session, topic string, payload []byte) {
	path, query, _ := strings.Cut(topic, "?")
	id := requestID(query)
	h := k.broker.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if status, ok := strings.CutPrefix(path, topicMethodReply); ok {
		h.answeredLocked(s.identity, strings.TrimSuffix(status, "/"), id, payload)
		return
	}
	if h.Faults.DropTwinAnswers.Load() {
		return
	}
	status, version, answer := h.twinRequestLocked(s, path, payload)
	reply := fmt.Sprintf("%s%d/?$rid=%s", topicTwinAnswer, status, id)
	if version != 0 {
		reply += "&$version=" + strconv.FormatInt(version, 10)
	}
	h.sendLocked(s.identity, reply, answer)
}

// requestID returns $rid of a topic's query.
func requestID(query string) string {
	for _, pair := range strings.Split(query, "&") {
		if id, ok := strings.CutPrefix(pair, "$rid="); ok {
			return id
		}
	}
	return ""
}

// twinRequestLocked returns the status, the version of reported properties that a patch made, and the body.
func (h *Hub) twinRequestLocked(s *session, path string, payload []byte) (int, int64, []byte) {
	i := s.identity
	limiter := h.throttles.twinReads
	if path == topicReported {
		limiter = h.throttles.twinUpdates
	}
	switch {
	case take(&h.Faults.ThrottleTwin) || !limiter.Allow():
		return http.StatusTooManyRequests, 0, h.errorBody(429001, "throttled")
	case take(&h.Faults.FailTwin):
		return http.StatusInternalServerError, 0, h.errorBody(500001, "failed")
	case path == topicTwinRead:
		text, _ := json.Marshal(object{"desired": i.twin.desired.forDevice(), "reported": i.twin.reported.forDevice()})
		i.counters.TwinReads.add(len(text))
		return http.StatusOK, 0, text
	}
	i.counters.Reported.add(len(payload))
	change, err := readObject(payload)
	if err == nil {
		err = i.twin.reported.patch(change, false, s.apiVersion, h.options.Now())
	}
	if err != nil {
		h.options.Logf("%s: reported properties refused: %v", i.id(), err)
		return http.StatusBadRequest, 0, h.errorBody(400004, err.Error())
	}
	i.twin.etag++
	h.changedLocked()
	return http.StatusNoContent, i.twin.reported.version, nil
}

// errorBody is what IoT Hub's errors say.
func (h *Hub) errorBody(code int, message string) []byte {
	text, _ := json.Marshal(object{
		"errorCode": code, "message": message, "trackingId": "hubtest",
		"timestampUtc": h.options.Now().UTC().Format(timeFormat),
	})
	return text
}

func (k *hook) event(s *session, topic string, payload []byte, properties map[string]string) {
	bag := strings.TrimPrefix(topic, s.identity.path()+"/messages/events/")
	values, err := url.ParseQuery(strings.TrimPrefix(bag, "?"))
	h := k.broker.hub
	if err != nil {
		h.options.Logf("%s: an event with properties %q: %v", s.identity.id(), bag, err)
	}
	for name := range values {
		properties[name] = values.Get(name)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	i := s.identity
	i.counters.Events.add(len(payload))
	i.events = append(i.events, Event{Properties: properties, Body: slices.Clone(payload), StoredOn: h.options.Now()})
	if surplus := len(i.events) - eventsKept; surplus > 0 {
		i.events = slices.Delete(i.events, 0, surplus)
	}
	h.changedLocked()
}
