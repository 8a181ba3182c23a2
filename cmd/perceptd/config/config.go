// Package config reads perceptd's configuration: from files that only those may have written who may say who gets
// tokens, to a Config that was checked as a whole. A fault names its file, line and key. Load is for the daemon, Check
// for whoever wants to know what it will find.
package config

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"perceptd/agent"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
)

// maxFile bounds one configuration file, in bytes.
const maxFile = 1 << 20

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
}

// Load reads path and its neighbour config.d/*.toml in the order of their names. Lists add up;
// of a single value that several files set, the last one counts. The error names every fault by file
// and line.
func Load(path string) (Config, error) { return loadTrusted(path, ownFiles(), memberOf) }

// Check is Load for whom the daemon runs as, who is named: where root asks and the service has a user, that user,
// who may be able to read less than root, and is in other groups. Empty: this process's user. It also reads what
// [iothub] names, which the daemon does when it connects; a credential is the service's alone, and worth a warning.
func Check(path string) (c Config, judgedFor string, err error) {
	from := processFiles()
	if service := serviceReader(); os.Geteuid() == 0 && service != nil {
		judgedFor, from = service.name, files{self: int(service.uid), reader: service}
		c, err = loadTrusted(path, &trust{reader: service}, otherMemberOf)
	} else {
		c, err = Load(path)
	}
	if err != nil {
		return c, judgedFor, err
	}
	known, unknown := c.IoTHub.withoutCredentials(os.Getenv(credentialsVariable))
	c.Warnings = append(c.Warnings, unknown...)
	if err := known.checkFiles(context.Background(), from); err != nil {
		return c, judgedFor, fmt.Errorf("[iothub]: %w", err)
	}
	return c, judgedFor, nil
}

// loadTrusted is Load with what files are trusted, and who is in a group.
func loadTrusted(path string, by *trust, in func(gid uint32, all []grants.Grant) string) (Config, error) {
	extra, err := extraFiles(filepath.Join(filepath.Dir(path), "config.d"), by)
	if err != nil {
		return Config{}, err
	}
	c := Config{Source: defaultSource, Callers: defaultCallers}
	where := newPositions()
	said := sha256.New()
	var unread, faults []error
	for _, file := range append([]string{path}, extra...) {
		text, err := readFile(file, by)
		if err != nil {
			unread = append(unread, err)
			continue
		}
		var doc document
		if err := decode(file, text, &doc); err != nil {
			unread = append(unread, err)
			continue
		}
		if where.add(file, text) != (tableCounts{len(doc.Identity), len(doc.Grant), len(doc.Resource),
			len(doc.Module)}) {
			unread = append(unread, fmt.Errorf("%s: write [[identity]], [[grant]], [[resource]] and [[module]], "+
				"each with two brackets: there may be several", file))
			continue
		}
		c.Files = append(c.Files, file)
		said.Write(text)
		faults = append(faults, c.take(doc, where))
	}
	if err := errors.Join(unread...); err != nil {
		return Config{}, err // what stands in those files would be missing in the rest
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
	warnings, open := by.settle(c.Rules.Grants, in)
	c.Warnings = warnings
	faults = append(faults, open...)
	if err := errors.Join(faults...); err != nil {
		return Config{}, err
	}
	return c, nil
}

// extraFiles lists the .toml files of a folder, which need not be there, in the order of their names.
func extraFiles(dir string, by *trust) ([]string, error) {
	entries, err := by.list(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, dangling(dir)
	}
	if err != nil {
		return nil, err
	}
	var files []string
	for _, entry := range entries {
		if strings.HasSuffix(entry.Name(), ".toml") {
			files = append(files, filepath.Join(dir, entry.Name()))
		}
	}
	return files, nil
}

// readFile reads a configuration file that only those who are trusted can have written.
func readFile(path string, by *trust) ([]byte, error) {
	text, _, err := readTrusted(path, maxFile, by)
	if errors.Is(err, fs.ErrNotExist) {
		if err := dangling(path); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s: not there: write one, README.md shows a first one", path)
	}
	return text, err
}

// dangling says that what is at path, which leads nowhere, is a link; nil: it is not one.
func dangling(path string) error {
	target, err := os.Readlink(path)
	if err != nil {
		return nil
	}
	return fmt.Errorf("%s: a link to nothing, since %s is not there: put it there, or remove the link", path, target)
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
