package link

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
)

// maxPacket bounds an MQTT packet from the hub, in bytes. A twin has some 100 KB at most, a method's payload 128 KB.
const maxPacket = 320 << 10

// MQTT's packet types.
const (
	packetPublish = 3
	packetPuback  = 4
)

// guard is the connection to the hub. It looks at the packets that come, before MQTT's library does: a packet that is
// too long, or an answer that the library would print, ends the connection.
//
// Source: MQTT 3.1.1, section 2.2 (fixed header) and 3.3 (PUBLISH).
type guard struct {
	net.Conn
	acknowledged *atomic.Int64 // PUBACKs that came

	kind   byte // of the packet that is coming
	state  guardState
	length int    // of what comes after the fixed header
	shift  uint   // of the next byte of length
	read   int    // of length
	head   []byte // the topic's length, and the topic, of a PUBLISH, as far as they came
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

// look looks at the bytes that come next, at one or more of them.
func (g *guard) look(p []byte) (taken int, fault error) {
	switch g.state {
	case atKind:
		g.kind, g.length, g.shift, g.read, g.head = p[0]>>4, 0, 0, 0, g.head[:0]
		g.state = atLength
		if g.kind == packetPuback {
			g.acknowledged.Add(1)
		}
		return 1, nil
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
		return 1, nil
	}
	taken = min(len(p), g.length-g.read)
	if g.kind == packetPublish {
		if err := g.lookAtTopic(p[:taken]); err != nil {
			return taken, err
		}
	}
	if g.read += taken; g.read == g.length {
		g.state = atKind
	}
	return taken, nil
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
			return checkTopic(string(g.head[2:]))
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

func checkTopic(topic string) error {
	if len(topic) > maxTopic {
		return errors.New("IoT Hub sends on a topic that is too long")
	}
	switch {
	case strings.HasPrefix(topic, topicTwinAnswer):
		if !isTwinAnswer(topic) {
			return errors.New("IoT Hub sends an answer that is none")
		}
	case strings.HasPrefix(topic, topicDesired), strings.HasPrefix(topic, topicMethod):
	default:
		return errors.New("IoT Hub sends on a topic that was not subscribed")
	}
	return nil
}

// isTwinAnswer reports whether the library understands the topic: $iothub/twin/res/STATUS/?$rid=HEX[&$version=NUMBER].
func isTwinAnswer(topic string) bool {
	status, query, found := strings.Cut(strings.TrimPrefix(topic, topicTwinAnswer), "/?")
	if !found || !isNumber(status, "0123456789", 3) {
		return false
	}
	ids := 0
	for _, pair := range strings.Split(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		switch name {
		case "$rid":
			ids++
			if !isNumber(value, "0123456789abcdefABCDEF", 8) {
				return false
			}
		case "$version":
			if !isNumber(value, "0123456789", 18) {
				return false
			}
		}
	}
	return ids == 1
}

func isNumber(text, digits string, most int) bool {
	return text != "" && len(text) <= most && strings.Trim(text, digits) == ""
}
