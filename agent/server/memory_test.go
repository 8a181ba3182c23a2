package server

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/agent/server/limit"
)

// memoryEnv has the test's own program measure one flood, in a process that does nothing else.
const memoryEnv = "PERCEPTD_TEST_MEMORY"

// holding is what a caller can hold a connection with.
type holding struct {
	name, text string
	answered   bool // until an answer comes
	stays      bool // it is counted among those that stay for long
	refused    bool // there is neither a place nor one in the line
}

var floods = []holding{
	{"says nothing", "", false, false, false},
	{"kept, idle", get(v1Vault), true, false, false},
	{"half a header of few lines", "GET / HTTP/1.1\r\nHost: localhost\r\nX: " + strings.Repeat("x", 15<<10), false,
		false, false},
	{"half a header of 64 lines", "GET / HTTP/1.1\r\nHost: localhost\r\n" + lines(62), false, false, false},
	{"half a body", requestText("POST", api.PathRejected, strings.Repeat(" ", 6<<10), "Content-Length: 8000",
		"Content-Type: application/json"), false, false, false},
	{"waits for a token", get(v1Vault + "&wait=10m&issued_after=4000000000"), false, true, false},
	{"a stream of events", get("/v1/watch?resource=" + vault), true, true, false},
	{"does not read its answers", strings.Repeat(get(v1Vault), 50), true, false, false},
	{"waits, with a header of 64 lines",
		"GET " + v1Vault + "&wait=10m&issued_after=4000000000 HTTP/1.1\r\nHost: localhost\r\n" + lines(62) +
			"\r\n", false, true, false},
	{"is refused", get(v1Vault), true, false, true},
}

func lines(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "x-%03d: %s\r\n", i, strings.Repeat("v", 230))
	}
	return b.String()
}

// What a connection takes, whatever its client does with it, is no more than the limits are made for.
func TestConnectionMemory(t *testing.T) {
	if name := os.Getenv(memoryEnv); name != "" {
		measureFlood(t, name)
		return
	}
	t.Parallel()
	for _, f := range floods {
		child := exec.Command(os.Args[0], "-test.run=^TestConnectionMemory$", "-test.v")
		child.Env = append(os.Environ(), memoryEnv+"="+f.name)
		out, err := child.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", f.name, err, out)
		}
		_, figures, found := bytes.Cut(out, []byte(memoryEnv+" "))
		var heap, stacks int
		if _, err := fmt.Sscan(string(figures), &heap, &stacks); err != nil || !found {
			t.Fatalf("%s: %v\n%s", f.name, err, out)
		}
		most := connectionMemory
		if f.stays {
			most += stayMemory
		}
		if f.refused {
			most = refusedMemory
		}
		t.Logf("%-34s %5.1f KB of heap, %4.1f KB of stacks, made for %d KB",
			f.name, float64(heap)/1024, float64(stacks)/1024, most>>10)
		if heap+stacks > most && !raceDetector {
			t.Errorf("%s: a connection takes %d bytes, and the limits are made for %d", f.name, heap+stacks, most)
		}
	}
}

// measureFlood prints what a connection of that flood takes.
func measureFlood(t *testing.T, name string) {
	d := newDaemon(t, fetchDay)
	d.Log = nil
	const many = 1 << 20
	d.Limits = Limits{
		Connections: many, PerCaller: many, PerSecond: many, Burst: many, Waiting: many, AllWaiting: many,
		Watching: many, AllWatching: many,
		Header: time.Hour, Answer: time.Hour,
	}
	f := floods[slices.IndexFunc(floods, func(f holding) bool { return f.name == name })]
	n := 256
	if f.refused {
		n = 240 // of the 256 that one user may have
		d.Limits.Connections, d.Limits.PerCaller, d.Limits.Place = 1024, 1, time.Hour
	}
	socket := d.tokens("")
	if f.refused {
		for range limit.OwnPlaces + 1 + 1024/64 {
			d.hold(socket, floods[5]) // one that is never idle
		}
	}
	d.hold(socket, f)
	heap, stacks := inUse()
	for range n {
		d.hold(socket, f)
	}
	for there := 0; !f.refused && there < n; time.Sleep(time.Millisecond) { // until each has sent what it has
		u := d.quotas().tokens.Usage()
		there = limit.OwnPlaces + u.Open - u.Waiting
		if f.text != "" {
			there -= u.Silent
		}
	}
	if f.stays {
		for count(&d.quotas().waiting)+count(&d.quotas().watching) < n {
			time.Sleep(time.Millisecond)
		}
	}
	after, stacksAfter := inUse()
	fmt.Println(memoryEnv, (after-heap)/n, (stacksAfter-stacks)/n)
	os.Exit(0) // with all of them open
}

// All callers together stay within the memory and the descriptors that the service has.
func TestLimitsAddUp(t *testing.T) {
	t.Parallel()
	var l Limits
	if got := l.Memory(); got > 95<<20 {
		t.Errorf("callers can take %d MB", got>>20)
	}
	for _, descriptors := range []int{128, 768, 3072, 12_288} {
		if got := l.Within(descriptors).Descriptors(); got > descriptors {
			t.Errorf("within %d descriptors callers can take %d", descriptors, got)
		}
	}
	if got := l.Within(12_288); got != l.orDefaults() {
		t.Errorf("where there are enough: %+v", got)
	}
	if got := l.Within(10); got.Connections < 1 || got.PerCaller < 1 || got.AdminPerUser < 1 ||
		got.LoopbackPerUser < 1 || got.Modules < 1 {
		t.Errorf("where there are next to none: %+v", got)
	}
}

// count returns how many requests a semaphore counts.
func count(s *limit.Semaphore) int {
	for n := 0; ; n++ {
		if probe := (limit.Key{Module: "?"}); s.TryAcquire(probe, limit.Quota{PerKey: 1, PerParent: 1, Total: n + 1}) {
			s.Release(probe)
			return n
		}
	}
}

// hold opens a connection without memory of this process's own beside the server's.
func (d *daemon) hold(socket string, f holding) {
	d.t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
	}
	if err == nil {
		_, err = unix.Write(fd, []byte(f.text))
	}
	if err == nil && f.answered {
		_, err = unix.Read(fd, make([]byte, 4096))
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

// inUse returns what is in use when all garbage is collected.
func inUse() (heap, stacks int) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapInuse), int(m.StackInuse)
}

// The parts that callers have of a listener's connections follow from how many there are.
func TestCapacities(t *testing.T) {
	t.Parallel()
	tokens, modules, admin, loopback := Limits{Connections: 64}.orDefaults().capacities()
	for _, row := range []struct{ got, want limit.Capacity }{
		{tokens, limit.Capacity{
			Name: "token socket", Total: 64, PerParent: 16, PerKey: 14, ForRoot: 4,
			Line: 4, LinePerParent: 1, LineTimeout: time.Second, Refused: 24,
		}},
		{modules, limit.Capacity{
			Name: "modules' sockets", Total: 512, PerModule: true,
			Line: 64, LinePerParent: 8, LineTimeout: time.Second, Refused: 64,
		}},
		{admin, limit.Capacity{
			Name: "admin socket", Total: 64, PerParent: 16, PerKey: 16, ForRoot: 16,
			Line: 16, LinePerParent: 4, LineTimeout: time.Second, Refused: 32,
		}},
		{loopback, limit.Capacity{
			Name: "loopback listener", Total: 128, PerParent: 64, PerKey: 64,
			Line: 128, LinePerParent: 64, LineTimeout: time.Second, Refused: 288,
		}},
	} {
		if row.got != row.want {
			t.Errorf("%+v, want %+v", row.got, row.want)
		}
	}
}
