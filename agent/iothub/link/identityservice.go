package link

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"unicode"
)

// Where IoT Edge has its sockets, from 1.2 on.
const (
	defaultIdentitySocket = "/run/aziot/identityd.sock"
	defaultKeySocket      = "/run/aziot/keyd.sock"
)

// IdentityService is the credentials that IoT Edge has for a service on its device: identityd says who that service is,
// and keyd signs for it. The key stays with keyd.
type IdentityService struct {
	IdentitySocket, KeySocket string // paths; empty: where IoT Edge has them
}

// Login asks identityd who this process is. It asks once: the next connection asks again, also for what has changed.
func (s IdentityService) Login(ctx context.Context) (Login, error) {
	identityd := edgeService{
		name: "identityd", group: "aziotid", path: s.IdentitySocket,
		refused: "it knows its clients by their user: [[principal]] in /etc/aziot/identityd/config.d must name the " +
			`uid of this process, with idtype = ["module"]; while it makes the module known to the hub it may ` +
			`refuse, too`,
	}
	if identityd.path == "" {
		identityd.path = defaultIdentitySocket
	}
	var answer identityAnswer
	if err := identityd.call(ctx, http.MethodGet, "/identities/identity", nil, &answer); err != nil {
		return Login{}, err
	}
	login, err := answer.login()
	if err != nil {
		return Login{}, identityd.fault("its answer is of no use: %w", err)
	}
	keyd := edgeService{
		name: "keyd", group: "aziotks", path: s.KeySocket, discreet: true,
		refused: "it does not sign with the key that identityd named",
	}
	if keyd.path == "" {
		keyd.path = defaultKeySocket
	}
	handle := answer.Spec.Auth.KeyHandle
	login.secret = sha256.Sum256([]byte(handle))
	login.Sign = func(ctx context.Context, data []byte) ([]byte, error) { return keyd.sign(ctx, handle, data) }
	return login, nil
}

// identityAnswer is what identityd says about its caller.
type identityAnswer struct {
	Type string `json:"type"`
	Spec struct {
		Hub     string `json:"hubName"`
		Gateway string `json:"gatewayHost"`
		Device  string `json:"deviceId"`
		Module  string `json:"moduleId"`
		Auth    struct {
			Type      string `json:"type"`
			KeyHandle string `json:"keyHandle"` // who has it can have keyd sign
		} `json:"auth"`
	} `json:"spec"`
}

// login returns a Login that does not yet sign.
func (a *identityAnswer) login() (Login, error) {
	identity := Identity{Hub: a.Spec.Hub, Gateway: a.Spec.Gateway, Device: a.Spec.Device, Module: a.Spec.Module}
	if strings.EqualFold(identity.Gateway, identity.Hub) {
		identity.Gateway = ""
	}
	switch {
	case a.Type != "aziot":
		return Login{}, fmt.Errorf("it names an identity of type %q, and not one of IoT Hub: "+
			`write idtype = ["module"] below [[principal]]`, cut(a.Type))
	case a.Spec.Auth.Type != "sas":
		return Login{}, fmt.Errorf("this identity signs in by %q, and not by a key: have a module identity, which "+
			`does, by idtype = ["module"] below [[principal]]`, cut(a.Spec.Auth.Type))
	case a.Spec.Auth.KeyHandle == "":
		return Login{}, errors.New("it names no key")
	}
	return Login{Identity: identity}, identity.Validate()
}

// hmacSize is the length of a signature, in bytes.
const hmacSize = sha256.Size

// sign has keyd sign data with the key of that handle.
func (s *edgeService) sign(ctx context.Context, handle string, data []byte) ([]byte, error) {
	type parameters struct {
		Message []byte `json:"message"` // in JSON as base64, which is what keyd wants
	}
	question := struct {
		KeyHandle  string     `json:"keyHandle"`
		Algorithm  string     `json:"algorithm"`
		Parameters parameters `json:"parameters"`
	}{handle, "HMAC-SHA256", parameters{data}}
	var answer struct {
		Signature string `json:"signature"`
	}
	if err := s.call(ctx, http.MethodPost, "/sign", question, &answer); err != nil {
		return nil, err
	}
	signature, err := base64.StdEncoding.DecodeString(answer.Signature)
	if err != nil || len(signature) != hmacSize {
		return nil, s.fault("its answer is no signature by HMAC-SHA256")
	}
	return signature, nil
}

// edgeService is one of IoT Edge's services on the device: JSON over HTTP on a Unix socket.
type edgeService struct {
	name, group, path string
	refused           string // what a refusal means
	discreet          bool   // what it says about an error is not repeated
}

// edgeAPIVersion is of identityd and keyd alike: the oldest that both have.
const edgeAPIVersion = "2020-09-01"

// maxEdgeAnswer bounds an answer, and its header, in bytes.
const maxEdgeAnswer = 64 << 10

// call sends question (nil: nothing) and decodes the answer. Each call has a connection of its own, so that what a
// service sends beyond its answer is never read.
func (s *edgeService) call(ctx context.Context, method, path string, question, answer any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return s.fault("%w", err)
	}
	if question == nil {
		body = nil
	}
	url := "http://" + s.name + ".sock" + path + "?api-version=" + edgeAPIVersion
	request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return s.fault("%w", err)
	}
	if question != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.path)
		},
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxEdgeAnswer,
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return s.fault("%w", s.explain(err))
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusSwitchingProtocols { // its body is the connection, which nothing ends
		return s.fault("it answered with status %d", response.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxEdgeAnswer+1))
	switch {
	case err != nil:
		return s.fault("%w", err)
	case len(text) > maxEdgeAnswer:
		return s.fault("its answer is longer than %d bytes", maxEdgeAnswer)
	case response.StatusCode != http.StatusOK:
		return s.refusal(response.StatusCode, text)
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return s.fault("its answer is not the JSON that it should be") // err may quote a handle
	}
	return nil
}

// explain says why a service cannot be reached.
func (s *edgeService) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no socket: IoT Edge 1.2 or newer (aziot-identity-service) has it; see that it "+
			"is installed and runs (systemctl status aziot-%s)", s.name)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the socket is for the group %s, to which this process must belong: install iot-edge.conf "+
			"as a drop-in of perceptd's unit", s.group)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nobody serves the socket: is the service up (systemctl status aziot-%s)?", s.name)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("it did not answer in time: %w", err)
	case errors.Is(err, context.Canceled):
		return err
	}
	return errors.New(cut(err.Error())) // it may quote what came
}

// refusal says what a status means that is not 200.
func (s *edgeService) refusal(status int, text []byte) error {
	var said struct {
		Message string `json:"message"`
	}
	reason := fmt.Sprintf("it answered with status %d", status)
	if json.Unmarshal(text, &said) == nil && said.Message != "" && !s.discreet {
		reason += fmt.Sprintf(" (%q)", cut(said.Message))
	}
	if status < http.StatusInternalServerError {
		reason += ": " + s.refused
	}
	return s.fault("%s", reason)
}

// maxSaid bounds what is repeated of another's words, in bytes.
const maxSaid = 200

// cut returns another's words on one line, and not too long.
func cut(words string) string {
	return oneLine(strings.ToValidUTF8(words[:min(len(words), maxSaid)], ""))
}

func oneLine(words string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, words)
}

func (s *edgeService) fault(format string, args ...any) error {
	return &IdentityServiceError{Socket: s.path, Err: fmt.Errorf(format, args...)}
}
