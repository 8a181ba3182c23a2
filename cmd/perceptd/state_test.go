package main

import (
	"encoding/base64"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/store"
	"perceptd/cmd/perceptd/config"
	"perceptd/cmd/perceptd/e2e/harness"
	"perceptd/tokencache"
)

// A version before did not tell the address. Its tokens are served on, but those that can be of no use.
func TestTokensOfNoAddress(t *testing.T) {
	t.Parallel()
	of := func(source, issuer string) *tokencache.Snapshot {
		payload := base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"` + issuer + `"}`))
		text := tokencache.NewSecret("eyJ0." + payload + ".c2ln")
		return &tokencache.Snapshot{Source: source,
			Keys: []tokencache.SnapshotEntry{{Token: tokencache.Token{Text: text}}}}
	}
	const azure, simulator = "https://sts.windows.net/t/", "https://sts.simulated.invalid/t/"
	from := api.SourceStatus{Kind: config.ManagedIdentity, Endpoint: "arc", Address: "127.0.0.1:40342"}
	s := state{log: zap.NewNop(), kind: from.Kind, source: sourceOf(from)}
	for _, row := range []struct {
		source, issuer string
		ours           bool
	}{
		{"managed-identity arc 127.0.0.1:40342", azure, true},
		{"managed-identity arc 127.0.0.1:40342", simulator, true}, // what is to be dropped is dropped token by token
		{"managed-identity arc 127.0.0.1:40343", azure, false},
		{"managed-identity arc", azure, true},
		{"managed-identity arc", simulator, false},
		{"managed-identity imds", azure, false},
		{"simulated arc", simulator, false},
		{"", azure, false},
	} {
		if got := s.ours(of(row.source, row.issuer)); got != row.ours {
			t.Errorf("of %q by %s: %v", row.source, row.issuer, got)
		}
	}
	inside := api.SourceStatus{Kind: config.Simulated, Endpoint: "arc", Address: "127.0.0.1:1"}
	if name := sourceOf(inside).Name; strings.Contains(name, "127.0.0.1") {
		t.Errorf("%q is another at each start", name)
	}
}

// What tokens outlive is told by how the last carrying and saving ended.
func TestKeptStatusIsThatOfTheLastSave(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tokens, err := store.OpenTokens(store.Disk(dir), new(store.Key))
	harness.Must(t, err)
	record := store.OpenPolicyChanges(store.Disk(dir), func() time.Duration { return time.Hour })
	s := state{log: zap.NewNop(), tokens: tokens, record: record}
	s.bound.Store(new(boundTo))
	var m tokencache.Snapshot
	m.BootID = "this"
	if err := s.save(m); err != nil || !s.status().Reboot || s.status().Why != "" {
		t.Errorf("%v, %+v", err, s.status())
	}
	harness.Must(t, os.Chmod(dir, 0o770))
	if err := s.save(m); err == nil || s.status().Reboot || !s.status().Restart ||
		!strings.Contains(s.status().Why, "mode 0770") || s.status().BoundTo == "" {
		t.Errorf("%v, %+v", err, s.status())
	}
	harness.Must(t, os.Chmod(dir, 0o700))
	if err := s.save(m); err != nil || !s.status().Reboot {
		t.Errorf("%v, %+v", err, s.status())
	}
}
