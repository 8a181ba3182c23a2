package config

import (
	"errors"
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

// engineSockets is where auto looks, in this order.
func engineSockets() []string { return []string{"/run/docker.sock", "/run/podman/podman.sock"} }

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

// callersDocument and moduleDocument are their parts of a configuration file. Pointers tell a missing key from
// a zero.
type callersDocument struct {
	Engine            *string  `toml:"engine"`
	CgroupParents     []string `toml:"cgroup_parents"`
	RequestsPerSecond *int     `toml:"requests_per_second"`
	Young             *string  `toml:"young"`
}

type moduleDocument struct {
	Name      string `toml:"name"`
	Require   string `toml:"require"`
	Container string `toml:"container"`
}

// grantCaller is the caller of a [[grant]] as it is written.
type grantCaller struct {
	Module         string  `toml:"module"`
	Unit           string  `toml:"unit"`
	ContainerImage string  `toml:"container_image"`
	User           string  `toml:"user"`
	UID            *uint32 `toml:"uid"`
	Group          string  `toml:"group"`
	GID            *uint32 `toml:"gid"`
}

// match returns whom a grant is for. Of several names the rules say that one is right.
func (g grantCaller) match() (grants.Match, error) {
	m := grants.Match{Module: g.Module, Image: g.ContainerImage, UID: g.UID, User: g.User, GID: g.GID, Group: g.Group}
	if g.Unit != "" {
		m.Unit = grants.UnitName(g.Unit)
	}
	var faults []error
	if g.User != "" {
		uid, err := uidOf(g.User)
		m.UID = &uid
		faults = append(faults, err, twice(g.UID))
	}
	if g.Group != "" {
		gid, err := gidOf(g.Group)
		m.GID = &gid
		faults = append(faults, err, twice(g.GID))
	}
	return m, errors.Join(faults...)
}

// twice is the fault of a name that stands beside its number.
func twice(number *uint32) error {
	if number == nil {
		return nil
	}
	return grants.Match{}.Check()
}

// take adds what a document says of callers. where has all documents so far, this one included.
func (c *Callers) take(doc callersDocument, modules []moduleDocument, where *positions) (faults []error) {
	if doc.Engine != nil {
		c.engine = *doc.Engine
	}
	if doc.RequestsPerSecond != nil {
		c.PerSecond = *doc.RequestsPerSecond
	}
	if doc.Young != nil {
		c.young = *doc.Young
	}
	c.cgroupParents = append(c.cgroupParents, doc.CgroupParents...)
	for _, written := range modules {
		m := module{name: written.Name, require: written.Require, container: written.Container}
		if err := m.validate(); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", where.table("module", len(c.modules)), err))
		} else if _, twice := c.module(m.name); twice {
			faults = append(faults, fmt.Errorf("%s: module %q is there twice", where.table("module", len(c.modules)),
				m.name))
		}
		c.modules = append(c.modules, m)
	}
	return faults
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

// validate looks at what all files together say; key is the one that is wrong.
func (c *Callers) validate() (key string, err error) {
	switch {
	case c.engine != engineAuto && c.engine != engineNone && !isCleanPath(c.engine):
		return "callers.engine", fmt.Errorf(
			"callers.engine is %q: it must be %q, %q or the absolute path of the engine's socket",
			c.engine, engineAuto, engineNone)
	case c.PerSecond < 1 || c.PerSecond > 1_000_000:
		return "callers.requests_per_second", fmt.Errorf(
			"callers.requests_per_second is %d: it must be between 1 and 1000000", c.PerSecond)
	}
	if c.young != youngAccept && c.young != youngRefuse {
		return "callers.young", fmt.Errorf("callers.young is %q: it must be %q or %q",
			c.young, youngAccept, youngRefuse)
	}
	for _, parent := range c.cgroupParents {
		if !isCleanPath(parent) {
			return "callers.cgroup_parents", fmt.Errorf(
				"callers.cgroup_parents has %q: it must be the whole path of a cgroup below the root, such as "+
					"/machine.slice",
				parent)
		}
	}
	return "", nil
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
