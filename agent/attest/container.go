package attest

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"perceptd/agent/grants"
)

// containerInfo is the engine's answer about a container.
type containerInfo struct {
	grants.Container
	running bool
	parent  string // the cgroup parent that it was started with; empty: the engine's default
	cgroup  string // its own cgroup; empty: the engine does not name it, as Docker
	pod     string // the ID of its pod, of Podman; empty: none
	pidMode string
	init    int32 // the process ID of its first process
}

// attestContainer asks the container engine which container a caller at that location runs in, and checks the answer.
// With an error it returns what is known of the container.
func (a *Attestor) attestContainer(ctx context.Context, rules *activeRules, at location) (*grants.Container, error) {
	unattested := "which container it runs in"
	bare := &grants.Container{ID: at.container}
	if at.split { // before any question, which a user could have asked as often as that user makes cgroups
		if err := a.kernel.checkOwners(a.engine.trusted, at.parent, at.path); err != nil {
			return bare, &Error{What: unattested, Why: err.Error(), Hint: rootlessHint}
		}
	}
	info, err := a.engine.inspect(ctx, rules.Engines, at.container)
	var untrusted *untrustedError
	switch {
	case errors.Is(err, errNoEngine):
		return bare, &Error{
			What: unattested,
			Why:  err.Error(),
			Hint: "perceptctl doctor, as an administrator, tells what is missing",
		}
	case errors.As(err, &untrusted):
		return bare, &Error{What: unattested, Why: err.Error(), Hint: engineHint(err)}
	case errors.Is(err, errNotFound):
		return bare, &Error{
			What: unattested,
			Why:  fmt.Sprintf("the engine knows no container %s", bare.ShortID()),
			Hint: "if another engine of root's runs it, name that one's socket as [callers] engine; " + rootlessHint,
		}
	case err != nil:
		return bare, &Error{
			What: unattested,
			Why:  fmt.Sprintf("the container engine was asked in vain: %v", err),
			Hint: "try again when the engine answers: docker ps or podman ps shows it",
		}
	}
	if err := a.checkContainer(rules, at, info); err != nil {
		return &info.Container, &Error{What: unattested, Why: err.Error(), Hint: info.hint(at)}
	}
	return &info.Container, nil
}

// checkContainer returns nil if info describes the container that the caller at that location runs in.
func (a *Attestor) checkContainer(rules *activeRules, at location, info containerInfo) error {
	switch {
	case info.ID != at.container:
		return fmt.Errorf("the engine was asked for container %s and answered for %q",
			shortID(at.container), truncate(info.ID))
	case !info.running || info.init <= 0:
		return errors.New("the engine says that its container does not run")
	case info.Name == "":
		return errors.New("the engine tells no name of its container")
	case info.sharesPidNamespace():
		return fmt.Errorf("its container shares the process numbers of others (--pid %s)",
			truncate(containerID.ReplaceAllStringFunc(info.pidMode, shortID)))
	case info.hasForeignParent(at):
		return fmt.Errorf("its container was started with a cgroup parent of its own (%s)", truncate(info.parent))
	case info.cgroup == "" && (at.split || at.pod != ""):
		return fmt.Errorf("the caller is in cgroup %s, and the engine does not name its container's, as Podman does",
			at.path)
	case info.cgroup != "" && info.cgroup != strings.TrimSuffix(at.path, "/container"):
		return fmt.Errorf("the engine says that its container is in cgroup %s, and the caller is in %s",
			truncate(info.cgroup), at.path)
	case at.pod != "" && at.pod != info.pod:
		return fmt.Errorf("the caller is in the cgroup of pod %s, and the engine names another pod of its container",
			shortID(at.pod))
	}
	file, err := a.kernel.readFile(info.init, "cgroup")
	if err != nil {
		return fmt.Errorf("the container's first process cannot be looked at: %w", err)
	}
	if first := parseCgroup(file, rules.parents); first.kind != inContainer || first.path != at.path {
		return fmt.Errorf("the container's first process is in cgroup %s, and the caller in %s",
			truncate(first.path), at.path)
	}
	return nil
}

// sharesPidNamespace reports whether the container was started with --pid. For a container without it Podman reports
// "private".
func (info *containerInfo) sharesPidNamespace() bool {
	return info.pidMode != "" && info.pidMode != "private"
}

// hasForeignParent reports whether the container was started with a --cgroup-parent that differs from its location. Of
// a container whose cgroup was split from a service's, Podman reports the pod's, which it does not use.
func (info *containerInfo) hasForeignParent(at location) bool {
	return !at.split && info.parent != "" && !isParent(at.parent, info.parent)
}

// hint returns what to do when checkContainer fails.
func (info *containerInfo) hint(at location) string {
	if info.sharesPidNamespace() || info.hasForeignParent(at) {
		return "run the container without --pid and --cgroup-parent"
	}
	return ""
}

// shortID shortens a container's ID for people.
func shortID(id string) string { return (&grants.Container{ID: id}).ShortID() }

// isParent reports whether cgroup is the parent that was configured for a container, which is a slice's name or a
// path.
func isParent(cgroup, configured string) bool {
	if strings.HasSuffix(configured, ".slice") && !strings.Contains(configured, "/") {
		return strings.HasSuffix(cgroup, "/"+configured)
	}
	return cgroup == "/"+strings.Trim(configured, "/")
}
