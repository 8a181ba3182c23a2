package source

import (
	"context"
	"strings"
	"testing"
	"time"

	"perceptd/agent/simulator"
	"perceptd/tokencache"
)

// The simulated back end in each of its forms: every identity by every name, then every fault it knows.

func TestSimulatedIMDS(t *testing.T) {
	withBackEnd(t, simulator.FormIMDS, func(b *simulator.Backend) { askAll(t, b, IMDS) })
}

func TestSimulatedAppService(t *testing.T) {
	withBackEnd(t, simulator.FormAppService, func(b *simulator.Backend) { askAll(t, b, AppService) })
}

func TestSimulatedArc(t *testing.T) {
	// Only this thread sees the directory of the key files; the server holds on to it from its start.
	onArc(t, nil, func() {
		withBackEnd(t, simulator.FormArc, func(b *simulator.Backend) { askAll(t, b, Arc) })
	})
}

// withBackEnd serves a back end, and points azidentity at it, until f returns.
func withBackEnd(t *testing.T, form simulator.Form, f func(*simulator.Backend)) {
	server, err := simulator.Start(context.Background(), simulator.ServerOptions{Form: form})
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = server.Close(context.Background()) }()
	for _, variable := range server.Environment() {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
	f(server.Backend())
}

func askAll(t *testing.T, b *simulator.Backend, endpoint Endpoint) {
	m, err := New(Options{ClockTrusted: func() bool { return true }})
	if err != nil || m.Endpoint() != endpoint {
		t.Errorf("endpoint %v, %v", m, err)
		return
	}
	ask := func(s tokencache.Selector) (tokencache.Fetched, error) {
		return m.Fetch(t.Context(), tokencache.Key{Selector: s, Resource: vault})
	}
	askBriefly := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := m.Fetch(ctx, system)
		return err
	}
	for _, id := range simulator.DefaultIdentities() {
		for _, s := range selectors(id) {
			got, err := ask(s)
			if err != nil || got.Token.Claims.ObjectID != id.ObjectID || got.Left <= 23*time.Hour ||
				got.Nominal != 24*time.Hour+5*time.Minute {
				t.Errorf("%v: token of %s, %v of %v left, %v", s, got.Token.Claims.ObjectID, got.Left, got.Nominal, err)
			}
		}
	}
	_, err = ask(tokencache.Selector{Kind: tokencache.ClientID, ID: clientID})
	wantFailure(t, err, tokencache.IdentityNotFound, clientID)

	for _, fault := range simulator.FaultKinds() {
		if strings.HasPrefix(fault.String(), "key-") && endpoint != Arc {
			continue
		}
		if fault == simulator.FaultKeyFIFO {
			continue // made by its path, which the server's threads do not see; TestChallenge has one
		}
		kind := kindOf(fault)
		f := simulator.Fault{Kind: fault, Status: 403, Body: canary, Size: 1 << 20, ExpiresIn: "-25h",
			ExpiresOn: "-25h"}
		if fault == simulator.FaultStatus || fault == simulator.FaultUnavailable {
			f.Body = "" // a canary is not of the endpoint's form, and so says nothing
		}
		err := b.AddFault(f)
		if err != nil {
			t.Error(err)
		}
		if fault == simulator.FaultHang || fault == simulator.FaultSlowBody {
			err = askBriefly()
		} else {
			_, err = ask(tokencache.Selector{})
		}
		if failed := wantFailure(t, err, kind, ""); failed.Kind != kind {
			t.Errorf("... with fault %v", fault)
		}
		b.ClearFaults()
	}
	if _, err := ask(tokencache.Selector{}); err != nil {
		t.Errorf("without a fault again: %v", err)
	}
}

func selectors(id simulator.Identity) []tokencache.Selector {
	if id.SystemAssigned {
		return []tokencache.Selector{{}}
	}
	return []tokencache.Selector{
		{Kind: tokencache.ClientID, ID: id.ClientID},
		{Kind: tokencache.ObjectID, ID: id.ObjectID},
		{Kind: tokencache.ResourceID, ID: id.ResourceID},
	}
}

func kindOf(f simulator.FaultKind) tokencache.Kind {
	switch f {
	case simulator.FaultHang, simulator.FaultSlowBody, simulator.FaultReset, simulator.FaultTruncated,
		simulator.FaultUnavailable, simulator.FaultHTML, simulator.FaultNotJSON, simulator.FaultHugeBody,
		simulator.FaultGzipBomb, simulator.FaultRedirect:
		return tokencache.Unreachable
	case simulator.FaultThrottle:
		return tokencache.Throttled
	case simulator.FaultStatus:
		return tokencache.Refused
	case simulator.FaultWrongIdentity:
		return tokencache.IdentityNotFound
	}
	return tokencache.Malformed
}
