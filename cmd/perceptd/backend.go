package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

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

// backend is where tokens come from, and the clock that its tokens live by. The daemon serves also while there is no
// source: each fetch then fails with the reason.
type backend struct {
	log       *zap.Logger
	clock     tokencache.Clock
	word      func() clock.Word // who vouches for clock
	simulator *simulator.Server // in this process; nil: none is
	forgets   bool              // clock begins anew with each process, so that its times are of no use to the next

	// move puts a source anew in force, where what is kept allows it; nil: nothing is kept yet
	move func(config.Source) error

	mu     sync.Mutex // protects what follows
	config config.Source
	kind   string
	source *source.ManagedIdentity // nil: there is none
	none   error                   // why not
	gave   bool                    // source has given a token
}

// simulated reports whether the tokens open nothing.
func (b *backend) simulated() bool { return b.status().Kind == config.Simulated }

// newBackend makes the source that the configuration names. A simulated one is the one that the environment leads to,
// or begins to serve on loopback in this process; azidentity is pointed at it. Close what it returns.
func newBackend(c config.Source, log *zap.Logger) *backend {
	b := &backend{log: log, config: c, kind: c.Kind}
	b.clock, b.word = clock.Device()
	switch at := os.Getenv(simulator.URLVariable); {
	case c.Fault != "":
		b.kind, b.none = "", fmt.Errorf("[source] of the configuration cannot be used: %s", c.Fault)
	case c.Kind == config.Simulated && at != "":
		c.Endpoint, b.none = source.AppService, b.joinSimulator(c, at)
	case c.Kind == config.Simulated:
		c.Endpoint, b.none = source.Auto, b.simulate(c) // Auto: as the environment says by now
	}
	if b.none != nil {
		log.Error("there is no source of tokens", zap.Error(b.none))
	} else {
		b.source = b.make(c)
	}
	return b
}

// make makes a source of managed identities. One whose endpoint is not there yet is made all the same: its fetches look
// again.
func (b *backend) make(c config.Source) *source.ManagedIdentity {
	made, missing := source.New(source.Options{
		Endpoint: c.Endpoint, Wall: b.clock.Wall, ClockTrusted: b.clock.Synchronised, Log: b.log,
	})
	if missing != nil {
		b.log.Error("there is no source of tokens: each fetch looks for it again", zap.Error(missing))
	}
	return made
}

// errSourceStays is why another source waits for a restart.
var errSourceStays = errors.New("[source] cannot change while the daemon runs: systemctl restart perceptd")

// follow has the source be at the endpoint that azidentity would choose by now, where it is free to choose and the one
// of before has given no token: "auto" means until then what it meant at the start.
func (b *backend) follow() {
	b.mu.Lock()
	from, c, gave := b.source, b.config, b.gave
	b.mu.Unlock()
	if b.move == nil || from == nil || gave || b.simulator != nil || !from.Moved() {
		return
	}
	if err := b.move(c); err == nil {
		b.log.Info("the source is at another endpoint by now", zap.String("endpoint", b.status().Endpoint))
	}
}

// canLeave reports whether there is no source, or azidentity would choose another by now.
func (b *backend) canLeave() bool {
	b.mu.Lock()
	from := b.source
	b.mu.Unlock()
	return b.missing() != nil || from.Moved()
}

// replace puts another source in the place of one that is not there, or that azidentity would leave by now, and
// that has given no token. mayHold reports whether the tokens that are held may be of that source.
func (b *backend) replace(c config.Source, mayHold func(api.SourceStatus) bool) error {
	if c.Kind != config.ManagedIdentity || c.Fault != "" || b.simulator != nil || !b.canLeave() {
		return errSourceStays
	}
	next := b.make(c)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.gave || !mayHold(statusOf(c.Kind, next)) {
		return errSourceStays
	}
	b.config, b.kind, b.source, b.none = c, c.Kind, next, nil
	return nil
}

// fetch asks the source. It may be another by the time that it answers: then that answer counts for nothing.
func (b *backend) fetch(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
	b.follow()
	b.mu.Lock()
	from, none := b.source, b.none
	b.mu.Unlock()
	if from == nil {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: none.Error()}
	}
	fetched, err := from.Fetch(ctx, key)
	if err != nil {
		return tokencache.Fetched{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.source != from {
		return tokencache.Fetched{}, &tokencache.FetchError{Kind: tokencache.Unreachable,
			Detail: "another source is in force by now: ask again"}
	}
	b.gave = true
	return fetched, nil
}

// missing is why there is no source now; nil: there is one.
func (b *backend) missing() error {
	b.mu.Lock()
	from, none := b.source, b.none
	b.mu.Unlock()
	if from == nil {
		return none
	}
	return from.Missing()
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
	b.mu.Lock()
	defer b.mu.Unlock()
	return statusOf(b.kind, b.source)
}

// statusOf describes a source of a kind; from is nil where there is none.
func statusOf(kind string, from *source.ManagedIdentity) api.SourceStatus {
	if from == nil {
		return api.SourceStatus{Kind: kind}
	}
	return api.SourceStatus{Kind: kind, Endpoint: string(from.Endpoint()), Address: from.Address()}
}

func (b *backend) close() {
	if b.simulator != nil {
		_ = b.simulator.Close(context.Background())
	}
}
