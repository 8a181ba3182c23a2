//go:build hub

package hub

import (
	"encoding/json"
	"testing"

	"perceptd/agent/iothub/hubtest"
)

// TestHubDeviceSDK has azure-iot-device connect, over each transport and as device and module: it reads and patches its
// twin, is notified, answers a method, and sends an event.
func TestHubDeviceSDK(t *testing.T) {
	for _, c := range []struct{ name, transport, module string }{
		{"MQTT", "mqtt", ""},
		{"MQTT over WebSocket", "ws", ""},
		{"a module", "mqtt", "percept"},
		{"a module over WebSocket", "ws", "percept"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := startHub(t)
			id, connection := "camera", h.CreateDevice("camera")
			if c.module != "" {
				id, connection = "camera/"+c.module, h.CreateModule("camera", c.module)
			}
			if c.module == "" { // it waits until there is a subscription
				must(t, h.SendMessage(id, []byte("hello"), map[string]string{"$.mid": "c1", "kind of": "a+b&c=é d"}))
			}
			h.node(t, "device.js", "TRANSPORT="+c.transport, "DEVICE="+connection, "ID=camera", "MODULE="+c.module)
			checkEvents(t, h.Events(id))
			if n := h.Counters(id); n.Connects != 1 || n.Refused != 0 || n.Methods.Messages != 4 ||
				n.TwinReads.Messages == 0 || n.BytesIn == 0 || n.BytesOut == 0 {
				t.Errorf("counted: %+v", n)
			}
		})
	}
}

// checkEvents checks the one event that device.js sends.
func checkEvents(t *testing.T, all []hubtest.Event) {
	t.Helper()
	if len(all) != 1 {
		t.Fatalf("%d events", len(all))
	}
	var body map[string]string
	must(t, json.Unmarshal(all[0].Body, &body))
	if body["trouble"] != "none" {
		t.Errorf("body %s", all[0].Body)
	}
	for name, want := range map[string]string{
		"kind of": "a+b&c=é;d", "$.mid": "m1", "$.ct": "application/json", "$.ce": "utf-8",
	} {
		if got := all[0].Properties[name]; got != want {
			t.Errorf("property %s is %q, want %q; all: %q", name, got, want, all[0].Properties)
		}
	}
}

// TestHubServiceSDK has azure-iothub register identities, read and update twins, query, and set automatic
// configurations.
func TestHubServiceSDK(t *testing.T) { startHub(t).node(t, "service.js") }
