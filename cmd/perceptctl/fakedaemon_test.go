package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

// fakeDaemon answers on a token socket and an admin socket with what it was told to.
type fakeDaemon struct {
	client client.Client
	ctx    context.Context // ends with the daemon
	cancel context.CancelFunc
	code   int // exit status of the last run against it

	servers []*http.Server
	serving sync.WaitGroup

	mu       sync.Mutex
	answers  map[string]fakeAnswer // by path, or by method and path
	requests strings.Builder
	asked    func() // called at each request; nil: nothing
}

type fakeAnswer struct {
	status     int
	body       string
	retryAfter string
	hangs      bool // before it answers
	stays      bool // after it answered, as a stream of events does
}

func newFakeDaemon(folder string) *fakeDaemon {
	d := &fakeDaemon{answers: make(map[string]fakeAnswer)}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.client.Socket = filepath.Join(folder, api.TokenSocketName)
	return d
}

// start listens on the token socket, the admin socket and the socket of a module named vision.
func (d *fakeDaemon) start() error {
	module := filepath.Join(filepath.Dir(d.client.Socket), api.ModulesDirName, "vision")
	if err := os.MkdirAll(module, 0o755); err != nil {
		return err
	}
	admin := []string{api.PathStatus, api.PathRefresh, api.PathReload, api.PathPolicyChanges, api.PathDeny,
		api.PathDenyHub, api.PathDenyLost}
	return errors.Join(
		d.listen(d.client.TokenSocketPath(), api.PathToken, api.PathWatch, api.PathWhoAmI, api.PathLoopback),
		d.listen(filepath.Join(module, api.TokenSocketName), api.PathToken, api.PathWhoAmI),
		d.listen(d.client.AdminSocketPath(), append(admin, api.PathGrants, api.PathGrantsCheck, api.PathLoopback)...),
	)
}

func (d *fakeDaemon) listen(path string, routes ...string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	for _, route := range routes {
		mux.HandleFunc(route, d.serve)
	}
	server := &http.Server{Handler: mux}
	d.servers = append(d.servers, server)
	d.serving.Go(func() { _ = server.Serve(listener) })
	return nil
}

func (d *fakeDaemon) close() {
	d.cancel()
	for _, server := range d.servers {
		_ = server.Close()
	}
	d.serving.Wait()
}

func (d *fakeDaemon) answer(path string, a fakeAnswer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answers[path] = a
}

// note records a request and returns the answer to it.
func (d *fakeDaemon) note(r *http.Request) fakeAnswer {
	body, _ := io.ReadAll(r.Body)
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintf(&d.requests, "%s %s %s\n", r.Method, r.RequestURI, body)
	if d.asked != nil {
		d.asked()
	}
	if a, found := d.answers[r.Method+" "+r.URL.Path]; found {
		return a
	}
	return d.answers[r.URL.Path]
}

func (d *fakeDaemon) takeRequests() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.requests.Reset()
	return d.requests.String()
}

func (d *fakeDaemon) serve(w http.ResponseWriter, r *http.Request) {
	a := d.note(r)
	if a.hangs {
		<-r.Context().Done()
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Path == api.PathWatch {
		w.Header().Set("Content-Type", "text/event-stream")
	}
	if a.status != http.StatusOK {
		w.Header().Set("Content-Type", "application/problem+json")
	}
	if a.retryAfter != "" {
		w.Header().Set("Retry-After", a.retryAfter)
	}
	if a.status == 0 {
		a.status = http.StatusInternalServerError
	}
	w.WriteHeader(a.status)
	_, _ = io.WriteString(w, a.body)
	if a.stays {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
}
