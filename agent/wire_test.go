package agent

import (
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// What is known of a key without a token says nothing of permissions.
func TestStatusOfAKeyWithoutAToken(t *testing.T) {
	t.Parallel()
	var key cachedKey
	if got := tokenStatusOf(key); got.Permissions != (api.Permissions{}) || got.Claims != nil ||
		!got.IssuedFrom.IsZero() {
		t.Errorf("%+v", got)
	}
	before := tokencache.Claims{Groups: []string{"g"}}
	key.Before, key.Left, key.Expected, key.Seen = &before, time.Hour, time.Unix(1e9, 0), 3
	key.Pattern = tokencache.Pattern{Kind: tokencache.Regular, Age: 12 * time.Hour}
	from := time.Unix(1e9-3600, 0)
	key.Ended = tokencache.Stretch{From: from, To: from.Add(time.Minute), State: tokencache.Stale, Withheld: true}
	got := tokenStatusOf(key)
	if want := (api.EndedStretch{From: api.Time(from), To: api.Time(from.Add(time.Minute)), State: api.PermissionsStale,
		Withheld: true}); got.Ended == nil || *got.Ended != want {
		t.Errorf("%+v", got.Ended)
	}
	if got.Before == nil || got.Before.Groups[0] != "g" || got.Claims == nil || got.Rollover.Age != 43200 ||
		got.Rollover.Seen != 3 || got.Rollover.Expected.IsZero() {
		t.Errorf("%+v", got)
	}
}
