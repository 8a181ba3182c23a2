package harness

import (
	"bufio"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// Exec is a running exec, by what its command was told.
type Exec struct {
	Address, Secret string
	PID             int // of its command
}

// LaunchExec runs exec with a command that waits for the test to end.
func LaunchExec(t *testing.T, socket string) Exec {
	t.Helper()
	cmd := exec.Command(Binary(t, "perceptctl"), "--socket", socket, "exec", "--", "sh", "-c",
		`echo "$IDENTITY_ENDPOINT"; echo "$IDENTITY_HEADER"; echo $$; exec cat`)
	in, err := cmd.StdinPipe()
	Must(t, err)
	out, err := cmd.StdoutPipe()
	Must(t, err)
	Must(t, cmd.Start())
	t.Cleanup(func() {
		in.Close() // ends the command
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	lines := bufio.NewScanner(out)
	lines.Scan()
	address, isOurs := strings.CutPrefix(lines.Text(), "http://")
	address, path, _ := strings.Cut(address, "/")
	lines.Scan()
	secret := lines.Text()
	lines.Scan()
	pid, err := strconv.Atoi(lines.Text())
	if !isOurs || path != "msi/token" || len(secret) != 64 || err != nil {
		t.Fatalf("the command was told %q and %d digits, %v", address, len(secret), err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	return Exec{address, secret, pid}
}
