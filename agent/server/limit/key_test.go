package limit

import "testing"

func TestKeysAreNamed(t *testing.T) {
	t.Parallel()
	for want, k := range map[string]Key{
		"uid 1000":                        {UID: 1000, Parent: true},
		"uid 1000 (not proved)":           {UID: 1000, Unattested: true},
		"unit cron.service as uid 1000":   {UID: 1000, Unit: "cron.service"},
		"unit cron.service":               {Unit: "cron.service"},
		"uid 0 outside of units":          {},
		"uid 0 (not proved)":              {Unattested: true},
		"module vision":                   {Module: "vision", Parent: true},
		"container 0123456789ab":          {Container: "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},
		"callers whose user is not known": {UID: NoUID, Loopback: true},
		"uid 0":                           {Loopback: true},
	} {
		if got := k.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
