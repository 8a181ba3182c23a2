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
	engineDeadline = 2 * time.Second // of all that one proof asks
	engineCalls    = 8               // at once; more wait for their turn within their deadline
	digestsKept    = time.Minute     // what registries call an image changes only when it is pulled or pushed
	mostDigests    = 256             // images whose names are kept
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
	changed  func()
	believed owners
	flights  singleflight.Group
	turns    chan struct{}

	mu      sync.Mutex // protects what follows
	line    *line      // to the engine in use; nil: none yet
	digests map[string]named
	trouble string // why it could not be asked the last time; empty: it could
}

// named is what registries call an image.
type named struct {
	digests []string
	on      time.Time
}

// facts is what the engine says of a container.
type facts struct {
	agent.Container
	running bool
	parent  string // cgroup parent that it was started with; empty: the engine's own
	pidMode string
	init    int32 // its first process
}

func newEngine(believed owners, changed func()) *engine {
	return &engine{changed: changed, believed: believed, turns: make(chan struct{}, engineCalls)}
}

// errNoEngine says that there is nobody to ask.
var errNoEngine = errors.New("no container engine is there to ask")

// confirm has the engine say what a container is. Beside an error it returns what is known.
func (p *Attestor) confirm(ctx context.Context, rules *ruleset, in place) (*agent.Container, error) {
	what := "which container it runs in"
	bare := &agent.Container{ID: in.container}
	said, err := p.engine.ask(ctx, rules.Engines, in.container)
	var foreign *foreignError
	switch {
	case errors.Is(err, errNoEngine):
		return bare, &Error{What: what, Why: err.Error(), Hint: "perceptctl doctor, as an administrator, tells what is missing"}
	case errors.As(err, &foreign):
		return bare, &Error{What: what, Why: err.Error(), Hint: engineHint(err)}
	case errors.Is(err, errUnknown):
		return bare, &Error{What: what, Why: fmt.Sprintf("the engine knows no container %s", bare.ShortID()),
			Hint: "if another engine runs it, name that one's socket as [callers] engine"}
	case err != nil:
		return bare, &Error{What: what, Why: fmt.Sprintf("the container engine was asked in vain: %v", err), Hint: "try again when the engine answers: docker ps tells"}
	}
	if err := p.doubt(rules, in, said); err != nil {
		return &said.Container, &Error{What: what, Why: err.Error(), Hint: said.hint(in)}
	}
	return &said.Container, nil
}

func engineHint(err error) string {
	var foreign *foreignError
	switch {
	case errors.As(err, &foreign):
		return "name the socket of root's own engine as [callers] engine (a rootless one cannot prove callers), or choose require = \"socket\" for the modules"
	case errors.Is(err, fs.ErrPermission):
		return "install the drop-in container-engine.conf, which lets perceptd into the group that the engine's socket is for, or choose require = \"socket\" for the modules"
	case errors.Is(err, errNoEngine):
		return "start the container engine, name its socket as [callers] engine, or choose require = \"socket\" for the modules"
	}
	return "see that the container engine answers: docker ps"
}

// doubt says why what the engine says is not about the container that the caller runs in, or nil.
func (p *Attestor) doubt(rules *ruleset, in place, said facts) error {
	switch {
	case said.ID != in.container:
		return fmt.Errorf("the engine was asked for container %s and answered for %q", shortID(in.container), cut(said.ID))
	case !said.running || said.init <= 0:
		return errors.New("the engine says that its container does not run")
	case said.Name == "":
		return errors.New("the engine tells no name of its container")
	case said.sharesPids():
		return fmt.Errorf("its container shares the process numbers of others (--pid %s)", cut(anyID.ReplaceAllStringFunc(said.pidMode, shortID)))
	case said.isElsewhere(in):
		return fmt.Errorf("its container was started with a cgroup parent of its own (%s)", cut(said.parent))
	}
	file, err := p.kernel.read(said.init, "cgroup")
	if err != nil {
		return fmt.Errorf("the container's first process cannot be looked at: %w", err)
	}
	if first := readPlace(file, rules.parents); first.kind != inContainer || first.path != in.path {
		return fmt.Errorf("the container's first process is in cgroup %s, and the caller in %s", cut(first.path), in.path)
	}
	return nil
}

// sharesPids reports whether a container was started with --pid. Podman says "private" of the others.
func (said *facts) sharesPids() bool { return said.pidMode != "" && said.pidMode != "private" }

// isElsewhere reports whether a container was started with another --cgroup-parent than where it is.
func (said *facts) isElsewhere(in place) bool {
	return said.parent != "" && !parentIs(in.parent, said.parent)
}

// hint is what to do about a doubt.
func (said *facts) hint(in place) string {
	if said.sharesPids() || said.isElsewhere(in) {
		return "run the container without --pid and --cgroup-parent"
	}
	return ""
}

func shortID(id string) string { return (&agent.Container{ID: id}).ShortID() }

// parentIs reports whether a container's configured parent, a slice's name or a path, is that cgroup.
func parentIs(cgroup, configured string) bool {
	if strings.HasSuffix(configured, ".slice") && !strings.Contains(configured, "/") {
		return strings.HasSuffix(cgroup, "/"+configured)
	}
	return cgroup == "/"+strings.Trim(configured, "/")
}

// ask returns what the engine says of the container with that ID. Callers who ask the same engine for the same one share an
// answer.
func (e *engine) ask(ctx context.Context, paths []string, id string) (facts, error) {
	answers := e.flights.DoChan(id+strings.Join(paths, "\n"), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), engineDeadline)
		defer cancel()
		select {
		case e.turns <- struct{}{}:
			defer func() { <-e.turns }()
		case <-ctx.Done():
			return facts{}, errors.New("too many ask it at once")
		}
		said, err := e.inspect(ctx, paths, id)
		e.note(err)
		return said, err
	})
	select {
	case answer := <-answers:
		return answer.Val.(facts), answer.Err
	case <-ctx.Done():
		return facts{}, ctx.Err()
	}
}

func (e *engine) inspect(ctx context.Context, paths []string, id string) (facts, error) {
	to, err := e.open(ctx, paths)
	if err != nil {
		return facts{}, err
	}
	said, err := to.container(ctx, id)
	if err == nil {
		said.RepoDigests, err = e.repoDigests(ctx, to, said.Digest)
	}
	if err != nil && !errors.Is(err, errUnknown) {
		e.drop(to)
	}
	return said, err
}

// repoDigests returns what registries call an image. One that is no longer there has no names.
func (e *engine) repoDigests(ctx context.Context, to *line, image string) ([]string, error) {
	if image == "" {
		return nil, nil
	}
	e.mu.Lock()
	kept, there := e.digests[image]
	current := e.line == to
	e.mu.Unlock()
	if there && current && time.Since(kept.on) < digestsKept {
		return kept.digests, nil
	}
	digests, err := to.image(ctx, image)
	if err != nil && !errors.Is(err, errUnknown) {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.line != to {
		return digests, nil // another engine is in use by now
	}
	if len(e.digests) >= mostDigests || e.digests == nil {
		e.digests = make(map[string]named)
	}
	e.digests[image] = named{digests, time.Now()}
	return digests, nil
}

// open returns a line to the engine at the first of paths that is a socket.
func (e *engine) open(ctx context.Context, paths []string) (*line, error) {
	path, err := present(paths)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	known := e.line
	e.mu.Unlock()
	if known != nil && known.path == path {
		return known, nil
	}
	to, err := dial(ctx, path, e.believed)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.line == nil || e.line.path != path {
		e.line, e.digests = to, nil
	}
	return e.line, nil
}

// present returns the first of paths that is a socket.
func present(paths []string) (string, error) {
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

// forget lets go of the engine; the next question finds it anew.
func (e *engine) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.line, e.digests = nil, nil
}

// drop lets go of a line on which something went wrong: the engine may have been started anew, with another version.
func (e *engine) drop(l *line) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.line == l {
		e.line, e.digests = nil, nil
	}
}

// note keeps whether the engine could be asked.
func (e *engine) note(err error) {
	trouble := ""
	if err != nil && !errors.Is(err, errUnknown) {
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
