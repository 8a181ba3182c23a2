//go:build bench

package bench

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

const (
	rounds       = 12 // many short ones rather than few long: what else the machine does comes and goes
	starts       = 20
	usualSeconds = 0.5  // of one cell; BENCH_SECONDS sets another, and all else in proportion
	idleCells    = 60   // how many cells' time the daemon is watched while idle
	warmRequests = 1000 // after which its memory is looked at
)

// TestBench measures the daemon beside net/http and nginx, which hand out the same bytes over the same
// kind of socket in the same minutes: the ratios mean something where the figures depend on the
// machine. It fails when something does not work, never because something is slow.
func TestBench(t *testing.T) {
	b := &bench{t: t, dir: harness.ShortFolder(t), cell: cellTime(t)}
	b.must(b.build())
	var err error
	b.cpus, err = twoCPUs()
	b.must(err)
	b.must(pin(b.cpus.client))
	b.accept, b.token, err = startTimes(b.cpus.server, b.binaries[0], b.dir, starts)
	b.must(err)
	b.startDaemon()
	b.must(b.watchIdle())
	b.must(b.warm())
	b.startOthers()
	b.plan()
	for range rounds {
		for _, c := range b.cells {
			b.must(c.measure(b.cell))
		}
	}
	b.peak, err = b.daemon.memory("VmHWM")
	b.must(err)
	b.report(os.Stdout)
	for _, c := range b.cells {
		if c.errors > 0 {
			t.Errorf("%s: %d requests got no token: %v", c.name(), c.errors, c.first)
		}
	}
}

// cellTime returns how long one cell is measured at a time.
func cellTime(t *testing.T) time.Duration {
	seconds := usualSeconds
	if text := os.Getenv("BENCH_SECONDS"); text != "" {
		var err error
		if seconds, err = strconv.ParseFloat(text, 64); err != nil || !(seconds > 0) {
			t.Fatalf("BENCH_SECONDS=%q: it must be a number of seconds above 0", text)
		}
	}
	return time.Duration(seconds * float64(time.Second))
}

// bench is what is measured and what came of it.
type bench struct {
	t    *testing.T
	dir  string
	cell time.Duration
	cpus cpus

	binaries []string // as architectures
	daemon   *contender
	net      *contender
	nginx    *contender // nil where it is not installed
	body     []byte     // the daemon's answer, which the others repeat
	cells    []*cell

	accept, token                time.Duration // from exec
	atStart, afterRequests, peak float64       // resident memory, megabytes
	program                      float64       // the part of it that is the program file's pages
	idle, idleWatched            float64       // context switches a minute, without and with systemd's watchdog
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) build() error {
	for _, arch := range architectures() {
		binary, err := buildFor(b.dir, arch)
		if err != nil {
			return err
		}
		b.binaries = append(b.binaries, binary)
	}
	return nil
}

// startDaemon starts the daemon that is measured and notes what it answers and what it holds.
func (b *bench) startDaemon() {
	var err error
	b.daemon, err = startPerceptd(b.cpus.server, b.binaries[0], filepath.Join(b.dir, "daemon"))
	b.must(err)
	b.daemon.stopAtEnd(b.t)
	answer, err := b.daemon.await(imdsRequest)
	b.must(err)
	b.body = bodyOf(answer)
	b.atStart, err = b.daemon.memory("VmRSS")
	b.must(err)
}

// watchIdle counts the context switches of the daemon when nobody asks it anything, and those of a
// second one that feeds systemd's watchdog as its unit has it.
func (b *bench) watchIdle() error {
	path := filepath.Join(b.dir, "notify.sock")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	var read sync.WaitGroup
	read.Go(func() {
		for message := make([]byte, 4096); ; {
			if _, err := conn.Read(message); err != nil {
				return // closed
			}
		}
	})
	defer read.Wait()
	defer func() { _ = conn.Close() }()
	watched, err := startPerceptd(b.cpus.server, b.binaries[0], filepath.Join(b.dir, "watched"),
		"NOTIFY_SOCKET="+path, "WATCHDOG_USEC=30000000")
	if err != nil {
		return err
	}
	defer watched.stop()
	if _, err := watched.await(imdsRequest); err != nil {
		return err
	}
	span := idleCells * b.cell
	time.Sleep(span * 4 / 3) // until the timers of the start have run out, the longest of them 30 s
	before, err := switchesOf(b.daemon, watched)
	if err != nil {
		return err
	}
	time.Sleep(span)
	after, err := switchesOf(b.daemon, watched)
	b.idle = float64(after[0]-before[0]) / span.Minutes()
	b.idleWatched = float64(after[1]-before[1]) / span.Minutes()
	return err
}

func switchesOf(first, second *contender) ([2]int, error) {
	a, errA := first.switches()
	b, errB := second.switches()
	return [2]int{a, b}, errors.Join(errA, errB)
}

// warm sends the daemon its first requests.
func (b *bench) warm() error {
	l, err := newLoader(b.daemon.socket, imdsRequest, 1, false)
	if err != nil {
		return err
	}
	defer l.close()
	for range warmRequests {
		s, err := l.run(0)
		if err := errors.Join(err, s.first); err != nil {
			return err
		}
	}
	if b.program, err = b.daemon.memory("RssFile"); err != nil {
		return err
	}
	b.afterRequests, err = b.daemon.memory("VmRSS")
	return err
}

func (b *bench) startOthers() {
	var err error
	b.net, err = startBare(b.cpus.server, b.dir, b.body)
	b.must(err)
	b.net.stopAtEnd(b.t)
	_, err = b.net.await(imdsRequest)
	b.must(err)
	b.nginx, err = startNginx(b.cpus.server, b.dir, b.body)
	if errors.Is(err, errNoNginx) {
		fmt.Println(err)
		return
	}
	b.must(err)
	b.nginx.stopAtEnd(b.t)
	_, err = b.nginx.await(imdsRequest)
	b.must(err)
}

// servers are perceptd and what it is compared with.
func (b *bench) servers() []*contender {
	if b.nginx == nil {
		return []*contender{b.daemon, b.net}
	}
	return []*contender{b.daemon, b.net, b.nginx}
}

// plan lists the cells in the order they are measured: what is compared stands side by side.
func (b *bench) plan() {
	for _, conns := range []int{1, 16, 64, 256} {
		for _, s := range b.servers() {
			b.cells = append(b.cells, &cell{server: s, form: "IMDS", request: imdsRequest, conns: conns})
		}
	}
	for _, s := range b.servers() {
		b.cells = append(b.cells, &cell{server: s, form: "IMDS", request: imdsRequest, conns: 16, fresh: true})
	}
	b.cells = append(b.cells,
		&cell{server: b.daemon, form: "App Service", request: appServiceRequest, conns: 16},
		&cell{server: b.daemon, form: "/v1/token", request: v1Request, conns: 16})
}

// cell is one load on one server, and what each round measured.
type cell struct {
	server  *contender
	form    string
	request []byte
	conns   int
	fresh   bool

	perSecond, p50, p99 []float64
	cpu                 []float64 // microseconds of the server's CPU a request
	busy                []float64 // the part of the time that the server ran
	errors              int
	first               error // the first of errors
}

// name is how the cell is called in a line of its own.
func (c *cell) name() string {
	return fmt.Sprintf("%s, %s, %s, c=%d", c.server.name, c.form, c.connections(), c.conns)
}

func (c *cell) connections() string {
	if c.fresh {
		return "new connections"
	}
	return "kept alive"
}

// measure runs the load for d, after one request on each connection that does not count.
func (c *cell) measure(d time.Duration) error {
	l, err := newLoader(c.server.socket, c.request, c.conns, c.fresh)
	if err != nil {
		return err
	}
	defer l.close()
	if err := l.warm(); err != nil {
		return fmt.Errorf("%s: %w", c.name(), err)
	}
	before, err := c.server.cpuTime()
	if err != nil {
		return err
	}
	s, err := l.run(d)
	if err != nil {
		return fmt.Errorf("%s: %w", c.name(), err)
	}
	after, err := c.server.cpuTime()
	if err != nil {
		return err
	}
	used := float64((after - before).Nanoseconds())
	c.perSecond, c.p50, c.p99 = append(c.perSecond, s.perSecond), append(c.p50, s.p50), append(c.p99, s.p99)
	c.cpu = append(c.cpu, used/1e3/float64(max(1, s.answered)))
	c.busy = append(c.busy, used/float64(s.elapsed.Nanoseconds()))
	c.errors += s.errors
	if c.first == nil {
		c.first = s.first
	}
	return nil
}
