package daemon

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// identityService is IoT Edge's identity service and its key service, which know one module.
type identityService struct {
	identitySocket, keySocket string
	asked, signed             atomic.Int64 // how often each was asked, refusals included
	refuse                    atomic.Bool  // the identity service knows nobody
}

// startIdentityService serves what a connection string says, whose key it keeps to itself.
func startIdentityService(t *testing.T, connectionString string) *identityService {
	t.Helper()
	said := make(map[string]string)
	for _, part := range strings.Split(connectionString, ";") {
		key, value, _ := strings.Cut(part, "=")
		said[key] = value
	}
	key, err := base64.StdEncoding.DecodeString(said["SharedAccessKey"])
	must(t, err)
	folder := harness.ShortFolder(t)
	s := &identityService{
		identitySocket: filepath.Join(folder, "identityd.sock"), keySocket: filepath.Join(folder, "keyd.sock"),
	}
	gateway := said["GatewayHostName"]
	if gateway == "" {
		gateway = said["HostName"]
	}
	const handle = "handle-of-the-key"
	answer := func(w http.ResponseWriter, status int, body any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(body)
	}
	s.serve(t, s.identitySocket, "GET /identities/identity", func(w http.ResponseWriter, _ *http.Request) {
		s.asked.Add(1)
		if s.refuse.Load() {
			answer(w, 403, map[string]string{"message": "unauthorized"})
			return
		}
		answer(w, 200, map[string]any{"type": "aziot", "spec": map[string]any{
			"hubName": said["HostName"], "gatewayHost": gateway, "deviceId": said["DeviceId"],
			"moduleId": said["ModuleId"], "genId": "1", "auth": map[string]string{"type": "sas", "keyHandle": handle},
		}})
	})
	s.serve(t, s.keySocket, "POST /sign", func(w http.ResponseWriter, q *http.Request) {
		s.signed.Add(1)
		var asked struct {
			KeyHandle, Algorithm string
			Parameters           struct{ Message []byte }
		}
		err := json.NewDecoder(q.Body).Decode(&asked)
		if err != nil || asked.KeyHandle != handle || asked.Algorithm != "HMAC-SHA256" ||
			q.Header.Get("Content-Type") != "application/json" || q.URL.Query().Get("api-version") != "2020-09-01" {
			answer(w, 400, map[string]string{"message": "bad request"})
			return
		}
		mac := hmac.New(sha256.New, key)
		mac.Write(asked.Parameters.Message)
		answer(w, 200, map[string]string{"signature": base64.StdEncoding.EncodeToString(mac.Sum(nil))})
	})
	return s
}

// serve answers one path on a socket until the test ends.
func (s *identityService) serve(t *testing.T, socket, path string, answer http.HandlerFunc) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc(path, answer)
	l, err := net.Listen("unix", socket)
	must(t, err)
	served := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = served.Serve(l) }()
	t.Cleanup(func() { _ = served.Close(); <-done })
}
