package source

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"perceptd/tokencache"
)

// A source that azidentity would not use yet fails with the reason, and gives tokens once it would.
func TestMissingEndpointHeals(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(answering(200, goodAnswer(time.Now()).String()))
	defer server.Close()
	himds := true
	m, err := newIn(func() environment {
		return environment{getenv: variables(envAuthorityHost, server.URL), himds: himds}
	}, Options{Endpoint: IMDS})
	const why = "endpoint imds cannot be used, azidentity chooses arc since the Azure Arc agent is installed"
	if err == nil || !strings.Contains(err.Error(), why) {
		t.Fatal(err)
	}
	for range 2 {
		_, err = m.Fetch(t.Context(), system)
		failed, ok := errors.AsType[*tokencache.FetchError](err)
		if !ok || failed.Kind != tokencache.Unreachable || !strings.Contains(failed.Detail, why) {
			t.Errorf("%v", err)
		}
	}
	himds = false
	if got, err := m.Fetch(t.Context(), system); err != nil || got.Left != 24*time.Hour {
		t.Errorf("%v %v", got.Left, err)
	}
}

// A source that is not there has the name of the one that it will be: what was kept of it is of use.
func TestMissingEndpointIsKnown(t *testing.T) {
	t.Parallel()
	m, err := newIn(func() environment { return environment{getenv: variables()} }, Options{Endpoint: Arc})
	if err == nil || !strings.Contains(err.Error(), "or install the agent") {
		t.Error(err)
	}
	if m.Endpoint() != Arc || m.Address() != "127.0.0.1:40342" {
		t.Errorf("%s at %s", m.Endpoint(), m.Address())
	}
	m, _ = newIn(func() environment { return environment{getenv: variables()} }, Options{Endpoint: AppService})
	if m.Endpoint() != AppService || m.Address() != "" {
		t.Errorf("%s at %s", m.Endpoint(), m.Address())
	}
}

// A source whose endpoint azidentity chooses knows when it would choose another one; one that was named does not move.
func TestMoved(t *testing.T) {
	t.Parallel()
	for want, moves := range map[Endpoint]bool{Auto: true, "": true, IMDS: false} {
		agent := false
		m, err := newIn(func() environment { return environment{getenv: variables(), himds: agent} },
			Options{Endpoint: want})
		if err != nil || m.Endpoint() != IMDS || m.Moved() {
			t.Fatalf("%q: %v %v", want, m.Endpoint(), err)
		}
		if agent = true; m.Moved() != moves || m.Endpoint() != IMDS {
			t.Errorf("%q: moved %v", want, m.Moved())
		}
	}
}

// What azidentity would use in the end is not taken for what the source was made for.
func TestMissingEndpointIsNotReplaced(t *testing.T) {
	t.Parallel()
	agent := false
	m, err := newIn(func() environment {
		return environment{getenv: variables(envAuthorityHost, "nonsense"), himds: agent}
	}, Options{})
	if err == nil || m.Endpoint() != "" || m.Address() != "" {
		t.Fatalf("%+v %v", m, err)
	}
	agent = true
	if err := m.Missing(); err == nil || !strings.Contains(err.Error(), "chooses arc by now: systemctl restart") {
		t.Error(err)
	}
}
