package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/explain"
	"perceptd/systemd"
)

// describeNow is describe, after updateLimitations.
func (d *daemon) describeNow() api.Status {
	d.updateLimitations(context.Background())
	return d.describe()
}

// describe is the daemon's own part of the status.
func (d *daemon) describe() api.Status {
	edited := d.edits.since(d.flags.config, d.backend.clock.Wall()) // looks at files: nothing is held meanwhile
	d.mu.Lock()
	defer d.mu.Unlock()
	s := api.Status{
		Version:   versionName(),
		StartedOn: api.Time(d.started),
		Simulated: d.backend.simulated(),
		Source:    d.backend.status(),
		Config:    d.inForce.describe(d.started),
		Clock:     api.ClockStatus{By: d.backend.word().By},
	}
	s.Config.EditedOn = api.Time(edited)
	if d.kept == nil {
		s.Config.NoCopy = "perceptd was started by hand"
	}
	s.Trouble = d.inForce.troubles()
	if err := d.backend.missing(); err != nil && d.inForce.config.Rules.NoRules == "" {
		s.Trouble = append(s.Trouble, fmt.Sprintf("no token can be fetched: %v; each fetch looks again", err))
	}
	if d.unnoted != nil {
		s.Trouble = append(s.Trouble, d.unnoted.Error())
	}
	s.Trouble = slices.Concat(s.Trouble, d.sockets.troubles(), d.loop.troubles(), d.hub.troubles())
	if d.fault == "" { // else they are of files that are others by now
		s.Trouble = append(s.Trouble, d.inForce.config.Warnings...)
	}
	s.Loopback, s.Hub = d.loop.status(), d.hub.describe()
	s.Callers.Engine, s.Callers.EngineError = d.callers.Engine()
	s.Callers.Kernel, s.Callers.Pidfd = kernelRelease(), d.callers.Pidfd()
	s.Callers.RefuseYoung = d.inForce.config.Callers.RefuseYoung()
	s.Callers.Limitations = []api.Limitation{}
	for _, b := range d.limitations {
		s.Callers.Limitations = append(s.Callers.Limitations, api.Limitation(b))
		s.Trouble = append(s.Trouble, limitationText(b))
	}
	s.Kept = d.state.status()
	if d.state.trouble != "" {
		s.Trouble = append(s.Trouble, d.state.trouble)
	}
	if d.fault != "" {
		s.Config.Error, s.Config.ErrorOn = d.fault, api.Time(d.faultOn)
		s.Trouble = append(s.Trouble, "the last reload changed nothing, the configuration is wrong: "+d.fault)
	}
	return s
}

// updateLimitations finds out what keeps callers from being attested here, and logs it once.
func (d *daemon) updateLimitations(ctx context.Context) {
	limitations := d.callers.Limitations(ctx)
	d.mu.Lock()
	before := d.limitations
	d.limitations = limitations
	d.mu.Unlock()
	for _, b := range limitations {
		if !slices.Contains(before, b) {
			d.log.Warn("callers cannot be proved",
				zap.String("what", b.What), zap.String("why", b.Why), zap.String("hint", b.Hint))
		}
	}
	if len(limitations) == 0 && len(before) > 0 {
		d.log.Info("callers can be proved again")
	}
}

// kernelRelease is what uname -r prints, or "".
func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "" // which it never does
	}
	return unix.ByteSliceToString(name.Release[:])
}

// limitationText is a limitation as the status shows it.
func limitationText(b attest.Limitation) string {
	return fmt.Sprintf("%s cannot be told, and who cannot be proved is denied: %s: %s", b.What, b.Why, b.Hint)
}

// statusText is the status text of now, and whether it tells of trouble.
func (d *daemon) statusText() (text string, troubled bool) {
	_, crowded := d.server.Connections()
	own := d.describe()
	trouble := append(own.Trouble, crowded...)
	s := d.agent.Status()
	s.Hub, s.Config = own.Hub, own.Config
	return statusText(s, d.backend.simulated() || s.Simulated, trouble), len(trouble)+len(s.Trouble) > 0
}

// statusText is what systemctl status shows of the daemon: what is denied, then trouble, then what it holds, and in the
// end whether the configuration was edited, and what is to be known of IoT Hub that the trouble does not show.
func statusText(s api.Status, opensNothing bool, trouble []string) string {
	var parts []string
	if opensNothing {
		parts = append(parts, "SIMULATED")
	}
	if rules := s.Deny.InForce(); len(rules) > 0 {
		parts = append(parts, deniedText(rules))
	}
	shown := troubleText(slices.Concat(trouble, s.Trouble))
	if shown != "" {
		parts = append(parts, shown)
	}
	parts = append(parts, holdingText(s))
	if edited := s.Config.EditedOn; !edited.IsZero() {
		parts = append(parts, "configuration edited "+edited.UTC().Format("Jan 2 15:04 UTC")+" and not reloaded")
	}
	if s.Deny != nil && !s.Deny.HubSetAsideOn.IsZero() {
		parts = append(parts, "IoT Hub set aside")
	}
	if s.Hub != nil && !s.Hub.Connected && !strings.HasPrefix(shown, "trouble: IoT Hub") {
		parts = append(parts, "IoT Hub not connected")
	}
	return strings.Join(parts, "; ")
}

// deniedText shows the first of the deny rules in force, since when and by which side it is, and counts the others.
func deniedText(rules []api.DenyRule) string {
	first := rules[0]
	text := "denied: " + first.String()
	switch {
	case first.Idle != "":
		return count(len(rules), "deny rule, which is idle", "deny rules, which are idle")
	case first.All:
		text = "everything is denied"
	}
	text += ", since " + first.Since.UTC().Format("Jan 2 15:04 UTC") + " by " + explain.SetBy(first)
	if more := len(rules) - 1; more > 0 {
		text += " (and " + count(more, "more deny rule", "more deny rules") + ")"
	}
	return text
}

// troubleText shows the first trouble and counts the others; "" where there is none. That of IoT Hub comes last, since
// tokens are served without it.
func troubleText(troubles []string) string {
	isOfHub := func(trouble string) int {
		if strings.HasPrefix(trouble, "IoT Hub") || strings.HasPrefix(trouble, "what IoT Hub") {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(troubles, func(a, b string) int { return isOfHub(a) - isOfHub(b) })
	switch len(troubles) {
	case 0:
		return ""
	case 1:
		return "trouble: " + troubles[0]
	}
	return fmt.Sprintf("trouble: %s (and %d more, see perceptctl status)", troubles[0], len(troubles)-1)
}

// holdingText counts identities and tokens, and says when the next token is refreshed.
func holdingText(s api.Status) string {
	valid, stale, withheld := 0, 0, 0
	var next time.Time
	for _, token := range s.Tokens {
		if token.ExpiresIn > 0 {
			valid++
			if token.Permissions.State != api.PermissionsCurrent {
				stale++
			}
		}
		if token.Permissions.Withheld {
			withheld++
		}
		if token.State != api.StateIdle && !token.NextRefresh.IsZero() &&
			(next.IsZero() || token.NextRefresh.Before(next)) {
			next = token.NextRefresh
		}
	}
	held := fmt.Sprintf("%s, %s", count(len(s.Identities), "identity", "identities"), count(valid, "token", "tokens"))
	if stale > 0 {
		held += fmt.Sprintf(", %d stale", stale)
	}
	if withheld > 0 {
		held += fmt.Sprintf(" (%d withheld)", withheld)
	}
	if !next.IsZero() {
		held += ", next refresh " + next.UTC().Format("Jan 2 15:04 UTC")
	}
	return held
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// recheckInterval is how soon trouble is looked at again where no watchdog has the daemon look at itself.
const recheckInterval = time.Minute

// statusTeller has systemd show what is true now: it sends the text when it differs from what systemd knows.
type statusTeller struct {
	notify systemd.Notify
	text   func() (text string, troubled bool)
	again  func() // has tell called again, while there is trouble; nil: it is called often enough

	mu    sync.Mutex // protects what follows, and keeps an older text from being sent after a newer one
	known string     // what systemd took last
	timer *time.Timer
}

// tell sends the text, if it is another than systemd knows.
func (s *statusTeller) tell() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, troubled := s.text()
	if troubled && s.again != nil {
		if s.timer == nil {
			s.timer = time.AfterFunc(recheckInterval, s.again)
		} else {
			s.timer.Reset(recheckInterval)
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
