package attest

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"perceptd/agent/grants"
)

func grantsFor(matches ...grants.Match) []grants.Ref {
	all := make([]grants.Ref, len(matches))
	for i, m := range matches {
		all[i].Caller = m
	}
	return all
}

func uidOf(n uint32) *uint32 { return &n }

// Each subject has its own secret, which depends on the root secret alone and is valid while a grant names the
// subject.
func TestSecretPerGrant(t *testing.T) {
	t.Parallel()
	digest := "sha256:" + strings.Repeat("a", 64)
	matches := []grants.Match{
		{Module: "vision"}, {Module: "uid 1000"}, {Unit: "vision"}, {Image: digest},
		{UID: uidOf(1000)}, {GID: uidOf(1000)}, {UID: uidOf(1001)},
	}
	s := NewSecrets([32]byte{1})
	seen := make(map[string]bool)
	for _, m := range matches {
		header := s.Header(m)
		if len(header) != 64 || seen[header] {
			t.Errorf("%v: %d digits, or another's", m, len(header))
		}
		seen[header] = true
		if _, ok := s.Match(header); ok {
			t.Errorf("%v: counts without a grant", m)
		}
	}
	s.SetGrants(grantsFor(matches...))
	for _, m := range matches {
		if got, ok := s.Match(s.Header(m)); !ok || !got.IsSame(m) {
			t.Errorf("%v: got %v %v", m, got, ok)
		}
	}
	named := grants.Match{UID: uidOf(1000), User: "edge"}
	if s.Header(named) != s.Header(grants.Match{UID: uidOf(1000)}) {
		t.Error("a user has another secret by name than by number")
	}
	right := s.Header(matches[0])
	for _, wrong := range []string{
		"", right[:63], right + "0", strings.ToUpper(right), " " + right[1:], strings.Repeat("0", 64),
		NewSecrets([32]byte{2}).Header(matches[0]),
	} {
		if got, ok := s.Match(wrong); ok {
			t.Errorf("%q is %v", wrong, got)
		}
	}
	s.SetGrants(grantsFor(matches[1]))
	if _, ok := s.Match(right); ok {
		t.Error("a secret outlives its grant")
	}
	if text := fmt.Sprintf("%v %+v %#v", s, s, s); strings.Contains(text, right) || strings.Contains(text, "[1 0 0") {
		t.Error("printing shows a secret")
	}
}

func TestCallerBySecret(t *testing.T) {
	t.Parallel()
	away := errors.New("it is away")
	for _, row := range []struct {
		name    string
		subject grants.Match
		uid     uint32
		unknown error
		want    string // the caller in words, or a part of the error
		denied  bool
	}{
		{"a module, whoever asks", grants.Match{Module: "vision"}, 5, nil,
			"module vision by header secret, peer uid 5", false},
		{"a module, when it cannot be told", grants.Match{Module: "vision"}, grants.NoID, away,
			"module vision by header secret, peer unknown", false},
		{"a unit", grants.Match{Unit: "a.service"}, 5, nil, "unit a.service by header secret, peer uid 5", false},
		{"a group", grants.Match{GID: uidOf(7)}, 5, nil, "gid 7 by header secret, peer uid 5", false},
		{"the user", grants.Match{UID: uidOf(5)}, 5, nil, "uid 5 by header secret, peer uid 5", false},
		{"another user", grants.Match{UID: uidOf(5)}, 6, nil, "that uid 5 sent its header secret: uid 6 did", true},
		{"root for a user", grants.Match{UID: uidOf(5)}, 0, nil, "uid 0 did", true},
		{"a user, when it cannot be told", grants.Match{UID: uidOf(5)}, grants.NoID, away, "it is away", true},
	} {
		c, err := CallerBySecret(row.subject, row.uid, row.unknown)
		got := c.String()
		var why *Error
		if err != nil && errors.As(err, &why) {
			got = err.Error()
		}
		if (err != nil) != row.denied || !strings.Contains(got, row.want) {
			t.Errorf("%s: %q %v", row.name, got, err)
		}
		if row.subject.UID == nil && c.UID != grants.NoID {
			t.Errorf("%s: it has what uid %d was granted", row.name, c.UID)
		}
		isKnown := row.unknown == nil && row.subject.UID == nil
		if (c.Peer != nil) != isKnown || isKnown && *c.Peer != row.uid {
			t.Errorf("%s: the peer is %v", row.name, c.Peer)
		}
	}
}
