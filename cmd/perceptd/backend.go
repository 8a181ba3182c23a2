package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/clock"
	"perceptd/agent/simulator"
	"perceptd/agent/source"
	"perceptd/cmd/perceptd/config"
	"perceptd/tokencache"
)

// identityVariables is all that azidentity, and our transport, choose an endpoint by.
var identityVariables = [...]string{
	"IDENTITY_ENDPOINT", "IDENTITY_HEADER", "IDENTITY_SERVER_THUMBPRINT", "IMDS_ENDPOINT",
	"MSI_ENDPOINT", "MSI_SECRET", "AZURE_POD_IDENTITY_AUTHORITY_HOST",
}

// backend is where tokens come from, and the clock that its tokens live by.
type backend struct {
	source    *source.ManagedIdentity
	clock     tokencache.Clock
	word      func() clock.Word // who vouches for clock
	simulator *simulator.Server // in this process; nil: none is
	kind      string
	forgets   bool // clock begins anew with each process, so that its times are of no use to the next
}

// simulated reports whether the tokens open nothing.
func (b *backend) simulated() bool { return b.kind == config.Simulated }

// newBackend makes the source that the configuration names. A simulated one is the one that the environment leads to,
// or begins to serve on loopback in this process; azidentity is pointed at it. Close what it returns.
func newBackend(c config.Source, log *zap.Logger) (*backend, error) {
	b := &backend{kind: c.Kind}
	b.clock, b.word = clock.Device()
	if b.simulated() {
		var err error
		if at := os.Getenv(simulator.URLVariable); at != "" {
			c.Endpoint, err = source.AppService, b.joinSimulator(c, at)
		} else {
			c.Endpoint, err = source.Auto, b.simulate(c) // Auto: as the environment says by now
		}
		if err != nil {
			return nil, err
		}
	}
	var err error
	options := source.Options{Endpoint: c.Endpoint, Wall: b.clock.Wall, ClockTrusted: b.clock.Synchronised, Log: log}
	if b.source, err = source.New(options); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

// joinSimulator uses the simulated back end of another process, and lives by its clock. It uses no other back end: only
// the App Service form is one that azidentity prefers to what else it finds on a device.
func (b *backend) joinSimulator(c config.Source, at string) error {
	endpoint, header := os.Getenv("IDENTITY_ENDPOINT"), os.Getenv("IDENTITY_HEADER")
	switch {
	case simulator.CheckURL(at) != nil:
		return fmt.Errorf("%s: %w", simulator.URLVariable, simulator.CheckURL(at))
	case !strings.HasPrefix(endpoint, at+"/") || header == "":
		return fmt.Errorf("%s is set, and IDENTITY_ENDPOINT and IDENTITY_HEADER do not lead to that simulated back "+
			"end: start perceptd with all variables of perceptctl simulate --form app-service, or with none of them",
			simulator.URLVariable)
	case c.Speed != 1 || c.Rollover != simulator.AtExpiry.String() || c.Spread != 0:
		return fmt.Errorf("source.speed, source.rollover and source.spread are for the simulated back end in "+
			"perceptd, and %s leads to another one: give them to perceptctl simulate", simulator.URLVariable)
	}
	if text := os.Getenv(simulator.ClockVariable); text != "" {
		began, err := clock.ParseOrigin(text)
		if err != nil {
			return fmt.Errorf("%s: %w", simulator.ClockVariable, err)
		}
		b.liveBy(began)
	}
	return setIdentityVariables([]string{"IDENTITY_ENDPOINT=" + endpoint, "IDENTITY_HEADER=" + header})
}

// liveBy has all times go by a clock that runs faster.
func (b *backend) liveBy(o clock.Origin) {
	b.clock, b.word = o.Clock(), func() clock.Word { return clock.Word{Synchronised: true} }
}

// simulate starts a simulated back end in this process.
func (b *backend) simulate(c config.Source) error {
	rollover, err := simulator.ParseRollover(c.Rollover)
	if err != nil {
		return fmt.Errorf("source.rollover: %w", err)
	}
	form := simulator.FormAppService
	switch c.Endpoint {
	case source.Arc:
		form = simulator.FormArc
	case source.IMDS:
		form = simulator.FormIMDS
	}
	if b.forgets = c.Speed != 1; b.forgets {
		b.liveBy(clock.Begin(c.Speed))
	}
	b.simulator, err = simulator.Start(context.Background(), simulator.ServerOptions{
		Listen:  "127.0.0.1:0",
		Form:    form,
		Backend: simulator.New(simulator.Options{Now: b.clock.Wall, Rollover: rollover, PropagationDelay: c.Spread}),
	})
	if err != nil {
		return err
	}
	return setIdentityVariables(b.simulator.Environment())
}

// setIdentityVariables points azidentity at one endpoint. The environment is this process's alone, and is set before
// anything reads it.
func setIdentityVariables(variables []string) error {
	for _, name := range identityVariables {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	for _, variable := range variables {
		name, value, _ := strings.Cut(variable, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}

func (b *backend) status() api.SourceStatus {
	return api.SourceStatus{Kind: b.kind, Endpoint: string(b.source.Endpoint()), Address: b.source.Address()}
}

func (b *backend) close() {
	if b.simulator != nil {
		_ = b.simulator.Close(context.Background())
	}
}
