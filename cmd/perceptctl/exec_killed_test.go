package main

import (
	"bufio"
	"errors"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// When exec is killed the command that it ran is killed too. What the kernel spares, since it is the command's child or
// has become another user, holds the port: no other process can listen where that would show its secret, and who
// connects is refused.
func TestExecKilled(t *testing.T) {
	t.Parallel()
	rows := map[string]struct {
		command string
		spared  bool
	}{
		"a command":              {`exec sleep 1000`, false},
		"its child":              {`sleep 1000 & echo $!; wait`, true},
		"a child without stdout": {`sleep 1000 </dev/null >/dev/null 2>&1 & echo $!; exec sleep 1000`, true},
	}
	if os.Getuid() == 0 {
		if _, err := exec.LookPath("setpriv"); err == nil {
			rows["another user"] = struct {
				command string
				spared  bool
			}{`exec setpriv --reuid=65534 --regid=65534 --clear-groups sleep 1000`, true}
		}
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := executing(t, "--", "sh", "-c", `echo $IDENTITY_ENDPOINT; echo $$; `+row.command)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(out)
			line := func() string {
				text, err := lines.ReadString('\n')
				if err != nil {
					t.Error(err)
				}
				return strings.TrimSpace(text)
			}
			endpoint, err := url.Parse(line())
			if err != nil {
				t.Fatal(err)
			}
			command, left := line(), ""
			if strings.Contains(row.command, "echo $!") {
				left = line()
			} else if row.spared {
				left = command
				awaitUser(t, command, 65534)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_, _ = cmd.Process.Wait()
			if command != left {
				awaitEnd(t, command)
			}
			if row.spared {
				if l, err := net.Listen("tcp4", endpoint.Host); !errors.Is(err, syscall.EADDRINUSE) {
					t.Errorf("a stranger listens on %v: %v", l, err)
				}
				if conn, err := net.Dial("tcp4", endpoint.Host); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("connecting: %v %v", conn, err)
				}
				pid, err := strconv.Atoi(left)
				if err != nil {
					t.Fatal(err)
				}
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatalf("it was not spared: %v", err)
				}
				awaitEnd(t, left)
			}
			l, err := net.Listen("tcp4", endpoint.Host)
			if err != nil {
				t.Fatalf("when all have ended: %v", err)
			}
			l.Close()
		})
	}
}

// awaitEnd waits until a process runs no more.
func awaitEnd(t *testing.T, pid string) {
	t.Helper()
	await(t, "the end of process "+pid, func() bool {
		stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		_, after, _ := strings.Cut(string(stat), ") ")
		return err != nil || strings.HasPrefix(after, "Z")
	})
}

// awaitUser waits until a process is of a uid.
func awaitUser(t *testing.T, pid string, uid int) {
	t.Helper()
	await(t, "another user of process "+pid, func() bool {
		status, _ := os.ReadFile(filepath.Join("/proc", pid, "status"))
		return strings.Contains(string(status), "\nUid:\t"+strconv.Itoa(uid)+"\t")
	})
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}
