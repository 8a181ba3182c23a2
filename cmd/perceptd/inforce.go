package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/store"
	"perceptd/cmd/perceptd/config"
)

// inForce is which configuration is in force, and why it is not that of the files.
type inForce struct {
	config config.Config
	files  []config.File // what config was made of
	since  time.Time     // when it was put in force

	// faults are of the files, and keep them from being in force. Then the last configuration goes on, or none is in
	// force. Without one the files are in force, but for elements that are idle.
	faults []error
	gone   []string // files of the last configuration that are not there any more, and do not go on
	lost   string   // the main file, where it is not there and what is left has elements that are idle
	unread []string // what is in config.d and is not read, with why
}

// lastGoesOn reports whether the last configuration is in force, and not the files.
func (c *inForce) lastGoesOn() bool { return len(c.faults) > 0 && c.config.Rules.NoRules == "" }

// removals is what has to be known of files that are not in force.
const removals = "what was taken out of the edited files is still in force"

// begin decides what a start puts in force: the files, as far as they are sound; where one cannot be read, or is
// refused, the last configuration; and where there is none, nothing, which every request is answered with. A file that
// is not there is a decision: nothing goes on that only it granted.
func (d *daemon) begin() inForce {
	found := d.readFiles()
	if len(found.Faults) == 0 {
		c := inForce{config: ofFiles(d.flags.config, found), files: found.Files, unread: found.Unread, gone: d.gone()}
		if found.Missing && len(found.Files) > 0 && len(c.config.Idle) > 0 {
			c.lost = d.flags.config
		}
		return c
	}
	whole := errors.Join(found.Faults...)
	last, record, gone, err := d.last()
	switch {
	case err != nil:
		return inForce{faults: found.Faults, unread: found.Unread,
			config: found.None(fmt.Sprintf("%v; and no last configuration goes on: %v", whole, err))}
	case len(last.Files) == 0:
		return inForce{faults: found.Faults, gone: gone, unread: found.Unread,
			config: found.None(fmt.Sprintf("%v; and the files of the last configuration are gone", whole))}
	}
	return inForce{
		config: last.Config(), files: last.Files, since: record.Since,
		faults: found.Faults, gone: gone, unread: found.Unread,
	}
}

// readFiles reads the files of the configuration.
func (d *daemon) readFiles() config.Reading {
	at := stampOf(d.flags.config) // before: what is edited meanwhile counts as edited
	found := config.Read(d.flags.config)
	d.edits.read(found, at)
	if last, _, _, err := d.last(); err == nil {
		return found.After(last)
	}
	return found
}

// ofFiles is what files that have no fault themselves put in force.
func ofFiles(path string, found config.Reading) config.Config {
	if len(found.Files) == 0 {
		return found.None(path + " is not there: put it back, or write one, as README.md shows; then: " +
			"perceptctl reload")
	}
	return found.Config()
}

// last returns the configuration last in force, from root's copy, and what was recorded of it.
func (d *daemon) last() (last config.Reading, record *store.ConfigRecord, gone []string, err error) {
	if d.kept == nil {
		return last, nil, nil, errors.New("perceptd was started by hand, and has no copy of one")
	}
	if record, err = store.LoadConfigRecord(store.Disk(d.flags.stateDir)); err != nil {
		return last, nil, nil, fmt.Errorf("it is not known which one was: %w", err)
	}
	last, gone, err = d.kept.Last(d.flags.config, record.SHA256, record.Gone)
	return last, record, gone, err
}

// gone returns the files of the last configuration that are not there any more.
func (d *daemon) gone() (all []string) {
	if d.kept == nil {
		return nil
	}
	record, err := store.LoadConfigRecord(store.Disk(d.flags.stateDir))
	if err != nil {
		return nil // it is the first start, or note says it
	}
	for _, path := range record.Files {
		if config.IsGone(path) {
			all = append(all, path)
		}
	}
	return all
}

// keptBy returns where root keeps a copy of the configuration; nil: nowhere, for a daemon that was started by hand.
func keptBy(stateDirectory string) *config.Kept {
	if stateDirectory == "" {
		return nil
	}
	return &config.Kept{Folder: config.KeptFolder}
}

// note records what is in force, before anything rests on it: a copy of what was in force before is of no use from now
// on. Where that fails, that is what a person has to know.
func (d *daemon) note(c inForce) error {
	if d.kept == nil || len(c.faults) > 0 && len(c.gone) == 0 {
		return nil // the record is of this one
	}
	folder := store.Disk(d.flags.stateDir)
	record := store.ConfigRecord{SHA256: config.Sum(c.files), Since: c.since.UTC(), Files: paths(c.files)}
	before, err := store.LoadConfigRecord(folder)
	switch {
	case len(c.faults) > 0 && err == nil:
		record = *before
		record.Gone = c.gone
	case len(c.faults) > 0:
		return err
	case err == nil && before.SHA256 == record.SHA256:
		record.Since = before.Since
	}
	if err := record.Save(folder); err != nil {
		return fmt.Errorf("which configuration is in force could not be recorded, so that a restart which finds a "+
			"fault in a file may go on with an earlier one, or with none: %w", err)
	}
	return nil
}

func paths(files []config.File) (all []string) {
	for _, file := range files {
		all = append(all, file.Path)
	}
	return all
}

// ofRestart says what a restart would make of files that a reload has refused.
func (d *daemon) ofRestart(found config.Reading) string {
	if len(found.Faults) > 0 {
		if _, _, _, err := d.last(); err != nil {
			return fmt.Sprintf("a restart would put nothing in force, and refuse every request: %v", err)
		}
		return "a restart would go on with the last configuration"
	}
	c := ofFiles(d.flags.config, found)
	if len(c.Idle) == 0 {
		return "a restart would put the files in force"
	}
	return "a restart would put the files in force, and leave idle: " + idleList(c.Idle)
}

// idleList names idle elements by their places.
func idleList(all []config.Idle) string {
	var names []string
	for _, idle := range all {
		names = append(names, fmt.Sprintf("%s (%s)", idle.Element, idle.Place))
	}
	return strings.Join(names, ", ")
}

// troubles says what is wrong with the configuration in force.
func (c *inForce) troubles() (all []string) {
	switch none := c.config.Rules.NoRules; {
	case none != "":
		all = append(all, "no configuration is in force, and every request is refused: "+none)
	case c.lastGoesOn():
		all = append(all, fmt.Sprintf("the last configuration goes on, of %s, and %s: %v",
			c.since.UTC().Format("Jan 2 15:04 UTC"), removals, errors.Join(c.faults...)))
	}
	if c.lost != "" {
		all = append(all, c.lost+" is not there, and what needs it is idle: put it back, then: perceptctl reload")
	}
	for _, idle := range c.config.Idle {
		all = append(all, fmt.Sprintf("%s: %s is idle: %s", idle.Place, idle.Element, idle.Why))
	}
	return all
}

// describe is what the status says of the configuration in force. started is when the daemon was started.
func (c *inForce) describe(started time.Time) api.ConfigStatus {
	s := api.ConfigStatus{
		Files: c.config.Files, SHA256: c.config.SHA256, LoadedOn: api.Time(c.since),
		None: c.config.Rules.NoRules, Gone: c.gone, Unread: c.unread,
	}
	for _, idle := range c.config.Idle {
		s.Idle = append(s.Idle, api.IdleElement(idle))
	}
	for _, fault := range c.faults {
		s.Faults = append(s.Faults, fault.Error())
	}
	if c.lastGoesOn() {
		s.LastSince = api.Time(started)
	}
	return s
}

// log writes what is wrong with the configuration in force.
func (c *inForce) log(log *zap.Logger) {
	for _, trouble := range c.troubles() {
		log.Error("the configuration is not in force as it is written: mend it, then: perceptctl reload",
			zap.String("what", trouble))
	}
	if len(c.gone) > 0 {
		log.Warn("files of the last configuration are gone, and what they allowed with them",
			zap.Strings("files", slices.Clone(c.gone)))
	}
}
