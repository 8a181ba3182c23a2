package limit

import "testing"

// However many units a user runs in, its requests that wait and its streams have one bound together; and so have those
// of a unit, whatever users it becomes.
func TestSemaphoreBoundsAParent(t *testing.T) {
	t.Parallel()
	user := func(uid uint32, unit string) Key { return Key{UID: uid, Unit: unit} }
	all := []struct {
		of   Key
		want bool
	}{
		{user(1, ""), true}, {user(1, ""), true}, {user(1, ""), false},
		{user(1, "a.service"), true}, {user(1, "b.service"), false}, // a fourth of user 1
		// a fourth of that unit
		{user(2, "a.service"), true}, {user(3, "a.service"), true}, {user(4, "a.service"), false},
		{user(4, ""), true}, {user(5, ""), false}, // a seventh of all
	}
	var s Semaphore
	for i, row := range all {
		if got := s.TryAcquire(row.of, Quota{PerKey: 2, PerParent: 3, Total: 6}); got != row.want {
			t.Errorf("row %d, %v: %v", i, row.of, got)
		}
	}
	for _, row := range all {
		if row.want {
			s.Release(row.of)
		}
	}
	if s.total != 0 || len(s.held) != 0 {
		t.Errorf("left over: %d %v", s.total, s.held)
	}
}
