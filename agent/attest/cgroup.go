package attest

import (
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"

	"perceptd/agent/grants"
)

// locationKind is what a cgroup says about a process.
type locationKind uint8

const (
	unclear     locationKind = iota // nothing that can be relied on
	onHost                          // it runs in no container and no service
	inUnit                          // it runs in a systemd service
	inContainer                     // it runs in a container
)

// location is where a process runs according to its cgroup. Only root's systemd and the container engine create the
// cgroups above the last segment. Below its own cgroup a service or a container may have created any.
type location struct {
	kind      locationKind
	path      string
	unit      string // of inUnit
	container string // of inContainer: its ID, which no engine has confirmed yet
	parent    string // of inContainer: the cgroup above the container's own
	pod       string // of inContainer: the ID of the Podman pod whose cgroup is parent; empty: it is not a pod's
	split     bool   // of inContainer: parent is a systemd service's own cgroup (podman run --cgroups=split)
	nested    bool   // of inUnit: the process has its own pid namespace, so that only the unit identifies it
	why       string // of unclear: the reason
	hint      string // of unclear: what to do about it; may be empty
}

// defaultParents are the cgroups in which engines create containers by default: Docker, Podman and containerd's own
// client with the cgroupfs driver, and the slices that they use with the systemd driver.
var defaultParents = map[string]bool{
	"/docker": true, "/libpod_parent": true, "/default": true,
	"/system.slice": true, "/machine.slice": true,
}

// containerIDPattern matches the ID of a container.
const containerIDPattern = `[0-9a-f]{64}`

var (
	// containerID matches the IDs of containers anywhere in a path.
	containerID = regexp.MustCompile(containerIDPattern)

	// containerCgroup matches a container's own cgroup, by engine and driver. Newer versions of Podman run the
	// processes one level further down.
	containerCgroup = regexp.MustCompile(`^(?:(?:libpod-)?(` + containerIDPattern + `)|` +
		`(?:docker|libpod|nerdctl|cri-containerd)-(` + containerIDPattern + `)\.scope(?:/container)?)$`)

	// podContainer matches the cgroup of a container in one of Podman's pods, by driver: the pod's ID and the
	// container's.
	podContainer = regexp.MustCompile(`^/machine\.slice/machine-libpod_pod_(` + containerIDPattern + `)\.slice` +
		`/libpod-(` + containerIDPattern + `)\.scope(?:/container)?$|` +
		`^/libpod_parent/(` + containerIDPattern + `)/libpod-(` + containerIDPattern + `)$`)

	sliceName = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]+\.slice$`)
	scopeName = regexp.MustCompile(`^[A-Za-z0-9:_.@\\-]+\.scope$`)

	// userManager matches the services and sessions of a user's own service manager, which only that user controls.
	userManager = regexp.MustCompile(`^/user\.slice/user-([0-9]+)\.slice/user@([0-9]+)\.service/`)
)

// splitLeaf is what Podman puts before the ID of a container whose cgroup it makes below that of the systemd service
// that started it, as Quadlet's units do. Podman's own process is in the cgroup runtime beside it.
const splitLeaf = "/libpod-payload-"

// usersCgroups begins the path of every cgroup that a user who logged in can make processes run in. No container there
// is ever proved, whatever an engine says and whatever cgroup_parents names.
const usersCgroups = "/user.slice/"

// parseCgroup parses a process's cgroup file (/proc/PID/cgroup, cgroups(7)) and returns its location. parents are the
// cgroups that may hold containers in addition to defaultParents.
//
// Two of the hierarchies are systemd's: the one of that name and the unified one, whose number is 0. If systemd uses
// both, they agree. In one that it does not use, every process is at the root.
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
			return location{
				why: fmt.Sprintf("its cgroup file has the line %q, beside another of the kind", truncate(line)),
			}
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
		why: fmt.Sprintf("it is in cgroup %s of one hierarchy and in %s of another",
			truncate(named), truncate(unified)),
	}
}

// classify interprets a whole cgroup path. A path that matches none of the known forms is unclear.
func classify(p string, parents map[string]bool) location {
	if p == "/" {
		return location{kind: onHost, path: p}
	}
	if !strings.HasPrefix(p, "/") || path.Clean(p) != p || strings.HasPrefix(p, "/..") {
		return location{
			path: p,
			why:  fmt.Sprintf("its cgroup %s is outside of what the daemon can see", truncate(p)),
			hint: "run perceptd on the device itself, not in a cgroup namespace of its own",
		}
	}
	ids := containerID.FindAllString(p, 3)
	pod := podContainer.FindStringSubmatch(p)
	switch {
	case len(ids) == 0:
		return classifyHost(p)
	case strings.HasPrefix(p, usersCgroups):
		return location{
			path: p,
			why: fmt.Sprintf("its cgroup %s is a user's, who makes cgroups there under any name; "+
				"a rootless engine proves nothing", truncate(p)),
			hint: rootlessHint,
		}
	case pod != nil:
		parent := path.Dir(strings.TrimSuffix(p, "/container"))
		return location{kind: inContainer, path: p, container: pod[2] + pod[4], pod: pod[1] + pod[3], parent: parent}
	case len(ids) == 1:
		return classifyContainer(p, ids[0], parents)
	}
	return location{
		path: p,
		why:  fmt.Sprintf("its cgroup %s names more than one container", truncate(p)),
		hint: "run the container without --cgroup-parent",
	}
}

// classifyContainer interprets a cgroup path with the ID of one container in it.
func classifyContainer(p, id string, parents map[string]bool) location {
	if unit, split := strings.CutSuffix(p, splitLeaf+id); split && unit != "" && classifyHost(unit).kind == inUnit {
		return location{kind: inContainer, path: p, container: id, parent: unit, split: true}
	}
	parent, leaf := path.Split(strings.TrimSuffix(p, "/container"))
	if strings.HasSuffix(p, "/container") {
		leaf += "/container"
	}
	parent = strings.TrimSuffix(parent, "/")
	found := containerCgroup.FindStringSubmatch(leaf)
	if found == nil || found[1]+found[2] != id || strings.Contains(parent, ".service") {
		return location{
			path: p,
			why: fmt.Sprintf("its cgroup %s is no container's own: "+
				"whoever runs above it can have made it", truncate(p)),
		}
	}
	if !defaultParents[parent] && !parents[parent] {
		return location{
			path: p,
			why:  fmt.Sprintf("its cgroup %s is not where container engines put containers by themselves", truncate(p)),
			hint: fmt.Sprintf("run the container without --cgroup-parent; "+
				"if every container of this device is in %s, name that in [callers] cgroup_parents", truncate(parent)),
		}
	}
	return location{kind: inContainer, path: p, container: id, parent: parent}
}

// classifyHost interprets a cgroup path without the ID of a container in it.
func classifyHost(p string) location {
	if user := userManager.FindStringSubmatch(p); user != nil && user[1] == user[2] {
		return location{kind: onHost, path: p}
	}
	segments := strings.Split(p[1:], "/")
	for i, segment := range segments {
		last := i == len(segments)-1
		switch {
		case !last && sliceName.MatchString(segment):
			continue
		case last && strings.HasSuffix(segment, ".service") && (grants.Match{Unit: segment}).Check() == nil:
			return location{kind: inUnit, path: p, unit: segment}
		case last && scopeName.MatchString(segment) && segments[0] != "machine.slice":
			return location{kind: onHost, path: p}
		case !last && strings.HasSuffix(segment, ".service"):
			return location{
				path: p,
				why: fmt.Sprintf("its cgroup %s is one that %s has made below its own: "+
					"anything may run there under any name", truncate(p), truncate(segment)),
				hint: "take Delegate= out of the service, " +
					"or have the process that asks run in the service's own cgroup",
			}
		}
		break
	}
	return location{
		path: p,
		why:  fmt.Sprintf("its cgroup %s is neither a service's, nor a session's, nor a container's", truncate(p)),
		hint: "run it as a systemd service, or in a container of an engine that perceptd can ask",
	}
}

// locate returns where a process runs.
func (a *Attestor) locate(pid int32, rules *activeRules) location {
	if a.kernel.procMismatch != nil {
		return location{why: fmt.Sprintf("where it runs cannot be told: %v", a.kernel.procMismatch), hint: procHint}
	}
	file, err := a.kernel.readFile(pid, "cgroup")
	if err != nil {
		return location{why: fmt.Sprintf("its cgroup cannot be read: %v", err), hint: doctorHint}
	}
	at := parseCgroup(file, rules.parents)
	if at.kind != inUnit && at.path != "" && at.path == a.ownCgroup {
		at = location{kind: onHost, path: at.path} // the daemon's own cgroup: the caller is in no container below it
	}
	if at.kind != onHost && at.kind != inUnit {
		return at
	}
	// Not every container has a cgroup that classify recognizes: runc and crun choose any name for a scope, and unshare
	// and --cgroups=disabled leave processes in the cgroup that they were started in. Root in such a container is not
	// root of the device.
	nested, err := a.kernel.isNested(pid)
	switch {
	case err != nil:
		return location{path: at.path, why: fmt.Sprintf("its pid namespace cannot be read: %v", err), hint: doctorHint}
	case nested && at.kind == onHost:
		hint := "run it as a systemd service, or in a container of an engine that perceptd can ask"
		if strings.HasPrefix(at.path, usersCgroups) {
			hint = rootlessHint
		}
		return location{
			path: at.path,
			why: fmt.Sprintf("it is in cgroup %s, and in a pid namespace of its own, as in a container: "+
				"its uid says nothing", truncate(at.path)),
			hint: hint,
		}
	}
	at.nested = nested
	return at
}

// isRejected reports whether the process was located, with the result that its location cannot be relied on.
func (l *location) isRejected() bool { return l.kind == unclear && l.why != "" }

// asError returns why the location is unclear.
func (l *location) asError() error {
	return &Error{What: "where it runs", Why: l.why, Hint: l.hint}
}

// fillIn sets the unit or the container of a caller at this location.
func (l *location) fillIn(c *grants.Caller) {
	switch l.kind {
	case inUnit:
		c.Unit, c.Nested = l.unit, l.nested
	case inContainer:
		c.Container = &grants.Container{ID: l.container}
	}
}

// userSlice matches everything that a user started by logging in, also processes that now run as another user. Only
// root's systemd moves processes there.
var userSlice = regexp.MustCompile(`^/user\.slice/user-([0-9]+)\.slice/`)

// owner returns the user whose session or service manager the location belongs to, or grants.NoID.
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
