package attest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"perceptd/agent"
)

const (
	engineAnswer = 1 << 20  // bytes of one answer; of a usual container it has some 10 kB
	engineHeader = 16 << 10 // bytes of its header
	longestName  = 255      // characters of a container's name
	longestRef   = 512      // of an image's name
	mostRefs     = 64       // names of one image
)

// line is how one engine is talked to: two questions of Docker's API, which Podman has too, over a Unix socket. None
// of its errors repeats what the engine sent, which nobody has looked at for secrets.
type line struct {
	path    string
	version string // of the API, as the engine names its own: every engine speaks that one, and questions without are deprecated
	wire    http.RoundTripper
}

// errUnknown is an engine that knows nothing of what it was asked about.
var errUnknown = errors.New("the engine does not know it")

// dial returns a line to the engine at path, once it has answered. believed are the users whose engine it may be.
func dial(ctx context.Context, path string, believed owners) (*line, error) {
	l := &line{path: path}
	l.wire = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if err := believed.vouch(path); err != nil {
				return nil, err
			}
			conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
			if err != nil {
				return nil, err
			}
			if err := believed.vouchFor(conn.(*net.UnixConn)); err != nil {
				_ = conn.Close()
				return nil, err
			}
			return conn, nil
		},
		// A connection of its own for each question: what an engine sends beyond its answer is never read.
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: engineHeader,
	}
	answer, err := l.send(ctx, "/_ping")
	if err != nil {
		return nil, err
	}
	_ = answer.Body.Close() // its text is "OK", of no use
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: answered with status %d when it was asked whether it is there", path, answer.StatusCode)
	}
	if l.version = answer.Header.Get("Api-Version"); !apiVersion.MatchString(l.version) {
		return nil, fmt.Errorf("%s: names no version of Docker's API: is it a container engine?", path)
	}
	return l, nil
}

var apiVersion = regexp.MustCompile(`^[0-9]{1,2}\.[0-9]{1,3}$`)

// container asks what a container is.
func (l *line) container(ctx context.Context, id string) (facts, error) {
	var c inspectedContainer
	if err := l.ask(ctx, "containers", id, &c); err != nil {
		return facts{}, err
	}
	said, err := c.facts()
	if err != nil {
		return facts{}, fmt.Errorf("%s: %w", l.path, err)
	}
	return said, nil
}

// image asks what registries call an image.
func (l *line) image(ctx context.Context, id string) ([]string, error) {
	var i inspectedImage
	if err := l.ask(ctx, "images", id, &i); err != nil {
		return nil, err
	}
	return i.names(), nil
}

// ask asks about one container or image.
func (l *line) ask(ctx context.Context, kind, id string, into any) error {
	answer, err := l.send(ctx, "/v"+l.version+"/"+kind+"/"+id+"/json")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return errUnknown
	default:
		return fmt.Errorf("%s: answered with status %d", l.path, answer.StatusCode)
	}
	if media, _, err := mime.ParseMediaType(answer.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return fmt.Errorf("%s: its answer is not JSON: is it a container engine?", l.path)
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, engineAnswer+1))
	switch {
	case err != nil:
		return l.plain(ctx, err)
	case len(text) > engineAnswer:
		return fmt.Errorf("%s: its answer is longer than %d bytes", l.path, engineAnswer)
	case json.Unmarshal(text, into) != nil:
		return fmt.Errorf("%s: its answer is not one of Docker's API", l.path)
	}
	return nil
}

// send asks with GET and returns the answer as it begins. No redirect is followed.
func (l *line) send(ctx context.Context, path string) (*http.Response, error) {
	question := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "localhost", Path: path}, Header: http.Header{"User-Agent": {"perceptd"}},
	}
	answer, err := l.wire.RoundTrip(question.WithContext(ctx))
	if err != nil {
		return nil, l.plain(ctx, err)
	}
	return answer, nil
}

// plain is why there is no whole answer. Some of net/http's errors quote what was sent, so only what the kernel says is
// passed on.
func (l *line) plain(ctx context.Context, err error) error {
	var foreign *foreignError
	var dialed *net.OpError
	switch {
	case errors.As(err, &foreign):
		return err
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w", l.path, fs.ErrPermission)
	case ctx.Err() != nil:
		return fmt.Errorf("%s: no answer in time", l.path)
	case errors.As(err, &dialed) && dialed.Op == "dial", errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: nobody answers there", l.path)
	}
	return fmt.Errorf("%s: its answer broke off or is not HTTP", l.path)
}

// inspectedContainer is what is read of an engine's answer about a container, in which anything can be missing.
type inspectedContainer struct {
	ID    string `json:"Id"`
	Name  string
	Image string // its ID
	State *struct {
		Running, Restarting, Dead bool

		Pid       int32
		StartedAt string
	}
	Config *struct {
		Image  string // as it was named when the container was made
		Labels map[string]string
	}
	HostConfig *struct{ CgroupParent, PidMode string }
}

// An image's ID, which is asked about by its path.
var imageID = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// facts returns what the answer says. Its errors do not repeat the answer.
func (c *inspectedContainer) facts() (facts, error) {
	if c.State == nil || c.HostConfig == nil || c.Config == nil {
		return facts{}, errors.New("its answer has no State, HostConfig or Config")
	}
	started, err := time.Parse(time.RFC3339Nano, c.State.StartedAt)
	if err != nil {
		return facts{}, errors.New("its answer has a StartedAt that is no time")
	}
	said := facts{
		Container: agent.Container{
			ID: cut(c.ID), Name: strings.TrimPrefix(c.Name, "/"), Image: cut(c.Config.Image), Digest: c.Image, StartedOn: started,
		},
		running: c.State.Running && !c.State.Restarting && !c.State.Dead,
		parent:  c.HostConfig.CgroupParent,
		pidMode: c.HostConfig.PidMode,
		init:    c.State.Pid,
	}
	if anyID.FindString(c.Image) == c.Image && c.Image != "" {
		said.Digest = "sha256:" + c.Image // as Podman writes it
	}
	switch {
	case len(said.Name) > longestName:
		return facts{}, fmt.Errorf("its answer has a container's name of more than %d characters", longestName)
	case said.Digest != "" && !imageID.MatchString(said.Digest):
		return facts{}, errors.New("its answer has an image that is no sha256")
	}
	if c.Config.Labels[edgeOwner] == edgeAgent {
		said.EdgeModule = said.Name
	}
	return said, nil
}

// inspectedImage is what is read of an engine's answer about an image.
type inspectedImage struct{ RepoDigests []string }

// names returns what registries call the image, as far as grants can name it: no more than a few, none that is very long.
func (i *inspectedImage) names() []string {
	var names []string
	for _, name := range i.RepoDigests {
		if len(name) <= longestRef && len(names) < mostRefs {
			names = append(names, name)
		}
	}
	return names
}
