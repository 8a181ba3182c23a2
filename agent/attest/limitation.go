package attest

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// Limitation is something that keeps callers from being proved. They are denied, not mistaken.
type Limitation struct {
	What string // that cannot be told of callers
	Why  string
	Hint string // what to do about it
}

// Limitations returns what of callers cannot be seen here, as far as it matters to the rules. It asks the engine where
// one is needed, for a second at most.
func (a *Attestor) Limitations(ctx context.Context) []Limitation {
	limitations := a.kernel.limitations()
	rules := a.rules.Load()
	if !rules.NeedsEngine {
		return limitations
	}
	if err := a.engine.ping(ctx, rules.Engines); err != nil {
		limitations = append(limitations, Limitation{What: "which container a caller runs in", Why: err.Error(), Hint: engineHint(err)})
	}
	return limitations
}

// Engine returns the path of the engine that is asked, or "" for none, and why it could not be asked the last time.
func (a *Attestor) Engine() (path, trouble string) {
	path, err := findSocket(a.rules.Load().Engines)
	if err != nil {
		return "", ""
	}
	a.engine.mu.Lock()
	defer a.engine.mu.Unlock()
	return path, a.engine.trouble
}

// The kernel's number of the first pid namespace (PROC_PID_INIT_INO).
const initPidNamespace = "pid:[4026531836]"

// limitations returns what the daemon's surroundings hide from it.
func (k kernel) limitations() (all []Limitation) {
	if first, err := k.readFile(1, "cgroup"); err != nil {
		all = append(all, Limitation{
			What: "the units and containers of other users' processes", Why: fmt.Sprintf("%s/1/cgroup: %v", k.proc, withoutPath(err)),
			Hint: "take ProtectProc=, ProcSubset= and hidepid= away from perceptd",
		})
	} else if strings.Contains(first, ":/..") {
		all = append(all, Limitation{
			What: "the units and containers of callers", Why: "perceptd is in a cgroup namespace of its own",
			Hint: "run it on the device itself, or with --cgroupns host",
		})
	}
	if k.procMismatch != nil {
		all = append(all, Limitation{What: "where callers run", Why: k.procMismatch.Error(), Hint: procHint})
	}
	if users, err := os.ReadFile(k.proc + "/self/uid_map"); err != nil || !isIdentityMap(string(users)) {
		all = append(all, Limitation{
			What: "the users of callers", Why: "perceptd is in a user namespace, in which other users all look the same",
			Hint: userNamespaceHint,
		})
	}
	namespace, err := os.Readlink(k.proc + "/self/ns/pid")
	if _, booted := os.Stat("/run/systemd/system"); err == nil && namespace != initPidNamespace && booted != nil {
		all = append(all, Limitation{
			What: "callers outside of the daemon's pid namespace", Why: "perceptd is in a pid namespace of its own",
			Hint: "run it on the device itself, or with --pid host",
		})
	}
	return all
}
