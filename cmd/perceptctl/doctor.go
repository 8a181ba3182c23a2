package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/binding"
	"perceptd/agent/clock"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

// severity is what a check found, in a word.
type severity string

const (
	pass severity = "ok"
	note severity = "note" // worth knowing, nothing to do
	fail severity = "FAIL" // needs a person
)

// finding is the outcome of one check.
type finding struct {
	Verdict severity `json:"verdict"`
	What    string   `json:"what"` // that was looked at, in a word or two
	Is      string   `json:"is"`
	Next    string   `json:"next,omitempty"` // what to do about it
}

func (a *app) doctorCommand() *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "doctor",
		Short: "look for what keeps tokens from modules, and say what to do",
		Long: `Look at the sockets, the daemon, its configuration, what it can see of its
callers, its tokens and its latest denials, and say of each how it is and what
to do next. Run it as an administrator on the device, or in a module's container
or service to see what that caller can reach. It changes nothing and fetches no
token, and works when perceptd is down as well. Nothing is waited for longer than
5 seconds, nor for perceptd longer than --timeout.

The exit status is 5 when a check failed.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.doctor(ctx, asJSON) }),
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print the findings as a list")
	return command
}

func (a *app) doctor(ctx context.Context, asJSON bool) error {
	findings := a.examine(ctx)
	failures := 0
	for _, f := range findings {
		if f.Verdict == fail {
			failures++
		}
	}
	var err error
	if asJSON {
		err = a.printJSON(findings)
	} else {
		err = a.print(a.screen(a.stdout).findings(findings, failures, ctx.Err() != nil))
	}
	switch {
	case err != nil:
	case ctx.Err() != nil:
		err = ctx.Err()
	case failures > 0:
		err = &troubleError{}
	}
	return err
}

// examine makes every check whose ground is there. Both sockets are asked at once; what to look at when the daemon does
// not answer is looked at meanwhile.
func (a *app) examine(ctx context.Context) []finding {
	asked, cancel := context.WithTimeout(ctx, a.probeTimeout())
	defer cancel()
	beside, answered := context.WithCancel(ctx)
	var all, units []finding
	var keeper timeKeeper
	var probes, checks sync.WaitGroup
	checks.Go(func() { units = a.examineUnits(beside) })
	probes.Go(func() { keeper = a.findTimeDaemon(ctx) })
	defer checks.Wait()
	defer answered()
	probes.Go(func() { all = a.examineCaller(asked) })
	status, err := a.fetchStatus(asked)
	probes.Wait()
	if err != nil {
		absence := a.examineAbsence(err, all[0].Verdict == pass)
		if all = append(all, absence); absence.Verdict == fail || ctx.Err() != nil {
			checks.Wait()
			all = append(all, units...)
		}
		return all
	}
	all = append(all, finding{Verdict: pass, What: "admin socket", Is: a.client.AdminSocketPath() + " answers"})
	all = append(all, examineDaemon(status)...)
	all = append(all, examineCallers(status)...)
	all = append(all, examineClock(status.Clock, keeper))
	all = append(all, examineKept(status.Kept)...)
	all = append(all, a.examineKey(ctx, status.Kept)...)
	all = append(all, examineHub(hubNow(status), status.Hub, status.Deny)...)
	all = append(all, examineDeny(status.Now, status.Deny, status.Hub)...)
	all = append(all, examineTokens(status)...)
	all = append(a.screen(a.stdout).examineAllDenied(status.Now, status.Deny), all...)
	return append(all, examineDenials(status)...)
}

// examineCaller asks on the token socket who this process is.
func (a *app) examineCaller(ctx context.Context) []finding {
	const what = "token socket"
	who, err := a.client.WhoAmI(ctx)
	if err != nil {
		return []finding{a.socketFailure(what, a.client.TokenSocketPath(), err)}
	}
	all := []finding{{Verdict: pass, What: what, Is: a.client.TokenSocketPath() + " answers"}}
	switch {
	case who.Unattested != nil:
		is := who.Unattested.What + " is not proved: " + who.Unattested.Why
		return append(all, finding{fail, "this process", strings.TrimSuffix(is, ": "), who.Unattested.Hint})
	case len(who.Grants) == 0:
		return append(all, finding{note, "this process",
			"nothing is granted to it: perceptctl whoami tells how it is seen", ""})
	case slices.ContainsFunc(who.Grants, func(g api.Grant) bool { return len(g.Denied) > 0 }):
		return append(all, finding{note, "this process",
			"deny rules take tokens from it that are granted: perceptctl whoami marks them", ""})
	}
	return append(all, finding{Verdict: pass, What: "this process",
		Is: fmt.Sprintf("it has %s: perceptctl whoami lists them", plural(len(who.Grants), "grant", "grants"))})
}

// socketFailure says what is at a socket's path when there is no answer.
func (a *app) socketFailure(what, path string, err error) finding {
	info, statErr := os.Lstat(path)
	switch {
	case errors.Is(err, context.Canceled):
		return finding{note, what, path + " was not waited for: interrupted", ""}
	case errors.Is(err, context.DeadlineExceeded):
		return finding{fail, what, fmt.Sprintf("%s does not answer, within %v", path, a.probeTimeout()),
			"journalctl -u perceptd tells why"}
	case errors.Is(statErr, fs.ErrNotExist):
		return finding{fail, what, path + " is not there", a.hint(err)}
	case statErr == nil && info.Mode().Type() != fs.ModeSocket:
		return finding{fail, what, path + " is no socket",
			"look what it is and remove it, then systemctl restart perceptd"}
	}
	return finding{fail, what, err.Error(), a.hint(err)}
}

// examineAbsence says why there is no status. In a module's container, whose own socket answers, that is as it should
// be.
func (a *app) examineAbsence(err error, answered bool) finding {
	const what = "admin socket"
	path := a.client.AdminSocketPath()
	if _, statErr := os.Lstat(path); errors.Is(statErr, fs.ErrNotExist) && answered {
		return finding{note, what,
			"there is none here, as in a module's container: run perceptctl doctor on the device for the rest", ""}
	}
	return a.socketFailure(what, path, err)
}

// examineUnits asks systemd and the daemon's own check, all at once, where they are here.
func (a *app) examineUnits(ctx context.Context) (all []finding) {
	names := [...]string{"perceptd.service", "perceptd.socket", "perceptd-admin.socket"}
	var units [len(names)]unitState
	var asking sync.WaitGroup
	for i, name := range names {
		asking.Go(func() { units[i] = a.unit(ctx, name) })
	}
	faults, err := a.runProgram(ctx, "perceptd", "--check")
	asking.Wait()

	config := examineConfig(strings.TrimPrefix(faults, "perceptd: "), err)
	for i, name := range names {
		switch unit := units[i]; {
		case unit.crashLoops():
			f := finding{fail, name, unit.crashText(), "systemctl status perceptd tells more"}
			switch {
			case unit.exit == exitFlags:
				f.Is += "; the reason: its command line is wrong"
				f.Next = "systemctl cat perceptd shows it, and which drop-in changes it: correct that, then " +
					"systemctl daemon-reload; systemd then starts perceptd by itself"
			case config != nil && config.Verdict == fail:
				f.Is += "; the reason: " + config.Is
				f.Next = "correct the configuration, of which perceptd --check shows every fault; systemd then " +
					"starts perceptd by itself"
				config = nil // it is part of this finding
			}
			all = append(all, f)
		case unit.active == "active" || unit.active == "reloading":
			all = append(all, finding{Verdict: pass, What: name, Is: "systemd says " + unit.active})
		case unit.active == "activating" && unit.text != "": // it waits for something
			all = append(all, finding{fail, name, "systemd says activating: " + unit.text, ""})
		case unit.active != "":
			all = append(all, finding{fail, name, "systemd says " + unit.active, "systemctl status " + name +
				" tells why; systemctl enable --now perceptd starts it"})
		}
	}
	if config != nil {
		all = append(all, *config)
	}
	return all
}

func (u unitState) crashText() string {
	return fmt.Sprintf("perceptd is not answering: systemd starts it, and it ends (%s so far)",
		plural(u.restarts, "restart", "restarts"))
}

// exitFlags is how perceptd ends where its command line is wrong.
const exitFlags = 78

// exitFaults is how perceptd --check ends where it finds a fault.
const exitFaults = 1

// examineConfig goes by how perceptd --check ended; nil: it is not here.
func examineConfig(output string, err error) *finding {
	const what = "configuration"
	var ended *exec.ExitError
	switch {
	case errors.Is(err, errNoProgram):
		return nil
	case err == nil:
		return &finding{Verdict: pass, What: what, Is: "perceptd --check finds no fault"}
	case errors.As(err, &ended) && ended.ExitCode() == exitFaults:
		return &finding{fail, what, output, "correct it: perceptd --check shows every fault"}
	case errors.Is(err, context.Canceled):
		return &finding{note, what, "it was not checked: interrupted", ""}
	case errors.Is(err, context.DeadlineExceeded):
		return &finding{note, what, fmt.Sprintf("it was not checked: perceptd --check does not end, within %v",
			probeTimeout), ""}
	}
	return &finding{note, what, strings.TrimSuffix(fmt.Sprintf("it was not checked: perceptd --check: %v: %s",
		err, output), ": "), ""}
}

func examineDaemon(status api.Status) (all []finding) {
	switch {
	case status.Simulated && status.Source.Kind != "simulated":
		all = append(all, finding{fail, "source", "SIMULATED: " + simulatedSource(status.Source),
			"systemctl cat perceptd and systemctl show-environment tell what leads perceptd there; once that is " +
				"gone: systemctl restart perceptd"})
	case status.Simulated:
		all = append(all, finding{note, "source", "SIMULATED: its tokens open nothing", ""})
	default:
		all = append(all, finding{Verdict: pass, What: "source", Is: sourceText(status.Source)})
	}
	all = append(all, examineFiles(status.Config)...)
	if !status.Ready {
		all = append(all, finding{fail, "perceptd", "it is not ready", "journalctl -u perceptd tells why"})
	}
	for _, trouble := range status.Trouble {
		if reportedElsewhere(status, trouble) {
			continue
		}
		all = append(all, finding{fail, "perceptd", trouble, ""})
	}
	return all
}

// examineFiles says what of the configuration's files is in force, and what mends the rest.
func examineFiles(c api.ConfigStatus) (all []finding) {
	const (
		what = "configuration"
		mend = "correct it, then perceptctl reload"
	)
	switch {
	case c.None != "":
		all = append(all, finding{fail, what, "none is in force, and every request is refused: " + c.None, mend})
	case !c.LastSince.IsZero():
		all = append(all, finding{fail, what, "the last one goes on, and what was taken out of the edited files is " +
			"still in force: " + strings.Join(c.Faults, "; "), mend})
	}
	for _, idle := range c.Idle {
		all = append(all, finding{fail, what,
			fmt.Sprintf("%s (%s) is idle: %s", idle.Element, idle.Place, idle.Why), mend})
	}
	if c.Error != "" {
		all = append(all, finding{fail, what, "the last reload changed nothing: " + c.Error, mend})
	}
	if len(all) == 0 {
		all = append(all, finding{Verdict: pass, What: what, Is: strings.Join(c.Files, ", ")})
	}
	if !c.EditedOn.IsZero() {
		all = append(all, finding{note, what, "edited on " + c.EditedOn.UTC().Format("Jan 2 15:04 UTC") +
			" and not reloaded since", "perceptctl reload puts it in force"})
	}
	for _, gone := range c.Gone {
		all = append(all, finding{note, what, gone + " was in force and is gone, and what it allowed with it",
			"if that was not meant, put it back, then perceptctl reload"})
	}
	for _, unread := range c.Unread {
		all = append(all, finding{note, what, unread, ""})
	}
	return all
}

// reportedOfFiles reports whether examineFiles says that trouble.
func reportedOfFiles(c api.ConfigStatus, trouble string) bool {
	says := func(why string) bool { return why != "" && strings.Contains(trouble, why) }
	return says(c.Error) || says(c.None) || !c.LastSince.IsZero() && says("the last configuration goes on") ||
		slices.ContainsFunc(c.Idle, func(i api.IdleElement) bool { return says(i.Why) && says(i.Element) })
}

// reportedElsewhere reports whether another check says that trouble, and more.
func reportedElsewhere(status api.Status, trouble string) bool {
	if reportedOfFiles(status.Config, trouble) {
		return true
	}
	for _, b := range status.Callers.Limitations {
		if strings.Contains(trouble, b.Why) {
			return true
		}
	}
	for _, token := range status.Tokens {
		if token.LastError != "" && strings.Contains(trouble, token.LastError) {
			return true
		}
	}
	return reportedOfHub(status.Hub, trouble) || reportedOfDeny(status.Deny, trouble)
}

func examineCallers(status api.Status) (all []finding) {
	for _, b := range status.Callers.Limitations {
		all = append(all, finding{fail, "callers", b.What + " cannot be told: " + b.Why, b.Hint})
	}
	if status.Callers.EngineError != "" && len(all) == 0 {
		all = append(all, finding{fail, "callers", "the container engine was asked in vain: " +
			status.Callers.EngineError, "see that it answers: docker ps or podman ps"})
	}
	if len(all) == 0 {
		is := "their users, services and containers can be told"
		if status.Callers.Engine != "" {
			is += ", by " + status.Callers.Engine
		}
		all = append(all, finding{Verdict: pass, What: "callers", Is: is})
	}
	return append(all, examineKernel(status.Callers))
}

// examineClock says whether the wall clock counts as right, by whose word, and what to do where it does not.
func examineClock(c api.ClockStatus, by timeKeeper) finding {
	const what = "clock"
	vouched := strings.TrimSuffix("synchronised, says the "+c.By, " ")
	if by.state == "active" {
		vouched += " (" + by.name + ")"
	}
	switch {
	case c.Known && c.By == "": // of a simulated back end that runs faster
		return finding{Verdict: pass, What: what, Is: "right by itself"}
	case c.Known && c.By == clock.ByTimesyncd:
		return finding{Verdict: pass, What: what, Is: "synchronised, says " + c.By}
	case c.Known:
		return finding{Verdict: pass, What: what, Is: vouched}
	case c.By == "":
		return finding{note, what, "nobody can be asked whether it is synchronised, so it does not count as right",
			"systemctl status perceptd-clock.socket tells why perceptd cannot ask; perceptctl clock asks the kernel"}
	case by.unit == "":
		return finding{note, what, "not synchronised, says the " + c.By + ", and no time daemon runs",
			"install chrony, or enable systemd-timesyncd: revocations and reboots take longer to settle without the " +
				"time"}
	}
	if by.state != "active" {
		return finding{note, what, fmt.Sprintf("not synchronised, says the %s, and %s, which is installed, does not "+
			"run: systemd says %s", c.By, by.name, by.state),
			"systemctl status " + by.unit + " tells why; systemctl enable --now " + by.unit + " starts it"}
	}
	return finding{note, what, "not " + vouched, by.next}
}

// examineKernel says what the kernel's age means for the proof of callers.
func examineKernel(c api.CallersStatus) finding {
	const (
		what  = "kernel"
		means = `docs/security.md tells what that means, under "Kernels before 6.5"`
	)
	is := strings.TrimSpace("Linux " + c.Kernel)
	switch {
	case c.Pidfd && c.RefuseYoung:
		return finding{pass, what, is +
			` gives a handle on the very process that connects, so that young = "refuse" in [callers] has no effect`,
			""}
	case c.Pidfd:
		return finding{pass, what, is + " gives a handle on the very process that connects", ""}
	case c.RefuseYoung:
		return finding{note, what, is + " gives no handle on a caller's process, as 6.5 and later do: processes " +
			"younger than 20 ms have to ask twice; " + means, ""}
	}
	return finding{note, what, is + " gives no handle on a caller's process, as 6.5 and later do: " + means,
		`if a number that root gave to another process must not prove anything, set young = "refuse" in [callers]`}
}

// examineKept says what tokens on the disk are bound to, where there are any.
func examineKept(k api.KeptStatus) []finding {
	if k.BoundTo == "" {
		return nil
	}
	f := finding{Verdict: pass, What: "kept tokens", Is: "bound " + bindingWorth(binding.KindOf(k.BoundTo))}
	switch {
	case binding.KindOf(k.BoundTo).Hardware():
	case k.Untold:
		f.Verdict = note
		f.Is += "; root has told perceptd nothing of it that they could be bound to"
		f.Next = cacheKeyNext + " has root tell, as after an upgrade"
	default:
		f.Verdict = note
		f.Next = `before the disk is copied, remove what docs/security.md names under "Images and copies"`
	}
	return []finding{f}
}

// examineKey says why the key of kept tokens cannot be opened, of which perceptd knows only that it was not.
func (a *app) examineKey(ctx context.Context, k api.KeptStatus) []finding {
	if k.Reboot {
		return nil
	}
	asked, cancel := context.WithTimeout(ctx, a.probeTimeout())
	defer cancel()
	unit := a.unit(asked, cacheKeyUnit)
	why, next, said := strings.Cut(unit.text, statusNext)
	if unit.active != "failed" || !said {
		return nil
	}
	return []finding{{fail, "key of kept tokens", why, next}}
}

func examineTokens(status api.Status) (all []finding) {
	sound := 0
	for _, token := range status.Tokens {
		what := fmt.Sprintf("token of %s for %s", token.Identity, token.Resource)
		lost := explain.LostRecord(explain.ChangesOf(token, status.Changes))
		switch {
		case token.State == api.StateMissing || token.State == api.StateFailing:
			all = append(all, finding{fail, what, cmp.Or(token.LastError, "there is none yet"),
				"perceptctl refresh --resource " + token.Resource + " tries again"})
		case token.Permissions.Withheld && lost != nil:
			all = append(all, finding{note, what, "it is withheld ([tokens] lost_record): " +
				explain.RecordText(lost.Record), "perceptctl explain " + token.Resource})
		case token.Permissions.Withheld:
			all = append(all, finding{note, what, "it is withheld, as a revocation ordered", "perceptctl explain " +
				token.Resource})
		case token.Former:
			all = append(all, finding{note, what, "it is of a former principal of the identity" + formerText(token) +
				"; the back end hands out its copy, and what the present principal is permitted does not hold for it",
				"perceptd asks again once an hour; perceptctl explain " + token.Resource})
		case token.Permissions.State != api.PermissionsCurrent && token.Permissions.State != "":
			all = append(all, finding{note, what, "its permissions are " + string(token.Permissions.State),
				"perceptctl explain " + token.Resource})
		default:
			sound++
		}
	}
	if sound > 0 || len(all) == 0 {
		all = append([]finding{{Verdict: pass, What: "tokens", Is: plural(sound, "token is", "tokens are") +
			" in order"}}, all...)
	}
	return all
}

func examineDenials(status api.Status) (all []finding) {
	for _, d := range status.Denials {
		is := d.Caller
		if d.Resource != "" {
			is += " for " + d.Resource
		}
		is += fmt.Sprintf(", %s: %s", plural(d.Count, "time", "times"), d.Reason)
		next := ""
		switch {
		case d.GrantedNow:
			is += "; granted since"
		case d.NearMiss != nil && d.Suggestion == nil:
			next = "have the caller ask for " + d.NearMiss.Spelling
		case d.Code == api.CodeDenied && !isStillDenied(status.Deny, d):
			is += "; lifted since"
		case d.Code == api.CodeDenied:
			next = "perceptctl deny tells who lifts the rule"
		case d.Code == api.CodeFaultyGrant:
			next = "mend it, then: sudo perceptctl reload"
		case d.Suggestion != nil:
			next = mend(d)
		case d.Resource != "":
			next = "perceptctl grants check tells what would be decided"
		}
		all = append(all, finding{note, "denied", is, next})
	}
	return all
}

// findings lays out what was found, a line or paragraph each, and what to do below.
func (s screen) findings(all []finding, failures int, interrupted bool) string {
	text := ""
	for _, f := range all {
		how := map[severity]term.Style{pass: term.Good, note: term.Warning, fail: term.Bad}[f.Verdict]
		text += s.Paragraph(fmt.Sprintf("%-4s  ", f.Verdict), f.What+": "+f.Is, how)
		if f.Next != "" {
			text += s.Paragraph("      next: ", f.Next, term.Plain)
		}
	}
	switch {
	case interrupted:
		return text + "\nnot everything was looked at\n"
	case failures == 0:
		return text + "\nnothing needs a person\n"
	}
	return text + fmt.Sprintf("\n%s a person\n", plural(failures, "thing needs", "things need"))
}
