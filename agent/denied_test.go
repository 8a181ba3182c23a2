package agent

import (
	"testing"

	"perceptd/agent/deny"
)

// A refusal names the twin that denies: a module's, or one of an identity that the device had before.
func TestSetByNamesTheTwin(t *testing.T) {
	t.Parallel()
	for want, rule := range map[string]deny.Rule{
		"the twin of h/percept-8/percept in IoT Hub, version 4,": {Origin: deny.Twin, Twin: 4,
			Hub: "h/percept-8/percept"},
		"this device's twin in IoT Hub, version 4,": {Origin: deny.Twin, Twin: 4},
		"a direct method from IoT Hub":              {Origin: deny.Method},
		"an administrator of this device":           {Origin: deny.Local},
	} {
		if got := setBy(&rule); got != want {
			t.Errorf("%+v: %s", rule, got)
		}
	}
}
