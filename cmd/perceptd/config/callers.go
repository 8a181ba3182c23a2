package config

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"perceptd/agent/grants"
)

// What a module has to be for its tokens.
const (
	requireSocket    = "socket"           // whoever comes in on its socket
	requireContainer = "socket+container" // whoever does so out of its container, by the engine's word
)

// Container engines that are no path.
const (
	engineAuto = "auto"
	engineNone = "none"
)

// engineSockets is where auto looks, in this order. The drop-in podman.socket.conf has Podman answer at the second, as
// perceptd may not enter the folder of the third.
func engineSockets() []string {
	return []string{"/run/docker.sock", "/run/podman.sock", "/run/podman/podman.sock"}
}

// What becomes of a young process where the kernel gives no handle on the process that connected.
const (
	youngAccept = "accept"
	youngRefuse = "refuse" // until its second request
)

// Callers says how callers are proved.
type Callers struct {
	PerSecond int // requests of one caller

	engine        string   // engineAuto, engineNone, or the path of the engine's socket
	cgroupParents []string // of containers, beside the engines' own
	young         string   // youngAccept or youngRefuse
	modules       []module

	engineFault bool // engine is none since what is written has a fault
	noParents   bool // cgroupParents are none, for the same reason

	// What follows from a [[module]] with a fault.
	idle             []string // names of modules
	anyIdle          bool     // a name is not understood: it may be that of any module without a [[module]] of its own
	idleContainers   []string // names of containers
	anyContainerIdle bool     // a container's name is not understood
}

// defaultPerSecond is far above what an honest caller asks, which keeps the token that it got.
const defaultPerSecond = 200

// defaultCallers is what counts where no file says otherwise.
var defaultCallers = Callers{engine: engineAuto, PerSecond: defaultPerSecond, young: youngAccept}

// module is one module and what it has to be.
type module struct {
	name      string
	require   string // empty: requireContainer, unless nobody could tell
	container string // the container's name; empty: the module's
}

// take reads a [callers]. What has a fault, or may be meant by an unknown key, takes the stricter value.
func (c *Callers) take(t *table) {
	engine, isEngine := t.text("engine", engineAuto)
	if isEngine && engine != engineAuto && engine != engineNone && !isCleanPath(engine) {
		t.addFault("engine", "callers.engine is %q: it must be %q, %q or the absolute path of the engine's socket",
			engine, engineAuto, engineNone)
	}
	parents, _ := t.texts("cgroup_parents", "/machine.slice")
	for _, parent := range parents {
		if !isCleanPath(parent) {
			t.addFault("cgroup_parents", "callers.cgroup_parents has %q: it must be the whole path of a cgroup below "+
				"the root, such as /machine.slice", parent)
		}
	}
	perSecond, isPerSecond := t.whole("requests_per_second", 1, 1_000_000)
	young, isYoung := t.text("young", youngRefuse)
	if isYoung && young != youngAccept && young != youngRefuse {
		t.addFault("young", "callers.young is %q: it must be %q or %q", young, youngAccept, youngRefuse)
	}
	t.finish()
	switch {
	case t.isSound("engine"):
		c.engine, c.engineFault = engine, false
	case t.mayMean("engine"):
		c.engine, c.engineFault = engineNone, true
	}
	switch {
	case t.isSound("cgroup_parents"):
		c.cgroupParents = append(c.cgroupParents, parents...)
	case t.mayMean("cgroup_parents"):
		c.noParents = true
	}
	switch {
	case isPerSecond && !t.misnamed:
		c.PerSecond = int(perSecond)
	case t.mayMean("requests_per_second"):
		c.PerSecond = min(c.PerSecond, defaultPerSecond)
	}
	switch {
	case t.isSound("young"):
		c.young = young
	case t.mayMean("young"):
		c.young = youngRefuse
	}
}

// takeModule reads a [[module]], and returns its name.
func (c *Callers) takeModule(t *table) string {
	m := module{}
	m.name, _ = t.text("name", "camera")
	m.require, _ = t.filled("require", requireContainer)
	m.container, _ = t.filled("container", m.name)
	t.finish()
	if err := m.validate(); err != nil && len(t.faults) == 0 {
		t.addFault("", "%v", err)
	}
	other, twice := c.module(m.name)
	if again := twice || slices.Contains(c.idle, m.name); again && len(t.faults) == 0 {
		t.addFault("", "module %q is there twice", m.name)
		c.anyIdle = true // one of the two may be meant for another
	}
	if twice {
		c.setIdle(other)
	}
	if len(t.faults) == 0 {
		c.modules = append(c.modules, m)
		return m.name
	}
	if m.container == "" && t.mayMean("container") || m.container != "" && !validContainer.MatchString(m.container) {
		c.anyContainerIdle = true
	}
	c.setIdle(m)
	return m.name
}

// setIdle leaves a module that has a fault without a socket, and its container without anything.
func (c *Callers) setIdle(m module) {
	if (grants.Match{Module: m.name}).Check() != nil || m.name == "" {
		c.anyIdle, c.anyContainerIdle = true, true
	} else {
		c.idle = append(c.idle, m.name)
		c.modules = slices.DeleteFunc(c.modules, func(o module) bool { return o.name == m.name })
	}
	for _, name := range []string{m.name, m.container} {
		if name != "" && !slices.Contains(c.idleContainers, name) {
			c.idleContainers = append(c.idleContainers, name)
		}
	}
}

// isIdle reports whether a module has no socket since its [[module]] has a fault, or one that may be its.
func (c *Callers) isIdle(name string) bool {
	_, is := c.module(name)
	return slices.Contains(c.idle, name) || c.anyIdle && !is
}

// module returns the [[module]] of that name.
func (c *Callers) module(name string) (module, bool) {
	i := slices.IndexFunc(c.modules, func(m module) bool { return m.name == name })
	if i < 0 {
		return module{name: name}, false
	}
	return c.modules[i], true
}

var validContainer = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)

func (m module) validate() error {
	if err := (grants.Match{Module: m.name}).Check(); err != nil || m.name == "" {
		return fmt.Errorf("module name %q: letters, digits, dot, dash and underscore, at most 63", m.name)
	}
	switch {
	case m.require != "" && m.require != requireSocket && m.require != requireContainer:
		return fmt.Errorf("module %q: require is %q: it must be %q or %q",
			m.name, m.require, requireContainer, requireSocket)
	case m.container != "" && m.require == requireSocket:
		return fmt.Errorf("module %q: container has no effect with require = %q", m.name, requireSocket)
	case m.container != "" && !validContainer.MatchString(m.container):
		return fmt.Errorf("module %q: container %q is no container's name: write it as docker ps shows it",
			m.name, m.container)
	}
	return nil
}

// orDefaults fills in what m leaves open.
func (m module) orDefaults() module {
	if m.require == "" {
		m.require = requireContainer
	}
	if m.container == "" && m.require == requireContainer {
		m.container = m.name
	}
	return m
}

// isCleanPath reports whether p is an absolute path that says what it means, and not the root.
func isCleanPath(p string) bool {
	return len(p) > 1 && p[0] == '/' && path.Clean(p) == p &&
		!strings.ContainsFunc(p, func(r rune) bool { return r <= ' ' || r == 0x7f })
}

func (m module) unprovable(none string) error {
	if m.require == requireSocket {
		return nil
	}
	return fmt.Errorf("%s which container is module %q: choose require = %q in its [[module]], "+
		"which trusts whoever reaches its socket, or name an engine", none, m.name, requireSocket)
}

// parents returns the cgroups in which containers are, beside the engines' own.
func (c *Callers) parents() []string {
	if c.noParents {
		return nil
	}
	return c.cgroupParents
}

// RefuseYoung reports whether a young process is to ask twice.
func (c *Callers) RefuseYoung() bool { return c.young == youngRefuse }

// engines returns the paths at which a container engine is looked for, each time anew, since one may start later.
func (c *Callers) engines() []string {
	switch c.engine {
	case engineNone:
		return nil
	case engineAuto:
		return engineSockets()
	}
	return []string{c.engine}
}
