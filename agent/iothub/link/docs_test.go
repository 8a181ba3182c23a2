package link

import (
	"os"
	"regexp"
	"testing"
	"time"
)

// docs/iothub.md shows the defaults that hold.
func TestDocumentedDefaults(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../../docs/iothub.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := func(key string) string {
		row := regexp.MustCompile("(?m)^\\| `" + key + "` \\| `(.*?)` \\|").FindSubmatch(page)
		if row == nil {
			t.Errorf("%s has no default", key)
			return ""
		}
		return string(row[1])
	}
	for key, want := range map[string]string{
		"identity_socket": defaultIdentitySocket, "key_socket": defaultKeySocket,
	} {
		if got := shown(key); got != want {
			t.Errorf("%s: %s is shown, it is %s", key, got, want)
		}
	}
	for key, want := range map[string]time.Duration{
		"token_life": defaultTokenLife, "keep_alive": defaultKeepAlive, "max_backoff": defaultMaxBackoff,
	} {
		if got, err := time.ParseDuration(shown(key)); err != nil || got != want {
			t.Errorf("%s: %v is shown, it is %v", key, got, want)
		}
	}
}
