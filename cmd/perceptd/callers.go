package main

import (
	"errors"
	"fmt"
	"maps"
	"os/user"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"perceptd/agent"
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

// callersConfig says how callers are proved.
type callersConfig struct {
	engine        string   // engineAuto, engineNone, or the path of the engine's socket
	cgroupParents []string // of containers, beside the engines' own
	perSecond     int      // requests of one caller
	young         string   // youngAccept or youngRefuse
	modules       []moduleConfig
}

// defaultPerSecond is far above what an honest caller asks, which keeps the token that it got.
const defaultPerSecond = 200

var defaultCallers = callersConfig{engine: engineAuto, perSecond: defaultPerSecond, young: youngAccept}

// moduleConfig is one module and what it has to be.
type moduleConfig struct {
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
func (g grantCaller) match() (agent.Match, error) {
	m := agent.Match{Module: g.Module, Image: g.ContainerImage, UID: g.UID, User: g.User, GID: g.GID, Group: g.Group}
	if g.Unit != "" {
		m.Unit = agent.UnitName(g.Unit)
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
	return agent.Match{}.Check()
}

func gidOf(name string) (uint32, error) {
	group, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("group %q is not known on this device: create it, or name a gid", name)
	}
	gid, err := strconv.ParseUint(group.Gid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("group %q has gid %q, which is no number", name, group.Gid)
	}
	return uint32(gid), nil
}

// take adds what a document says of callers. where has all documents so far, this one included.
func (c *callersConfig) take(doc callersDocument, modules []moduleDocument, where *places) (faults []error) {
	if doc.Engine != nil {
		c.engine = *doc.Engine
	}
	if doc.RequestsPerSecond != nil {
		c.perSecond = *doc.RequestsPerSecond
	}
	if doc.Young != nil {
		c.young = *doc.Young
	}
	c.cgroupParents = append(c.cgroupParents, doc.CgroupParents...)
	for _, written := range modules {
		m := moduleConfig{name: written.Name, require: written.Require, container: written.Container}
		if err := m.validate(); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", where.table("module", len(c.modules)), err))
		} else if _, twice := c.module(m.name); twice {
			faults = append(faults, fmt.Errorf("%s: module %q is there twice", where.table("module", len(c.modules)), m.name))
		}
		c.modules = append(c.modules, m)
	}
	return faults
}

// module returns the [[module]] of that name.
func (c *callersConfig) module(name string) (moduleConfig, bool) {
	i := slices.IndexFunc(c.modules, func(m moduleConfig) bool { return m.name == name })
	if i < 0 {
		return moduleConfig{name: name}, false
	}
	return c.modules[i], true
}

var validContainer = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)

func (m moduleConfig) validate() error {
	if err := (agent.Match{Module: m.name}).Check(); err != nil || m.name == "" {
		return fmt.Errorf("module name %q: letters, digits, dot, dash and underscore, at most 63", m.name)
	}
	switch {
	case m.require != "" && m.require != requireSocket && m.require != requireContainer:
		return fmt.Errorf("module %q: require is %q: it must be %q or %q", m.name, m.require, requireContainer, requireSocket)
	case m.container != "" && m.require == requireSocket:
		return fmt.Errorf("module %q: container has no effect with require = %q", m.name, requireSocket)
	case m.container != "" && !validContainer.MatchString(m.container):
		return fmt.Errorf("module %q: container %q is no container's name: write it as docker ps shows it", m.name, m.container)
	}
	return nil
}

// orDefaults fills in what m leaves open.
func (m moduleConfig) orDefaults() moduleConfig {
	if m.require == "" {
		m.require = requireContainer
	}
	if m.container == "" && m.require == requireContainer {
		m.container = m.name
	}
	return m
}

// validate looks at what all files together say; key is the one that is wrong.
func (c *callersConfig) validate() (key string, err error) {
	switch {
	case c.engine != engineAuto && c.engine != engineNone && !isPlace(c.engine):
		return "callers.engine", fmt.Errorf("callers.engine is %q: it must be %q, %q or the absolute path of the engine's socket", c.engine, engineAuto, engineNone)
	case c.perSecond < 1 || c.perSecond > 1_000_000:
		return "callers.requests_per_second", fmt.Errorf("callers.requests_per_second is %d: it must be between 1 and 1000000", c.perSecond)
	}
	if c.young != youngAccept && c.young != youngRefuse {
		return "callers.young", fmt.Errorf("callers.young is %q: it must be %q or %q", c.young, youngAccept, youngRefuse)
	}
	for _, parent := range c.cgroupParents {
		if !isPlace(parent) {
			return "callers.cgroup_parents", fmt.Errorf("callers.cgroup_parents has %q: it must be the whole path of a cgroup below the root, such as /machine.slice", parent)
		}
	}
	return "", nil
}

// isPlace reports whether p is an absolute path that says what it means, and not the root.
func isPlace(p string) bool {
	return len(p) > 1 && p[0] == '/' && path.Clean(p) == p && !strings.ContainsFunc(p, func(r rune) bool { return r <= ' ' || r == 0x7f })
}

// unprovable lists what nobody could ever be proved to be, where no engine is asked.
func (c *config) unprovable(where *places) (faults []error) {
	if c.callers.engine != engineNone {
		return nil
	}
	const none = `with callers.engine = "none" nobody can tell`
	told := make(map[string]bool)
	for i, m := range c.callers.modules {
		told[m.name] = true
		faults = append(faults, located(where.table("module", i), m.unprovable(none)))
	}
	for i, grant := range c.rules.Grants {
		place := where.table("grant", i)
		if grant.Caller.Image != "" {
			faults = append(faults, located(place, fmt.Errorf("%s which image a container was made of: name an engine, or the module by its socket", none)))
		}
		if name := grant.Caller.Module; name != "" && !told[name] {
			told[name] = true
			faults = append(faults, located(place, moduleConfig{name: name}.unprovable(none)))
		}
	}
	return faults
}

func (m moduleConfig) unprovable(none string) error {
	if m.require == requireSocket {
		return nil
	}
	return fmt.Errorf("%s which container is module %q: choose require = %q in its [[module]], which trusts whoever reaches its socket, or name an engine", none, m.name, requireSocket)
}

func located(place string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", place, err)
}

// engines returns the paths at which a container engine is looked for, each time anew, since one may start later.
func (c *callersConfig) engines() []string {
	switch c.engine {
	case engineNone:
		return nil
	case engineAuto:
		return engineSockets()
	}
	return []string{c.engine}
}

// required returns what each module has to be, in the order of their names.
func (c config) required() []moduleConfig {
	var all []moduleConfig
	for _, name := range c.modules() {
		m, _ := c.callers.module(name)
		all = append(all, m.orDefaults())
	}
	return all
}

// describe says in words how callers are proved.
func (c config) describeCallers() string {
	var b strings.Builder
	for _, m := range c.required() {
		if m.require == requireSocket {
			fmt.Fprintf(&b, "module %s: whoever comes in on its socket\n", m.name)
			continue
		}
		fmt.Fprintf(&b, "module %s: on its socket, out of the container named %s\n", m.name, m.container)
	}
	switch c.callers.engine {
	case engineAuto:
		fmt.Fprintf(&b, "container engine: auto, the first that is there of %s\n", strings.Join(engineSockets(), ", "))
	case engineNone:
		fmt.Fprintln(&b, "container engine: none, every caller in a container is denied on the token socket")
	default:
		fmt.Fprintf(&b, "container engine: %s\n", c.callers.engine)
	}
	for _, parent := range c.callers.cgroupParents {
		fmt.Fprintf(&b, "containers may be below cgroup %s too\n", parent)
	}
	if c.callers.young == youngRefuse {
		fmt.Fprintln(&b, "processes younger than 20 ms are asked to ask again, on kernels before 6.5; on others nobody's age counts")
	}
	if n := c.callers.perSecond; n != defaultPerSecond {
		fmt.Fprintf(&b, "a caller may make %d requests a second\n", n)
	}
	return b.String()
}

// changes lists in words what differs between c and what was before it.
func (c config) callerChanges(before config) []string {
	var all []string
	was := make(map[string]moduleConfig)
	for _, m := range before.required() {
		was[m.name] = m
	}
	for _, m := range c.required() {
		if old, there := was[m.name]; there && old != m {
			all = append(all, fmt.Sprintf("module %s: require %s%s, was %s%s", m.name, m.require, inContainer(m), old.require, inContainer(old)))
		}
	}
	if c.callers.engine != before.callers.engine {
		all = append(all, fmt.Sprintf("container engine is %s, was %s", c.callers.engine, before.callers.engine))
	}
	if !maps.Equal(setOf(c.callers.cgroupParents), setOf(before.callers.cgroupParents)) {
		all = append(all, fmt.Sprintf("containers' cgroups beside the engines' own: %s, were %s", inList(c.callers.cgroupParents), inList(before.callers.cgroupParents)))
	}
	if c.callers.young != before.callers.young {
		all = append(all, fmt.Sprintf("young is %q, was %q", c.callers.young, before.callers.young))
	}
	if c.callers.perSecond != before.callers.perSecond {
		all = append(all, fmt.Sprintf("requests_per_second is %d from the next start on, until then %d", c.callers.perSecond, before.callers.perSecond))
	}
	return all
}

func inContainer(m moduleConfig) string {
	if m.container == "" {
		return ""
	}
	return " (container " + m.container + ")"
}

func setOf(list []string) map[string]bool {
	set := make(map[string]bool)
	for _, s := range list {
		set[s] = true
	}
	return set
}
