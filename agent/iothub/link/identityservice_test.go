package link

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"perceptd/agent/api"
)

// edgeHandle is the handle of a key in these tests. It must be in no error.
const edgeHandle = "sr%3Dkey-of-percept%26sig%3DcanaryHandle"

// edgeKey is the key itself, which keyd has.
var edgeKey = []byte("the key that never leaves keyd")

// edgeIdentity is an answer of identityd.
const edgeIdentity = `{"type":"aziot","spec":{"hubName":"hub.test","gatewayHost":"hub.test","deviceId":"device-7",` +
	`"moduleId":"percept","genId":"638","auth":{"type":"sas","keyHandle":"` + edgeHandle + `"}}}`

// edge is IoT Edge's two services, each on a Unix socket.
func edge(t *testing.T, identityd, keyd http.HandlerFunc) IdentityService {
	t.Helper()
	folder, err := os.MkdirTemp("", "aziot") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	s := IdentityService{filepath.Join(folder, "identityd.sock"), filepath.Join(folder, "keyd.sock")}
	for path, handler := range map[string]http.HandlerFunc{s.IdentitySocket: identityd, s.KeySocket: keyd} {
		if handler == nil {
			continue
		}
		listener, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		server := http.Server{Handler: handler}
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(listener) }()
		t.Cleanup(func() { _ = server.Close(); <-done })
	}
	return s
}

// answers is a service that answers everything alike.
func answers(status int, text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(text))
	}
}

// identityd is what IoT Edge's answers to the question that its documents name, and to nothing else.
func identityd(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.String() != "/identities/identity?api-version=2020-09-01" {
			http.Error(w, `{"message":"not found"}`, http.StatusNotFound)
			return
		}
		_, _ = w.Write([]byte(text))
	}
}

// keyd signs as IoT Edge's does.
func keyd(w http.ResponseWriter, r *http.Request) {
	var question struct {
		KeyHandle, Algorithm string
		Parameters           struct{ Message []byte }
	}
	err := json.NewDecoder(r.Body).Decode(&question)
	switch {
	case r.Method != http.MethodPost || r.URL.String() != "/sign?api-version=2020-09-01":
		http.Error(w, `{"message":"not found"}`, http.StatusNotFound)
	case r.Header.Get("Content-Type") != "application/json", err != nil, question.Algorithm != "HMAC-SHA256":
		http.Error(w, `{"message":"malformed request"}`, http.StatusBadRequest)
	case question.KeyHandle != edgeHandle:
		http.Error(w, `{"message":"parameter keyHandle: invalid"}`, http.StatusBadRequest)
	default:
		_ = json.NewEncoder(w).Encode(map[string][]byte{"signature": signedByEdge(question.Parameters.Message)})
	}
}

func signedByEdge(data []byte) []byte {
	mac := hmac.New(sha256.New, edgeKey)
	mac.Write(data)
	return mac.Sum(nil)
}

func TestIdentityServiceSaysWhoThisIsAndSigns(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		answer string
		want   Identity
	}{
		"a module": {edgeIdentity, Identity{Hub: "hub.test", Device: "device-7", Module: "percept"}},
		"a gateway": {strings.Replace(edgeIdentity, `"gatewayHost":"hub.test"`, `"gatewayHost":"parent"`, 1),
			Identity{Hub: "hub.test", Gateway: "parent", Device: "device-7", Module: "percept"}},
		"no gateway": {strings.Replace(edgeIdentity, `"gatewayHost":"hub.test",`, "", 1),
			Identity{Hub: "hub.test", Device: "device-7", Module: "percept"}},
		"the same host in other letters": {
			strings.Replace(edgeIdentity, `"gatewayHost":"hub.test"`, `"gatewayHost":"HUB.test"`, 1),
			Identity{Hub: "hub.test", Device: "device-7", Module: "percept"}},
		"a device": {strings.Replace(edgeIdentity, `"moduleId":"percept","genId":"638",`, "", 1),
			Identity{Hub: "hub.test", Device: "device-7"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			login, err := edge(t, identityd(row.answer), keyd).Login(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if login.Identity != row.want || login.Certificate != nil {
				t.Errorf("login is of %+v with certificate %v, want %+v and none",
					login.Identity, login.Certificate, row.want)
			}
			signature, err := login.Sign(t.Context(), []byte("hub.test%2Fdevices\n1"))
			if err != nil || !hmac.Equal(signature, signedByEdge([]byte("hub.test%2Fdevices\n1"))) {
				t.Errorf("signature is %x, error %v: it is not keyd's", signature, err)
			}
		})
	}
}

func TestIdentityServiceIsAskedAnew(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	s := edge(t, func(w http.ResponseWriter, r *http.Request) {
		switch calls.Add(1) {
		case 1: // the first one, while it makes the module known
			http.Error(w, `{"message":"caller not authorized"}`, http.StatusUnauthorized)
		case 2, 3:
			identityd(edgeIdentity)(w, r)
		default: // it was provisioned to another hub
			identityd(strings.NewReplacer("hub.test", "other.test", "canary", "other").Replace(edgeIdentity))(w, r)
		}
	}, keyd)
	if _, err := s.Login(t.Context()); err == nil {
		t.Error("a refusal is no error")
	}
	var logins [3]Login
	for n := range logins {
		login, err := s.Login(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		logins[n] = login
	}
	if !logins[0].isSame(&logins[1]) || logins[1].isSame(&logins[2]) {
		t.Error("logins are the same where their identities and keys are, and there alone")
	}
}

func TestIdentityServiceThatIsOfNoUse(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 10<<20)
	for name, row := range map[string]struct {
		identityd http.HandlerFunc
		want      string
	}{
		"it refuses":           {answers(401, `{"message":"not authorized"}`), `"not authorized"): it knows its`},
		"the hub refused it":   {answers(404, `{"message":"hub client error"}`), `status 404 ("hub client error")`},
		"it fails":             {answers(500, `{"message":"internal error"}`), `status 500 ("internal error")`},
		"it says no more":      {answers(503, ``), "status 503"},
		"it sends elsewhere":   {http.RedirectHandler("/elsewhere", http.StatusFound).ServeHTTP, "status 302"},
		"its words are long":   {answers(500, `{"message":"`+long[:60000]+`"}`), long[:maxSaid] + `"`},
		"its words are odd":    {answers(500, `{"message":"a\nb\u001b[2J"}`), `"a b [2J"`},
		"it sends no JSON":     {answers(200, `keyHandle=`+edgeHandle), "is not the JSON"},
		"it sends other JSON":  {answers(200, `{"spec":{"auth":{"keyHandle":["`+edgeHandle+`"]}}}`), "is not the JSON"},
		"it sends too much":    {answers(200, long), "longer than"},
		"it refuses at length": {answers(400, long), "longer than"},
		"its header is long": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Long", long[:1<<20])
		}, "identityd.sock"},
		"it hangs up": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
		"it speaks no HTTP": {func(w http.ResponseWriter, _ *http.Request) {
			c, _, _ := w.(http.Hijacker).Hijack()
			_, _ = c.Write([]byte(long[:50000] + "\r\n\r\n"))
			_ = c.Close()
		}, "malformed HTTP"},
		"a local identity": {identityd(strings.Replace(edgeIdentity, "aziot", "local", 1)),
			`type "local"`},
		"a certificate":           {identityd(strings.Replace(edgeIdentity, `"sas"`, `"x509"`, 1)), `by "x509"`},
		"no key":                  {identityd(strings.Replace(edgeIdentity, edgeHandle, "", 1)), "names no key"},
		"no hub":                  {identityd(strings.ReplaceAll(edgeIdentity, "hub.test", "")), "hub's name"},
		"a hub that is a path":    {identityd(strings.ReplaceAll(edgeIdentity, "hub.test", "a/b")), "hub's name"},
		"no device":               {identityd(strings.Replace(edgeIdentity, "device-7", "", 1)), "device's ID"},
		"a module that is a path": {identityd(strings.Replace(edgeIdentity, `"percept"`, `"a/b"`, 1)), "module's ID"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := edge(t, row.identityd, keyd).Login(t.Context())
			checkEdgeError(t, err, row.want)
		})
	}
}

// checkEdgeError checks an error: what it says, and what it does not.
func checkEdgeError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("the error is %.500v, want one with %.300q", err, want)
	}
	if strings.Contains(err.Error(), "canary") || len(err.Error()) > 1000 {
		t.Errorf("the error of %d bytes has a key's handle in it, or too much: %.500v", len(err.Error()), err)
	}
	if failure := failureOf(err); failure != api.HubFailureIdentity {
		t.Errorf("the failure is %q, want %q", failure, api.HubFailureIdentity)
	}
}

func TestKeydThatDoesNotSign(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		keyd http.HandlerFunc
		want string
	}{
		"it refuses":              {answers(400, `{"message":"no key `+edgeHandle+`"}`), "does not sign"},
		"it fails":                {answers(500, `{"message":"`+edgeHandle+`"}`), "status 500"},
		"it sends no JSON":        {answers(200, edgeHandle), "is not the JSON"},
		"it sends no base64":      {answers(200, `{"signature":"`+edgeHandle+`"}`), "no signature"},
		"it signs in another way": {answers(200, `{"signature":"MTIzNA=="}`), "no signature"},
		"it sends nothing":        {answers(200, `{}`), "no signature"},
		"it sends too much":       {answers(200, strings.Repeat(" ", 1<<20)), "longer than"},
		"it is not there":         {nil, "no socket"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			login, err := edge(t, identityd(edgeIdentity), row.keyd).Login(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, err = login.Sign(t.Context(), []byte("data"))
			checkEdgeError(t, err, row.want)
		})
	}
}

func TestIdentityServiceThatIsNotReached(t *testing.T) {
	t.Parallel()
	_, err := edge(t, nil, keyd).Login(t.Context())
	checkEdgeError(t, err, "no socket: IoT Edge 1.2")

	s := edge(t, nil, keyd)
	listener, err := net.Listen("unix", s.IdentitySocket)
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = listener.Close()
	_, err = s.Login(t.Context())
	checkEdgeError(t, err, "nobody serves the socket")

	// Root may connect to each socket, and so the kernel's answer to others is given here.
	service := edgeService{name: "keyd", group: "aziotks", path: s.KeySocket}
	for _, refused := range []error{syscall.EACCES, fs.ErrPermission} {
		explained := service.explain(fmt.Errorf("connect: %w", refused))
		checkEdgeError(t, service.fault("%w", explained), "the group aziotks")
	}
}

func TestIdentityServiceThatIsSilent(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := edge(t, func(_ http.ResponseWriter, r *http.Request) {
		cancel() // the caller's time is up while it waits
		<-r.Context().Done()
	}, keyd)
	_, err := s.Login(ctx)
	checkEdgeError(t, err, "context canceled")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error %v is not that of the context", err)
	}
}

// FuzzIdentityAnswer shows that an answer of identityd leads to names that IoT Hub allows, or to an error that has no
// handle of a key in it.
func FuzzIdentityAnswer(f *testing.F) {
	f.Add([]byte(edgeIdentity))
	f.Add([]byte(`{"type":"aziot","spec":{"hubName":"a/b","auth":{"type":"sas","keyHandle":"k"}}}`))
	f.Add([]byte(`{"type":"aziot","spec":{"auth":{"type":"\u0000"}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var answer identityAnswer
		if json.Unmarshal(text, &answer) != nil {
			return
		}
		login, err := answer.login()
		if err == nil && (login.Validate() != nil || answer.Spec.Auth.KeyHandle == "") {
			t.Errorf("%q leads to %+v", text, login.Identity)
		}
	})
}

// An answer that hands over the connection ends, as every other does: its body is the connection, of which no context
// ends a read.
func TestIdentityServiceThatSwitchesProtocols(t *testing.T) {
	t.Parallel()
	switches := func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = c.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"))
		_, _ = c.Read(make([]byte, 1)) // until the other side closes it
		_ = c.Close()
	}
	for name, s := range map[string]IdentityService{
		"identityd": edge(t, switches, keyd), "keyd": edge(t, identityd(edgeIdentity), switches),
	} {
		login, err := s.Login(t.Context())
		if err == nil {
			_, err = login.Sign(t.Context(), []byte("x"))
		}
		if err == nil || !strings.Contains(err.Error(), "101") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
