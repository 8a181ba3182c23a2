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
func TestRulesChangeDuringAProof(t *testing.T) {
	t.Parallel()
	s, e := withEngine(t, Options{})
	asked, release := e.slow(idA, honest(idA, "vision", 2))
	s.put(os.Getpid(), containerA)
	proof, _, _ := s.dial(Socket{Module: "vision"})
	told := make(chan error)
	go func() {
		_, err := proof.Caller(context.Background())
		told <- err
	}()
	<-asked
	s.SetRules(Rules{Engines: []string{e.path}, Modules: map[string]Requirement{"vision": {Container: "camera"}}})
	close(release)
	denies(t, "the module is another container now", <-told, "the module's is named camera")
}

// What one engine is still being asked, another one has not answered.
func TestEngineChangesDuringAProof(t *testing.T) {
	t.Parallel()
	s, e := withEngine(t, Options{})
	asked, release := e.slow(idA, honest(idA, "vision", 2))
	s.put(os.Getpid(), containerA)
	proof, _, _ := s.dial(Socket{Module: "vision"})
	told := make(chan error)
	go func() {
		_, err := proof.Caller(context.Background())
		told <- err
	}()
	<-asked
	other := newFakeEngine(t) // which knows no container
	s.SetRules(Rules{Engines: []string{other.path}, Modules: map[string]Requirement{"vision": {Container: "vision"}}})
	_, err := s.called(containerA, Socket{Module: "vision"})
	denies(t, "a second caller", err, "the engine knows no container")
	close(release)
	denies(t, "the first one", <-told, "the engine knows no container")
}

// Of a process that has ended nothing more is known: its number may be another's, whose service or container would be
// counted, logged and told in its place.
func TestNothingIsToldOfAnothersProcess(t *testing.T) {
	t.Parallel()
	const dead = "0 0 0 0 0 0 0\n"
	ctx := context.Background()
	for _, cgroup := range []string{"/system.slice/victim.service", containerA, "/system.slice/victim.service/below"} {
		s, e := withEngine(t, Options{NoPidfd: true})
		isPeer := func(when string, got agent.Caller, err error) {
			t.Helper()
			denies(t, when, err, "has ended")
			if got.Unit != "" || got.Container != nil || got.Module != "" || got.PID == 0 {
				t.Errorf("%s, %s: %+v", cgroup, when, got)
			}
		}
		proof, _, _ := s.dial(Socket{})
		s.put(os.Getpid(), cgroup)
		s.write(os.Getpid(), "statm", dead)
		proof.lookedOn = time.Time{}
		got, err := proof.Caller(ctx)
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
	s := newScene(t, Options{NoPidfd: true})
	s.put(os.Getpid(), "/system.slice/cam.service")
	proof, _, _ := s.dial(Socket{})
	if _, err := proof.Caller(ctx); err != nil {
		t.Fatal(err)
	}
	s.put(os.Getpid(), "/system.slice/victim.service")
	s.write(os.Getpid(), "statm", dead)
	proof.lookedOn = time.Time{}
	got, err := proof.Caller(ctx)
	denies(t, "ended after its proof", err, "has ended")
	if got.Unit != "cam.service" {
		t.Errorf("%+v", got)
	}
}
