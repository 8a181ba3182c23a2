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

	"perceptd/agent/grants"
)

const (
	maxAnswerBytes    = 1 << 20  // bytes of one answer; of a usual container it has some 10 kB
	maxHeaderBytes    = 16 << 10 // bytes of its header
	maxNameLength     = 255      // characters of a container's name
	maxDigestLength   = 512      // of an image's name
	maxDigestsOfImage = 64       // names of one image
)

// engineClient is how one engine is talked to: two questions of Docker's API, which Podman has too, over a Unix socket. None
// of its errors repeats what the engine sent, which nobody has looked at for secrets.
type engineClient struct {
	path      string
	version   string // of the API, as the engine names its own: every engine speaks that one, and questions without are deprecated
	transport http.RoundTripper
}

// errNotFound is an engine that knows nothing of what it was asked about.
var errNotFound = errors.New("the engine does not know it")

// dialEngine returns a line to the engine at path, once it has answered. believed are the users whose engine it may be.
func dialEngine(ctx context.Context, path string, trusted trustedOwners) (*engineClient, error) {
	c := &engineClient{path: path}
	c.transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if err := trusted.checkPath(path); err != nil {
				return nil, err
			}
			conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
			if err != nil {
				return nil, err
			}
			if err := trusted.checkListener(conn.(*net.UnixConn)); err != nil {
				_ = conn.Close()
				return nil, err
			}
			return conn, nil
		},
		// A connection of its own for each question: what an engine sends beyond its answer is never read.
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeaderBytes,
	}
	response, err := c.get(ctx, "/_ping")
	if err != nil {
		return nil, err
	}
	_ = response.Body.Close() // its text is "OK", of no use
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: answered with status %d when it was asked whether it is there", path, response.StatusCode)
	}
	if c.version = response.Header.Get("Api-Version"); !apiVersion.MatchString(c.version) {
		return nil, fmt.Errorf("%s: names no version of Docker's API: is it a container engine?", path)
	}
	return c, nil
}

var apiVersion = regexp.MustCompile(`^[0-9]{1,2}\.[0-9]{1,3}$`)

// inspectContainer asks what a inspectContainer is.
func (c *engineClient) inspectContainer(ctx context.Context, id string) (containerInfo, error) {
	var container containerJSON
	if err := c.getJSON(ctx, "containers", id, &container); err != nil {
		return containerInfo{}, err
	}
	info, err := container.info()
	if err != nil {
		return containerInfo{}, fmt.Errorf("%s: %w", c.path, err)
	}
	return info, nil
}

// inspectImage asks what registries call an inspectImage.
func (c *engineClient) inspectImage(ctx context.Context, id string) ([]string, error) {
	var image imageJSON
	if err := c.getJSON(ctx, "images", id, &image); err != nil {
		return nil, err
	}
	return image.digests(), nil
}

// getJSON asks about one container or image.
func (c *engineClient) getJSON(ctx context.Context, kind, id string, into any) error {
	response, err := c.get(ctx, "/v"+c.version+"/"+kind+"/"+id+"/json")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	switch response.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return errNotFound
	default:
		return fmt.Errorf("%s: answered with status %d", c.path, response.StatusCode)
	}
	if media, _, err := mime.ParseMediaType(response.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return fmt.Errorf("%s: its answer is not JSON: is it a container engine?", c.path)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswerBytes+1))
	switch {
	case err != nil:
		return c.sanitize(ctx, err)
	case len(text) > maxAnswerBytes:
		return fmt.Errorf("%s: its answer is longer than %d bytes", c.path, maxAnswerBytes)
	case json.Unmarshal(text, into) != nil:
		return fmt.Errorf("%s: its answer is not one of Docker's API", c.path)
	}
	return nil
}

// get asks with GET and returns the answer as it begins. No redirect is followed.
func (c *engineClient) get(ctx context.Context, path string) (*http.Response, error) {
	request := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: "localhost", Path: path}, Header: http.Header{"User-Agent": {"perceptd"}},
	}
	response, err := c.transport.RoundTrip(request.WithContext(ctx))
	if err != nil {
		return nil, c.sanitize(ctx, err)
	}
	return response, nil
}

// sanitize is why there is no whole answer. Some of net/http's errors quote what was sent, so only what the kernel says is
// passed on.
func (c *engineClient) sanitize(ctx context.Context, err error) error {
	var untrusted *untrustedError
	var dialed *net.OpError
	switch {
	case errors.As(err, &untrusted):
		return err
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w", c.path, fs.ErrPermission)
	case ctx.Err() != nil:
		return fmt.Errorf("%s: no answer in time", c.path)
	case errors.As(err, &dialed) && dialed.Op == "dial", errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: nobody answers there", c.path)
	}
	return fmt.Errorf("%s: its answer broke off or is not HTTP", c.path)
}

// What IoT Edge's agent puts on the containers that it makes. The prefix is its own: labels of that kind in a
// deployment are overwritten.
const (
	edgeOwner = "net.azure-devices.edge.owner"
	edgeAgent = "Microsoft.Azure.Devices.Edge.Agent"
)

// containerJSON is what is read of an engine's answer about a container, in which anything can be missing.
type containerJSON struct {
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

// info returns what the answer says. Its errors do not repeat the answer.
func (c *containerJSON) info() (containerInfo, error) {
	if c.State == nil || c.HostConfig == nil || c.Config == nil {
		return containerInfo{}, errors.New("its answer has no State, HostConfig or Config")
	}
	started, err := time.Parse(time.RFC3339Nano, c.State.StartedAt)
	if err != nil {
		return containerInfo{}, errors.New("its answer has a StartedAt that is no time")
	}
	parsed := containerInfo{
		Container: grants.Container{
			ID: truncate(c.ID), Name: strings.TrimPrefix(c.Name, "/"), Image: truncate(c.Config.Image), Digest: c.Image, StartedOn: started,
		},
		running: c.State.Running && !c.State.Restarting && !c.State.Dead,
		parent:  c.HostConfig.CgroupParent,
		pidMode: c.HostConfig.PidMode,
		init:    c.State.Pid,
	}
	if anyID.FindString(c.Image) == c.Image && c.Image != "" {
		parsed.Digest = "sha256:" + c.Image // as Podman writes it
	}
	switch {
	case len(parsed.Name) > maxNameLength:
		return containerInfo{}, fmt.Errorf("its answer has a container's name of more than %d characters", maxNameLength)
	case parsed.Digest != "" && !imageID.MatchString(parsed.Digest):
		return containerInfo{}, errors.New("its answer has an image that is no sha256")
	}
	if c.Config.Labels[edgeOwner] == edgeAgent {
		parsed.EdgeModule = parsed.Name
	}
	return parsed, nil
}

// imageJSON is what is read of an engine's answer about an image.
type imageJSON struct{ RepoDigests []string }

// digests returns what registries call the image, as far as grants can name it: no more than a few, none that is very long.
func (i *imageJSON) digests() []string {
	var names []string
	for _, name := range i.RepoDigests {
		if len(name) <= maxDigestLength && len(names) < maxDigestsOfImage {
			names = append(names, name)
		}
	}
	return names
}
