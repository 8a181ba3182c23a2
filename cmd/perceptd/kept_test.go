package main

import (
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
		return &tokencache.Snapshot{Source: source, Keys: []tokencache.SnapshotEntry{{Token: tokencache.Token{Text: text}}}}
	}
	const azure, simulator = "https://sts.windows.net/t/", "https://sts.simulated.invalid/t/"
	from := api.SourceStatus{Kind: config.ManagedIdentity, Endpoint: "arc", Address: "127.0.0.1:40342"}
	k := kept{log: zap.NewNop(), source: sourceName(from), former: "managed-identity arc"}
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
		if got := k.ours(of(row.source, row.issuer)); got != row.ours {
			t.Errorf("of %q by %s: %v", row.source, row.issuer, got)
		}
	}
	inside := api.SourceStatus{Kind: config.Simulated, Endpoint: "arc", Address: "127.0.0.1:1"}
	if name := sourceName(inside); strings.Contains(name, "127.0.0.1") {
		t.Errorf("%q is another at each start", name)
	}
}

// The first key that is anywhere is the key, and one that is no key hides those after it.
func TestFindKey(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	write := func(name string, size int) string {
		path := filepath.Join(folder, name)
		if err := os.WriteFile(path, []byte(strings.Repeat("k", size)), 0o400); err != nil {
			t.Fatal(err)
		}
		return path
	}
	none, key, odd := filepath.Join(folder, "none"), write("key", 32), write("odd", 7)
	for _, row := range []struct {
		places []string
		found  bool
		absent bool
	}{
		{[]string{none, key}, true, false},
		{[]string{none, none, key, odd}, true, false},
		{[]string{none, odd, key}, false, false},
		{[]string{none, none}, false, true},
	} {
		got, place, err := findKey(row.places)
		if (got != nil) != row.found || row.found && place != key || errors.Is(err, fs.ErrNotExist) != row.absent || (err == nil) != row.found {
			t.Errorf("%q: found %t in %q, %v", row.places, got != nil, place, err)
		}
	}
}

func TestNoKey(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache-key")
	if err := unopened(path); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path+".cred", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unopened(path); err == nil || !strings.HasSuffix(err.Error(), "cache-key.cred, was not opened: systemctl status perceptd-cache-key tells why") {
		t.Error(err)
	}
}

// What tokens outlive is told by how the last carrying and saving ended.
func TestKeptStatusIsThatOfTheLastSave(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tokens, err := store.OpenTokens(store.Disk(dir), new(store.Key))
	harness.Must(t, err)
	k := kept{log: zap.NewNop(), tokens: tokens}
	var m tokencache.Snapshot
	m.BootID = "this"
	if err := k.save(m); err != nil || !k.status().Reboot || k.status().Why != "" {
		t.Errorf("%v, %+v", err, k.status())
	}
	harness.Must(t, os.Chmod(dir, 0o770))
	if err := k.save(m); err == nil || k.status().Reboot || !k.status().Restart || !strings.Contains(k.status().Why, "mode 0770") || k.status().BoundTo == "" {
		t.Errorf("%v, %+v", err, k.status())
	}
	harness.Must(t, os.Chmod(dir, 0o700))
	if err := k.save(m); err != nil || !k.status().Reboot {
		t.Errorf("%v, %+v", err, k.status())
	}
}
