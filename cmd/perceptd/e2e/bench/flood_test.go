//go:build bench

package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/agent/client"
	"perceptd/cmd/perceptd/e2e/harness"
)

const (
	floodVariable = "BENCH_FLOOD"  // which flood this process is to be
	floodSocket   = "BENCH_SOCKET" // and where
	flooderUID    = 54321
	unitFiles     = 16384 // LimitNOFILE= of perceptd.service

	floodCells = 40                    // how many cells' time each flood lasts
	honestPace = 10 * time.Millisecond // between two requests of each honest client
	recovery   = 3 * time.Minute       // until all must be as it was before: idle connections are kept for one
)

// floods are what one user does to the socket that all local services share.
var floods = []struct {
	name  string
	width int // how many do it at once
	once  func(*flooder)
}{
	{"10,000 connections", 10_000, (*flooder).sayNothing},
	{"2,000 slow headers", 2_000, (*flooder).sayLittle},
	{"64 connections asking", 64, (*flooder).ask},
	{"64 connecting for nothing", 64, (*flooder).comeAndGo},
}

// TestBenchFlood reports what others notice of one user who floods the token socket, and that everything is as before
// when the flood is over. It fails when a request is not answered or something is not given back, never because
// something is slow.
func TestBenchFlood(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("the flood comes from another user: run it as root")
	}
	cell := cellTime(t)
	dir := harness.ShortFolder(t)
	if err := os.Chmod(dir, 0o755); err != nil { // the flooder is to get in
		t.Fatal(err)
	}
	binary, err := buildFor(dir, architectures()[0])
	if err != nil {
		t.Fatal(err)
	}
	d := startFlooded(t, binary, filepath.Join(dir, "daemon"))
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\t\tkept, ms\t\t\tnew, ms\t\t\tmodule's, ms\t\tdaemon\t\t\t\t\t")
	fmt.Fprintln(table, "\tp50\tp99\tmost\tp50\tp99\tmost\tp50\tp99\tmost\tfiles\tthreads\tMB\tCPU\tflooder\t")
	line := func(name, notes string, spent time.Duration, h [3]*honest, at holdings) {
		fmt.Fprintf(table, "%s\t", name)
		for _, one := range h {
			fmt.Fprintf(table, "%.2f\t%.2f\t%.2f\t", one.percentile(50), one.percentile(99), one.percentile(100))
		}
		fmt.Fprintf(table, "%d\t%d\t%.1f\t%.0f %%\t%s\t\n", at.files, at.threads, at.resident,
			100*spent.Seconds()/(floodCells*cell).Seconds(), notes)
	}
	phase := func(name string, during func() (notes string)) {
		before, err := d.cpuTime()
		benchMust(t, err)
		stop := make(chan struct{})
		h, most := d.askHonestly(stop)
		notes := during()
		close(stop)
		at := most()
		after, err := d.cpuTime()
		benchMust(t, err)
		line(name, notes, after-before, h, at)
		for _, one := range h {
			if one.fault != nil {
				t.Errorf("%s: %d honest requests of %d were not answered: %v",
					name, one.failed, len(one.took), one.fault)
			}
		}
	}
	alone := func() string { time.Sleep(floodCells * cell); return "" }
	phase("nobody else", alone)
	baseline := d.settled(t)
	for _, one := range floods {
		phase(one.name, func() string { return d.flood(t, one.name, floodCells*cell) })
	}
	recovered, took := d.recovers(t, baseline)
	phase("nobody else", alone)
	fmt.Fprintf(os.Stdout, "\nhonest clients asking every %v beside one user's flood; %d CPUs; %v each\n\n",
		honestPace, usableCPUs(t), floodCells*cell)
	_ = table.Flush()
	fmt.Fprintf(os.Stdout, "\nbefore: %v\n after: %v, %v later\n", baseline, recovered, took.Round(time.Second))
}

func benchMust(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func usableCPUs(t *testing.T) int {
	var may unix.CPUSet
	benchMust(t, unix.SchedGetaffinity(0, &may))
	return may.Count()
}

// flooded is the daemon that is flooded.
type flooded struct {
	*contender
	module string // the socket of a module of its own
}

// startFlooded starts the daemon as its unit does, with grants for this user, for the flooder and for a module.
func startFlooded(t *testing.T, binary, dir string) *flooded {
	benchMust(t, os.Mkdir(dir, 0o755))
	config := filepath.Join(dir, "config.toml")
	benchMust(t, os.WriteFile(config, fmt.Appendf(nil, `[source]
kind = "simulated"

[[identity]]
name = "device"
default = true

[[module]]
name = "vision"
require = "socket"

[[grant]]
caller = { module = "vision" }
identity = "device"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { uid = 0 }
identity = "device"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { uid = %d }
identity = "device"
resources = ["https://vault.azure.net"]
`, flooderUID), 0o600))
	cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, unitFiles), binary,
		"--config", config, "--runtime-dir", dir, "--state-dir", filepath.Join(dir, "state"))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	d := &flooded{
		contender: &contender{name: "perceptd", socket: filepath.Join(dir, "token.sock"), cmd: cmd, begun: time.Now(),
			ended: make(chan struct{})},
		module: filepath.Join(dir, "modules", "vision", "token.sock"),
	}
	cmd.Stderr = &d.stderr
	benchMust(t, cmd.Start())
	go func() {
		defer close(d.ended)
		_ = cmd.Wait() // how it ended matters only where it was not asked to, and then stderr says
	}()
	d.stopAtEnd(t)
	_, err := d.await(imdsRequest)
	benchMust(t, err)
	return d
}

// holdings are what a process has.
type holdings struct {
	files, threads int
	resident       float64 // megabytes
}

func (h holdings) String() string {
	return fmt.Sprintf("%d files, %d threads, %.1f MB resident", h.files, h.threads, h.resident)
}

func (d *flooded) holds() (h holdings, err error) {
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(d.pid()), "fd"))
	if err != nil {
		return h, err
	}
	threads, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(d.pid()), "task"))
	if err != nil {
		return h, err
	}
	h.files, h.threads = len(files), len(threads)
	h.resident, err = d.memory("VmRSS")
	return h, err
}

// settled returns what the daemon has when it has served and nobody is connected.
func (d *flooded) settled(t *testing.T) holdings {
	h, err := d.holds()
	benchMust(t, err)
	return h
}

// recovers waits until the daemon has no more files than before, and returns what it has then.
func (d *flooded) recovers(t *testing.T, before holdings) (h holdings, took time.Duration) {
	for began := time.Now(); ; time.Sleep(time.Second) {
		var err error
		h, err = d.holds()
		benchMust(t, err)
		if took = time.Since(began); h.files <= before.files {
			return h, took
		}
		if took > recovery {
			t.Fatalf("%v after the floods it has %v, and had %v before", took, h, before)
		}
	}
}

// honest is a client that asks at its pace and knows how long that took.
type honest struct {
	mu     sync.Mutex // protects what follows
	took   []time.Duration
	failed int
	fault  error // the first
}

func (h *honest) percentile(p int) (milliseconds float64) {
	slices.Sort(h.took)
	if len(h.took) == 0 {
		return 0
	}
	return h.took[min(len(h.took)*p/100, len(h.took)-1)].Seconds() * 1000
}

// askHonestly asks until stop is closed: on one connection, on a new one each time, and on a new one to a module's own
// socket. most waits for the end of that and returns the most that the daemon had meanwhile.
func (d *flooded) askHonestly(stop chan struct{}) (all [3]*honest, most func() holdings) {
	var asking sync.WaitGroup
	for i := range all {
		all[i] = new(honest)
	}
	asking.Go(func() { all[0].ask(d.onOneConnection(), stop, func(ask func()) { ask() }) })
	asking.Go(func() { all[1].ask(onNewConnections(d.socket), stop, asking.Go) })
	asking.Go(func() { all[2].ask(onNewConnections(d.module), stop, asking.Go) })
	var seen holdings
	asking.Go(func() {
		for watch := time.Tick(100 * time.Millisecond); ; {
			select {
			case <-stop:
				return
			case <-watch:
			}
			if now, err := d.holds(); err == nil {
				seen = holdings{max(seen.files, now.files), max(seen.threads, now.threads),
					max(seen.resident, now.resident)}
			}
		}
	})
	return all, func() holdings { asking.Wait(); return seen }
}

// ask counts from the time that a request was due at, so that waiting for the one before counts as well, where it has
// to.
func (h *honest) ask(once func() error, stop chan struct{}, begin func(func())) {
	for due := time.Now(); ; due = due.Add(honestPace) {
		select {
		case <-stop:
			return
		case <-time.After(time.Until(due)):
		}
		begin(func() {
			err := once()
			h.count(time.Since(due), err)
		})
	}
}

func (h *honest) count(took time.Duration, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.took = append(h.took, took)
	if err != nil {
		h.failed++
		if h.fault == nil {
			h.fault = err
		}
	}
}

func (d *flooded) onOneConnection() func() error {
	var conn net.Conn
	var in *bufio.Reader
	return func() (err error) {
		if conn == nil {
			if conn, err = net.Dial("unix", d.socket); err != nil {
				return err
			}
			in = bufio.NewReader(conn)
		}
		return getToken(conn, in)
	}
}

// onNewConnections comes again at once when the kernel's queue is full, as agent/client does.
func onNewConnections(socket string) func() error {
	return func() error {
		conn, err := client.Dial(context.Background(), socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		return getToken(conn, bufio.NewReader(conn))
	}
}

var errNoToken = errors.New("no token")

// getToken asks for a token and returns nil when one came.
func getToken(conn net.Conn, in *bufio.Reader) error {
	if _, err := conn.Write(v1Request); err != nil {
		return err
	}
	answer, err := http.ReadResponse(in, nil)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%w: status %d", errNoToken, answer.StatusCode)
	}
	return nil
}

// flood starts this test's own binary again, as TestFlooder, for that long, and returns what came of it.
func (d *flooded) flood(t *testing.T, name string, length time.Duration) (notes string) {
	self, err := os.Executable()
	benchMust(t, err)
	cmd := exec.Command(self, "-test.run=^TestFlooder$", "-test.timeout=0")
	cmd.Env = []string{floodVariable + "=" + name, floodSocket + "=" + d.socket}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	benchMust(t, err)
	out, err := cmd.StdoutPipe()
	benchMust(t, err)
	benchMust(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	time.Sleep(length)
	benchMust(t, in.Close())
	text, err := bufio.NewReader(out).ReadString('\n')
	benchMust(t, err)
	return strings.TrimSpace(text)
}

// TestFlooder is no test but the flood: it ends when its standard input does, and says what came of it.
func TestFlooder(t *testing.T) {
	name := os.Getenv(floodVariable)
	if name == "" {
		t.Skip("it is a flood, which TestBenchFlood starts")
	}
	const files = 12_000
	benchMust(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files}))
	benchMust(t, unix.Setregid(flooderUID, flooderUID))
	benchMust(t, unix.Setreuid(flooderUID, flooderUID))
	f := &flooder{socket: os.Getenv(floodSocket)}
	for _, one := range floods {
		if one.name == name {
			crowd(one.width, func() { one.once(f) })
		}
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	text, err := json.Marshal(map[string]int64{"connected": f.connected.Load(), "closed": f.closed.Load(),
		"200": f.served.Load(), "429": f.limited.Load()})
	benchMust(t, err)
	fmt.Println(strings.NewReplacer(`"`, "", "{", "", "}", "", ",", ", ", ":", " ").Replace(string(text)))
}

// flooder is one user's attack, and what came of it.
type flooder struct {
	socket                             string
	connected, closed, served, limited atomic.Int64
}

// crowd has that many do something over and over, the first at once and the last a second later.
func crowd(n int, do func()) {
	for i := range n {
		go func() {
			time.Sleep(time.Second * time.Duration(i) / time.Duration(n))
			for {
				do()
			}
		}()
	}
}

// connect does not wait where the queue is full: it comes again.
func (f *flooder) connect() net.Conn {
	for {
		if conn, err := net.Dial("unix", f.socket); err == nil {
			f.connected.Add(1)
			return conn
		}
		time.Sleep(time.Millisecond)
	}
}

// sayNothing holds a connection. When it is closed, the next one comes a second later.
func (f *flooder) sayNothing() {
	conn := f.connect()
	defer conn.Close()
	_, _ = conn.Read(make([]byte, 1))
	f.closed.Add(1)
	time.Sleep(time.Second)
}

// sayLittle sends a byte of a header a second, for as long as it may.
func (f *flooder) sayLittle() {
	conn := f.connect()
	defer conn.Close()
	for _, b := range v1Request {
		if _, err := conn.Write([]byte{b}); err != nil {
			break
		}
		time.Sleep(time.Second)
	}
	f.closed.Add(1)
}

// ask asks for tokens on one connection for as long as it is answered.
func (f *flooder) ask() {
	conn := f.connect()
	defer conn.Close()
	for in := bufio.NewReader(conn); ; {
		switch err := getToken(conn, in); {
		case err == nil:
			f.served.Add(1)
		case errors.Is(err, errNoToken):
			f.limited.Add(1)
		default:
			f.closed.Add(1)
			return
		}
	}
}

func (f *flooder) comeAndGo() {
	conn := f.connect()
	_ = conn.Close()
}
