package main

import (
	"os/exec"
	"strings"
	"testing"

	"perceptd/agent/api"
)

// A shell that evaluates what is printed has those variables and runs nothing, whatever NO_PROXY was.
func TestEnvForShells(t *testing.T) {
	t.Parallel()
	l := api.Loopback{Endpoint: "http://[::1]:40380/msi/token", Header: strings.Repeat("0a", 32)}
	for _, row := range []struct{ before, after string }{
		{"", "127.0.0.1,localhost,::1"},
		{"localhost", "localhost,127.0.0.1,::1"},
		{"10.0.0.1,.example", "10.0.0.1,.example,127.0.0.1,localhost,::1"},
		{"it's `x` $(x) \\ \"; x", "it's `x` $(x) \\ \"; x,127.0.0.1,localhost,::1"},
	} {
		script := variablesFor(l, shellForm, row.before) +
			`printf '%s|' "$IDENTITY_ENDPOINT" "$IDENTITY_HEADER" "$NO_PROXY" "$no_proxy" "${MSI_ENDPOINT-unset}"`
		shell := exec.Command("sh", "-c", script)
		shell.Env = []string{"MSI_ENDPOINT=http://127.0.0.1:1"}
		out, err := shell.CombinedOutput()
		want := strings.Join([]string{l.Endpoint, l.Header, row.after, row.after, "unset", ""}, "|")
		if err != nil || string(out) != want {
			t.Errorf("%q: %v\n%s\nwant %s", row.before, err, out, want)
		}
	}
}
