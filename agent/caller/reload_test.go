package caller

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"testing"
)

// slow has an engine answer when it is told to; asked tells of each question.
func (e *fakeEngine) slow(about string, value any) (asked, release chan struct{}) {
	asked, release = make(chan struct{}, 8), make(chan struct{})
	e.serve(about, func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-release:
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
