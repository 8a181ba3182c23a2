package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
)

// maxPacket bounds an MQTT packet from the hub, in bytes. A twin has some 100 KB at most, a method's payload 128 KB.
const maxPacket = 320 << 10

// MQTT's packet types that a hub sends.
const (
	packetConnack  = 2
	packetPublish  = 3
	packetPuback   = 4
	packetSuback   = 9
	packetPingresp = 13
)

// guard is the connection to the hub. It looks at each packet before the libraries do, and ends the connection at one
// that a hub does not send. MQTT's library keeps messages of QoS 2 in memory, and panics at a SUBACK with more codes
// than subscriptions. IoT Hub's library prints answers that it cannot read, and leaks a goroutine for each that comes
// twice.
//
// Source: MQTT 3.1.1, section 2.2 (fixed header) and 3 (packets).
type guard struct {
	net.Conn
	acknowledged *atomic.Int64 // PUBACKs that came
	waiting      unacknowledged
	answered     requestIDs

	kind   byte // of the packet that is coming
	state  guardState
	length int    // of what comes after the fixed header
	shift  uint   // of the next byte of length
	read   int    // of length
	head   []byte // as far as it came: the topic's length, and the topic, of a PUBLISH; all of what has two bytes
	fault  error
}

type guardState uint8

const (
	atKind guardState = iota
	atLength
	atBody
)

// Read reads as a net.Conn. After what breaks the rules it returns an error.
func (g *guard) Read(p []byte) (int, error) {
	if g.fault != nil {
		return 0, g.fault
	}
	n, err := g.Conn.Read(p)
	for at := 0; at < n; {
		taken, fault := g.look(p[at:n])
		if fault != nil {
			g.fault = fault
			return at, fault
		}
		at += taken
	}
	return n, err
}

// Write writes as a net.Conn: one packet.
func (g *guard) Write(packet []byte) (int, error) {
	g.waiting.sent(packet) // before its PUBACK can come
	return g.Conn.Write(packet)
}

// look looks at the bytes that come next, at one or more of them.
func (g *guard) look(p []byte) (taken int, fault error) {
	switch g.state {
	case atKind:
		g.kind, g.length, g.shift, g.read, g.head = p[0]>>4, 0, 0, 0, g.head[:0]
		g.state = atLength
		return 1, checkKind(g.kind, p[0]&0x0f)
	case atLength:
		g.length |= int(p[0]&0x7f) << g.shift
		g.shift += 7
		switch {
		case g.length > maxPacket || g.shift > 28:
			return 1, fmt.Errorf("IoT Hub sends a packet of more than %d bytes", maxPacket)
		case p[0]&0x80 != 0:
			return 1, nil
		}
		g.state = atBody
		if g.length == 0 {
			g.state = atKind
		}
		return 1, checkLength(g.kind, g.length)
	}
	taken = min(len(p), g.length-g.read)
	switch g.kind {
	case packetPublish:
		if err := g.lookAtTopic(p[:taken]); err != nil {
			return taken, err
		}
	case packetConnack, packetPuback:
		g.head = append(g.head, p[:taken]...)
	}
	if g.read += taken; g.read < g.length {
		return taken, nil
	}
	g.state = atKind
	return taken, g.lookAtEnd()
}

// lookAtEnd looks at a packet of which all has come.
func (g *guard) lookAtEnd() error {
	switch g.kind {
	case packetPublish:
		if g.topicEnd() == 0 || len(g.head) < g.topicEnd() {
			return errors.New("IoT Hub sends a message whose topic has no end")
		}
	case packetConnack:
		if code := g.head[1]; code > lastConnackCode {
			return fmt.Errorf("IoT Hub answers the connect with code %d, which MQTT 3.1.1 does not have", code)
		}
	case packetPuback:
		if !g.waiting.acknowledge(binary.BigEndian.Uint16(g.head)) {
			return errors.New("IoT Hub acknowledges a message that was not sent")
		}
		g.acknowledged.Add(1)
	}
	return nil
}

// lastConnackCode is the highest that a CONNACK can have: not authorised. The library takes some above it for success.
const lastConnackCode = 5

// checkKind looks at the first byte of a packet: its type, and flags.
func checkKind(kind, flags byte) error {
	const qos1 = 1
	switch kind {
	case packetPublish:
		if flags>>1&3 > qos1 {
			return errors.New("IoT Hub sends a message of QoS 2")
		}
		return nil
	case packetConnack, packetPuback, packetSuback, packetPingresp:
		if flags == 0 {
			return nil
		}
	}
	return fmt.Errorf("IoT Hub sends a packet of type %d with flags %#x, as it never does", kind, flags)
}

// checkLength looks at the length of what comes after the fixed header.
func checkLength(kind byte, length int) error {
	whole, fixed := map[byte]int{
		packetConnack: 2, packetPuback: 2, packetPingresp: 0,
		packetSuback: 3, // of one subscription: each SUBSCRIBE has one
	}[kind]
	if fixed && length != whole {
		return fmt.Errorf("IoT Hub sends a packet of type %d with %d bytes", kind, length)
	}
	if kind == packetPublish && length == 0 {
		return errors.New("IoT Hub sends a message without a topic")
	}
	return nil
}

// lookAtTopic gathers the topic of a PUBLISH, and checks it when it is there.
func (g *guard) lookAtTopic(p []byte) error {
	whole := g.topicEnd()
	if whole != 0 && len(g.head) == whole {
		return nil // it was checked
	}
	for _, b := range p {
		g.head = append(g.head, b)
		if whole = g.topicEnd(); whole != 0 && len(g.head) == whole {
			return g.checkTopic(string(g.head[2:]))
		}
	}
	return nil
}

// topicEnd is how long the topic and its length are together; 0: not known yet.
func (g *guard) topicEnd() int {
	if len(g.head) < 2 {
		return 0
	}
	return 2 + int(g.head[0])<<8 + int(g.head[1])
}

// The topics on which the hub sends.
const (
	topicTwinAnswer = "$iothub/twin/res/"
	topicDesired    = "$iothub/twin/PATCH/properties/desired/"
	topicMethod     = "$iothub/methods/POST/"
)

// maxTopic bounds a topic, in bytes.
const maxTopic = 1 << 10

func (g *guard) checkTopic(topic string) error {
	if len(topic) > maxTopic {
		return errors.New("IoT Hub sends on a topic that is too long")
	}
	switch {
	case strings.HasPrefix(topic, topicTwinAnswer):
		id, isAnswer := readTwinAnswer(topic)
		if !isAnswer {
			return errors.New("IoT Hub sends an answer that is none")
		}
		if !g.answered.add(id) {
			return errors.New("IoT Hub answers a request twice")
		}
	case strings.HasPrefix(topic, topicDesired), strings.HasPrefix(topic, topicMethod):
	default:
		return errors.New("IoT Hub sends on a topic that was not subscribed")
	}
	return nil
}

// readTwinAnswer returns the ID of the request that a topic answers, and whether the library understands the topic:
// $iothub/twin/res/STATUS/?$rid=HEX[&$version=NUMBER].
func readTwinAnswer(topic string) (id uint32, isAnswer bool) {
	status, query, found := strings.Cut(strings.TrimPrefix(topic, topicTwinAnswer), "/?")
	if !found || !isNumber(status, 3) {
		return 0, false
	}
	ids := 0
	for _, pair := range strings.Split(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		switch name {
		case "$rid":
			ids++
			number, err := strconv.ParseUint(value, 16, 32)
			if err != nil {
				return 0, false
			}
			id = uint32(number)
		case "$version":
			if !isNumber(value, 18) {
				return 0, false
			}
		}
	}
	return id, ids == 1
}

// isNumber reports whether text is a number of at most so many digits.
func isNumber(text string, most int) bool {
	return text != "" && len(text) <= most && strings.Trim(text, "0123456789") == ""
}

// idWindow is how many of the highest IDs are remembered. Far fewer requests are under way at a time.
const idWindow = 1024

// requestIDs is the IDs of requests that were answered. They are given out in order. Zero: none.
type requestIDs struct {
	highest uint32
	seen    [idWindow / 64]uint64 // a bit for each of the highest, by the ID's remainder
}

// add adds an ID. It returns false for one that is there, or is too low for that to be known.
func (r *requestIDs) add(id uint32) bool {
	if id > r.highest {
		for gone := r.highest + 1; gone < id && gone-r.highest <= idWindow; gone++ {
			r.seen[gone%idWindow/64] &^= 1 << (gone % 64)
		}
		r.highest = id
	} else if r.highest-id >= idWindow || r.seen[id%idWindow/64]&(1<<(id%64)) != 0 {
		return false
	}
	r.seen[id%idWindow/64] |= 1 << (id % 64)
	return true
}
