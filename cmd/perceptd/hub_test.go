package main

import (
	"errors"
	"slices"
	"testing"
	"time"

	"perceptd/agent/api"
)

func TestHubTroubles(t *testing.T) {
	t.Parallel()
	since := time.Date(2026, 11, 28, 8, 0, 0, 0, time.UTC)
	refused := api.DesiredStatus{Version: 7, Applied: 6, Refused: "percept.deny[0]: unknown key modul"}
	const refusal = "what IoT Hub sets is refused, version 7 of the twin's desired properties: percept.deny[0]: unknown " +
		"key modul"
	for _, row := range []struct {
		name string
		of   api.HubStatus
		why  error
		now  time.Time
		want []string
	}{
		{"connected", api.HubStatus{Connected: true, Since: since, LastError: "EOF"}, nil, since.Add(time.Hour), nil},
		{"away for a moment", api.HubStatus{Since: since, LastError: "EOF"}, nil, since.Add(offlineTrouble - 1), nil},
		{"away", api.HubStatus{Since: since, LastError: "connection refused"}, nil, since.Add(offlineTrouble),
			[]string{"IoT Hub is not connected since Nov 28 08:00 UTC: connection refused"}},
		{"refused at once", api.HubStatus{Since: since, LastError: "CONNACK 5", Failure: api.HubFailureRefused}, nil, since,
			[]string{"IoT Hub is not connected since Nov 28 08:00 UTC: CONNACK 5"}},
		{"away without a word", api.HubStatus{Since: since}, nil, since.Add(time.Hour),
			[]string{"IoT Hub is not connected since Nov 28 08:00 UTC: it does not answer"}},
		{"a file is not there", api.HubStatus{Since: since}, errors.New("/ca.pem: file does not exist"), since,
			[]string{"IoT Hub: what [iothub] names cannot be used: /ca.pem: file does not exist: mend it, then " +
				"perceptctl reload"}},
		{"refused", api.HubStatus{Connected: true, Since: since, Desired: refused}, nil, since,
			[]string{refusal}},
		{"refused, and away since", api.HubStatus{Since: since, LastError: "EOF", Desired: refused}, nil,
			since.Add(time.Hour), []string{"IoT Hub is not connected since Nov 28 08:00 UTC: EOF", refusal}},
	} {
		if got := hubTroubles(row.of, row.why, row.now); !slices.Equal(got, row.want) {
			t.Errorf("%s: %q", row.name, got)
		}
	}
}
