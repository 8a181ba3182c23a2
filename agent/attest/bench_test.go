//go:build bench

package attest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

const (
	benchRounds      = 100 // many short ones, since the load of the machine changes
	requestsPerRound = 300 // on a kept connection
	dialsPerRound    = 10  // connections with one request each
)

// attestationKind is one way to attest a caller, and what it cost.
type attestationKind struct {
	name    string
	options Options
	cgroup  string
	from    Socket
	bare    bool // without attestation

	path           string
	dials, request []float64 // of each round: the median, and the CPU time of both ends, in µs
}

// TestBenchAttestation measures the cost of attestation in comparison with an HTTP server without it, with real
// sockets, the real kernel and an engine in this process. It fails if something does not work, never because it is
// slow.
func TestBenchAttestation(t *testing.T) {
	rounds := benchRounds
	if text := os.Getenv("BENCH_SECONDS"); text != "" {
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Fatal(err)
		}
		rounds = max(2, int(float64(rounds)*min(1, seconds/0.5)))
	}
	kinds := []*attestationKind{
		{name: "no proof", bare: true},
		{name: "module by its socket", from: Socket{Module: "free"}},
		{name: "service", cgroup: "/system.slice/cam.service"},
		{name: "module in a container", cgroup: containerA, from: Socket{Module: "vision"}},
		{name: "module by its socket, /proc", options: Options{NoPidfd: true}, from: Socket{Module: "free"}},
		{name: "service, /proc", options: Options{NoPidfd: true}, cgroup: "/system.slice/cam.service"},
		{
			name: "module in a container, /proc", options: Options{NoPidfd: true},
			cgroup: containerA, from: Socket{Module: "vision"},
		},
	}
	for _, k := range kinds {
		k.serve(t)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for round := range rounds {
		for i := range kinds { // each is the first equally often
			kinds[(round+i)%len(kinds)].measure(t)
		}
	}
	report(kinds, rounds)
}

// serve starts a server that answers each attested caller with as many bytes as a token has.
func (k *attestationKind) serve(t *testing.T) {
	s, _ := newEngineFixture(t, k.options)
	s.putProcess(os.Getpid(), k.cgroup)
	body := []byte(strings.Repeat("x", 1500))
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !k.bare {
			attestation, err := FromContext(r.Context())
			if err == nil {
				_, err = attestation.Caller(r.Context())
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
		}
		_, _ = w.Write(body)
	})}
	l := s.l
	if k.bare {
		l = l.(*listener).Listener
	} else {
		server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
			return s.NewContext(ctx, conn, k.from)
		}
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	k.path = s.path
}

// measure adds a round.
func (k *attestationKind) measure(t *testing.T) {
	var dials []float64
	for range dialsPerRound {
		began := time.Now()
		conn, in := k.connect(t)
		k.ask(t, conn, in)
		dials = append(dials, micros(time.Since(began)))
		conn.Close()
	}
	conn, in := k.connect(t)
	defer conn.Close()
	k.ask(t, conn, in)
	runtime.GC() // so that no row pays for the garbage of others
	began := cpuTime(t)
	for range requestsPerRound {
		k.ask(t, conn, in)
	}
	k.dials = append(k.dials, median(dials))
	k.request = append(k.request, micros(cpuTime(t)-began)/requestsPerRound)
}

// cpuTime is the CPU time that this process has used. The load of the machine affects it less than elapsed time.
func cpuTime(t *testing.T) time.Duration {
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

func (k *attestationKind) connect(t *testing.T) (net.Conn, *bufio.Reader) {
	conn, err := net.Dial("unix", k.path)
	if err != nil {
		t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

func (k *attestationKind) ask(t *testing.T, conn net.Conn, in *bufio.Reader) {
	if _, err := io.WriteString(conn, "GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != 200 {
		t.Fatalf("%s: %v %d %s", k.name, err, answer.StatusCode, body)
	}
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// ratio is the median of the rounds' ratios, since the load of the machine changes from round to round.
func ratio(is, to []float64) float64 {
	var each []float64
	for i := range is {
		each = append(each, is[i]/to[i])
	}
	return median(each)
}

func report(kinds []*attestationKind, rounds int) {
	fmt.Printf("\nProof of callers: net/http on a Unix socket with each kind of proof and without; "+
		"medians of %d rounds\n\n", rounds)
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "caller\tnew connection µs\tof no proof\tCPU µs of a request, both ends\tof no proof\t")
	bare := kinds[0]
	for _, k := range kinds {
		fmt.Fprintf(table, "%s\t%.0f\t%.2f\t%.1f\t%.3f\t\n", k.name,
			median(k.dials), ratio(k.dials, bare.dials), median(k.request), ratio(k.request, bare.request))
	}
	_ = table.Flush()
	for _, k := range kinds[1:] {
		fmt.Printf("aim: a request costs no more than 5 %% more: %s for %s\n",
			met(ratio(k.request, bare.request) <= 1.05), k.name)
		if k.cgroup == containerA {
			fmt.Printf("aim: a new connection in less than 2 ms: %s for %s\n", met(median(k.dials) < 2000), k.name)
		}
	}
}

func met(yes bool) string {
	if yes {
		return "met"
	}
	return "MISSED"
}
