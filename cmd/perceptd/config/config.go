// Package config reads perceptd's configuration: from files that only those may have written who may say who gets
// tokens, to a Config that was checked as a whole. A fault names its file, line and key. Load is for the daemon, Check
// for whoever wants to know what it will find.
package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"perceptd/agent"
	"perceptd/agent/attest"
)

// Config is a configuration that was checked.
type Config struct {
	Files  []string // in the order they were read
	SHA256 string   // of what they say, one after the other, in hexadecimal
	Source Source
	Rules  agent.Rules

	Callers  Callers
	Loopback Loopback
	IoTHub   IoTHub

	Warnings []string // of what is in force all the same
	Idle     []Idle   // the elements that have a fault

	fault error // every fault of the elements; nil: none has one
}

// Config returns what the files of r say.
func (r Reading) Config() Config {
	c := Config{Source: defaultSource, Callers: defaultCallers, Warnings: r.warnings}
	where := newPositions()
	said := sha256.New()
	var unread, faults []error
	for _, file := range r.Files {
		var doc document
		if err := decode(file.Path, file.Text, &doc); err != nil {
			unread = append(unread, err)
			continue
		}
		if where.add(file.Path, file.Text) != (tableCounts{len(doc.Identity), len(doc.Grant), len(doc.Resource),
			len(doc.Module)}) {
			unread = append(unread, fmt.Errorf("%s: write [[identity]], [[grant]], [[resource]] and [[module]], "+
				"each with two brackets: there may be several", file.Path))
			continue
		}
		c.Files = append(c.Files, file.Path)
		said.Write(file.Text)
		faults = append(faults, c.take(doc, where))
	}
	if err := errors.Join(unread...); err != nil {
		return whollyIdle(r.path, err) // what stands in those files would be missing in the rest
	}
	if key, err := c.Source.validate(); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", where.value(key), err))
	}
	if key, err := c.Callers.validate(); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", where.value(key), err))
	}
	_, hasLoopback := where.values["loopback"]
	if key, err := c.Loopback.validate(hasLoopback); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", where.value(key), err))
	}
	_, hasIoTHub := where.values["iothub"]
	if key, err := c.IoTHub.validate(hasIoTHub); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", where.value(key), err))
	}
	c.SHA256 = hex.EncodeToString(said.Sum(nil))
	faults = append(faults, where.locate(c.Rules.Validate()))
	faults = append(faults, c.unprovable(where)...)
	if err := errors.Join(faults...); err != nil {
		return whollyIdle(r.path, err)
	}
	return c
}

// whollyIdle is a configuration of which nothing is in force.
func whollyIdle(path string, why error) Config {
	return Config{
		Source: defaultSource, Callers: defaultCallers, fault: why,
		Idle: []Idle{{Place: path, Element: "configuration", Why: why.Error()}},
	}
}

// Modules lists the modules that are configured or named by grants: each has a socket of its own.
func (c Config) Modules() []string {
	var all []string
	for _, grant := range c.Rules.Grants {
		if m := grant.Caller.Module; m != "" && !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	for _, m := range c.Callers.modules {
		if !slices.Contains(all, m.name) {
			all = append(all, m.name)
		}
	}
	slices.Sort(all)
	return all
}

// required returns what each module has to be, in the order of their names.
func (c Config) required() []module {
	var all []module
	for _, name := range c.Modules() {
		m, _ := c.Callers.module(name)
		all = append(all, m.orDefaults())
	}
	return all
}

// unprovable lists what nobody could ever be proved to be, where no engine is asked.
func (c *Config) unprovable(where *positions) (faults []error) {
	if c.Callers.engine != engineNone {
		return nil
	}
	const none = `with callers.engine = "none" nobody can tell`
	told := make(map[string]bool)
	for i, m := range c.Callers.modules {
		told[m.name] = true
		faults = append(faults, located(where.table("module", i), m.unprovable(none)))
	}
	for i, grant := range c.Rules.Grants {
		place := where.table("grant", i)
		if grant.Caller.Image != "" {
			faults = append(faults, located(place,
				fmt.Errorf("%s which image a container was made of: name an engine, or the module by its socket",
					none)))
		}
		if name := grant.Caller.Module; name != "" && !told[name] {
			told[name] = true
			faults = append(faults, located(place, module{name: name}.unprovable(none)))
		}
	}
	return faults
}

// CallerRules is what the configuration says of how callers are proved.
func (c Config) CallerRules() attest.Rules {
	r := attest.Rules{
		Engines: c.Callers.engines(), Parents: c.Callers.cgroupParents, RefuseYoung: c.Callers.RefuseYoung(),
		Modules: make(map[string]attest.Requirement),
	}
	for _, m := range c.required() {
		r.Modules[m.name] = attest.Requirement{Container: m.container}
		r.NeedsEngine = r.NeedsEngine || m.container != ""
	}
	for _, grant := range c.Rules.Grants {
		r.NeedsEngine = r.NeedsEngine || grant.Caller.Image != ""
	}
	return r
}
