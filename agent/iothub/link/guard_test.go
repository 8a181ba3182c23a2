package link

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// pieces is a connection that gives out text a few bytes at a time.
type pieces struct {
	net.Conn
	text io.Reader
	size int
}

func (p *pieces) Read(b []byte) (int, error) { return p.text.Read(b[:min(len(b), p.size)]) }

func through(text []byte, size int) (out []byte, acknowledged int64, err error) {
	var n atomic.Int64
	g := &guard{Conn: &pieces{text: bytes.NewReader(text), size: size}, acknowledged: &n}
	for _, id := range []byte{1, 2} {
		g.waiting.sent([]byte{packetPublish<<4 | 2, 5, 0, 1, 't', 0, id})
	}
	out, err = io.ReadAll(g)
	return out, n.Load(), err
}

// publish is a PUBLISH with QoS 0.
func publish(topic, payload string) []byte {
	body := append([]byte{byte(len(topic) >> 8), byte(len(topic))}, topic+payload...)
	head := []byte{packetPublish << 4}
	length := len(body)
	for {
		b := byte(length & 0x7f)
		if length >>= 7; length > 0 {
			head = append(head, b|0x80)
			continue
		}
		return append(append(head, b), body...)
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	good := bytes.Join([][]byte{
		{0x20, 2, 0, 0}, {0x40, 2, 0, 1}, {0x40, 2, 0, 2}, {0xd0, 0}, {0x90, 3, 0, 1, 1},
		publish("$iothub/twin/res/200/?$rid=a1", `{"desired":{}}`),
		publish("$iothub/twin/res/204/?$rid=2&$version=17", ""),
		publish("$iothub/twin/PATCH/properties/desired/?$version=2", strings.Repeat("x", 100_000)),
		publish("$iothub/methods/POST/percept.status/?$rid=1", "null"), {0xd0, 0},
	}, nil)
	for _, size := range []int{1, 2, 7, 4096, 1 << 20} {
		out, acknowledged, err := through(good, size)
		if err != nil || !bytes.Equal(out, good) || acknowledged != 2 {
			t.Errorf("in pieces of %d: %d of %d bytes, %d acknowledged, %v", size, len(out), len(good), acknowledged,
				err)
		}
		for name, bad := range map[string][]byte{
			"a PUBACK for nothing":    {0x40, 2, 0, 9},
			"a PUBACK twice":          {0x40, 2, 0, 1},
			"a code that there isn't": {0x20, 2, 0, 6},
			"long":                    {0x30, 0xff, 0xff, 0xff, 0x7f},
			"endless length":          {0x30, 0x80, 0x80, 0x80, 0x80, 1},
			"an answer of words":      publish("$iothub/twin/res/fine/?$rid=1", ""),
			"an answer to nobody":     publish("$iothub/twin/res/200/", ""),
			"an answer to a name":     publish("$iothub/twin/res/200/?$rid=canary", ""),
			"another's":               publish("devices/other/messages/devicebound/", "x"),
			"a second answer":         publish("$iothub/twin/res/500/?$rid=A1", ""),
			"a packet of QoS 2":       append([]byte{0x34}, publish(topicMethod+"x/?$rid=1", "x")[1:]...),
			"codes of no filter":      {0x90, 5, 0, 1, 1, 1, 1},
			"no code":                 {0x90, 2, 0, 1},
			"a PUBREL":                {0x62, 2, 0, 1},
			"a CONNECT":               {0x10, 2, 0, 1},
			"odd flags":               {0x42, 2, 0, 1},
			"a ping with a body":      {0xd0, 1, 0},
			"a PUBACK of nothing":     {0x40, 0},
			"no topic":                {0x30, 0},
			"half a topic":            {0x30, 4, 0, 9, 'x', 'x'},
			"half a length":           {0x30, 1, 0},
			"a long topic":            publish(topicMethod+strings.Repeat("x", 2000)+"/?$rid=1", "x"),
		} {
			out, _, err := through(append(bytes.Clone(good), bad...), size)
			if err == nil || strings.Contains(err.Error(), "canary") || errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s in pieces of %d: %v", name, size, err)
			}
			if !bytes.HasPrefix(out, good) {
				t.Errorf("%s in pieces of %d: what came before is lost", name, size)
			}
		}
	}
}

func TestRequestIDs(t *testing.T) {
	t.Parallel()
	var ids requestIDs
	for _, row := range []struct {
		id   uint32
		want bool
	}{
		{0, true}, {0, false}, {1, true}, {3, true}, {2, true}, {2, false}, {3, false},
		{1024, true}, {0, false}, {4, true}, {1, false}, // 1 is still remembered, 0 is not
		{1027, true}, {3, false}, {1025, true}, {1026, true}, {1025, false},
		{900_000, true}, {1026, false}, {900_000 - 1023, true}, {900_000 - 1024, false},
		{math.MaxUint32, true}, {math.MaxUint32, false}, {math.MaxUint32 - 1023, true},
	} {
		if got := ids.add(row.id); got != row.want {
			t.Errorf("adding %d is %t, want %t", row.id, got, row.want)
		}
	}
	// Against a plain record of all.
	random := mathrand.New(mathrand.NewPCG(1, 2))
	ids, all := requestIDs{}, map[uint32]bool{}
	highest := uint32(0)
	for range 100_000 {
		id := highest - min(highest, random.Uint32N(1500)) + random.Uint32N(300)
		want := !all[id] && (id > highest || highest-id < idWindow)
		if got := ids.add(id); got != want {
			t.Fatalf("adding %d is %t, want %t; the highest is %d", id, got, want, highest)
		}
		if want {
			all[id], highest = true, max(highest, id)
		}
	}
}

// packetsOf counts the whole packets at the beginning of text.
func packetsOf(text []byte) (n int) {
	for {
		length, end := 0, 1
		for shift := 0; ; shift += 7 {
			if end >= len(text) || shift > 21 {
				return n
			}
			length |= int(text[end]&0x7f) << shift
			if end++; text[end-1]&0x80 == 0 {
				break
			}
		}
		if len(text)-end < length {
			return n
		}
		text, n = text[end+length:], n+1
	}
}

// A fault is the same however the text comes, and no packet gets through in pieces that does not as a whole.
func TestMessagesThatWaitForTheirPuback(t *testing.T) {
	t.Parallel()
	message := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
	message.TopicName, message.Payload, message.Qos, message.MessageID = "t", make([]byte, 100_000), 1, 513
	var text bytes.Buffer
	if err := message.Write(&text); err != nil {
		t.Fatal(err)
	}
	whole := text.Bytes()
	if id, wanted := idOfPublish(whole); id != 513 || !wanted {
		t.Errorf("%d, %t", id, wanted)
	}
	for i := range 10 { // no more of it
		if id, wanted := idOfPublish(whole[:min(i, 7)]); wanted && i < 8 {
			t.Errorf("%d bytes: %d", i, id)
		}
	}
	message.Qos = 0
	text.Reset()
	if err := message.Write(&text); err != nil {
		t.Fatal(err)
	}
	if _, wanted := idOfPublish(text.Bytes()); wanted {
		t.Error("one of QoS 0 wants a PUBACK")
	}
}

func FuzzGuard(f *testing.F) {
	f.Add(publish("$iothub/twin/res/200/?$rid=a1", "{}"), 3)
	f.Add([]byte{0x40, 2, 0, 1}, 1)
	f.Add(append([]byte{0x40, 2, 0, 1, 0x30, 9}, "no topic's end"...), 5)
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		out, acknowledged, err := through(text, 1+size&0xff)
		if !bytes.HasPrefix(text, out) || err == nil && len(out) != len(text) {
			t.Error("something is missing")
		}
		whole, same, fault := through(text, len(text)+1)
		if fmt.Sprint(err) != fmt.Sprint(fault) || acknowledged != same || packetsOf(out) != packetsOf(whole) {
			t.Errorf("in pieces %d packets, %d acknowledged, %v; as a whole %d, %d, %v",
				packetsOf(out), acknowledged, err, packetsOf(whole), same, fault)
		}
	})
}
