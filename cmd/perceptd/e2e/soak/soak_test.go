//go:build soak

package soak

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/cmd/perceptd/e2e/harness"
)

const (
	soakSeconds = 600  // unless SOAK_SECONDS says otherwise
	soakSpeed   = 1440 // a day of the back end's takes a minute
	soakModules = 9
	soakCallers = 5 // of each module, and of the user that the test runs as

	soakFault   = 4 * time.Second  // how long the back end is away, of which nobody notices anything
	soakOutage  = 45 * time.Second // and how long now and then: until tokens have expired
	soakRecover = 5 * time.Second  // from then on everybody is served again
	soakEvent   = 6 * time.Second  // between what happens
	soakRest    = time.Minute      // until everything has been given back
)

// TestSoak has the daemon serve at full load for long while its back end fails and comes back, its configuration is
// read again and policy changes come and go. Every answer is to be right for its moment, and all is to be given back.
func TestSoak(t *testing.T) {
	s := startSoak(t)
	length := soakLength(t)
	s.load(5 * time.Second) // what a daemon keeps that has served
	baseline := s.rests(t, holding{})
	stop := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() { s.happen(stop) })
	others.Go(func() { s.look(stop) })
	s.load(length)
	close(stop)
	others.Wait()
	s.quiet(t)
	after := s.rests(t, baseline)
	s.summarise(length, baseline, after)
	s.judge(t)
}

func soakLength(t *testing.T) time.Duration {
	text := os.Getenv("SOAK_SECONDS")
	if text == "" {
		return soakSeconds * time.Second
	}
	seconds, err := strconv.Atoi(text)
	if err != nil || seconds < 1 {
		t.Fatalf("SOAK_SECONDS is %q: it must be a number of seconds", text)
	}
	return time.Duration(seconds) * time.Second
}

// soaked is the daemon under load, and what came of it.
type soaked struct {
	*harness.Daemon
	config  string
	control string // where the back end is steered
	outages int
	sockets []string

	mu       sync.Mutex // protects what follows
	answers  map[int]int
	wrong    []error
	tokens   map[string]bool // their text
	statuses strings.Builder // all that the status ever told
	faults   spells
	revoked  spells
	events   map[string]int
}

// spells are the times when something was so, the last one perhaps still.
type spells struct {
	now   bool
	ended time.Time
}

func (s *spells) set(on bool) {
	if s.now && !on {
		s.ended = time.Now()
	}
	s.now = on
}

// lately reports whether it was so at some time after t.
func (s *spells) lately(t time.Time) bool { return s.now || s.ended.After(t) }

func startSoak(t *testing.T) *soaked {
	var config strings.Builder
	fmt.Fprintf(&config, "[source]\nkind = \"simulated\"\nspeed = %d\nrollover = \"half-life\"\n", soakSpeed)
	config.WriteString("\n[[identity]]\nname = \"device\"\ndefault = true\n")
	config.WriteString(soakGrant(fmt.Sprintf("uid = %d", os.Getuid()), harness.VaultURI, "api://own"))
	s := &soaked{answers: make(map[int]int), tokens: make(map[string]bool), events: make(map[string]int)}
	for i := range soakModules {
		name := fmt.Sprint("m", i)
		fmt.Fprintf(&config, "\n[[module]]\nname = %q\nrequire = \"socket\"\n", name)
		config.WriteString(soakGrant(fmt.Sprintf("module = %q", name), harness.VaultURI, fmt.Sprint("api://", i)))
		fmt.Fprintf(&config, "prefetch = %v\n", i%2 == 0)
	}
	s.config = config.String()
	s.Daemon = harness.NewDaemon(t, s.config)
	s.Process = harness.Launch(t, nil, "perceptd", "--config", s.Daemon.Config, "--runtime-dir", s.Dir,
		"--state-dir", filepath.Join(s.Dir, "state"), "--log-level", "info")
	s.AwaitHealth(t)
	s.control = "http://" + s.Status(t).Source.Address + "/simulator/faults"
	s.sockets = []string{s.Token()}
	for i := range soakModules {
		s.sockets = append(s.sockets, s.Module(fmt.Sprint("m", i)))
	}
	return s
}

func soakGrant(caller string, resources ...string) string {
	return fmt.Sprintf("\n[[grant]]\ncaller = { %s }\nidentity = \"device\"\nresources = [\"%s\"]\n",
		caller, strings.Join(resources, "\", \""))
}

// load asks on every socket, on connections that are kept and on new ones, without pause.
func (s *soaked) load(length time.Duration) {
	end := time.Now().Add(length)
	var all sync.WaitGroup
	for i, socket := range s.sockets {
		for j := range soakCallers {
			resource := harness.VaultURI
			if j%2 == 0 {
				resource = map[bool]string{true: "api://own", false: fmt.Sprint("api://", i-1)}[i == 0]
			}
			c := &soakCaller{soaked: s, socket: socket, resource: resource, kept: (i+j)%2 == 0}
			all.Go(func() { c.ask(end) })
		}
	}
	all.Wait()
}

// soakCaller is one that asks over and over.
type soakCaller struct {
	*soaked
	socket, resource string
	kept             bool // its connection, from one request to the next
	conn             net.Conn
	in               *bufio.Reader
}

func (c *soakCaller) ask(end time.Time) {
	defer c.hangUp()
	for time.Now().Before(end) {
		begun := time.Now()
		status, retry, body, err := c.once()
		c.weigh(begun, status, retry, body, err)
		if !c.kept || err != nil {
			c.hangUp()
		}
		if retry > 0 {
			time.Sleep(min(retry, time.Second)) // as an SDK does
		}
	}
}

func (c *soakCaller) hangUp() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

func (c *soakCaller) once() (status int, retry time.Duration, body string, err error) {
	if c.conn == nil {
		if c.conn, err = client.Dial(context.Background(), c.socket); err != nil {
			return 0, 0, "", err
		}
		c.in = bufio.NewReader(c.conn)
	}
	_ = c.conn.SetDeadline(time.Now().Add(11 * time.Second)) // answers come within 10
	path := api.PathIMDSToken + "?api-version=2018-02-01&resource=" + url.QueryEscape(c.resource)
	if _, err = fmt.Fprintf(c.conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nMetadata: true\r\n\r\n", path); err != nil {
		return 0, 0, "", err
	}
	answer, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return 0, 0, "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	seconds, _ := strconv.Atoi(answer.Header.Get("Retry-After"))
	return answer.StatusCode, time.Duration(seconds) * time.Second, string(text), err
}

// weigh notes an answer, and whether it was right for its moment.
func (s *soaked) weigh(begun time.Time, status int, retry time.Duration, body string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answers[status]++
	switch {
	case err != nil:
	case status == http.StatusOK:
		err = s.weighToken(body)
	case status == http.StatusServiceUnavailable && s.faults.lately(begun.Add(-soakRecover)) && retry > 0:
	case status == http.StatusForbidden && s.revoked.lately(begun) && strings.Contains(body, "revoked"):
	case status == http.StatusTooManyRequests && retry > 0:
	default:
		err = fmt.Errorf("status %d, Retry-After %v: %.300s", status, retry, body)
	}
	if err != nil {
		s.wrong = append(s.wrong, err)
	}
}

// weighToken notes a token, which is known again wherever it must not be.
func (s *soaked) weighToken(body string) error {
	var token struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   string `json:"expires_in"`
	}
	if err := json.Unmarshal([]byte(body), &token); err != nil {
		return err
	}
	if left, err := strconv.Atoi(token.ExpiresIn); err != nil || left < 0 ||
		strings.Count(token.AccessToken, ".") != 2 {
		return fmt.Errorf("a token of %d characters with %q seconds left", len(token.AccessToken), token.ExpiresIn)
	}
	s.tokens[token.AccessToken] = true
	return nil
}

// happen lets the back end fail and come back, policy changes be noted and withdrawn, and the configuration be read
// again, one thing after the other.
func (s *soaked) happen(stop chan struct{}) {
	for ever := time.Tick(soakEvent); ; {
		for _, one := range []func(stop chan struct{}) error{s.fail, s.reloadGood, s.change, s.reloadBad} {
			select {
			case <-stop:
				return
			case <-ever:
			}
			if err := one(stop); err != nil {
				s.mu.Lock()
				s.wrong = append(s.wrong, err)
				s.mu.Unlock()
			}
		}
	}
}

func (s *soaked) note(what string, change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events[what]++
	change()
}

func (s *soaked) fail(stop chan struct{}) error {
	kinds := []string{
		`{"kind":"status","status":500}`, `{"kind":"throttle","retry_after":"30"}`, `{"kind":"reset"}`,
		`{"kind":"html"}`,
		`{"kind":"truncated"}`,
	}
	s.note("faults of the back end", func() { s.faults.set(true) })
	if err := s.steer("POST", kinds[rand.N(len(kinds))], 200); err != nil {
		return err
	}
	length := soakFault
	if s.outages++; s.outages%3 == 2 {
		length = soakOutage
	}
	select {
	case <-time.After(length):
	case <-stop:
	}
	err := s.steer("DELETE", "", 204)
	s.note("recoveries", func() { s.faults.set(false) })
	return err
}

func (s *soaked) steer(method, body string, want int) error {
	request, err := http.NewRequest(method, s.control, strings.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Simulator-Control", "true")
	request.Close = true // its end is in the daemon, whose descriptors count
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if answer.StatusCode != want {
		return fmt.Errorf("%s of a fault: %d: %s", method, answer.StatusCode, text)
	}
	return err
}

func (s *soaked) change(stop chan struct{}) error {
	effect := []api.Effect{api.EffectChanged, api.EffectGranted, api.EffectRevoked}[rand.N(3)]
	if effect == api.EffectRevoked {
		s.note("revocations", func() { s.revoked.set(true) })
	}
	body := fmt.Sprintf(`{"all_resources":true,"effect":%q}`, effect)
	status, text, err := s.Ask(s.Admin(), "POST", api.PathPolicyChanges, body)
	var noted struct {
		ID string `json:"id"`
	}
	if err == nil && status/100 == 2 {
		err = json.Unmarshal([]byte(text), &noted)
	}
	if err != nil || noted.ID == "" {
		return fmt.Errorf("noting a policy change: %d, %w: %s", status, err, text)
	}
	select {
	case <-time.After(soakFault):
	case <-stop:
	}
	status, text, err = s.Ask(s.Admin(), "DELETE", api.PathPolicyChanges+"?id="+noted.ID, "")
	s.note("policy changes", func() { s.revoked.set(false) })
	if err != nil || status/100 != 2 {
		return fmt.Errorf("withdrawing a policy change: %d, %w: %s", status, err, text)
	}
	return nil
}

func (s *soaked) reloadGood(chan struct{}) error {
	s.note("reloads", func() {})
	return s.reloadAs(s.config+soakGrant("uid = 4711", fmt.Sprint("api://", rand.N(100))), 200)
}

func (s *soaked) reloadBad(chan struct{}) error {
	s.note("reloads of a bad file", func() {})
	return s.reloadAs("[nonsense]\n", http.StatusUnprocessableEntity)
}

func (s *soaked) reloadAs(config string, want int) error {
	if err := os.WriteFile(s.Daemon.Config, []byte(config), 0o644); err != nil {
		return err
	}
	status, text, err := s.Ask(s.Admin(), "POST", api.PathReload, "")
	if err == nil && status != want {
		err = fmt.Errorf("a reload: %d, not %d: %s", status, want, text)
	}
	return err
}

// look asks for what technicians and modules look at.
func (s *soaked) look(stop chan struct{}) {
	for often := time.Tick(200 * time.Millisecond); ; {
		select {
		case <-stop:
			return
		case <-often:
		}
		for _, ask := range [][2]string{
			{s.Admin(), api.PathStatus}, {s.sockets[1], api.PathWhoAmI}, {s.Admin(), api.PathPolicyChanges},
		} {
			status, body, err := s.Get(ask[0], ask[1])
			if err == nil && status != 200 {
				err = fmt.Errorf("%s: %d: %s", ask[1], status, body)
			}
			s.note("looks", func() {
				s.statuses.WriteString(body)
				if s.statuses.Len() > 32<<20 {
					s.statuses.Reset() // what was told of the tokens is told again
				}
				if err != nil {
					s.wrong = append(s.wrong, err)
				}
			})
		}
	}
}

// quiet leaves the daemon with a good configuration and a back end that is well.
func (s *soaked) quiet(t *testing.T) {
	for _, err := range []error{s.reloadAs(s.config, 200), s.steer("DELETE", "", 204)} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// holding is what a process has.
type holding struct {
	files, threads int
	resident       int // kilobytes
}

func (s *soaked) holds() (h holding, err error) {
	proc := filepath.Join("/proc", strconv.Itoa(s.Cmd.Process.Pid))
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return h, err
	}
	text, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		return h, err
	}
	h.files = len(files)
	for line := range strings.Lines(string(text)) {
		switch name, value, _ := strings.Cut(line, ":"); name {
		case "Threads":
			h.threads, err = strconv.Atoi(strings.TrimSpace(value))
		case "VmRSS":
			h.resident, err = strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")))
		}
	}
	return h, err
}

// within reports whether h is no more than before. The runtime never ends a thread, and gives memory back bit by bit.
func (h holding) within(before holding) bool {
	return h.files <= before.files && h.threads <= before.threads+4 &&
		h.resident <= before.resident+before.resident/4+4096
}

// rests waits a minute at most until the daemon has no more than before, or is settled where that is nothing, and
// returns what it has.
func (s *soaked) rests(t *testing.T, before holding) (h holding) {
	for end := time.Now().Add(soakRest); ; time.Sleep(time.Second) {
		last := h
		var err error
		if h, err = s.holds(); err != nil {
			t.Fatal(err)
		}
		settled := before.files == 0 && h.files == last.files && h.threads == last.threads
		switch {
		case settled, h.within(before):
			return h
		case time.Now().After(end):
			if before.files != 0 {
				t.Errorf("a minute after the load the daemon has %+v, and had %+v before", h, before)
			}
			return h
		}
	}
}

func (s *soaked) summarise(length time.Duration, before, after holding) {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(table, "\n%v of load on %d connections; a day of the back end's takes a minute\t\t\n",
		length, len(s.sockets)*soakCallers)
	total := 0
	for _, status := range slices.Sorted(maps.Keys(s.answers)) {
		total += s.answers[status]
		fmt.Fprintf(table, "answers with status %d\t%d\t\n", status, s.answers[status])
	}
	fmt.Fprintf(table, "answers a second\t%.0f\t\n", float64(total)/length.Seconds())
	fmt.Fprintf(table, "answers that were wrong\t%d\t\n", len(s.wrong))
	for _, event := range slices.Sorted(maps.Keys(s.events)) {
		fmt.Fprintf(table, "%s\t%d\t\n", event, s.events[event])
	}
	fmt.Fprintf(table, "tokens served\t%d\t\n", len(s.tokens))
	fmt.Fprintf(table, "descriptors before, after\t%d, %d\t\n", before.files, after.files)
	fmt.Fprintf(table, "threads before, after\t%d, %d\t\n", before.threads, after.threads)
	fmt.Fprintf(table, "resident before, after\t%d kB, %d kB\t\n", before.resident, after.resident)
	_ = table.Flush()
}

// judge fails the test for every answer that was wrong, and for what is in the log or the status and must not be there.
func (s *soaked) judge(t *testing.T) {
	if err := errors.Join(s.wrong[:min(len(s.wrong), 10)]...); err != nil {
		t.Errorf("%d answers were wrong, such as: %v", len(s.wrong), err)
	}
	if s.answers[http.StatusOK] == 0 || len(s.tokens) <= soakModules {
		t.Error("nothing was served")
	}
	printed := s.Text()
	for line := range strings.Lines(printed) {
		_, rest, found := strings.Cut(line, "\tERROR\t")
		if found && !strings.Contains(rest, "the configuration was not reloaded") {
			t.Errorf("logged as an error, which nobody provoked: %s", line)
		}
	}
	printed += s.statuses.String()
	for token := range s.tokens {
		_, own, _ := strings.Cut(token, ".") // before that is what all have in common
		if strings.Contains(printed, own[:40]) || strings.Contains(printed, own[len(own)-40:]) {
			t.Error("a token's text is in the log or the status")
		}
	}
	if status := s.Stop(t); status != 0 {
		t.Errorf("the daemon ended with status %d", status)
	}
}
