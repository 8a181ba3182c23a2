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
	simulator *simulator.Server // nil unless simulated
	kind      string
}

// newBackend makes the source that the configuration names; a simulated one begins to serve on
// loopback, and azidentity is pointed at it. Close what it returns.
func newBackend(c config.Source, log *zap.Logger) (*backend, error) {
	b := &backend{kind: c.Kind}
	b.clock, b.word = clock.Device()
	if c.Kind == config.Simulated {
		if err := b.simulate(c); err != nil {
			return nil, err
		}
		c.Endpoint = source.Auto // as the environment says by now
	}
	var err error
	options := source.Options{Endpoint: c.Endpoint, Wall: b.clock.Wall, ClockTrusted: b.clock.Synchronised, Log: log}
	if b.source, err = source.New(options); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

// simulate starts a simulated back end in this process. azidentity learns where from the environment,
// which is this process's alone and is set before anything reads it.
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
	if c.Speed != 1 {
		b.clock, b.word = clock.Fast(c.Speed), func() clock.Word { return clock.Word{Synchronised: true} }
	}
	b.simulator, err = simulator.Start(context.Background(), simulator.ServerOptions{
		Listen:  "127.0.0.1:0",
		Form:    form,
		Backend: simulator.New(simulator.Options{Now: b.clock.Wall, Rollover: rollover, PropagationDelay: c.Spread}),
	})
	if err != nil {
		return err
	}
	for _, name := range identityVariables {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	for _, variable := range b.simulator.Environment() {
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
