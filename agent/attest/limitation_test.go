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

// newUnlimitedFixture is a scene whose /proc hides nothing.
func newUnlimitedFixture(t *testing.T) *fixture {
	t.Helper()
	s := newFixture(t, Options{})
	s.putNamespaces(t, "0 0 4294967295\n", initPidNamespace)
	return s
}

// putNamespaces writes what the scene's /proc says of this process's namespaces.
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
	if blind := s.Limitations(context.Background()); len(blind) != 0 {
		t.Errorf("%+v", blind)
	}
	s.putNamespaces(t, "         0          0 4294967295\n", initPidNamespace)
	e := newFakeEngine(t)
	s.SetRules(Rules{Engines: []string{e.path}, NeedsEngine: true})
	if blind := s.Limitations(context.Background()); len(blind) != 0 {
		t.Errorf("%+v", blind)
	}
	s.SetRules(Rules{Engines: []string{"/nowhere"}})
	if blind := s.Limitations(context.Background()); len(blind) != 0 {
		t.Errorf("an engine that nobody needs: %+v", blind)
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
		{"ProtectProc=", "1/cgroup: no such file", func(t *testing.T, s *fixture) { _ = os.RemoveAll(filepath.Join(s.proc, "1")) }},
		{"a cgroup namespace", "cgroup namespace", func(t *testing.T, s *fixture) { s.putProcess(1, "/../../init.scope") }},
		{"PrivateUsers=", "user namespace", func(t *testing.T, s *fixture) { s.putNamespaces(t, "0 0 1\n988 988 1\n", initPidNamespace) }},
		{"a remapped user", "user namespace", func(t *testing.T, s *fixture) { s.putNamespaces(t, "0 100000 65536\n", initPidNamespace) }},
		{"no uid_map", "user namespace", func(t *testing.T, s *fixture) { s.putNamespaces(t, "", initPidNamespace) }},
		{"a pid namespace", "pid namespace", func(t *testing.T, s *fixture) { s.putNamespaces(t, "0 0 4294967295\n", "pid:[4026532000]") }},
	} {
		s := newUnlimitedFixture(t)
		row.hide(t, s)
		blind := s.Limitations(context.Background())
		if row.name == "a pid namespace" && booted == nil {
			continue // a whole system in a container sees all that is in it
		}
		if len(blind) != 1 || !strings.Contains(blind[0].Why, row.want) || blind[0].What == "" || blind[0].Hint == "" {
			t.Errorf("%s: %+v", row.name, blind)
		}
	}
}

func TestLimitationsOfEngine(t *testing.T) {
	t.Parallel()
	s, e := newUnlimitedFixture(t), newFakeEngine(t)
	s.SetRules(Rules{Engines: []string{e.path}, NeedsEngine: true})
	e.serve("ping", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	if blind := s.Limitations(context.Background()); len(blind) != 1 || !strings.Contains(blind[0].Why, "no answer in time") || !strings.Contains(blind[0].Hint, "docker ps") {
		t.Errorf("hanging: %+v", blind)
	}
	e.serve("ping", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
	if blind := s.Limitations(context.Background()); len(blind) != 1 {
		t.Errorf("refusing: %+v", blind)
	}
	shut := &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.EACCES)} // root, who runs this perhaps, is let in everywhere
	if err := new(engineClient).sanitize(context.Background(), shut); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
	if hint := engineHint(os.ErrPermission); !strings.Contains(hint, "container-engine.conf") {
		t.Error(hint)
	}
}
