//go:build attacks

package attacks

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// execBound is what strangers may cause a `perceptctl exec` to have: a module's container is small.
const execBound = 64 << 20

// stranger is a user who shares the module's network, and nothing else.
var stranger = soldier{uid: strayUser}

// openProgram copies this test binary to where every user may run it.
func openProgram(t *testing.T) string {
	t.Helper()
	dir := harness.ShortFolder(t)
	must(t, os.Chmod(dir, 0o755))
	program := filepath.Join(dir, "test")
	copyProgram(t, "/proc/self/exe", program)
	return program
}

// execPID is the exec whose command that is.
func execPID(t *testing.T, r harness.Exec) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.PID))
	must(t, err)
	_, rest, _ := strings.Cut(string(text), ") ")
	pid, err := strconv.Atoi(strings.Fields(rest)[1])
	must(t, err)
	return pid
}

// askExec gets a token as exec's command does, on a connection of its own.
func askExec(r harness.Exec) error {
	conn, err := net.Dial("tcp", r.Address)
	if err != nil {
		return err
	}
	defer conn.Close()
	return askFor200(conn, bufio.NewReader(conn), "GET /msi/token?api-version=2019-08-01&resource="+harness.VaultURI+
		" HTTP/1.1\r\nHost: "+r.Address+"\r\nX-IDENTITY-HEADER: "+r.Secret+"\r\nConnection: close\r\n\r\n")
}

// TestAttacksExec: whatever strangers on the same network do at exec's port, its command gets its tokens, and exec
// stays small.
func TestAttacksExec(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Fatal("the attackers are other users: run make test-attacks as root")
	}
	program := openProgram(t)
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	for _, row := range []struct {
		name  string
		kind  string
		width int
	}{
		{"many lines", "many lines", 400},
		{"idle connections", "idle", 1000},
		{"refused, and idle ever after", "ask", 1000},
		{"slow heads", "slow head", 400},
	} {
		t.Run(row.name, func(t *testing.T) {
			to := harness.LaunchExec(t, d.Module("vision"))
			refused := "GET /msi/token?api-version=2019-08-01&resource=" + harness.VaultURI + " HTTP/1.1\r\nHost: " +
				to.Address + "\r\n\r\n"
			tr := dispatch(t, program, stranger, orders{Kind: row.kind, Network: "tcp",
				Address: to.Address, Width: row.width, Request: refused})
			tr.awaitBegun(nil)
			for i := range 50 {
				if err := askExec(to); err != nil {
					t.Errorf("request %d of the command: %v", i, err)
					break
				}
			}
			told := tr.recall()
			peak := peakResident(t, execPID(t, to))
			figure("exec: "+row.name, peak, 50, told.Connected)
			if peak > execBound {
				t.Errorf("exec had %.1f MB", float64(peak)/(1<<20))
			}
		})
	}
}

// TestAttacksExecKilled: when exec is killed its command does not go on sending its secret to a port that a stranger
// can take.
func TestAttacksExecKilled(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	cmd := exec.Command(harness.Binary(t, "perceptctl"), "--socket", d.Module("vision"), "exec", "--", "sh", "-c",
		`echo "$IDENTITY_ENDPOINT"; echo $$; exec sleep 1000`)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewScanner(out)
	lines.Scan()
	address, _, _ := strings.Cut(strings.TrimPrefix(lines.Text(), "http://"), "/")
	lines.Scan()
	child, err := strconv.Atoi(lines.Text())
	must(t, err)
	t.Cleanup(func() { _ = syscall.Kill(child, syscall.SIGKILL) })
	must(t, cmd.Process.Kill())
	harness.Until(t, "the command to end with exec", nil,
		func() bool { return errors.Is(syscall.Kill(child, 0), syscall.ESRCH) })
	_ = cmd.Wait()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatalf("the port is not free again: %v", err)
	}
	l.Close()
}

// simulatorBound is what others may cause `perceptctl simulate` to have.
const simulatorBound = 128 << 20

// TestAttacksSimulator: a simulator of its own stays small as well, and answers.
func TestAttacksSimulator(t *testing.T) {
	t.Parallel()
	program := openProgram(t)
	for _, row := range []struct {
		kind  string
		width int
	}{{"many lines", 1200}, {"idle", 17000}} {
		t.Run(row.kind, func(t *testing.T) {
			p, environment := harness.StartSimulator(t, "imds")
			address := strings.TrimPrefix(harness.ValueOf(environment, "AZURE_POD_IDENTITY_AUTHORITY_HOST"), "http://")
			tr := dispatch(t, program, stranger, orders{Kind: row.kind, Network: "tcp",
				Address: address, Width: row.width})
			tr.awaitBegun(nil)
			var asking sync.WaitGroup
			for range 8 {
				asking.Go(func() {
					conn, err := net.Dial("tcp", address)
					if err == nil {
						defer conn.Close()
						err = askFor200(conn, bufio.NewReader(conn),
							"GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource="+harness.VaultURI+
								" HTTP/1.1\r\nHost: "+address+"\r\nMetadata: true\r\nConnection: close\r\n\r\n")
					}
					if err != nil {
						t.Error(err)
					}
				})
			}
			asking.Wait()
			told := tr.recall()
			peak := peakResident(t, p.Cmd.Process.Pid)
			figure("simulator: "+row.kind, peak, 8, told.Connected)
			if peak > simulatorBound {
				t.Errorf("the simulator had %.1f MB", float64(peak)/(1<<20))
			}
		})
	}
}
