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
	maxAnswerBytes    = 1 << 20  // of one answer's body; for a typical container it has about 10 kB
	maxHeaderBytes    = 16 << 10 // of one answer's header
	maxNameLength     = 255      // of a container's name, in bytes
	maxDigestLength   = 512      // of one repo digest, in bytes
	maxDigestsOfImage = 64       // repo digests of one image
)

// engineClient makes the two calls that attestation needs, over a Unix socket. Both are of Docker's API, which Podman
// has too. But it asks Podman about a container by Podman's own API, since only that names the container's cgroup and
// pod. Its errors do not repeat what the engine sent, since that may contain secrets.
type engineClient struct {
	path      string
	version   string // the engine's own version of the API; calls without a version are deprecated
	libpod    string // the version of Podman's own API; empty: the engine is not Podman
	transport http.RoundTripper
}

// errNotFound says that the engine has no such container or image.
var errNotFound = errors.New("the engine does not know it")

// dialEngine returns a client of the engine at path, after the engine has answered a ping. It refuses an engine that
// belongs to a user who is not in trusted.
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
		return nil, fmt.Errorf("%s: answered with status %d when it was asked whether it is there",
			path, response.StatusCode)
	}
	if c.version = response.Header.Get("Api-Version"); !apiVersion.MatchString(c.version) {
		return nil, fmt.Errorf("%s: names no version of Docker's API: is it a container engine?", path)
	}
	if c.libpod = response.Header.Get("Libpod-Api-Version"); c.libpod != "" && !libpodVersion.MatchString(c.libpod) {
		return nil, fmt.Errorf("%s: names an odd version of Podman's API: is it Podman?", path)
	}
	return c, nil
}

var (
	// apiVersion matches a version of Docker's API.
	apiVersion = regexp.MustCompile(`^[0-9]{1,2}\.[0-9]{1,3}$`)

	// libpodVersion matches a version of Podman's own API.
	libpodVersion = regexp.MustCompile(`^[0-9]{1,2}\.[0-9]{1,3}\.[0-9]{1,3}(?:-[a-z0-9.]{1,16})?$`)
)

// inspectContainer asks for the facts about a container.
func (c *engineClient) inspectContainer(ctx context.Context, id string) (containerInfo, error) {
	var container containerJSON
	about := c.version + "/containers/"
	if c.libpod != "" {
		about = c.libpod + "/libpod/containers/"
	}
	if err := c.getJSON(ctx, about+id, &container); err != nil {
		return containerInfo{}, err
	}
	info, err := container.info()
	if err != nil {
		return containerInfo{}, fmt.Errorf("%s: %w", c.path, err)
	}
	return info, nil
}

// inspectImage asks for the repo digests of an image.
func (c *engineClient) inspectImage(ctx context.Context, id string) ([]string, error) {
	var image imageJSON
	if err := c.getJSON(ctx, c.version+"/images/"+id, &image); err != nil {
		return nil, err
	}
	return image.digests(), nil
}

// getJSON asks for one container or image and decodes the answer into target. about is the API's version and the path
// below it.
func (c *engineClient) getJSON(ctx context.Context, about string, target any) error {
	response, err := c.get(ctx, "/v"+about+"/json")
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
	media, _, err := mime.ParseMediaType(response.Header.Get("Content-Type"))
	if err != nil || media != "application/json" {
		return fmt.Errorf("%s: its answer is not JSON: is it a container engine?", c.path)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswerBytes+1))
	switch {
	case err != nil:
		return c.sanitize(ctx, err)
	case len(text) > maxAnswerBytes:
		return fmt.Errorf("%s: its answer is longer than %d bytes", c.path, maxAnswerBytes)
	case json.Unmarshal(text, target) != nil:
		return fmt.Errorf("%s: its answer is not one of Docker's API", c.path)
	}
	return nil
}

// get sends a GET request and returns the response, whose body is still to be read. It does not follow redirects.
func (c *engineClient) get(ctx context.Context, path string) (*http.Response, error) {
	request := &http.Request{
		Method: http.MethodGet,
		URL:    &url.URL{Scheme: "http", Host: "localhost", Path: path},
		Header: http.Header{"User-Agent": {"perceptd"}},
	}
	response, err := c.transport.RoundTrip(request.WithContext(ctx))
	if err != nil {
		return nil, c.sanitize(ctx, err)
	}
	return response, nil
}

// sanitize replaces an error of the HTTP client. Some of net/http's errors quote what the engine sent, so that only
// what the kernel said is kept.
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

// The label that the IoT Edge agent puts on the containers of its modules. Its prefix is reserved: the agent
// overwrites labels of that kind that a deployment sets.
const (
	edgeOwner = "net.azure-devices.edge.owner"
	edgeAgent = "Microsoft.Azure.Devices.Edge.Agent"
)

// containerJSON is the part that is read of the engine's answer about a container. Any of it may be missing.
type containerJSON struct {
	ID    string `json:"Id"`
	Name  string
	Image string // the image's ID; empty: it has none, as with podman run --rootfs
	State *struct {
		Running, Restarting, Dead bool

		Pid       int32
		StartedAt string

		CgroupPath string // Podman's own API alone
	}
	Pod    string // its ID; Podman's own API alone
	Config *struct {
		Image  string // as it was named when the container was made
		Labels map[string]string
	}
	HostConfig *struct{ CgroupParent, PidMode string }
}

// imageID matches the ID of an image, which becomes part of a request's path.
var imageID = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// info returns the checked answer. Its errors do not repeat the answer.
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
			ID:        truncate(c.ID),
			Name:      strings.TrimPrefix(c.Name, "/"),
			Image:     truncate(c.Config.Image),
			Digest:    c.Image,
			StartedOn: started,
		},
		running: c.State.Running && !c.State.Restarting && !c.State.Dead,
		parent:  c.HostConfig.CgroupParent,
		pidMode: c.HostConfig.PidMode,
		cgroup:  c.State.CgroupPath,
		pod:     c.Pod,
		init:    c.State.Pid,
	}
	if containerID.FindString(c.Image) == c.Image && c.Image != "" {
		parsed.Digest = "sha256:" + c.Image // as Podman writes it
	}
	switch {
	case len(parsed.Name) > maxNameLength:
		return containerInfo{}, fmt.Errorf("its answer has a container's name of more than %d characters",
			maxNameLength)
	case parsed.Digest != "" && !imageID.MatchString(parsed.Digest):
		return containerInfo{}, errors.New("its answer has an image that is no sha256")
	}
	if c.Config.Labels[edgeOwner] == edgeAgent {
		parsed.EdgeModule = parsed.Name
	}
	return parsed, nil
}

// imageJSON is the part that is read of the engine's answer about an image.
type imageJSON struct{ RepoDigests []string }

// digests returns the repo digests of the image, without those that are too long or too many.
func (i *imageJSON) digests() []string {
	var names []string
	for _, name := range i.RepoDigests {
		if len(name) <= maxDigestLength && len(names) < maxDigestsOfImage {
			names = append(names, name)
		}
	}
	return names
}
