//go:build clients

package clients

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

const (
	armURI   = "https://management.example.net/" // what Azure CLI logs in for
	visionID = "00000000-0000-0000-0000-000000000001"
	deviceID = "00000000-0000-0000-0000-000000000009"
)

// situation is what a client meets when it asks.
type situation struct {
	name     string
	asVision bool
	warm     bool   // the daemon has a token by then
	twice    bool   // it asks once before
	denied   bool   // there is no grant
	fault    string // of the back end
	hangs    bool   // the back end never answers
	fails    bool
	calls    func(p program) int // at most
}

func (s situation) resource(p program) string {
	return "https://" + p.slug + "." + strings.NewReplacer(" ", "-", ",", "").Replace(s.name) + ".example.net"
}

func (s situation) throttled() bool { return s.fault == "throttle" }

func once(program) int { return 1 }

func situations() []situation {
	retries := func(p program) int { return p.retries }
	return []situation{
		{name: "system-assigned", calls: once},
		{name: "user-assigned", asVision: true, calls: once},
		{name: "asked again", twice: true, calls: func(p program) int {
			if p.cached {
				return 0
			}
			return 1
		}},
		{name: "denied", denied: true, fails: true, calls: once},
		{name: "throttled", fault: "throttle", fails: true, calls: retries},
		{name: "back end down", fault: "reset", fails: true, calls: retries},
		{name: "back end hangs", hangs: true, fails: true, calls: retries},
		{name: "back end down, cached", fault: "reset", warm: true, calls: once},
	}
}

// clientsConfig grants this user every situation's resource, but the denied ones.
func clientsConfig(all []program) string {
	device, vision := []string{armURI}, []string{armURI}
	for _, p := range all {
		for _, s := range situations() {
			switch {
			case s.denied:
			case s.asVision:
				vision = append(vision, s.resource(p))
			default:
				device = append(device, s.resource(p))
			}
		}
	}
	return twoIdentities("", device, vision)
}

func twoIdentities(source string, device, vision []string) string {
	return fmt.Sprintf(`[source]
kind = "simulated"
%s
[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = %q

[[grant]]
caller = { uid = 0 }
identity = "device"
resources = [%s]

[[grant]]
caller = { uid = 0 }
identity = "vision"
resources = [%s]
`, source, visionID, quoted(device), quoted(vision))
}

func quoted(all []string) string { return `"` + strings.Join(all, `", "`) + `"` }

// steer steers the back end in a daemon.
func steer(t *testing.T, d *harness.Daemon, args ...string) string {
	t.Helper()
	command := exec.Command(harness.Binary(t, "perceptctl"), append([]string{"simulate"}, args...)...)
	command.Env = []string{"PERCEPT_SIMULATOR=http://" + d.Status(t).Source.Address}
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return string(out)
}

// TestClients has the real clients ask in every situation, and counts what they ask.
func TestClients(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("a network namespace needs root")
	}
	all := programs(t)
	d := harness.LaunchDaemon(t, clientsConfig(all))
	c := newCounter(t, d)
	hung := harness.LaunchDaemon(t, clientsConfig(all)) // whose calls to the back end keep others waiting
	h := newCounter(t, hung)
	choked := harness.LaunchDaemon(t, clientsConfig(all)) // whose back end throttles, and is left alone as a whole
	k := newCounter(t, choked)
	for _, d := range []*harness.Daemon{hung, choked} { // Azure CLI logs in before that
		if status, body, err := d.Get(d.Token(), "/v1/token?identity=device&resource="+armURI); status != 200 {
			t.Fatal(status, body, err)
		}
	}
	steer(t, hung, "fault", "hang")
	for _, p := range all {
		for _, s := range situations() {
			if s.warm {
				if status, body, err := d.Get(d.Token(), "/v1/token?resource="+s.resource(p)); status != 200 {
					t.Fatal(status, body, err)
				}
			}
			if s.fault != "" {
				at := d
				if s.throttled() {
					at = choked
				}
				steer(t, at, "fault", s.fault, "--resource", s.resource(p))
			}
		}
	}
	var table clientTable
	t.Run("each", func(t *testing.T) {
		for _, p := range all {
			for _, s := range situations() {
				t.Run(p.slug+" "+s.name, func(t *testing.T) {
					t.Parallel()
					at := c
					switch {
					case s.hangs:
						at = h
					case s.throttled():
						at = k
					}
					table.set(p.name, s.name, s.meet(t, p, at))
				})
			}
		}
	})
	keepTable(t, "clients", table.markdown(all))
	if said := d.Text(); strings.Contains(said, "eyJ") {
		t.Error("the log has a token")
	}
}

// meet has a client ask, and returns how many calls it made and how long it waited from the first one on.
func (s situation) meet(t *testing.T, p program, c *counter) string {
	t.Helper()
	id := ""
	if s.asVision {
		id = visionID
	}
	a, resource := p.start(t, c.socket, id), s.resource(p)
	began := time.Now()
	var before int
	if s.twice {
		if got := a.ask(resource); got.Token == "" {
			t.Fatal(got.Error)
		}
		before, _ = c.of(resource)
		began = time.Now()
	}
	got := a.ask(resource)
	calls, first := c.of(resource)
	waited := time.Since(began)
	if !s.twice && calls > 0 {
		waited = time.Since(first) // without what it takes to start
	}
	calls -= before
	switch {
	case s.fails && got.Token != "":
		t.Error("it has a token")
	case s.fails:
		t.Log(got.Error)
	case got.Token == "":
		t.Errorf("%d calls, and %s", calls, got.Error)
	default:
		wantID := deviceID
		if s.asVision {
			wantID = visionID
		}
		if c := harness.Claims(t, got.Token); c["aud"] != resource || c["appid"] != wantID {
			t.Errorf("a token for %v of %v", c["aud"], c["appid"])
		}
	}
	if most := s.calls(p); calls > most {
		t.Errorf("%d calls, and %d are the most expected", calls, most)
	}
	t.Logf("%d calls, %v", calls, waited.Round(time.Millisecond))
	return fmt.Sprintf("%d, %s", calls, coarse(waited))
}

// coarse is a time as it can be told again of another device.
func coarse(d time.Duration) string {
	switch {
	case d < 2*time.Second:
		return "at once"
	case d < 15*time.Second:
		return "seconds"
	case d < time.Minute:
		return "under a minute"
	}
	return "over a minute"
}

// clientTable is filled from tests side by side.
type clientTable struct {
	mu    sync.Mutex // protects cells
	cells map[[2]string]string
}

func (c *clientTable) set(program, situation, cell string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cells == nil {
		c.cells = make(map[[2]string]string)
	}
	c.cells[[2]string{program, situation}] = cell
}

func (c *clientTable) markdown(all []program) string {
	rows := [][]string{{"client"}}
	for _, s := range situations() {
		rows[0] = append(rows[0], s.name)
	}
	for _, p := range all {
		row := []string{p.name}
		for _, s := range situations() {
			row = append(row, c.cells[[2]string{p.name, s.name}])
		}
		rows = append(rows, row)
	}
	return aligned(rows)
}

// aligned is a table as Markdown that is read well as text too.
func aligned(rows [][]string) string {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len(cell))
		}
	}
	var rule []string
	for _, width := range widths {
		rule = append(rule, strings.Repeat("-", width))
	}
	var text strings.Builder
	for _, row := range slices.Insert(slices.Clone(rows), 1, rule) {
		for i, cell := range row {
			fmt.Fprintf(&text, "| %-*s ", widths[i], cell)
		}
		text.WriteString("|\n")
	}
	return text.String()
}

// keepTable prints a table, and puts it between the markers of that name in docs/modules/clients.md when CLIENTS_DOCS
// is set. What it says of time differs from device to device, so that it is not compared.
func keepTable(t *testing.T, name, table string) {
	t.Helper()
	fmt.Printf("\n%s\n", table)
	const path = "../../../../docs/modules/clients.md"
	text, err := os.ReadFile(path)
	must(t, err)
	begin, end := "<!-- "+name+": begin -->\n", "<!-- "+name+": end -->"
	before, rest, found := strings.Cut(string(text), begin)
	_, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		t.Fatalf("%s has no markers for the table %q", path, name)
	}
	if os.Getenv("CLIENTS_DOCS") != "" && !t.Failed() {
		must(t, os.WriteFile(path, []byte(before+begin+table+end+after), 0o644))
	}
}
