package agent

import (
	"testing"
	"time"
)

func TestSecondsOf(t *testing.T) {
	t.Parallel()
	for value, want := range map[any]int64{
		1604106651.0: 1604106651, "1604106651": 1604106651, "1604106651.5": 1604106651, "soon": 0, true: 0, -5.0: 0,
		"NaN": 0, "1e300": 0, nil: 0,
	} {
		if got := secondsOf(value); got.IsZero() != (want == 0) || want != 0 && got.Unix() != want {
			t.Errorf("%v: %v", value, got)
		}
	}
}

func TestTruncate(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		text string
		n    int
		want string
	}{{"abc", 3, "abc"}, {"abcd", 3, "abc"}, {"aé", 2, "a"}, {"é", 1, ""}, {"", 0, ""}} {
		if got := truncate(row.text, row.n); got != row.want {
			t.Errorf("%q, %d: %q", row.text, row.n, got)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add([]byte(`{"access_token":{"nbf":{"essential":true,"value":"1604106651"}}}`))
	f.Add([]byte(`{"access_token":{"acrs":{"essential":true,"value":"c1"},"nbf":{"value":1e9}},"id_token":{}}`))
	f.Add([]byte(` `))
	f.Add([]byte(`{"access_token":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseChallenge(text)
		if err != nil && (c.made || err.Error() == "") {
			t.Errorf("%+v, %v", c, err)
		}
		if len(c.others) > listed || !c.after.IsZero() && c.after.Before(time.Unix(0, 0)) {
			t.Errorf("%+v", c)
		}
	})
}
