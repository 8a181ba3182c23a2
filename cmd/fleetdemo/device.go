package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

const (
	vault   = "https://vault.azure.net"
	storage = "https://storage.azure.com"
	life    = 24 * time.Hour
)

// device is one of the fleet: an agent with its cache, on a back end of its own.
type device struct {
	name  string
	agent *agent.Agent
}

// rules are the same on each device: two modules, each with a token of an identity, which are prefetched.
func rules() agent.Rules {
	return agent.Rules{Rules: grants.Rules{
		Identities: []grants.Identity{
			{Name: "device", Default: true},
			{Name: "vision", ClientID: simulator.DefaultIdentities()[1].ClientID},
		},
		Grants: []grants.Grant{
			{Caller: grants.Match{Module: "log"}, Identity: "device", Resources: []string{storage}, Prefetch: true},
			{Caller: grants.Match{Module: "vision"}, Identity: "vision", Resources: []string{vault}, Prefetch: true},
		},
	}}
}

// module is the one whose permissions the demonstration changes.
var module = grants.Caller{Module: "vision", UID: grants.NoID, GID: grants.NoID}

// newDevice starts the agent of the device with that number. Back ends differ in when they hand out newer tokens.
func newDevice(number int, clock tokencache.Clock, changed func()) (*device, error) {
	backend := simulator.New(simulator.Options{
		Now: clock.Wall, Life: life, Rollover: simulator.Jittered, Aged: life, Seed: uint64(number),
	})
	a, err := agent.New(agent.Options{
		Fetch: fetchFrom(backend, clock), Rules: rules(), Clock: clock, Simulated: true, Changed: changed,
		Log: zap.NewNop(),
	})
	if err != nil {
		return nil, err
	}
	return &device{name: fmt.Sprintf("percept-%03d", number), agent: a}, nil
}

// fetchFrom asks a back end as agent/source does, without HTTP in between.
func fetchFrom(
	backend *simulator.Backend, clock tokencache.Clock,
) func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
	return func(_ context.Context, key tokencache.Key) (tokencache.Fetched, error) {
		selection := simulator.Selection{By: simulator.SystemAssigned}
		if key.Selector.Kind != tokencache.SystemAssigned {
			selection = simulator.Selection{By: simulator.ByClientID, ID: key.Selector.ID}
		}
		token, err := backend.Token(selection, key.Resource)
		if err != nil {
			return tokencache.Fetched{}, err
		}
		return tokencache.Fetched{
			Token: tokencache.Token{
				Text: tokencache.NewSecret(token.Text), ExpiresOn: token.ExpiresOn, NotBefore: token.NotBefore,
				Claims: tokencache.Claims{ObjectID: token.Identity.ObjectID, IssuedAt: token.IssuedAt,
					NotBefore: token.NotBefore},
			},
			Left: token.ExpiresOn.Sub(clock.Wall()), Counted: true, Nominal: life,
		}, nil
	}
}

// status is the whole status of the device.
func (d *device) status(now func() time.Time) api.Status {
	s := d.agent.Status()
	s.Version, s.Now, s.Simulated = "demo", api.Time(now()), true
	s.Source = api.SourceStatus{Kind: "simulated"}
	return s
}

// serves returns why the module does not get its token, or nil: it does.
func (d *device) serves(ctx context.Context) error {
	_, err := d.agent.Token(ctx, module, agent.Request{Request: grants.Request{Resource: vault}})
	return err
}

// denies reports whether the module gets no token, since a deny rule takes it away.
func (d *device) denies(ctx context.Context) bool {
	refusal, is := errors.AsType[*agent.Error](d.serves(ctx))
	return is && refusal.Code == api.CodeDenied
}

// isStale reports whether the module's token lacks the policy change on record.
func (d *device) isStale() bool {
	for _, token := range d.agent.Status().Tokens {
		if token.Resource == vault && token.Permissions.State != api.PermissionsCurrent {
			return true
		}
	}
	return false
}

// hasChange reports whether the change with that note is on record.
func (d *device) hasChange(note string) bool {
	for _, change := range d.agent.Changes() {
		if change.Note == note {
			return true
		}
	}
	return false
}
