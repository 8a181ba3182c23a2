package attest

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// newUnlimitedFixture returns a fixture whose /proc hides nothing.
func newUnlimitedFixture(t *testing.T) *fixture {
	t.Helper()
	s := newFixture(t, Options{})
	s.putNamespaces(t, "0 0 4294967295\n", initPidNamespace)
	return s
}

// putNamespaces writes this process's uid map and pid namespace in the fixture's /proc.
func (f *fixture) putNamespaces(t *testing.T, uidMap, pidNamespace string) {
	t.Helper()
	ns := filepath.Join(f.proc, "self", "ns")
	_ = os.RemoveAll(filepath.Join(f.proc, "self"))
	if err := os.MkdirAll(ns, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(pidNamespace, filepath.Join(ns, "pid")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.proc, "self", "uid_map"), []byte(uidMap), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestNoLimitations(t *testing.T) {
	t.Parallel()
	s := newUnlimitedFixture(t)
	if limitations := s.Limitations(context.Background()); len(limitations) != 0 {
		t.Errorf("%+v", limitations)
	}
	s.putNamespaces(t, "         0          0 4294967295\n", initPidNamespace)
	e := newFakeEngine(t)
	s.SetRules(Rules{Engines: []string{e.path}, NeedsEngine: true})
	if limitations := s.Limitations(context.Background()); len(limitations) != 0 {
		t.Errorf("%+v", limitations)
	}
	s.SetRules(Rules{Engines: []string{"/nowhere"}})
	if limitations := s.Limitations(context.Background()); len(limitations) != 0 {
		t.Errorf("an engine that nobody needs: %+v", limitations)
	}
	if path, trouble := s.Engine(); path != "" || trouble != "" {
		t.Errorf("%q %q", path, trouble)
	}
}

func TestLimitations(t *testing.T) {
	t.Parallel()
	_, booted := os.Stat("/run/systemd/system")
	for _, row := range []struct {
		name, want string
		hide       func(*testing.T, *fixture)
	}{
		{"ProtectProc=", "1/cgroup: no such file", func(t *testing.T, s *fixture) {
			_ = os.RemoveAll(filepath.Join(s.proc, "1"))
		}},
		{"a cgroup namespace", "cgroup namespace", func(t *testing.T, s *fixture) {
			s.putProcess(1, "/../../init.scope")
		}},
		{"PrivateUsers=", "user namespace", func(t *testing.T, s *fixture) {
			s.putNamespaces(t, "0 0 1\n988 988 1\n", initPidNamespace)
		}},
		{"a remapped user", "user namespace", func(t *testing.T, s *fixture) {
			s.putNamespaces(t, "0 100000 65536\n", initPidNamespace)
		}},
		{"no uid_map", "user namespace", func(t *testing.T, s *fixture) { s.putNamespaces(t, "", initPidNamespace) }},
		{"a pid namespace", "pid namespace", func(t *testing.T, s *fixture) {
			s.putNamespaces(t, "0 0 4294967295\n", "pid:[4026532000]")
		}},
	} {
		s := newUnlimitedFixture(t)
		row.hide(t, s)
		limitations := s.Limitations(context.Background())
		if row.name == "a pid namespace" && booted == nil {
			continue // a whole system in a container sees all of its processes
		}
		if len(limitations) != 1 || !strings.Contains(limitations[0].Why, row.want) ||
			limitations[0].What == "" || limitations[0].Hint == "" {
			t.Errorf("%s: %+v", row.name, limitations)
		}
	}
}

func TestLimitationsOfEngine(t *testing.T) {
	t.Parallel()
	s, e := newUnlimitedFixture(t), newFakeEngine(t)
	s.SetRules(Rules{Engines: []string{e.path}, NeedsEngine: true})
	e.serve("ping", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	limitations := s.Limitations(context.Background())
	if len(limitations) != 1 || !strings.Contains(limitations[0].Why, "no answer in time") ||
		!strings.Contains(limitations[0].Hint, "docker ps") {
		t.Errorf("hanging: %+v", limitations)
	}
	e.serve("ping", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
	if limitations := s.Limitations(context.Background()); len(limitations) != 1 {
		t.Errorf("refusing: %+v", limitations)
	}
	// Made up, since root, who may run this test, is refused nowhere.
	shut := &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.EACCES)}
	if err := new(engineClient).sanitize(context.Background(), shut); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
	if hint := engineHint(os.ErrPermission); !strings.Contains(hint, "container-engine.conf") {
		t.Error(hint)
	}
}
