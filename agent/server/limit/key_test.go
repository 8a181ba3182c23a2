package limit

import (
	"slices"
	"strings"
	"testing"
)

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
		"container 0123456789ab":          {Container: strings.Repeat("0123456789abcdef", 4)},
		"callers whose user is not known": {UID: NoUID, Loopback: true},
		"uid 0":                           {Loopback: true},
	} {
		if got := k.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A user's units and a unit's users have a parent in common; root's services, and containers, have none.
func TestParents(t *testing.T) {
	t.Parallel()
	user, unit := Key{UID: 1, Parent: true}, Key{Unit: "a.service", Parent: true}
	for _, row := range []struct {
		key  Key
		want []Key
	}{
		{Key{UID: 1}, []Key{user}},
		{Key{UID: 1, Unattested: true}, []Key{user}},
		{Key{UID: 1, Unit: "a.service"}, []Key{user, unit}},
		{Key{UID: 1, Loopback: true}, []Key{{UID: 1, Loopback: true, Parent: true}}},
		{Key{UID: 2, Unit: "a.service"}, []Key{{UID: 2, Parent: true}, unit}},
		{Key{Unit: "a.service"}, []Key{unit}},
		{Key{}, nil},
		{Key{UID: NoUID, Unattested: true}, nil},
		{Key{Container: "1f"}, nil},
		{Key{Module: "m", UID: 1}, []Key{{Module: "m", Parent: true}}},
		{Key{Module: "m", Unattested: true}, []Key{{Module: "m", Parent: true}}},
	} {
		parents, n := row.key.parents()
		if !slices.Equal(parents[:n], row.want) {
			t.Errorf("%+v: %+v, want %+v", row.key, parents[:n], row.want)
		}
	}
}
