package attest

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"testing"
	"time"

	"perceptd/agent"
)

// slow has an engine answer when it is told to; asked tells of each question.
func (e *fakeEngine) slow(about string, value any) (asked, release chan struct{}) {
	asked, release = make(chan struct{}, 8), make(chan struct{})
	e.serve(about, func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-release:
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(value)
		case <-r.Context().Done():
		}
	})
	return asked, release
}

// Rules that come into force while an engine is waited for decide over who has waited.
func TestRulesChangeDuringAttestation(t *testing.T) {
	t.Parallel()
	s, e := newEngineFixture(t, Options{})
	asked, release := e.slow(idA, honestAnswer(idA, "vision", 2))
	s.putProcess(os.Getpid(), containerA)
	attestation, _, _ := s.dial(Socket{Module: "vision"})
	told := make(chan error)
	go func() {
		_, err := attestation.Caller(context.Background())
		told <- err
	}()
	<-asked
	s.SetRules(Rules{Engines: []string{e.path}, Modules: map[string]Requirement{"vision": {Container: "camera"}}})
	close(release)
	checkDenied(t, "the module is another container now", <-told, "the module's is named camera")
}

// What one engine is still being asked, another one has not answered.
func TestEngineChangesDuringAttestation(t *testing.T) {
	t.Parallel()
	s, e := newEngineFixture(t, Options{})
	asked, release := e.slow(idA, honestAnswer(idA, "vision", 2))
	s.putProcess(os.Getpid(), containerA)
	attestation, _, _ := s.dial(Socket{Module: "vision"})
	told := make(chan error)
	go func() {
		_, err := attestation.Caller(context.Background())
		told <- err
	}()
	<-asked
	other := newFakeEngine(t) // which knows no container
	s.SetRules(Rules{Engines: []string{other.path}, Modules: map[string]Requirement{"vision": {Container: "vision"}}})
	_, err := s.callerIn(containerA, Socket{Module: "vision"})
	checkDenied(t, "a second caller", err, "the engine knows no container")
	close(release)
	checkDenied(t, "the first one", <-told, "the engine knows no container")
}

// Of a process that has ended nothing more is known: its number may be another's, whose service or container would be
// counted, logged and told in its place.
func TestNothingLeaksOfReusedPID(t *testing.T) {
	t.Parallel()
	const dead = "0 0 0 0 0 0 0\n"
	ctx := context.Background()
	for _, cgroup := range []string{"/system.slice/victim.service", containerA, "/system.slice/victim.service/below"} {
		s, e := newEngineFixture(t, Options{NoPidfd: true})
		isPeer := func(when string, got agent.Caller, err error) {
			t.Helper()
			checkDenied(t, when, err, "has ended")
			if got.Unit != "" || got.Container != nil || got.Module != "" || got.PID == 0 {
				t.Errorf("%s, %s: %+v", cgroup, when, got)
			}
		}
		attestation, _, _ := s.dial(Socket{})
		s.putProcess(os.Getpid(), cgroup)
		s.write(os.Getpid(), "statm", dead)
		attestation.locatedAt = time.Time{}
		got, err := attestation.Caller(ctx)
		isPeer("ended before its request", got, err)
		before := e.questions()
		again, _, _ := s.dial(Socket{})
		got, err = again.Unconfirmed()
		isPeer("ended before it was accepted", got, err)
		got, err = again.Caller(ctx)
		isPeer("ended before it was accepted, proved", got, err)
		if e.questions() != before {
			t.Errorf("%s: the engine was asked about it", cgroup)
		}
	}
	s := newFixture(t, Options{NoPidfd: true})
	s.putProcess(os.Getpid(), "/system.slice/cam.service")
	attestation, _, _ := s.dial(Socket{})
	if _, err := attestation.Caller(ctx); err != nil {
		t.Fatal(err)
	}
	s.putProcess(os.Getpid(), "/system.slice/victim.service")
	s.write(os.Getpid(), "statm", dead)
	attestation.locatedAt = time.Time{}
	got, err := attestation.Caller(ctx)
	checkDenied(t, "ended after its proof", err, "has ended")
	if got.Unit != "cam.service" {
		t.Errorf("%+v", got)
	}
}
