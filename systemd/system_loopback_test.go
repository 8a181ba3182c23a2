//go:build system

package systemd_test

import (
	"regexp"
	"strings"
	"testing"
)

// askLoopback asks for a token on the loopback listener with the secret that is its first argument, as App Service's
// clients do.
const askLoopback = `exec 3<>/dev/tcp/127.0.0.1/40380
printf 'GET /msi/token?api-version=2019-08-01&resource=https://vault.azure.net HTTP/1.1\r\nHost: 127.0.0.1:40380\r\nX-IDENTITY-HEADER: %s\r\nConnection: close\r\n\r\n' "$0" >&3
cat <&3`

// testLoopback shows that the sandbox lets the loopback listener work, and the table of sockets be read.
func testLoopback(t *testing.T, machine *machine) {
	t.Run("serves on loopback", func(t *testing.T) {
		machine.configure(t, config+"\n[loopback]\naddress = \"127.0.0.1:40380\"\n")
		wants(t, machine.must(t, "stat", "-c", "%a %U %s", "/var/lib/percept/loopback-secret"), "600 percept 32")
		secret := regexp.MustCompile(`IDENTITY_HEADER='([0-9a-f]{64})'`)
		secretOf := func(out string, err error) string {
			t.Helper()
			found := secret.FindStringSubmatch(out)
			if err != nil || found == nil {
				t.Fatalf("no secret: %v %.200s", err, out)
			}
			return found[1]
		}
		edge := secretOf(machine.as(t, "edge", "perceptctl", "env"))
		vision := secretOf(machine.run(t, "perceptctl", "env", "--module", "vision"))
		for _, row := range []struct{ user, secret, want string }{
			{"edge", edge, `"access_token"`},
			{"nobody", edge, "uid 65534 did"},
			{"nobody", strings.Repeat("0", 64), "has no grant's secret"},
			{"nobody", vision, `"access_token"`},
		} {
			out, err := machine.as(t, row.user, "bash", "-c", askLoopback, row.secret)
			if err != nil || !strings.Contains(out, row.want) {
				t.Errorf("user %s: %v %s", row.user, err, out)
			}
		}
		if out, err := machine.as(t, "technician", "perceptctl", "env", "--module", "vision"); exitOf(err) != 4 {
			t.Errorf("an administrator who is not root: %v %s", err, out)
		}
		machine.configure(t, config)
		if out, err := machine.as(t, "edge", "bash", "-c", askLoopback, edge); err == nil {
			t.Errorf("closed, and it answers: %s", out)
		}
	})
}
