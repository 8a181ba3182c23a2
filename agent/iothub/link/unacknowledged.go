package link

import (
	"encoding/binary"
	"sync"
)

// unacknowledged are the IDs of the messages that were sent and want a PUBACK. It is safe for concurrent use.
type unacknowledged struct {
	mu  sync.Mutex
	ids map[uint16]bool
}

// sent notes what is sent: one packet, whole, as MQTT's library writes each.
func (u *unacknowledged) sent(packet []byte) {
	id, wanted := idOfPublish(packet)
	if !wanted {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ids == nil {
		u.ids = make(map[uint16]bool)
	}
	u.ids[id] = true
}

// acknowledge notes a PUBACK, and reports whether a message waits for it.
func (u *unacknowledged) acknowledge(id uint16) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	waits := u.ids[id]
	delete(u.ids, id)
	return waits
}

// idOfPublish returns the ID of a PUBLISH that wants a PUBACK; false: the packet is none.
//
// Source: MQTT 3.1.1, section 3.3.
func idOfPublish(packet []byte) (id uint16, wanted bool) {
	const qos, maxLength = 0x06, 4
	if len(packet) == 0 || packet[0]>>4 != packetPublish || packet[0]&qos == 0 {
		return 0, false
	}
	body := packet[1:]
	for i := 0; i < maxLength && len(body) > 0; i++ {
		more := body[0]&0x80 != 0
		if body = body[1:]; !more {
			break
		}
	}
	if len(body) < 2 {
		return 0, false
	}
	topic := int(binary.BigEndian.Uint16(body))
	if body = body[2:]; len(body) < topic+2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(body[topic:]), true
}
