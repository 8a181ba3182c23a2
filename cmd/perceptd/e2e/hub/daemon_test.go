//go:build hub

package hub

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// TestHubServiceSDKOfPerceptd has azure-iothub's service client update the twin of a device that perceptd is, and call
// perceptd's methods. No secret of it all is in the daemon's log.
func TestHubServiceSDKOfPerceptd(t *testing.T) {
	h := startHub(t)
	connection := h.CreateDevice("percept-7")
	file := filepath.Join(harness.ShortFolder(t), "iothub")
	must(t, os.WriteFile(file, []byte(connection), 0o600))
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision")+fmt.Sprintf(
		"\n[iothub]\nconnection_string_file = %q\nca_file = %q\nreport_spread = \"0s\"\n", file, h.rootFile))
	d.AwaitReady(t)
	h.node(t, "perceptd.js", "ID=percept-7")
	_, key, _ := strings.Cut(connection, "SharedAccessKey=")
	for _, secret := range []string{key, "SharedAccessSignature"} {
		if strings.Contains(d.Text(), secret) {
			t.Errorf("the log has %q", secret)
		}
	}
}
