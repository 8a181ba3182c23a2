package attest

import (
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"

	"perceptd/agent/grants"
)

// locationKind is what a process's cgroup says of it.
type locationKind uint8

const (
	unclear     locationKind = iota // it says nothing that can be relied on
	onHost                          // it is in no container and of no service
	inUnit                          // it is of a systemd service
	inContainer                     // it is in a container
)

// location is where in the tree of cgroups a process is. Everything above a path's last segment was made by root's
// systemd or engine; what is below a service or a container may have been made by whoever runs in it.
type location struct {
	kind      locationKind
	path      string
	unit      string // of inUnit
	container string // of inContainer: its ID, not confirmed by anybody
	parent    string // of inContainer: the cgroup that the container's own is in
	nested    bool   // of inUnit: in a pid namespace of its own, so that it is known by its unit alone
	why       string // of unclear
	hint      string // of unclear; may be empty
}

// The cgroups that engines put containers in when nobody tells them otherwise: Docker and Podman with the
// cgroupfs driver, and containerd's own client; and the slices that they use with systemd's.
var defaultParents = map[string]bool{
	"/docker": true, "/libpod_parent": true, "/default": true,
	"/system.slice": true, "/machine.slice": true,
}

const longID = `[0-9a-f]{64}`

var (
	anyID = regexp.MustCompile(longID)

	// leafID is a container's own cgroup, by engine and driver. Podman has the processes one further down in
	// newer versions.
	leafID = regexp.MustCompile(`^(?:(?:libpod-)?(` + longID + `)|(?:docker|libpod|nerdctl|cri-containerd)-(` + longID + `)\.scope(?:/container)?)$`)

	validSlice = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]+\.slice$`)
	validScope = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]+\.scope$`)

	// userManager is below which a user's own services and sessions are: that user's to arrange, and nobody else's.
	userManager = regexp.MustCompile(`^/user\.slice/user-([0-9]+)\.slice/user@([0-9]+)\.service/`)
)

// parseCgroup reads a process's cgroup file (/proc/PID/cgroup, cgroups(7)) and returns where it is.
//
// Two of the hierarchies there are systemd's: the one named so, and the unified one, whose number is 0. Where both
// are in use they say the same; one that is not in use has everybody at its root.
func parseCgroup(file string, parents map[string]bool) location {
	named, unified := "", ""
	for line := range strings.Lines(file) {
		line = strings.TrimSuffix(line, "\n")
		parts := strings.SplitN(line, ":", 3)
		if len(parts) != 3 {
			return location{why: fmt.Sprintf("its cgroup file has the line %q", truncate(line))}
		}
		into := &unified
		switch {
		case parts[1] == "name=systemd":
			into = &named
		case parts[0] != "0" || parts[1] != "":
			continue
		}
		if *into != "" || parts[2] == "" {
			return location{why: fmt.Sprintf("its cgroup file has the line %q, beside another of the kind", truncate(line))}
		}
		*into = parts[2]
	}
	switch {
	case named == "" && unified == "":
		return location{why: "its cgroup file names no hierarchy of systemd's"}
	case named == "" || named == "/" && unified != "":
		return classify(unified, parents)
	case unified == "" || unified == "/" || unified == named:
		return classify(named, parents)
	}
	return location{
		path: named + " " + unified,
		why:  fmt.Sprintf("it is in cgroup %s of one hierarchy and in %s of another", truncate(named), truncate(unified)),
	}
}

// classify says what a whole cgroup path means. What is not on the list means nothing.
func classify(p string, parents map[string]bool) location {
	if p == "/" {
		return location{kind: onHost, path: p}
	}
	if !strings.HasPrefix(p, "/") || path.Clean(p) != p || strings.HasPrefix(p, "/..") {
		return location{path: p, why: fmt.Sprintf("its cgroup %s is outside of what the daemon can see", truncate(p)),
			hint: "run perceptd on the device itself, not in a cgroup namespace of its own"}
	}
	switch ids := anyID.FindAllString(p, 3); len(ids) {
	case 0:
		return classifyHost(p)
	case 1:
		return classifyContainer(p, ids[0], parents)
	}
	return location{path: p, why: fmt.Sprintf("its cgroup %s names more than one container", truncate(p)),
		hint: "run the container without --cgroup-parent"}
}

func classifyContainer(p, id string, parents map[string]bool) location {
	in, leaf := path.Split(strings.TrimSuffix(p, "/container"))
	if strings.HasSuffix(p, "/container") {
		leaf += "/container"
	}
	in = strings.TrimSuffix(in, "/")
	found := leafID.FindStringSubmatch(leaf)
	if found == nil || found[1]+found[2] != id || strings.Contains(in, ".service") {
		return location{path: p, why: fmt.Sprintf("its cgroup %s is no container's own: whoever runs above it can have made it", truncate(p))}
	}
	if !defaultParents[in] && !parents[in] {
		return location{path: p, why: fmt.Sprintf("its cgroup %s is not where container engines put containers by themselves", truncate(p)),
			hint: fmt.Sprintf("run the container without --cgroup-parent; if every container of this device is in %s, name that in [callers] cgroup_parents", truncate(in))}
	}
	return location{kind: inContainer, path: p, container: id, parent: in}
}

func classifyHost(p string) location {
	if user := userManager.FindStringSubmatch(p); user != nil && user[1] == user[2] {
		return location{kind: onHost, path: p}
	}
	segments := strings.Split(p[1:], "/")
	for i, segment := range segments {
		last := i == len(segments)-1
		switch {
		case !last && validSlice.MatchString(segment):
			continue
		case last && strings.HasSuffix(segment, ".service") && (grants.Match{Unit: segment}).Check() == nil:
			return location{kind: inUnit, path: p, unit: segment}
		case last && validScope.MatchString(segment) && segments[0] != "machine.slice":
			return location{kind: onHost, path: p}
		case !last && strings.HasSuffix(segment, ".service"):
			return location{path: p, why: fmt.Sprintf("its cgroup %s is one that %s has made below its own: anything may run there under any name", truncate(p), truncate(segment)),
				hint: "take Delegate= out of the service, or have the process that asks run in the service's own cgroup"}
		}
		break
	}
	return location{path: p, why: fmt.Sprintf("its cgroup %s is neither a service's, nor a session's, nor a container's", truncate(p)),
		hint: "run it as a systemd service, or in a container of an engine that perceptd can ask"}
}

// locate reads where a process runs.
func (a *Attestor) locate(pid int32, rules *ruleset) location {
	if a.kernel.procMismatch != nil {
		return location{why: fmt.Sprintf("where it runs cannot be told: %v", a.kernel.procMismatch), hint: procHint}
	}
	file, err := a.kernel.readFile(pid, "cgroup")
	if err != nil {
		return location{why: fmt.Sprintf("its cgroup cannot be read: %v", err), hint: doctorHint}
	}
	at := parseCgroup(file, rules.parents)
	if at.kind != inUnit && at.path != "" && at.path == a.ownCgroup {
		at = location{kind: onHost, path: at.path} // where the daemon itself was started, so in no container of its own
	}
	if at.kind != onHost && at.kind != inUnit {
		return at
	}
	// Not every container has a cgroup by which judge knows it: runc and crun name scopes as they like, unshare and
	// --cgroups=disabled leave theirs where they were started. Root in there is not root of the device.
	nested, err := a.kernel.isNested(pid)
	switch {
	case err != nil:
		return location{path: at.path, why: fmt.Sprintf("its pid namespace cannot be read: %v", err), hint: doctorHint}
	case nested && at.kind == onHost:
		return location{path: at.path, why: fmt.Sprintf("it is in cgroup %s, and in a pid namespace of its own, as in a container: its uid says nothing", truncate(at.path)),
			hint: "run it as a systemd service, or in a container of an engine that perceptd can ask"}
	}
	at.nested = nested
	return at
}

// isRejected reports whether it was looked for, and nothing can be relied on.
func (l *location) isRejected() bool { return l.kind == unclear && l.why != "" }

func (l *location) asError() error {
	return &Error{What: "where it runs", Why: l.why, Hint: l.hint}
}

// fillIn fills in what a place says of a caller.
func (l *location) fillIn(c *grants.Caller) {
	switch l.kind {
	case inUnit:
		c.Unit, c.Nested = l.unit, l.nested
	case inContainer:
		c.Container = &grants.Container{ID: l.container}
	}
}

// userSlice is below which everything runs that a user has started by logging in, whatever users it has become since. Only
// root's systemd puts processes there.
var userSlice = regexp.MustCompile(`^/user\.slice/user-([0-9]+)\.slice/`)

// owner returns the user whose session or service manager a place is in, or grants.NoID.
func (l *location) owner() uint32 {
	user := userSlice.FindStringSubmatch(l.path)
	if user == nil {
		return grants.NoID
	}
	uid, err := strconv.ParseUint(user[1], 10, 32)
	if err != nil {
		return grants.NoID
	}
	return uint32(uid)
}
