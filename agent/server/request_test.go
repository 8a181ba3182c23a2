package server

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestQueryIsReadStrictly(t *testing.T) {
	t.Parallel()
	many := func(n int) string {
		var pieces []string
		for i := range n {
			pieces = append(pieces, fmt.Sprintf("p%d=", i))
		}
		return strings.Join(pieces, "&")
	}
	for _, test := range []struct{ raw, want, fault string }{
		{"", "", ""},
		{"a=1", "a=1", ""},
		{"a=1&b=2", "a=1 b=2", ""},
		{"a", "a=", ""},
		{"a=", "a=", ""},
		{"a=b=c", "a=b=c", ""},
		{"&a=1&&b=2&", "a=1 b=2", ""},
		{"?a=1", "?a=1", ""},
		{"a=https://x/y", "a=https://x/y", ""},
		{"a=https%3A%2F%2fx%2Fy", "a=https://x/y", ""},
		{"%61=1", "a=1", ""},
		{"a=1;b=2", "a=1;b=2", ""},
		{"a=%26%3D", "a=&=", ""},
		{"a=%00%FF", "a=\x00\xff", ""},
		{"a=b+c", "a=b c", ""},
		{"A=1&a=2", "A=1 a=2", ""},
		{many(maxParameters), strings.ReplaceAll(many(maxParameters), "&", " "), ""},
		{many(maxParameters + 1), "", "more than 16"},
		{"a=1&a=1", "", `"a" is there twice`},
		{"a=1&%61=2", "", `"a" is there twice`},
		{"a&b&a", "", `"a" is there twice`},
		{"=1", "", "without a name"},
		{"=", "", "without a name"},
		{"a=%", "", "malformed"},
		{"a=%2", "", "malformed"},
		{"a=%zz", "", "malformed"},
		{"a=%2x", "", "malformed"},
		{"%g0=1", "", "malformed"},
		{"a=1#b", "", "malformed"},
		{"a=ü", "", "malformed"},
		{"a=\x7f", "", "malformed"},
		{"a=\t", "", "malformed"},
		{"a=b c", "", "malformed"},
	} {
		var q query
		e := q.parse(test.raw)
		if test.fault != "" {
			if e == nil || e.status != 400 || !strings.Contains(e.detail, test.fault) {
				t.Errorf("%q: fault %+v, want %q", test.raw, e, test.fault)
			}
			continue
		}
		var got []string
		for _, p := range q.list[:q.count] {
			got = append(got, p.name+"="+p.value)
		}
		if e != nil || strings.Join(got, " ") != test.want {
			t.Errorf("%q: got %q, fault %+v, want %q", test.raw, got, e, test.want)
		}
	}
}

// FuzzQuery checks that what the parser lets through, net/url understands in the same way.
func FuzzQuery(f *testing.F) {
	f.Add("resource=https%3A%2F%2Fvault.azure.net&api-version=2018-02-01")
	f.Add("a=%zz&&b=+#")
	f.Add("a=1&%61=2")
	f.Fuzz(func(t *testing.T, raw string) {
		var q query
		if q.parse(raw) != nil {
			return
		}
		// A raw semicolon is a letter to us, and an error to net/url.
		values, err := url.ParseQuery(strings.ReplaceAll(raw, ";", "%3B"))
		if err != nil {
			t.Fatalf("net/url refuses %q: %v", raw, err)
		}
		if len(values) != q.count {
			t.Fatalf("%q: %d parameters, net/url has %d", raw, q.count, len(values))
		}
		for _, p := range q.list[:q.count] {
			if !slices.Equal(values[p.name], []string{p.value}) {
				t.Fatalf("%q: %q is %q, net/url has %q", raw, p.name, p.value, values[p.name])
			}
		}
	})
}

func TestLazyDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		due := time.Now().Add(9 * time.Second)
		c := &lazyDeadline{Context: t.Context(), deadline: due}
		if at, ok := c.Deadline(); !ok || !at.Equal(due) {
			t.Errorf("deadline %v, %v", at, ok)
		}
		if err := c.Err(); err != nil {
			t.Errorf("ended before its time: %v", err)
		}
		<-c.Done()
		if !time.Now().Equal(due) || !errors.Is(c.Err(), context.DeadlineExceeded) {
			t.Errorf("ended at %v with %v", time.Now(), c.Err())
		}
		c.stop()
		if !errors.Is(c.Err(), context.DeadlineExceeded) {
			t.Errorf("stop changes the error to %v", c.Err())
		}
	})
	gone, cancel := context.WithCancel(context.Background())
	c := &lazyDeadline{Context: gone, deadline: time.Now().Add(time.Hour)}
	cancel()
	<-c.Done()
	if !errors.Is(c.Err(), context.Canceled) {
		t.Errorf("a caller that has gone: %v", c.Err())
	}
	c.stop()
	(&lazyDeadline{Context: gone, deadline: time.Now()}).stop() // never waited for
}
