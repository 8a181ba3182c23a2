// Package config reads perceptd's configuration: from files that only those may have written who may say who gets
// tokens, to a Config that was checked as a whole. A fault names its file, line and key. Load is for the daemon, Check
// for whoever wants to know what it will find.
package config

import (
	"crypto/sha256"
	"encoding/hex"
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

	faults faults // of the elements
}

// Config returns what the files of r say. What has a fault is in Idle, and the rest is in force.
func (r Reading) Config() Config {
	e := newElements(r.path)
	said := sha256.New()
	for _, file := range r.Files {
		w, err := parse(file)
		if err != nil { // which Read has seen to
			e.faults.add(file.Path, "file "+file.Path, err.Error())
			e.Rules.NoRules = err.Error()
			continue
		}
		e.Files = append(e.Files, file.Path)
		said.Write(file.Text)
		e.read(w)
	}
	c := e.settle()
	c.SHA256 = hex.EncodeToString(said.Sum(nil))
	c.Warnings = r.warnings
	return c
}

// Modules lists the modules that are configured or named by grants: each has a socket of its own, unless it is idle.
func (c Config) Modules() []string {
	var all []string
	for _, grant := range c.Rules.Grants {
		if m := grant.Caller.Module; m != "" && grant.Unclear == 0 {
			all = append(all, m)
		}
	}
	for _, m := range c.Callers.modules {
		all = append(all, m.name)
	}
	slices.Sort(all)
	return slices.DeleteFunc(slices.Compact(all), c.Callers.isIdle)
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

// CallerRules is what the configuration says of how callers are proved.
func (c Config) CallerRules() attest.Rules {
	r := attest.Rules{
		Engines: c.Callers.engines(), Parents: c.Callers.parents(), RefuseYoung: c.Callers.RefuseYoung(),
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
