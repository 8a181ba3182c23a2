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

	"perceptd/agent"
)

const (
	engineTimeout  = 2 * time.Second // of all that one proof asks
	maxEngineCalls = 8               // at once; more wait for their turn within their deadline
	digestTTL      = time.Minute     // what registries call an image changes only when it is pulled or pushed
	maxDigests     = 256             // images whose names are kept
)

// What IoT Edge's agent puts on the containers that it makes. The prefix is its own: labels of that kind in a
// deployment are overwritten.
const (
	edgeOwner = "net.azure-devices.edge.owner"
	edgeAgent = "Microsoft.Azure.Devices.Edge.Agent"
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

// containerInfo is what the engine says of a container.
type containerInfo struct {
	agent.Container
	running bool
	parent  string // cgroup parent that it was started with; empty: the engine's own
	pidMode string
	init    int32 // its first process
}

func newEngine(trusted trustedOwners, changed func()) *engine {
	return &engine{changed: changed, trusted: trusted, slots: make(chan struct{}, maxEngineCalls)}
}

// errNoEngine says that there is nobody to ask.
var errNoEngine = errors.New("no container engine is there to ask")

// attestContainer has the engine say what a container is. Beside an error it returns what is known.
func (a *Attestor) attestContainer(ctx context.Context, rules *ruleset, at location) (*agent.Container, error) {
	unattested := "which container it runs in"
	bare := &agent.Container{ID: at.container}
	info, err := a.engine.inspect(ctx, rules.Engines, at.container)
	var untrusted *untrustedError
	switch {
	case errors.Is(err, errNoEngine):
		return bare, &Error{What: unattested, Why: err.Error(), Hint: "perceptctl doctor, as an administrator, tells what is missing"}
	case errors.As(err, &untrusted):
		return bare, &Error{What: unattested, Why: err.Error(), Hint: engineHint(err)}
	case errors.Is(err, errNotFound):
		return bare, &Error{What: unattested, Why: fmt.Sprintf("the engine knows no container %s", bare.ShortID()),
			Hint: "if another engine runs it, name that one's socket as [callers] engine"}
	case err != nil:
		return bare, &Error{What: unattested, Why: fmt.Sprintf("the container engine was asked in vain: %v", err), Hint: "try again when the engine answers: docker ps tells"}
	}
	if err := a.checkContainer(rules, at, info); err != nil {
		return &info.Container, &Error{What: unattested, Why: err.Error(), Hint: info.hint(at)}
	}
	return &info.Container, nil
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

// checkContainer says why what the engine says is not about the container that the caller runs in, or nil.
func (a *Attestor) checkContainer(rules *ruleset, at location, info containerInfo) error {
	switch {
	case info.ID != at.container:
		return fmt.Errorf("the engine was asked for container %s and answered for %q", shortID(at.container), truncate(info.ID))
	case !info.running || info.init <= 0:
		return errors.New("the engine says that its container does not run")
	case info.Name == "":
		return errors.New("the engine tells no name of its container")
	case info.sharesPidNamespace():
		return fmt.Errorf("its container shares the process numbers of others (--pid %s)", truncate(anyID.ReplaceAllStringFunc(info.pidMode, shortID)))
	case info.hasForeignParent(at):
		return fmt.Errorf("its container was started with a cgroup parent of its own (%s)", truncate(info.parent))
	}
	file, err := a.kernel.readFile(info.init, "cgroup")
	if err != nil {
		return fmt.Errorf("the container's first process cannot be looked at: %w", err)
	}
	if first := parseCgroup(file, rules.parents); first.kind != inContainer || first.path != at.path {
		return fmt.Errorf("the container's first process is in cgroup %s, and the caller in %s", truncate(first.path), at.path)
	}
	return nil
}

// sharesPidNamespace reports whether a container was started with --pid. Podman says "private" of the others.
func (info *containerInfo) sharesPidNamespace() bool {
	return info.pidMode != "" && info.pidMode != "private"
}

// hasForeignParent reports whether a container was started with another --cgroup-parent than where it is.
func (info *containerInfo) hasForeignParent(at location) bool {
	return info.parent != "" && !isParent(at.parent, info.parent)
}

// hint is what to do about a doubt.
func (info *containerInfo) hint(at location) string {
	if info.sharesPidNamespace() || info.hasForeignParent(at) {
		return "run the container without --pid and --cgroup-parent"
	}
	return ""
}

func shortID(id string) string { return (&agent.Container{ID: id}).ShortID() }

// isParent reports whether a container's configured parent, a slice's name or a path, is that cgroup.
func isParent(cgroup, configured string) bool {
	if strings.HasSuffix(configured, ".slice") && !strings.Contains(configured, "/") {
		return strings.HasSuffix(cgroup, "/"+configured)
	}
	return cgroup == "/"+strings.Trim(configured, "/")
}

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
