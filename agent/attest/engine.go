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
	engineTimeout  = 2 * time.Second // for all calls of one attestation
	maxEngineCalls = 8               // at once; others wait for a slot until engineTimeout
	digestTTL      = time.Minute     // an image's repo digests change only when it is pulled or pushed
	maxDigests     = 256             // images whose repo digests are cached
)

// engine calls the container engine at the first of the configured sockets. Callers in the same container share one
// call. A call that hangs delays no caller in another container.
type engine struct {
	changed func()        // called when calls begin to fail, and when they succeed again
	trusted trustedOwners // the users whose engine is trusted
	flights singleflight.Group
	slots   chan struct{} // holds one value for each call under way

	mu      sync.Mutex              // protects what follows
	client  *engineClient           // of the engine in use; nil: none yet
	digests map[string]imageDigests // cache, by image ID
	trouble string                  // why the last call failed; empty: it succeeded
}

// imageDigests are the repo digests of an image, which name it in registries.
type imageDigests struct {
	digests []string
	readAt  time.Time
}

// errNoEngine says that none of the configured paths is a socket.
var errNoEngine = errors.New("no container engine is there to ask")

func newEngine(trusted trustedOwners, changed func()) *engine {
	return &engine{changed: changed, trusted: trusted, slots: make(chan struct{}, maxEngineCalls)}
}

// inspect returns what the engine at the first socket of paths says about a container. Concurrent calls for the same
// paths and the same container share one answer.
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

// inspectOnce asks the engine about a container and its image.
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

// repoDigests returns the repo digests of an image, from the cache if possible. An image that the engine no longer
// has has none.
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
		return digests, nil // the engine has changed
	}
	if len(e.digests) >= maxDigests || e.digests == nil {
		e.digests = make(map[string]imageDigests)
	}
	e.digests[image] = imageDigests{digests, time.Now()}
	return digests, nil
}

// connect returns a client of the engine at the first of paths that is a socket.
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

// pingTimeout is how long an engine may take to answer a ping.
const pingTimeout = time.Second

// ping returns nil if an engine answers.
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

// reset discards the client and the cache. The next call connects again.
func (e *engine) reset() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.client, e.digests = nil, nil
}

// drop discards a client after a failed call, since the engine may have been restarted with another API version.
func (e *engine) drop(client *engineClient) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client == client {
		e.client, e.digests = nil, nil
	}
}

// recordResult records whether the last call failed, and calls changed if the one before had the other result.
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

// engineHint returns what to do about an error of the engine's.
func engineHint(err error) string {
	var untrusted *untrustedError
	switch {
	case errors.As(err, &untrusted):
		return "name the socket of root's own engine as [callers] engine (a rootless one cannot prove callers), " +
			"or choose require = \"socket\" for the modules"
	case errors.Is(err, fs.ErrPermission):
		return "install the drop-in container-engine.conf for Docker or podman.socket.conf for Podman, " +
			"which lets perceptd ask the engine, " +
			"or choose require = \"socket\" for the modules"
	case errors.Is(err, errNoEngine):
		return "start the container engine, name its socket as [callers] engine, " +
			"or choose require = \"socket\" for the modules"
	}
	return "see that the container engine answers: docker ps or podman ps"
}
