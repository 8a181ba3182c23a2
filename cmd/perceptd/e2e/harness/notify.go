package harness

import (
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// ListenAsSystemd returns the path of a notification socket, and what is told there.
func ListenAsSystemd(t testing.TB) (path string, told <-chan string) {
	t.Helper()
	path = filepath.Join(ShortFolder(t), "n")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	messages := make(chan string, 1000)
	var reading sync.WaitGroup
	reading.Go(func() {
		message := make([]byte, 4096)
		for {
			n, err := manager.Read(message)
			if err != nil {
				return
			}
			select {
			case messages <- string(message[:n]):
			default: // nobody listens, which must not hold the daemon up
			}
		}
	})
	t.Cleanup(func() {
		_ = manager.Close()
		reading.Wait()
	})
	return path, messages
}

// AwaitMessages waits until systemd was told each of the parts, in any order, since the last call.
func AwaitMessages(t testing.TB, told <-chan string, parts ...string) {
	t.Helper()
	var heard []string
	limit := time.After(time.Minute)
	for {
		missing := slices.IndexFunc(parts, func(part string) bool {
			return !slices.ContainsFunc(heard, func(message string) bool { return strings.Contains(message, part) })
		})
		if missing < 0 {
			return
		}
		select {
		case message := <-told:
			heard = append(heard, message)
		case <-limit:
			t.Fatalf("systemd was never told %q, but %q", parts[missing], heard)
		}
	}
}

// AwaitPings waits until the watchdog was fed by a check that began after the call.
func AwaitPings(t testing.TB, told <-chan string) {
	t.Helper()
	for len(told) > 0 {
		<-told
	}
	limit := time.After(time.Minute)
	for pings := 0; pings < 2; { // the first may be of a check that began before
		select {
		case message := <-told:
			pings += strings.Count(message, "WATCHDOG=1")
		case <-limit:
			t.Fatal("systemd would have restarted the daemon")
		}
	}
}
