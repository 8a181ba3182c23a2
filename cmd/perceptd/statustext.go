package main

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"perceptd/agent"
	"perceptd/systemd"
	"perceptd/tokencache"
)

// lookEvery is how soon trouble is looked at again where no watchdog has the daemon look at itself.
const lookEvery = time.Minute

// statusTeller has systemd show what is true now: it sends the text when it differs from what systemd knows.
type statusTeller struct {
	notify systemd.Notify
	text   func() (text string, troubled bool)
	again  func() // has tell called again, while there is trouble; nil: it is called often enough

	mu    sync.Mutex // protects what follows, and keeps an older text from being sent after a newer one
	known string     // what systemd took last
	timer *time.Timer
}

func (s *statusTeller) tell() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, troubled := s.text()
	if troubled && s.again != nil {
		if s.timer == nil {
			s.timer = time.AfterFunc(lookEvery, s.again)
		} else {
			s.timer.Reset(lookEvery)
		}
	}
	if text == s.known {
		return nil
	}
	err := s.notify.Status(text)
	if err == nil {
		s.known = text
	}
	return err
}

// stop ends what looks again.
func (s *statusTeller) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.again = nil
	if s.timer != nil {
		s.timer.Stop()
	}
}

// statusText is what systemctl status shows of the daemon: trouble first, then what it holds.
func statusText(s agent.Status, opensNothing bool, trouble []string) string {
	var parts []string
	if opensNothing {
		parts = append(parts, "SIMULATED")
	}
	trouble = append(trouble, s.Trouble...)
	switch len(trouble) {
	case 0:
	case 1:
		parts = append(parts, "trouble: "+trouble[0])
	default:
		parts = append(parts, fmt.Sprintf("trouble: %s (and %d more, see perceptctl status)", trouble[0], len(trouble)-1))
	}
	valid, withheld := 0, 0
	var next time.Time
	for _, key := range s.Keys {
		if key.Left > 0 {
			valid++
		}
		if key.Permissions.Withheld {
			withheld++
		}
		if key.State != tokencache.Idle && !key.NextRefresh.IsZero() && (next.IsZero() || key.NextRefresh.Before(next)) {
			next = key.NextRefresh
		}
	}
	held := fmt.Sprintf("%s, %s", count(len(s.Identities), "identity", "identities"), count(valid, "token", "tokens"))
	if s.Stale > 0 {
		held += fmt.Sprintf(", %d stale", s.Stale)
	}
	if withheld > 0 {
		held += fmt.Sprintf(" (%d withheld)", withheld)
	}
	if !next.IsZero() {
		held += ", next refresh " + next.UTC().Format("Jan 2 15:04 UTC")
	}
	return strings.Join(append(parts, held), "; ")
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
