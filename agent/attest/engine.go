package attest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	engineTimeout  = 2 * time.Second // of all that one proof asks
	maxEngineCalls = 8               // at once; more wait for their turn within their deadline
	digestTTL      = time.Minute     // what registries call an image changes only when it is pulled or pushed
	maxDigests     = 256             // images whose names are kept
)

// engine asks a container engine. Who waits for an engine that does not answer holds up nobody else, and there is one
// question at a time about each container.
type engine struct {
	changed func()
	trusted trustedOwners
	flights singleflight.Group
	slots   chan struct{}

	mu      sync.Mutex    // protects what follows
	client  *engineClient // to the engine in use; nil: none yet
	digests map[string]imageDigests
	trouble string // why it could not be asked the last time; empty: it could
}

// imageDigests is what registries call an image.
type imageDigests struct {
	digests []string
	readAt  time.Time
}

func newEngine(trusted trustedOwners, changed func()) *engine {
	return &engine{changed: changed, trusted: trusted, slots: make(chan struct{}, maxEngineCalls)}
}

// errNoEngine says that there is nobody to ask.
var errNoEngine = errors.New("no container engine is there to ask")

// inspect returns what the engine says of the container with that ID. Callers who inspect the same engine for the same one share an
// answer.
func (e *engine) inspect(ctx context.Context, paths []string, id string) (containerInfo, error) {
	results := e.flights.DoChan(id+strings.Join(paths, "\n"), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), engineTimeout)
		defer cancel()
		select {
		case e.slots <- struct{}{}:
			defer func() { <-e.slots }()
		case <-ctx.Done():
			return containerInfo{}, errors.New("too many ask it at once")
		}
		info, err := e.inspectOnce(ctx, paths, id)
		e.recordResult(err)
		return info, err
	})
	select {
	case result := <-results:
		return result.Val.(containerInfo), result.Err
	case <-ctx.Done():
		return containerInfo{}, ctx.Err()
	}
}

func (e *engine) inspectOnce(ctx context.Context, paths []string, id string) (containerInfo, error) {
	client, err := e.connect(ctx, paths)
	if err != nil {
		return containerInfo{}, err
	}
	info, err := client.inspectContainer(ctx, id)
	if err == nil {
		info.RepoDigests, err = e.repoDigests(ctx, client, info.Digest)
	}
	if err != nil && !errors.Is(err, errNotFound) {
		e.drop(client)
	}
	return info, err
}

// repoDigests returns what registries call an image. One that is no longer there has no names.
func (e *engine) repoDigests(ctx context.Context, client *engineClient, image string) ([]string, error) {
	if image == "" {
		return nil, nil
	}
	e.mu.Lock()
	cached, known := e.digests[image]
	current := e.client == client
	e.mu.Unlock()
	if known && current && time.Since(cached.readAt) < digestTTL {
		return cached.digests, nil
	}
	digests, err := client.inspectImage(ctx, image)
	if err != nil && !errors.Is(err, errNotFound) {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client != client {
		return digests, nil // another engine is in use by now
	}
	if len(e.digests) >= maxDigests || e.digests == nil {
		e.digests = make(map[string]imageDigests)
	}
	e.digests[image] = imageDigests{digests, time.Now()}
	return digests, nil
}

// connect returns a line to the engine at the first of paths that is a socket.
func (e *engine) connect(ctx context.Context, paths []string) (*engineClient, error) {
	path, err := findSocket(paths)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	known := e.client
	e.mu.Unlock()
	if known != nil && known.path == path {
		return known, nil
	}
	client, err := dialEngine(ctx, path, e.trusted)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client == nil || e.client.path != path {
		e.client, e.digests = client, nil
	}
	return e.client, nil
}

// findSocket returns the first of paths that is a socket.
func findSocket(paths []string) (string, error) {
	for _, path := range paths {
		info, err := os.Stat(path)
		switch {
		case err == nil && info.Mode().Type() == fs.ModeSocket:
			return path, nil
		case errors.Is(err, fs.ErrPermission):
			return "", fmt.Errorf("%s: %w", path, fs.ErrPermission)
		}
	}
	if len(paths) == 1 {
		return "", fmt.Errorf("%w: %s is no socket", errNoEngine, paths[0])
	}
	if len(paths) > 1 {
		return "", fmt.Errorf("%w: none of %s is a socket", errNoEngine, strings.Join(paths, ", "))
	}
	return "", errNoEngine
}

// ping asks whether an engine answers.
func (e *engine) ping(ctx context.Context, paths []string) error {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	path, err := findSocket(paths)
	if err != nil {
		return err
	}
	_, err = dialEngine(ctx, path, e.trusted)
	return err
}

// pingTimeout is how long an engine may take to say that it is there.
const pingTimeout = time.Second

// reset lets go of the engine; the next question finds it anew.
func (e *engine) reset() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.client, e.digests = nil, nil
}

// drop lets go of a line on which something went wrong: the engine may have been started anew, with another version.
func (e *engine) drop(client *engineClient) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client == client {
		e.client, e.digests = nil, nil
	}
}

// recordResult keeps whether the engine could be asked.
func (e *engine) recordResult(err error) {
	trouble := ""
	if err != nil && !errors.Is(err, errNotFound) {
		trouble = err.Error()
	}
	e.mu.Lock()
	before := e.trouble
	e.trouble = trouble
	e.mu.Unlock()
	if (before == "") != (trouble == "") {
		e.changed()
	}
}

func engineHint(err error) string {
	var untrusted *untrustedError
	switch {
	case errors.As(err, &untrusted):
		return "name the socket of root's own engine as [callers] engine (a rootless one cannot prove callers), or choose require = \"socket\" for the modules"
	case errors.Is(err, fs.ErrPermission):
		return "install the drop-in container-engine.conf, which lets perceptd into the group that the engine's socket is for, or choose require = \"socket\" for the modules"
	case errors.Is(err, errNoEngine):
		return "start the container engine, name its socket as [callers] engine, or choose require = \"socket\" for the modules"
	}
	return "see that the container engine answers: docker ps"
}
