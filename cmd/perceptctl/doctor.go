package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
)

// judgement is what a check found, in a word.
type judgement string

const (
	fine   judgement = "ok"
	noted  judgement = "note" // worth knowing, nothing to do
	failed judgement = "FAIL" // needs a person
)

// finding is the outcome of one check.
type finding struct {
	Verdict judgement `json:"verdict"`
	What    string    `json:"what"` // that was looked at, in a word or two
	Is      string    `json:"is"`
	Next    string    `json:"next,omitempty"` // what to do about it
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
token, and works when perceptd is down as well.

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
		if f.Verdict == failed {
			failures++
		}
	}
	var err error
	if asJSON {
		err = a.printJSON(findings)
	} else {
		err = a.print(a.screen(a.stdout).findings(findings, failures))
	}
	if err == nil && failures > 0 {
		err = &troubleError{}
	}
	return err
}

// examine makes every check whose ground is there.
func (a *app) examine(ctx context.Context) []finding {
	all := a.examineCaller(ctx)
	status, err := a.fetchStatus(ctx)
	if err != nil {
		absence := a.examineAbsence(err, all[0].Verdict == fine)
		if all = append(all, absence); absence.Verdict == failed {
			all = append(all, a.examineUnits(ctx)...)
		}
		return all
	}
	all = append(all, finding{Verdict: fine, What: "admin socket", Is: a.client.AdminSocketPath() + " answers"})
	all = append(all, examineDaemon(status)...)
	all = append(all, examineCallers(status)...)
	all = append(all, examineTokens(status)...)
	return append(all, examineDenials(status)...)
}

// examineCaller asks on the token socket who this process is.
func (a *app) examineCaller(ctx context.Context) []finding {
	const what = "token socket"
	ctx, cancel := a.patience(ctx)
	defer cancel()
	who, err := a.client.WhoAmI(ctx)
	if err != nil {
		return []finding{a.deadSocket(what, a.client.TokenSocketPath(), err)}
	}
	all := []finding{{Verdict: fine, What: what, Is: a.client.TokenSocketPath() + " answers"}}
	switch {
	case who.Unproved != nil:
		is := who.Unproved.What + " is not proved: " + who.Unproved.Why
		return append(all, finding{failed, "this process", strings.TrimSuffix(is, ": "), who.Unproved.Hint})
	case len(who.Grants) == 0:
		return append(all, finding{noted, "this process", "nothing is granted to it: perceptctl whoami tells how it is seen", ""})
	}
	return append(all, finding{Verdict: fine, What: "this process", Is: fmt.Sprintf("it has %s: perceptctl whoami lists them", plural(len(who.Grants), "grant", "grants"))})
}

// deadSocket says what is at a socket's path when nobody answers there.
func (a *app) deadSocket(what, path string, err error) finding {
	info, statErr := os.Lstat(path)
	switch {
	case errors.Is(statErr, fs.ErrNotExist):
		return finding{failed, what, path + " is not there", a.hint(err)}
	case statErr == nil && info.Mode().Type() != fs.ModeSocket:
		return finding{failed, what, path + " is no socket", "look what it is and remove it, then systemctl restart perceptd"}
	}
	return finding{failed, what, err.Error(), a.hint(err)}
}

// examineAbsence says why there is no status. In a module's container, whose own socket answers, that is as it should be.
func (a *app) examineAbsence(err error, answered bool) finding {
	const what = "admin socket"
	path := a.client.AdminSocketPath()
	if _, statErr := os.Lstat(path); errors.Is(statErr, fs.ErrNotExist) && answered {
		return finding{noted, what, "there is none here, as in a module's container: run perceptctl doctor on the device for the rest", ""}
	}
	return a.deadSocket(what, path, err)
}

// probing is how long another program may take that is asked.
const probing = 10 * time.Second

// examineUnits asks systemd and the daemon's own check, where they are here.
func (a *app) examineUnits(ctx context.Context) (all []finding) {
	for _, unit := range []string{"perceptd.service", "perceptd.socket", "perceptd-admin.socket"} {
		state, _ := a.ask(ctx, "systemctl", "is-active", unit)
		switch state {
		case "active", "reloading":
			all = append(all, finding{Verdict: fine, What: unit, Is: "systemd says " + state})
		case "inactive", "failed", "activating", "deactivating", "maintenance", "unknown":
			all = append(all, finding{failed, unit, "systemd says " + state, "systemctl status " + unit + " tells why; systemctl enable --now perceptd starts it"})
		}
	}
	if out, there := a.ask(ctx, "perceptd", "--check"); there && strings.HasPrefix(out, "perceptd: ") {
		all = append(all, finding{failed, "configuration", strings.TrimPrefix(out, "perceptd: "), "correct it: perceptd --check shows every fault"})
	} else if there {
		all = append(all, finding{Verdict: fine, What: "configuration", Is: "perceptd --check finds no fault"})
	}
	return all
}

// ask runs a program that is on the path and returns what it said, whatever its exit status is.
func (a *app) ask(ctx context.Context, name string, args ...string) (out string, there bool) {
	path := a.program(name)
	if path == "" {
		return "", false
	}
	ctx, cancel := context.WithTimeout(ctx, probing)
	defer cancel()
	command := exec.CommandContext(ctx, path, args...)
	command.Env = a.environ
	text, _ := command.CombinedOutput()
	return strings.TrimSpace(string(text)), true
}

// program returns where a program is on the path, or "".
func (a *app) program(name string) string {
	for _, folder := range filepath.SplitList(a.getenv("PATH")) {
		path := filepath.Join(folder, name)
		if info, err := os.Stat(path); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}

func examineDaemon(status api.Status) (all []finding) {
	switch {
	case status.Simulated:
		all = append(all, finding{noted, "source", "SIMULATED: its tokens open nothing", ""})
	default:
		all = append(all, finding{Verdict: fine, What: "source", Is: strings.TrimSpace(status.Source.Kind + " " + status.Source.Endpoint + " " + status.Source.Address)})
	}
	if status.Config.Error != "" {
		all = append(all, finding{failed, "configuration", "the last reload changed nothing: " + status.Config.Error, "correct it, then perceptctl reload"})
	} else {
		all = append(all, finding{Verdict: fine, What: "configuration", Is: strings.Join(status.Config.Files, ", ")})
	}
	if !status.Ready {
		all = append(all, finding{failed, "perceptd", "it is not ready", "journalctl -u perceptd tells why"})
	}
	for _, trouble := range status.Trouble {
		if isTold(status, trouble) {
			continue
		}
		all = append(all, finding{failed, "perceptd", trouble, ""})
	}
	return all
}

// isTold reports whether another check tells of that trouble, and says more.
func isTold(status api.Status, trouble string) bool {
	if status.Config.Error != "" && strings.Contains(trouble, status.Config.Error) {
		return true
	}
	for _, b := range status.Callers.Blind {
		if strings.Contains(trouble, b.Why) {
			return true
		}
	}
	for _, token := range status.Tokens {
		if token.LastError != "" && strings.Contains(trouble, token.LastError) {
			return true
		}
	}
	return false
}

func examineCallers(status api.Status) (all []finding) {
	for _, b := range status.Callers.Blind {
		all = append(all, finding{failed, "callers", b.What + " cannot be told: " + b.Why, b.Hint})
	}
	if status.Callers.EngineError != "" && len(all) == 0 {
		all = append(all, finding{failed, "callers", "the container engine was asked in vain: " + status.Callers.EngineError, "see that it answers: docker ps"})
	}
	if len(all) == 0 {
		is := "their users, services and containers can be told"
		if status.Callers.Engine != "" {
			is += ", by " + status.Callers.Engine
		}
		all = append(all, finding{Verdict: fine, What: "callers", Is: is})
	}
	return append(all, examineKernel(status.Callers))
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
		return finding{fine, what, is + ` gives a handle on the very process that connects, so that young = "refuse" in [callers] has no effect`, ""}
	case c.Pidfd:
		return finding{fine, what, is + " gives a handle on the very process that connects", ""}
	case c.RefuseYoung:
		return finding{noted, what, is + " gives no handle on a caller's process, as 6.5 and later do: processes younger than 20 ms have to ask twice; " + means, ""}
	}
	return finding{noted, what, is + " gives no handle on a caller's process, as 6.5 and later do: " + means,
		`if a number that root gave to another process must not prove anything, set young = "refuse" in [callers]`}
}

func examineTokens(status api.Status) (all []finding) {
	sound := 0
	for _, token := range status.Tokens {
		what := fmt.Sprintf("token of %s for %s", token.Identity, token.Resource)
		switch {
		case token.State == api.StateMissing || token.State == api.StateFailing:
			all = append(all, finding{failed, what, token.LastError, "perceptctl refresh --resource " + token.Resource + " tries again"})
		case token.Permissions.Withheld:
			all = append(all, finding{noted, what, "it is withheld, as a revocation ordered", "perceptctl explain " + token.Resource})
		case token.Permissions.Standing != api.StandingCurrent && token.Permissions.Standing != "":
			all = append(all, finding{noted, what, "its permissions are " + string(token.Permissions.Standing), "perceptctl explain " + token.Resource})
		default:
			sound++
		}
	}
	if sound > 0 || len(all) == 0 {
		all = append([]finding{{Verdict: fine, What: "tokens", Is: plural(sound, "token is", "tokens are") + " in order"}}, all...)
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
		if d.Resource != "" {
			next = "if it should have it, add a [[grant]]; perceptctl grants check tells what would be decided"
		}
		all = append(all, finding{noted, "denied", is, next})
	}
	return all
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// findings lays out what was found, a line or paragraph each, and what to do below.
func (s screen) findings(all []finding, failures int) string {
	text := ""
	for _, f := range all {
		how := map[judgement]style{fine: good, noted: warning, failed: bad}[f.Verdict]
		text += s.paragraph(fmt.Sprintf("%-4s  ", f.Verdict), f.What+": "+f.Is, how)
		if f.Next != "" {
			text += s.paragraph("      next: ", f.Next, plain)
		}
	}
	if failures == 0 {
		return text + "\nnothing needs a person\n"
	}
	return text + fmt.Sprintf("\n%s a person\n", plural(failures, "thing needs", "things need"))
}
