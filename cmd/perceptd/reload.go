package main

import (
	"context"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/config"
)

// reload puts the configuration files in force, whole or not at all, and returns what changed and what is not as it
// should be. What is in force then is recorded before it answers.
func (d *daemon) reload(ctx context.Context) (api.ReloadResponse, error) {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	d.told(d.notify.Reloading())
	defer d.ready()
	next, changes, err := d.reloadFiles(ctx)
	now := d.backend.clock.Wall()
	d.mu.Lock()
	if err != nil {
		d.fault, d.faultOn = err.Error(), now
	} else {
		next.since = now
		d.inForce, d.fault = next, ""
		d.unnoted = d.note(next)
	}
	unnoted := d.unnoted
	d.mu.Unlock()
	d.updateLimitations(ctx)
	d.tellStatus()
	if err != nil {
		d.log.Error("the configuration was not reloaded, nothing changed", zap.Error(err))
		return api.ReloadResponse{}, fmt.Errorf("nothing changed: %w", err)
	}
	warnings := slices.Concat(next.config.Rules.UselessAlternates(), next.config.Warnings, d.sockets.renewals())
	d.warn(next.config.Warnings)
	next.log(d.log)
	if unnoted != nil {
		d.log.Error("the configuration in force is not recorded", zap.Error(unnoted))
		warnings = append(warnings, unnoted.Error())
	}
	if none := next.config.Rules.NoRules; none != "" {
		warnings = append(warnings, "no configuration is in force, and every request is refused: "+none)
	}
	d.log.Info("configuration reloaded", zap.Strings("changes", changes))
	return api.ReloadResponse{Changes: changes, Warnings: warnings}, nil
}

// reloadFiles puts the files in force. It refuses them where one of them, or an element in them, has a fault, and says
// what that means.
func (d *daemon) reloadFiles(ctx context.Context) (next inForce, changes []string, err error) {
	found := d.readFiles()
	c, err := d.whole(found)
	if err != nil {
		return next, nil, fmt.Errorf("%w\n%s; %s", err, removals, d.ofRestart(found))
	}
	changes, err = d.apply(ctx, c)
	return inForce{config: c, files: found.Files, unread: found.Unread}, changes, err
}

// whole is what files say that have no fault. That the main file is not there is none: what is left counts.
func (d *daemon) whole(found config.Reading) (config.Config, error) {
	if found.Missing && len(found.Faults) == 0 && len(found.Files) == 0 {
		c := ofFiles(d.flags.config, found)
		c.Source = d.inForce.config.Source // which is of no use now, and perhaps of use again
		return c, nil
	}
	found.Missing = false
	return found.Whole()
}

// apply puts c in force, or changes nothing.
func (d *daemon) apply(ctx context.Context, c config.Config) ([]string, error) {
	d.mu.Lock()
	before := d.inForce.config
	d.mu.Unlock()
	if err := checkHub(ctx, c.IoTHub, before.IoTHub); err != nil {
		return nil, err
	}
	var changes []string
	err := d.state.settle(d.backend.status, func() (err error) {
		if c.Source != before.Source {
			if err := d.backend.replace(c.Source, d.state.mayBeLocked); err != nil {
				return err
			}
		}
		changes, err = d.agent.Apply(c.Rules)
		return err
	})
	if err != nil {
		return nil, err
	}
	d.callers.SetRules(c.CallerRules())
	d.sockets.setModules(c.Modules())
	d.loop.set(c.Loopback.Address, d.agent.Grants())
	ofHub := d.hub.credentialChanges(ctx, c.IoTHub)
	d.hub.set(c.IoTHub)
	return slices.Concat(changes, c.Changes(before), ofHub), nil
}
