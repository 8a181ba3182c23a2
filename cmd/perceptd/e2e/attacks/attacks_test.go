//go:build attacks

package attacks

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// attack is what somebody does to the daemon, one flood or several.
type attack struct {
	name   string
	floods func(s *stage) []flood
	rounds int64    // of honest requests, at the least; 0: 40
	blames []string // one of whom the status says was turned away; nil: nobody need be
}

// flood is what one process does.
type flood struct {
	by   soldier
	what orders
}

// Requests of attackers.
const (
	askToken   = "GET " + harness.VaultToken + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
	askToWait  = "GET " + harness.VaultToken + "&min_ttl=24h&wait=10m HTTP/1.1\r\nHost: localhost\r\n\r\n"
	watchVault = "GET " + api.PathWatch + "?resource=" + harness.VaultURI + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
	askStatus  = "GET " + api.PathStatus + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
)

func stray(n uint32) soldier { return soldier{uid: strayUser + n} }

var (
	granted    = soldier{uid: ownUser}
	member     = soldier{uid: adminUser, groups: []uint32{adminGroup}}
	moduleRoot = soldier{uid: 0} // in a container that the module's folder is mounted in
)

// at are the places that floods go to.
func (s *stage) at(kind, socket string, width int, request string) orders {
	return orders{Kind: kind, Network: "unix", Address: socket, Width: width, Request: request}
}

func (s *stage) overTCP(kind, address string, width int, request string) orders {
	return orders{Kind: kind, Network: "tcp", Address: address, Width: width, Request: request}
}

// fourSeats are a user's processes in a unit, under the user's manager, in a session, and where nothing is proved.
func fourSeats(uid uint32) []soldier {
	return []soldier{
		{uid: uid, cgroup: fmt.Sprintf("/system.slice/flood-%d.service", uid)},
		{uid: uid, cgroup: fmt.Sprintf("/user.slice/user-%d.slice/user@%[1]d.service/app.slice/flood.service", uid)},
		{uid: uid},
		{uid: uid, cgroup: fmt.Sprintf("/system.slice/flood-%d.service/below.scope", uid)},
	}
}

// backEnd returns the address of the embedded simulator.
func (s *stage) backEnd() string {
	return strings.TrimPrefix(s.Status(s.t).Source.Address, "http://")
}

func attacks() []attack {
	one := func(by soldier, what func(s *stage) orders) func(s *stage) []flood {
		return func(s *stage) []flood { return []flood{{by, what(s)}} }
	}
	uid := func(who soldier) string { return fmt.Sprintf("uid %d", who.uid) }
	return []attack{
		{name: "many lines, a user", floods: one(stray(0),
			func(s *stage) orders { return s.at("many lines", s.Token(), 1200, "") })},
		{name: "many lines, a module",
			floods: one(moduleRoot, func(s *stage) orders { return s.at("many lines", s.Module("vision"), 1200, "") })},
		{name: "many lines, admin.sock",
			floods: one(member, func(s *stage) orders { return s.at("many lines", s.Admin(), 1200, "") })},
		{name: "many lines, loopback",
			floods: one(stray(0), func(s *stage) orders { return s.overTCP("many lines", s.loopback, 400, "") })},
		{name: "many lines, simulator",
			floods: one(stray(0), func(s *stage) orders { return s.overTCP("many lines", s.backEnd(), 1200, "") })},

		{name: "idle, a user", floods: one(stray(0),
			func(s *stage) orders { return s.at("idle", s.Token(), 12000, "") }), blames: []string{uid(stray(0))}},
		{name: "idle, two users", blames: []string{uid(stray(0)), uid(stray(1))}, floods: func(s *stage) []flood {
			return []flood{{stray(0), s.at("idle", s.Token(), 5000, "")}, {stray(1), s.at("idle", s.Token(), 5000, "")}}
		}},
		{name: "idle, a user's four seats", blames: []string{uid(stray(0))}, floods: func(s *stage) (all []flood) {
			for _, seat := range fourSeats(stray(0).uid) {
				all = append(all, flood{seat, s.at("idle", s.Token(), 1200, "")})
			}
			return all
		}},
		{name: "idle, a module", floods: one(moduleRoot,
			func(s *stage) orders {
				return s.at("idle", s.Module("vision"), 6000,
					"")
			}), blames: []string{"module vision"}},
		{name: "idle, admin.sock", floods: one(member,
			func(s *stage) orders { return s.at("idle", s.Admin(), 12281, "") }), blames: []string{uid(member)}},
		{name: "idle, loopback", floods: one(stray(0),
			func(s *stage) orders { return s.overTCP("idle", s.loopback, 2000, "") })},
		{name: "idle, simulator", floods: one(stray(0),
			func(s *stage) orders { return s.overTCP("idle", s.backEnd(), 17000, "") })},

		{name: "slow heads", floods: one(stray(0),
			func(s *stage) orders { return s.at("slow head", s.Token(), 1200, "") })},
		{name: "slow bodies", floods: one(granted,
			func(s *stage) orders { return s.at("slow body", s.Token(), 1200, "") })},
		{name: "slow bodies, admin.sock",
			floods: one(member, func(s *stage) orders {
				return s.at("slow body",
					s.Admin(), 1200, api.PathPolicyChanges)
			})},
		{name: "waiting requests", floods: one(granted,
			func(s *stage) orders { return s.at("ask", s.Token(), 1200, askToWait) })},
		{name: "streams", floods: one(granted,
			func(s *stage) orders { return s.at("ask", s.Token(), 1200, watchVault) })},
		{name: "unread answers", floods: one(granted,
			func(s *stage) orders { return s.at("unread", s.Token(), 1200, askToken) })},
		{name: "unread answers, admin.sock",
			floods: one(member, func(s *stage) orders { return s.at("unread", s.Admin(), 1200, askStatus) })},
		{name: "pipelining", floods: one(granted,
			func(s *stage) orders { return s.at("pipeline", s.Token(), 64, askToken) })},
		{name: "reconnecting", floods: one(granted,
			func(s *stage) orders { return s.at("reconnect", s.Token(), 64, askToken) })},
		{name: "connecting for nothing",
			floods: one(stray(0), func(s *stage) orders { return s.at("come, go", s.Token(), 16, "") })},
	}
}

// everything is every kind of flood at once, each by a user of its own where that makes it worse.
func everything(s *stage) (all []flood) {
	for _, seat := range fourSeats(stray(0).uid) {
		all = append(all, flood{seat, s.at("idle", s.Token(), 1000, "")})
	}
	return append(all,
		flood{stray(1), s.at("many lines", s.Token(), 500, "")},
		flood{stray(2), s.at("slow head", s.Token(), 1000, "")},
		flood{stray(3), s.at("come, go", s.Token(), 4, "")},
		flood{granted, s.at("ask", s.Token(), 300, askToWait)},
		flood{granted, s.at("ask", s.Token(), 300, watchVault)},
		flood{granted, s.at("slow body", s.Token(), 300, "")},
		flood{granted, s.at("unread", s.Token(), 300, askToken)},
		flood{granted, s.at("pipeline", s.Token(), 16, askToken)},
		flood{moduleRoot, s.at("many lines", s.Module("vision"), 500, "")},
		flood{moduleRoot, s.at("unread", s.Module("vision"), 300, askToken)},
		flood{member, s.at("idle", s.Admin(), 2000, "")},
		flood{member, s.at("many lines", s.Admin(), 300, "")},
		flood{member, s.at("unread", s.Admin(), 300, askStatus)},
		flood{stray(4), s.overTCP("many lines", s.loopback, 400, "")},
		flood{stray(5), s.overTCP("idle", s.loopback, 400, "")},
		flood{stray(6), s.overTCP("many lines", s.backEnd(), 300, "")},
		flood{stray(7), s.overTCP("idle", s.backEnd(), 1000, "")},
	)
}

// figure prints what an attack came to, as docs/security.md has it.
func figure(name string, peak, answered, connected int64) {
	fmt.Printf("| %s | %d | %.0f MB | %d |\n", name, connected, float64(peak)/(1<<20), answered)
}

// TestAttacksFloods has real users flood a daemon that has the unit's limits, in each way alone and in all at once: it
// has half of its memory at most, goes on, answers everybody else, gives everything back, and says who it was.
func TestAttacksFloods(t *testing.T) {
	harness.Binary(t, "perceptd") // not in the time of the first
	t.Run("one", func(t *testing.T) {
		for _, a := range attacks() {
			t.Run(a.name, func(t *testing.T) { t.Parallel(); a.test(t) })
		}
	})
	// All who want to connect wait in one queue of the kernel's, so that answers take a while.
	attack{name: "all of these at once", floods: everything, rounds: 4, blames: []string{
		fmt.Sprint("uid ", stray(0).uid), fmt.Sprint("uid ", stray(1).uid), fmt.Sprint("uid ",
			stray(2).uid), fmt.Sprint("uid ", stray(3).uid), fmt.Sprint("uid ", granted.uid),
	}}.test(t)
}

func (a attack) test(t *testing.T) {
	s := newStage(t)
	audience := s.honest()
	audience.rounds(10)
	pid, before := s.Cmd.Process.Pid, s.descriptors()
	var all []*troop
	for _, f := range a.floods(s) {
		all = append(all, s.send(f.by, f.what))
	}
	for _, tr := range all {
		tr.awaitBegun(s.Ended)
	}
	held := audience.untilFull(cmp.Or(a.rounds, 40))
	t.Logf("the daemon has %d descriptors, and had %d", held, before)
	if s.isAlive() {
		s.blame(a.blames)
	}
	var connected int64
	for _, tr := range all {
		told := tr.recall()
		connected += told.Connected
		t.Logf("%s: %d connections, %d of them closed unanswered, answers %v",
			tr.who, told.Connected, told.Unanswered, told.Answers)
	}
	answered := audience.judge()
	peak := s.memory.peak(t)
	figure(a.name, peak, answered, connected)
	if n := s.memory.killed(t); n != "0" || !s.isAlive() || s.Cmd.Process.Pid != pid {
		t.Fatalf("the daemon did not survive: %s killed for memory, %.1f MB at the most", n, float64(peak)/(1<<20))
	}
	if peak > memoryBound {
		t.Errorf("%.1f MB at the most, more than %d", float64(peak)/(1<<20), memoryBound>>20)
	}
	harness.Until(t, "the descriptors to be given back", s.Ended, func() bool { return s.descriptors() <= before })
}

// untilFull waits until the attackers hold as much as they ever will, and returns how many descriptors the daemon has
// then. Between two looks each honest caller has that many answers.
func (a *audience) untilFull(rounds int64) (held int) {
	a.s.t.Helper()
	for range 4 {
		a.rounds(rounds)
		now := a.s.descriptors()
		if now <= held {
			break
		}
		held = now
	}
	return held
}

// blame checks that status and STATUS name one of those, and the log in few lines.
func (s *stage) blame(who []string) {
	s.t.Helper()
	if len(who) == 0 {
		return
	}
	named := func(text string) bool {
		return slices.ContainsFunc(who, func(name string) bool { return strings.Contains(text, name) })
	}
	if trouble := strings.Join(s.Status(s.t).Trouble, "\n"); !named(trouble) {
		s.t.Errorf("the status does not say that %v was turned away: %q", who, trouble)
		return
	}
	harness.Until(s.t, fmt.Sprintf("STATUS to name one of %v", who), s.Ended,
		func() bool { return named(s.lastStatus()) })
	lines := 0
	for line := range strings.Lines(s.Text()) {
		if named(line) {
			lines++
		}
	}
	if lines == 0 || lines > 10 {
		s.t.Errorf("the log names %v in %d lines", who, lines)
	}
}

// TestAttacksCallsAtOnce: a hundred calls at once by one user on the loopback listener are all answered.
func TestAttacksCallsAtOnce(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	c := exec.Command(harness.Binary(t, "perceptctl"), "--socket", s.Token(), "env", "--format", "json")
	copied := s.Dir + "ctl"
	copyProgram(t, c.Path, copied)
	c.Path = copied
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ownUser, Gid: ownUser}}
	out, err := c.Output()
	must(t, err)
	var told struct{ Set map[string]string }
	must(t, json.Unmarshal(out, &told))
	request := fmt.Sprintf("GET %s?api-version=2019-08-01&resource=%s HTTP/1.1\r\nHost: %s\r\nX-IDENTITY-HEADER: "+
		"%s\r\nConnection: close\r\n\r\n",
		api.PathAppServiceToken, harness.VaultURI, s.loopback, told.Set["IDENTITY_HEADER"])
	tr := s.send(granted, s.overTCP("ask", s.loopback, 100, request))
	tr.awaitBegun(s.Ended)
	// Each has one life at least; what is under way when it is recalled is not counted.
	harness.Until(t, "every call to be over", tr.ended, func() bool { return s.requests(t) >= 200 })
	got := tr.recall()
	t.Logf("%d connections, answers %v", got.Connected, got.Answers)
	if got.Unanswered > 0 || got.NoRetry > 0 || got.Answers[200] < 64 {
		t.Errorf("%d of %d were closed unanswered, %d told to come back at no time, answers %v", got.Unanswered,
			got.Connected, got.NoRetry, got.Answers)
	}
	for status := range got.Answers {
		if status != 200 && status != 429 {
			t.Errorf("answer %d", status)
		}
	}
}

// requests is how many requests for tokens the daemon has counted.
func (s *stage) requests(t *testing.T) int64 {
	t.Helper()
	n := s.Status(t).Requests
	return n.Served + n.Denied + n.Invalid + n.Failed
}
