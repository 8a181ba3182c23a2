package link

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
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
		{0x20, 2, 0, 0}, {0x40, 2, 0, 1}, {0x40, 2, 0, 2}, {0xd0, 0},
		publish("$iothub/twin/res/200/?$rid=a1", `{"desired":{}}`),
		publish("$iothub/twin/res/204/?$rid=2&$version=17", ""),
		publish("$iothub/twin/PATCH/properties/desired/?$version=2", strings.Repeat("x", 100_000)),
		publish("$iothub/methods/POST/percept.status/?$rid=1", "null"), {0xd0, 0},
	}, nil)
	for _, size := range []int{1, 2, 7, 4096, 1 << 20} {
		out, acknowledged, err := through(good, size)
		if err != nil || !bytes.Equal(out, good) || acknowledged != 2 {
			t.Errorf("in pieces of %d: %d of %d bytes, %d acknowledged, %v", size, len(out), len(good), acknowledged, err)
		}
		for name, bad := range map[string][]byte{
			"long":                {0x30, 0xff, 0xff, 0xff, 0x7f},
			"endless length":      {0x30, 0x80, 0x80, 0x80, 0x80, 1},
			"an answer of words":  publish("$iothub/twin/res/fine/?$rid=1", ""),
			"an answer to nobody": publish("$iothub/twin/res/200/", ""),
			"an answer to a name": publish("$iothub/twin/res/200/?$rid=canary", ""),
			"another's":           publish("devices/other/messages/devicebound/", "x"),
			"a long topic":        publish(topicMethod+strings.Repeat("x", 2000)+"/?$rid=1", "x"),
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

func FuzzGuard(f *testing.F) {
	f.Add(publish("$iothub/twin/res/200/?$rid=a1", "{}"), 3)
	f.Add([]byte{0x40, 2, 0, 1}, 1)
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		out, acknowledged, err := through(text, 1+size&0xff)
		if err == nil && !bytes.Equal(out, text) {
			t.Error("something is missing")
		}
		whole, same, _ := through(text, len(text)+1)
		if !bytes.HasPrefix(text, out) || acknowledged != same || len(whole) != len(out) {
			t.Error("pieces are judged otherwise than the whole")
		}
	})
}
