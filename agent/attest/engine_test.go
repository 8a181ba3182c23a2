package attest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func TestBrokenEngine(t *testing.T) {
	t.Parallel()
	bothWays(t, func(t *testing.T, o Options) {
		s, e := newEngineFixture(t, o)
		raw := func(text string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				_, _ = io.WriteString(w, text)
			}
		}
		for _, row := range []struct {
			name, want string
			about      string
			handler    http.HandlerFunc
		}{
			{"not known", "the engine knows no container 3f4e5d6c7b8a", idA, nil},
			{"no JSON", "asked in vain", idA, raw("<html>")},
			{"half an answer", "asked in vain", idA, raw(`{"Id": "` + idA)},
			{"nothing", "asked in vain", idA, raw("")},
			{"null", "no State", idA, raw("null")},
			{"types that are none", "asked in vain", idA, raw(`{"Id": 7}`)},
			{"an error", "answered with status 500", idA, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(500)
				_, _ = io.WriteString(w, `{"message":"boom"}`)
			}},
			{"a page", "is not JSON", idA, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/html")
				_ = json.NewEncoder(w).Encode(honestAnswer(idA, "vision", 2))
			}},
			{"deep", "not one of Docker's API", idA,
				raw(`{"Deep": ` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000) + `}`)},
			{"more than an answer", "not one of Docker's API", idA, raw(`{"Id": "x"} {"Id": "x"}`)},
			{"a long header", "is not HTTP", idA, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("X-Long", strings.Repeat("x", 2*maxHeaderBytes))
			}},
			{"elsewhere", "asked in vain", idA, func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "/other", http.StatusFound)
			}},
			{"cut off", "asked in vain", idA, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
			{"without end", "longer than", idA, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				_, _ = io.WriteString(w, `{"Id": "`)
				for range maxAnswerBytes>>10 + 1 {
					if _, err := w.Write(make1k()); err != nil {
						return
					}
				}
			}},
			{"an image that cannot be told", "asked in vain", "sha256:" + idB, raw("x")},
		} {
			s.engine.reset()
			before := e.handlers[row.about]
			e.serve(row.about, row.handler)
			got, err := s.callerIn(containerA, Socket{Module: "vision"})
			checkDenied(t, row.name, err, row.want)
			if got.Container == nil || got.Container.ID != idA || got.Module != "" {
				t.Errorf("%s: %+v beside the error", row.name, got)
			}
			e.serve(row.about, before)
		}
		if got, err := s.callerIn(containerA, Socket{Module: "vision"}); err != nil || got.Module != "vision" {
			t.Errorf("afterwards: %+v, %v", got, err)
		}
		e.serve("sha256:"+idB, nil) // an image that was removed has no repo digests
		s.engine.reset()
		got, err := s.callerIn(containerA, Socket{Module: "vision"})
		if err != nil || got.Container.RepoDigests != nil {
			t.Errorf("without its image: %+v, %v", got, err)
		}
	})
}

func make1k() []byte { return []byte(strings.Repeat("x", 1<<10)) }

// A call that hangs delays only the callers that need it, and not for long.
func TestHangingEngine(t *testing.T) {
	t.Parallel()
	var changes, waiting sync.WaitGroup
	changes.Add(2)
	o := Options{Changed: changes.Done}
	s, e := newEngineFixture(t, o)
	release := make(chan struct{})
	e.serve(idA, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	s.putProcess(os.Getpid(), containerA)
	for range 3 {
		attestation, _, _ := s.dial(Socket{Module: "vision"})
		waiting.Go(func() {
			_, err := attestation.Caller(context.Background())
			checkDenied(t, "hanging", err, "no answer in time")
		})
	}
	impatient, _, _ := s.dial(Socket{Module: "vision"})
	gone, leave := context.WithCancel(context.Background())
	leave()
	_, err := impatient.Caller(gone)
	checkDenied(t, "gone meanwhile", err, "canceled")
	for _, row := range []struct {
		cgroup string
		from   Socket
	}{
		{"/", Socket{}}, {"/system.slice/cam.service", Socket{}},
		{"/docker/" + idB, Socket{Module: "speech"}}, {containerA, Socket{Module: "free"}},
	} {
		if _, err := s.callerIn(row.cgroup, row.from); err != nil {
			t.Errorf("%s, beside it: %v", row.cgroup, err)
		}
	}
	waiting.Wait()
	if e.questions() > 4 { // one for each container, however many callers wait, and one for the image
		t.Errorf("%d questions", e.questions())
	}
	if path, trouble := s.Engine(); path != e.path || !strings.Contains(trouble, "no answer") {
		t.Errorf("%q %q", path, trouble)
	}
	close(release)
	e.answer(idA, honestAnswer(idA, "vision", 2))
	if got, err := s.callerIn(containerA, Socket{Module: "vision"}); err != nil || got.Module != "vision" {
		t.Errorf("afterwards: %+v, %v", got, err)
	}
	changes.Wait() // the failure and the recovery were reported
	if _, trouble := s.Engine(); trouble != "" {
		t.Errorf("%q", trouble)
	}
}

// Only maxEngineCalls run at once. Further callers wait for a slot, and get an error if none becomes free.
func TestEngineCallsAreBounded(t *testing.T) {
	t.Parallel()
	s, _ := newEngineFixture(t, Options{})
	for range maxEngineCalls {
		s.engine.slots <- struct{}{}
	}
	_, err := s.callerIn(containerA, Socket{})
	checkDenied(t, "no turn", err, "too many ask it at once")
	<-s.engine.slots
	if _, err := s.callerIn(containerA, Socket{}); err != nil {
		t.Error(err)
	}
}

func TestFindEngine(t *testing.T) {
	t.Parallel()
	dir := shortFolder(t)
	file, nobody := filepath.Join(dir, "file"), filepath.Join(dir, "nobody")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "dead.sock")
	syscall.ForkLock.RLock() // a process that is being started has the socket too
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	syscall.ForkLock.RUnlock()
	for _, row := range []struct {
		name    string
		engines []string
		want    string
	}{
		{"none", nil, "no container engine is there to ask"},
		{"one that is not there", []string{nobody}, nobody + " is no socket"},
		{"a file", []string{file}, file + " is no socket"},
		{"several", []string{nobody, file}, "none of " + nobody + ", " + file + " is a socket"},
		{"one that nobody serves", []string{nobody, dead}, dead + ": nobody answers there"},
	} {
		s := newFixture(t, Options{})
		s.SetRules(Rules{Engines: row.engines, NeedsEngine: true})
		_, err := s.callerIn(containerA, Socket{})
		checkDenied(t, row.name, err, row.want)
		limitations := s.Limitations(context.Background())
		if len(limitations) == 0 {
			t.Errorf("%s: none", row.name)
			continue
		}
		last := limitations[len(limitations)-1]
		if last.What != "which container a caller runs in" || !strings.Contains(last.Why, row.want) || last.Hint == "" {
			t.Errorf("%s: %+v", row.name, limitations)
		}
	}
}

func TestCachedDigestsAreBounded(t *testing.T) {
	t.Parallel()
	s, _ := newEngineFixture(t, Options{})
	if _, err := s.callerIn(containerA, Socket{}); err != nil {
		t.Fatal(err)
	}
	for i := range maxDigests + 10 {
		image := fmt.Sprintf("sha256:%064x", i)
		if _, err := s.engine.repoDigests(context.Background(), s.engine.client, image); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.engine.digests) > maxDigests {
		t.Errorf("%d images are kept", len(s.engine.digests))
	}
	if digests, err := s.engine.repoDigests(context.Background(), s.engine.client, ""); digests != nil || err != nil {
		t.Errorf("no image: %v, %v", digests, err)
	}
}

// The answer of one engine is not used for another one that replaces it during the call.
func TestEngineChangesDuringAttestation(t *testing.T) {
	t.Parallel()
	s, e := newEngineFixture(t, Options{})
	asked, release := e.slow(idA, honestAnswer(idA, "vision", 2))
	s.putProcess(os.Getpid(), containerA)
	attestation, _, _ := s.dial(Socket{Module: "vision"})
	result := make(chan error)
	go func() {
		_, err := attestation.Caller(context.Background())
		result <- err
	}()
	<-asked
	other := newFakeEngine(t) // which knows no container
	s.SetRules(Rules{Engines: []string{other.path}, Modules: map[string]Requirement{"vision": {Container: "vision"}}})
	_, err := s.callerIn(containerA, Socket{Module: "vision"})
	checkDenied(t, "a second caller", err, "the engine knows no container")
	close(release)
	checkDenied(t, "the first one", <-result, "the engine knows no container")
}
