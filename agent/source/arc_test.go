package source

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

// onArc runs f where the Azure Arc agent is installed, with the key files given: on a thread that
// has mounts of its own, which end with it, so that neither the machine nor another test sees them.
// azidentity looks at files on the goroutine that asks it. f must not call t.Fatal.
func onArc(t *testing.T, keys map[string]string, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		err := installArc(keys)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; errors.Is(err, unix.EPERM) {
		t.Skip("skipped: a mount namespace, in which to install an Azure Arc agent, needs root (CAP_SYS_ADMIN)")
	} else if err != nil {
		t.Fatal(err)
	}
}

func installArc(keys map[string]string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, dir := range []string{"/opt", "/var/opt"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
	}
	for _, dir := range []string{filepath.Dir(himdsFile), arcKeyDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for name, key := range keys {
		if err := os.WriteFile(filepath.Join(arcKeyDir, name), []byte(key), 0o600); err != nil {
			return err
		}
	}
	if err := os.Symlink(filepath.Join(arcKeyDir, "good.key"), filepath.Join(arcKeyDir, "link.key")); err != nil {
		return err
	}
	return os.WriteFile(himdsFile, nil, 0o755)
}

// arcAgent challenges with the key file named and answers who shows the key.
func arcAgent(t *testing.T, challenge, key string, answer http.HandlerFunc) (_ *ManagedIdentity, legs *[]string) {
	t.Helper()
	legs = new([]string)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown := r.Header.Get("Authorization")
		*legs = append(*legs, shown) // one request at a time
		if r.URL.Path != "/metadata/identity/oauth2/token" || r.URL.Query().Get("api-version") != "2020-06-01" ||
			r.Header.Get("Metadata") != "true" {
			t.Errorf("asked %s with %v", r.URL, r.Header)
		}
		switch {
		case shown == "":
			w.Header().Set("WWW-Authenticate", "Basic realm="+filepath.Join(arcKeyDir, challenge))
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, canary)
		case shown != "Basic "+key:
			t.Error("the wrong key was shown")
		default:
			answer(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return arcAt(t, server.Listener.Addr().String()), legs
}

// arcAt is the agent's default address, which azidentity has built in, redirected.
func arcAt(t *testing.T, address string) *ManagedIdentity {
	m := newAt(target{form: Arc, scheme: "http", host: "127.0.0.1:40342", dial: address}, Options{})
	return m
}

func TestArc(t *testing.T) {
	t.Parallel()
	keys := map[string]string{"good.key": canary, "line.key": canary + "\n"}
	now := time.Now()
	body := goodAnswer(now).String()

	t.Run("token", func(t *testing.T) {
		t.Parallel()
		m, legs := arcAgent(t, "good.key", canary, answering(200, body))
		onArc(t, keys, func() {
			for range 2 {
				got, err := m.Fetch(t.Context(), system)
				if err != nil || got.Left != 24*time.Hour {
					t.Errorf("left %v, %v", got.Left, err)
				}
				noCanary(t, got, m)
			}
			if want := []string{"", "Basic " + canary, "", "Basic " + canary}; fmt.Sprint(*legs) != fmt.Sprint(want) {
				t.Errorf("two fetches made %d requests", len(*legs))
			}
		})
	})
	t.Run("user-assigned", func(t *testing.T) {
		t.Parallel()
		m, _ := arcAgent(t, "good.key", canary, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, goodAnswer(now).with(object{"client_id": strings.ToUpper(r.URL.Query().Get("client_id"))}))
		})
		onArc(t, keys, func() {
			if _, err := m.Fetch(t.Context(), byClient); err != nil {
				t.Error(err)
			}
			_, err := m.Fetch(t.Context(), byARM) // which this agent does not know of
			wantFailure(t, err, tokencache.IdentityNotFound, "update the agent")
		})
	})
	for _, test := range []struct {
		name, challenge string
		answer          http.HandlerFunc
		kind            tokencache.Kind
		words           string
		legs            int
	}{
		{"key refused", "good.key", answering(401, canary), tokencache.Refused, "systemctl restart himdsd", 2},
		{"identity unknown", "good.key", answering(400, `{"error_description":"Identity not found"}`),
			tokencache.IdentityNotFound, "enable it", 2},
		{"offline", "good.key", answering(500, canary), tokencache.Unreachable, "azcmagent show", 2},
		{"key behind a link", "link.key", nil, tokencache.Malformed, "link.key is not a regular file", 1},
		{"key with a line end", "line.key", nil, tokencache.Malformed, "line end", 1},
		{"key that is not there", "none.key", nil, tokencache.Malformed, "does not exist", 1},
		{"key elsewhere", "../" + canary + ".key", nil, tokencache.Malformed, "not the Azure Arc agent", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			m, legs := arcAgent(t, test.challenge, canary, test.answer)
			onArc(t, keys, func() {
				_, err := m.Fetch(t.Context(), system)
				wantFailure(t, err, test.kind, test.words)
				if len(*legs) != test.legs {
					t.Errorf("%d requests, want %d", len(*legs), test.legs)
				}
			})
		})
	}
	for _, test := range []struct {
		status int
		kind   tokencache.Kind
		words  string
	}{
		{200, tokencache.Malformed, "without a challenge"},
		{401, tokencache.Malformed, "does not name a .key file"},
		{429, tokencache.Throttled, "too many calls"},
		{500, tokencache.Unreachable, "azcmagent show"},
	} {
		t.Run(fmt.Sprint("first answer ", test.status), func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(answering(test.status, body))
			t.Cleanup(server.Close)
			m := arcAt(t, server.Listener.Addr().String())
			onArc(t, keys, func() {
				_, err := m.Fetch(t.Context(), system)
				wantFailure(t, err, test.kind, test.words)
			})
		})
	}
}

func TestArcAgentInstalled(t *testing.T) {
	t.Parallel()
	onArc(t, nil, func() {
		m, err := New(Options{})
		if err != nil {
			t.Error(err)
			return
		}
		if m.Endpoint() != Arc || m.Address() != "127.0.0.1:40342" {
			t.Errorf("endpoint %s at %s", m.Endpoint(), m.Address())
		}
		if _, err := New(Options{Endpoint: IMDS}); err == nil || !strings.Contains(err.Error(), himdsFile) {
			t.Errorf("got %v, want an error that names %s", err, himdsFile)
		}
		// A source made before the agent was installed must not ask the agent.
		before := imdsAt(t, "127.0.0.1:1", Options{})
		_, err = before.Fetch(t.Context(), system)
		wantFailure(t, err, tokencache.Malformed, "restart perceptd")
	})
}

func TestSwappedKeyIsNotSent(t *testing.T) {
	t.Parallel()
	m := arcAt(t, "127.0.0.1:1")
	req := httptest.NewRequest(http.MethodGet, defaultArcURL, nil)
	req.Header.Set("Authorization", "Basic "+canary)
	wantFailure(t, m.transport.checkRequest(&fetch{secret: tokencache.NewSecret("key")}, req),
		tokencache.Malformed, "changed between check and use")
}
