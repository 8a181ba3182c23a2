package config

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// inList writes a list as people write one.
func inList(all []string) string { return cmp.Or(strings.Join(all, ", "), "none") }

// Describe says in words what the configuration allows.
func (c Config) Describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "configuration is fine: %s\n", strings.Join(c.Files, ", "))
	fmt.Fprintf(&b, "source: %s, endpoint %s\n", c.Source.Kind, c.Source.Endpoint)
	for _, identity := range c.Rules.Identities {
		fmt.Fprintf(&b, "identity %s: %v\n", identity.Name, identity.Selector())
	}
	for _, grant := range c.Rules.Grants {
		fmt.Fprintf(&b, "grant: %v may have tokens of %s for %s\n",
			grant.Caller, grant.Identity, strings.Join(grant.Resources, ", "))
	}
	if len(c.Rules.Grants) == 0 {
		fmt.Fprintln(&b, "no grants: every caller is denied")
	}
	b.WriteString(c.describeCallers())
	if c.Loopback.Address.IsValid() {
		fmt.Fprintf(&b, "loopback: tokens at http://%s/msi/token for who has a grant's header secret\n",
			c.Loopback.Address)
	}
	if c.IoTHub.Configured() {
		fmt.Fprintf(&b, "IoT Hub: %v\n", c.IoTHub)
	}
	for _, resource := range slices.Sorted(maps.Keys(c.Rules.Alternates)) {
		fmt.Fprintf(&b, "resource: %s accepts tokens for %s too\n",
			resource, strings.Join(c.Rules.Alternates[resource], ", "))
	}
	for _, warning := range append(c.Rules.UselessAlternates(), c.Warnings...) {
		fmt.Fprintf(&b, "warning: %s\n", warning)
	}
	for _, note := range c.Rules.SpellingNotes() {
		fmt.Fprintf(&b, "note: %s\n", note)
	}
	fmt.Fprintf(&b, "SDKs are told a life of at most %v\n", c.Rules.SDKLifeOrDefault())
	if c.Rules.WithholdLost {
		b.WriteString("when the record of policy changes is lost, tokens from before are withheld\n")
	}
	fmt.Fprintf(&b, "a policy change takes up to %v to reach new tokens\n",
		c.Rules.SpreadOrDefault().Truncate(time.Microsecond))
	return b.String()
}

// describeCallers is describe of how callers are proved.
func (c Config) describeCallers() string {
	var b strings.Builder
	for _, m := range c.required() {
		if m.require == requireSocket {
			fmt.Fprintf(&b, "module %s: whoever comes in on its socket\n", m.name)
			continue
		}
		fmt.Fprintf(&b, "module %s: on its socket, out of the container named %s\n", m.name, m.container)
	}
	switch c.Callers.engine {
	case engineAuto:
		fmt.Fprintf(&b, "container engine: auto, the first that is there of %s\n", strings.Join(engineSockets(), ", "))
	case engineNone:
		fmt.Fprintln(&b, "container engine: none, every caller in a container is denied on the token socket")
	default:
		fmt.Fprintf(&b, "container engine: %s\n", c.Callers.engine)
	}
	for _, parent := range c.Callers.parents() {
		fmt.Fprintf(&b, "containers may be below cgroup %s too\n", parent)
	}
	if c.Callers.RefuseYoung() {
		fmt.Fprintln(&b,
			"processes younger than 20 ms are asked to ask again, on kernels before 6.5; on others nobody's age counts")
	}
	if n := c.Callers.PerSecond; n != defaultPerSecond {
		fmt.Fprintf(&b, "a caller may make %d requests a second\n", n)
	}
	return b.String()
}

// Changes lists in words what differs between c and what was before it, beside the rules, of which the agent tells.
func (c Config) Changes(before Config) []string {
	changes := slices.Concat(c.callerChanges(before), c.loopbackChanges(before), c.iothubChanges(before))
	if !slices.Equal(before.Files, c.Files) {
		changes = append(changes, fmt.Sprintf("read from %s, was %s", inList(c.Files), inList(before.Files)))
	}
	return changes
}

// callerChanges is changes of how callers are proved.
func (c Config) callerChanges(before Config) []string {
	var all []string
	was := make(map[string]module)
	for _, m := range before.required() {
		was[m.name] = m
	}
	for _, m := range c.required() {
		if old, there := was[m.name]; there && old != m {
			all = append(all, fmt.Sprintf("module %s: require %s%s, was %s%s",
				m.name, m.require, inContainer(m), old.require, inContainer(old)))
		}
	}
	if c.Callers.engine != before.Callers.engine {
		all = append(all, fmt.Sprintf("container engine is %s, was %s", c.Callers.engine, before.Callers.engine))
	}
	if !maps.Equal(setOf(c.Callers.parents()), setOf(before.Callers.parents())) {
		all = append(all, fmt.Sprintf("containers' cgroups beside the engines' own: %s, were %s",
			inList(c.Callers.parents()), inList(before.Callers.parents())))
	}
	if c.Callers.young != before.Callers.young {
		all = append(all, fmt.Sprintf("young is %q, was %q", c.Callers.young, before.Callers.young))
	}
	if c.Callers.PerSecond != before.Callers.PerSecond {
		all = append(all, fmt.Sprintf("requests_per_second is %d from the next start on, until then %d",
			c.Callers.PerSecond, before.Callers.PerSecond))
	}
	return all
}

func inContainer(m module) string {
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

// loopbackChanges is changes of the loopback listener.
func (c Config) loopbackChanges(before Config) []string {
	now, was := c.Loopback.Address, before.Loopback.Address
	switch {
	case now == was:
		return nil
	case !now.IsValid():
		return []string{"no loopback listener any more, was " + was.String()}
	case !was.IsValid():
		return []string{"loopback listener on " + now.String()}
	}
	return []string{fmt.Sprintf("loopback listener on %v, was on %v", now, was)}
}

// iothubChanges is changes of how the device is connected to IoT Hub.
func (c Config) iothubChanges(before Config) []string {
	now, was := c.IoTHub, before.IoTHub
	switch {
	case now == was:
		return nil
	case !now.Configured():
		return []string{"not connected to IoT Hub any more, was " + was.String()}
	case !was.Configured():
		return []string{"connects to IoT Hub " + now.String()}
	}
	return []string{fmt.Sprintf("connects to IoT Hub anew %v, was %v", now, was)}
}
