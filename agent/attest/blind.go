package attest

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

// Limitation is something that keeps callers from being proved. They are denied, not mistaken.
type Limitation struct {
	What string // that cannot be told of callers
	Why  string
	Hint string // what to do about it
}

// pingDeadline is how long an engine may take to say that it is there.
const pingDeadline = time.Second

// Limitations returns what of callers cannot be seen here, as far as it matters to the rules. It asks the engine where
// one is needed, for a second at most.
func (p *Attestor) Limitations(ctx context.Context) []Limitation {
	all := p.kernel.blindness()
	rules := p.rules.Load()
	if !rules.NeedsEngine {
		return all
	}
	if err := p.engine.ping(ctx, rules.Engines); err != nil {
		all = append(all, Limitation{What: "which container a caller runs in", Why: err.Error(), Hint: engineHint(err)})
	}
	return all
}

// Engine returns the path of the engine that is asked, or "" for none, and why it could not be asked the last time.
func (p *Attestor) Engine() (path, trouble string) {
	path, err := present(p.rules.Load().Engines)
	if err != nil {
		return "", ""
	}
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	return path, p.engine.trouble
}

// ping asks whether an engine answers.
func (e *engine) ping(ctx context.Context, paths []string) error {
	ctx, cancel := context.WithTimeout(ctx, pingDeadline)
	defer cancel()
	path, err := present(paths)
	if err != nil {
		return err
	}
	_, err = dial(ctx, path, e.believed)
	return err
}

const usersHint = "take PrivateUsers= away from perceptd, or run it on the device itself"

// The kernel's number of the first pid namespace (PROC_PID_INIT_INO).
const firstPidNamespace = "pid:[4026531836]"

// blindness returns what the daemon's surroundings hide from it.
func (k kernel) blindness() (all []Limitation) {
	if first, err := k.read(1, "cgroup"); err != nil {
		all = append(all, Limitation{
			What: "the units and containers of other users' processes", Why: fmt.Sprintf("%s/1/cgroup: %v", k.proc, plainPath(err)),
			Hint: "take ProtectProc=, ProcSubset= and hidepid= away from perceptd",
		})
	} else if strings.Contains(first, ":/..") {
		all = append(all, Limitation{
			What: "the units and containers of callers", Why: "perceptd is in a cgroup namespace of its own",
			Hint: "run it on the device itself, or with --cgroupns host",
		})
	}
	if k.misplaced != nil {
		all = append(all, Limitation{What: "where callers run", Why: k.misplaced.Error(), Hint: procHint})
	}
	if users, err := os.ReadFile(k.proc + "/self/uid_map"); err != nil || !isWhole(string(users)) {
		all = append(all, Limitation{
			What: "the users of callers", Why: "perceptd is in a user namespace, in which other users all look the same",
			Hint: usersHint,
		})
	}
	namespace, err := os.Readlink(k.proc + "/self/ns/pid")
	if _, booted := os.Stat("/run/systemd/system"); err == nil && namespace != firstPidNamespace && booted != nil {
		all = append(all, Limitation{
			What: "callers outside of the daemon's pid namespace", Why: "perceptd is in a pid namespace of its own",
			Hint: "run it on the device itself, or with --pid host",
		})
	}
	return all
}
