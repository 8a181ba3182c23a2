package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"perceptd/agent"
)

// modules lists the modules that are configured or named by grants: each has a socket of its own.
func (c config) modules() []string {
	var all []string
	for _, grant := range c.rules.Grants {
		if m := grant.Caller.Module; m != "" && !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	for _, m := range c.callers.modules {
		if !slices.Contains(all, m.name) {
			all = append(all, m.name)
		}
	}
	slices.Sort(all)
	return all
}

// inList writes a list as people write one.
func inList(all []string) string { return cmp.Or(strings.Join(all, ", "), "none") }

// describe says in words what the configuration allows.
func (c config) describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "configuration is fine: %s\n", strings.Join(c.files, ", "))
	fmt.Fprintf(&b, "source: %s, endpoint %s\n", c.source.kind, c.source.endpoint)
	for _, identity := range c.rules.Identities {
		fmt.Fprintf(&b, "identity %s: %v\n", identity.Name, identity.Selector())
	}
	for _, grant := range c.rules.Grants {
		fmt.Fprintf(&b, "grant: %v may have tokens of %s for %s\n", grant.Caller, grant.Identity, strings.Join(grant.Resources, ", "))
	}
	if len(c.rules.Grants) == 0 {
		fmt.Fprintln(&b, "no grants: every caller is denied")
	}
	b.WriteString(c.describeCallers())
	if c.loopback.address.IsValid() {
		fmt.Fprintf(&b, "loopback: tokens at http://%s/msi/token for who has a grant's header secret\n", c.loopback.address)
	}
	for _, resource := range slices.Sorted(maps.Keys(c.rules.Alternates)) {
		fmt.Fprintf(&b, "resource: %s accepts tokens for %s too\n", resource, strings.Join(c.rules.Alternates[resource], ", "))
	}
	for _, warning := range append(c.rules.UselessAlternates(), c.warnings...) {
		fmt.Fprintf(&b, "warning: %s\n", warning)
	}
	fmt.Fprintf(&b, "SDKs are told a life of at most %v\n", cmp.Or(c.rules.SDKLife, agent.DefaultSDKLife))
	if c.rules.WithholdLost {
		b.WriteString("when the record of policy changes is lost, tokens from before are withheld\n")
	}
	fmt.Fprintf(&b, "a policy change takes up to %v to reach new tokens\n", c.rules.SpreadOrDefault().Truncate(time.Microsecond))
	return b.String()
}
