package attest

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// Limitation is something in the daemon's surroundings that keeps callers from being attested. They are denied.
type Limitation struct {
	What string // what cannot be attested
	Why  string
	Hint string // what to do about it
}

// Limitations returns what keeps callers from being attested here, as far as the rules depend on it. If they need a
// container engine, it asks whether one answers, and waits a second at most.
func (a *Attestor) Limitations(ctx context.Context) []Limitation {
	limitations := a.kernel.limitations()
	rules := a.rules.Load()
	if !rules.NeedsEngine {
		return limitations
	}
	if err := a.engine.ping(ctx, rules.Engines); err != nil {
		limitations = append(limitations, Limitation{
			What: "which container a caller runs in", Why: err.Error(), Hint: engineHint(err),
		})
	}
	return limitations
}

// Engine returns the socket of the container engine in use, or "" if there is none, and why the last call to it
// failed.
func (a *Attestor) Engine() (path, trouble string) {
	path, err := findSocket(a.rules.Load().Engines)
	if err != nil {
		return "", ""
	}
	a.engine.mu.Lock()
	defer a.engine.mu.Unlock()
	return path, a.engine.trouble
}

// initPidNamespace is the kernel's name of the initial pid namespace (PROC_PID_INIT_INO).
const initPidNamespace = "pid:[4026531836]"

// limitations returns what namespaces and mount options hide from the daemon.
func (k kernel) limitations() (all []Limitation) {
	if first, err := k.readFile(1, "cgroup"); err != nil {
		all = append(all, Limitation{
			What: "the units and containers of other users' processes",
			Why:  fmt.Sprintf("%s/1/cgroup: %v", k.proc, withoutPath(err)),
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
			What: "the users of callers",
			Why:  "perceptd is in a user namespace, in which other users all look the same",
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
