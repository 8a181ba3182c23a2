package caller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sync/singleflight"

	"perceptd/agent"
)

const (
	engineDeadline = 2 * time.Second // of all that one proof asks
	engineCalls    = 8               // at once; more wait for their turn within their deadline
	engineAnswer   = 4 << 20         // bytes of one answer
	digestsKept    = time.Minute     // what registries call an image changes only when it is pulled or pushed
	mostDigests    = 256             // images whose names are kept
)

// What IoT Edge's agent puts on the containers that it makes. The prefix is its own: labels of that kind in a
// deployment are overwritten.
const (
	edgeOwner = "net.azure-devices.edge.owner"
	edgeAgent = "Microsoft.Azure.Devices.Edge.Agent"
)

// engine asks a container engine by Docker's API, which Podman has too. Who waits for an engine that does not
// answer holds up nobody else, and there is one question at a time about each container.
type engine struct {
	changed func()
	flights singleflight.Group
	turns   chan struct{}

	mu      sync.Mutex // protects what follows
	line    *line      // to the engine in use; nil: none yet
	digests map[string]named
	trouble string // why it could not be asked the last time; empty: it could
}

// line is how one engine is talked to.
type line struct {
	path string
	api  *client.Client
	wire *http.Transport
	shut atomic.Bool // its socket is for others
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

func newEngine(changed func()) *engine {
	return &engine{changed: changed, turns: make(chan struct{}, engineCalls)}
}

// errNoEngine says that there is nobody to ask.
var errNoEngine = errors.New("no container engine is there to ask")

// confirm has the engine say what a container is. Beside an error it returns what is known.
func (p *Prover) confirm(ctx context.Context, rules *ruleset, in place) (*agent.Container, error) {
	what := "which container it runs in"
	bare := &agent.Container{ID: in.container}
	said, err := p.engine.ask(ctx, rules.Engines, in.container)
	switch {
	case errors.Is(err, errNoEngine):
		return bare, &UnprovedError{What: what, Why: err.Error(), Hint: "perceptctl doctor, as an administrator, tells what is missing"}
	case errdefs.IsNotFound(err):
		return bare, &UnprovedError{What: what, Why: fmt.Sprintf("the engine knows no container %s", bare.ShortID()),
			Hint: "if another engine runs it, name that one's socket as [callers] engine"}
	case err != nil:
		return bare, &UnprovedError{What: what, Why: fmt.Sprintf("the container engine was asked in vain: %v", err), Hint: "try again when the engine answers: docker ps tells"}
	}
	if err := p.doubt(rules, in, said); err != nil {
		return &said.Container, &UnprovedError{What: what, Why: err.Error(), Hint: said.hint(in)}
	}
	return &said.Container, nil
}

// doubt says why what the engine says is not about the container that the caller runs in, or nil.
func (p *Prover) doubt(rules *ruleset, in place, said facts) error {
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
	to, err := e.open(paths)
	if err != nil {
		return facts{}, err
	}
	found, err := to.api.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return facts{}, to.plain(ctx, err)
	}
	said, err := read(&found.Container)
	if err != nil {
		return facts{}, err
	}
	said.RepoDigests, err = e.repoDigests(ctx, to, said.Digest)
	return said, to.plain(ctx, err)
}

// read takes what matters out of an engine's answer, in which anything can be missing.
func read(c *container.InspectResponse) (facts, error) {
	if c.State == nil || c.HostConfig == nil || c.Config == nil {
		return facts{}, errors.New("its answer has no State, HostConfig or Config")
	}
	started, err := time.Parse(time.RFC3339Nano, c.State.StartedAt)
	if err != nil {
		return facts{}, fmt.Errorf("its answer has StartedAt %q", cut(c.State.StartedAt))
	}
	said := facts{
		Container: agent.Container{
			ID: c.ID, Name: strings.TrimPrefix(c.Name, "/"), Image: c.Config.Image, Digest: c.Image, StartedOn: started,
		},
		running: c.State.Running && !c.State.Restarting && !c.State.Dead,
		parent:  c.HostConfig.CgroupParent,
		pidMode: string(c.HostConfig.PidMode),
		init:    int32(c.State.Pid),
	}
	if anyID.FindString(c.Image) == c.Image && c.Image != "" {
		said.Digest = "sha256:" + c.Image // as Podman writes it
	}
	if c.Config.Labels[edgeOwner] == edgeAgent {
		said.EdgeModule = said.Name
	}
	return said, nil
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
	found, err := to.api.ImageInspect(ctx, image)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.line != to {
		return found.RepoDigests, nil // another engine is in use by now
	}
	if len(e.digests) >= mostDigests || e.digests == nil {
		e.digests = make(map[string]named)
	}
	e.digests[image] = named{found.RepoDigests, time.Now()}
	return found.RepoDigests, nil
}

// open returns a line to the engine at the first of paths that is a socket.
func (e *engine) open(paths []string) (*line, error) {
	path, err := present(paths)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.line != nil && e.line.path == path {
		return e.line, nil
	}
	to := &line{path: path}
	to.wire = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
			to.shut.Store(errors.Is(err, fs.ErrPermission))
			return conn, err
		},
		MaxIdleConns: 2, IdleConnTimeout: 15 * time.Second, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
	}
	// The host is for the address that it writes into requests; the client given after it does the talking.
	to.api, err = client.New(client.WithHost("unix://"+path), client.WithHTTPClient(&http.Client{Transport: bounded{to.wire}, CheckRedirect: noRedirect}))
	if err != nil {
		return nil, err
	}
	e.close()
	e.line, e.digests = to, nil
	return to, nil
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
	e.close()
	e.line, e.digests = nil, nil
}

// close is called with the lock held.
func (e *engine) close() {
	if e.line != nil {
		e.line.wire.CloseIdleConnections()
	}
}

// note keeps whether the engine could be asked.
func (e *engine) note(err error) {
	trouble := ""
	if err != nil && !errdefs.IsNotFound(err) {
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

// plain takes the client's own explanations, which are for people at a terminal, out of an error.
func (l *line) plain(ctx context.Context, err error) error {
	switch {
	case err == nil || errdefs.IsNotFound(err):
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%s: no answer in time", l.path)
	case l.shut.Load():
		return fmt.Errorf("%s: %w", l.path, fs.ErrPermission)
	case client.IsErrConnectionFailed(err):
		return fmt.Errorf("%s: nobody answers there", l.path)
	}
	return errors.New(cut(err.Error()))
}

func noRedirect(*http.Request, []*http.Request) error {
	return errors.New("its answer leads elsewhere")
}

// bounded refuses answers without end.
type bounded struct{ *http.Transport }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := b.Transport.RoundTrip(r)
	if err == nil {
		answer.Body = &boundedBody{answer.Body, engineAnswer}
	}
	return answer, err
}

type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("its answer is longer than %d bytes", engineAnswer)
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}
