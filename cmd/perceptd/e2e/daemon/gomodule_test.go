package daemon

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/agent/client/azcredential"
	"perceptd/cmd/perceptd/e2e/harness"
)

// A module in Go, with the real azsecrets client and a key vault over TLS, gets its token from a running perceptd, and
// is told by it what a challenge is about.
func TestGoModule(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	credential := azcredential.New(&client.Client{Socket: d.Module("vision")}, nil)
	token, err := credential.GetToken(t.Context(),
		policy.TokenRequestOptions{Scopes: []string{harness.VaultURI + "/.default"}})
	must(t, err)
	if id := harness.Claims(t, token.Token)["appid"]; id != "00000000-0000-0000-0000-000000000001" {
		t.Errorf("the token is %v's", id)
	}
	if in := time.Until(token.RefreshOn); in <= 0 || in > 31*time.Minute || !token.ExpiresOn.After(token.RefreshOn) {
		t.Errorf("to be refreshed in %v", in)
	}

	challenge := `Bearer authorization="https://login.microsoftonline.com/a", resource="https://vault.azure.net"`
	refused := 0
	vault := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Authorization") == "":
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
		case r.Header.Get("Authorization") == "Bearer "+token.Token && strings.HasPrefix(r.URL.Path, "/secrets/open/"):
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write([]byte(`{"value":"opened"}`))
		default:
			refused++
			w.Header().Set("WWW-Authenticate",
				challenge+`, error="insufficient_claims", `+
					`claims="eyJhY2Nlc3NfdG9rZW4iOnsibmJmIjp7ImVzc2VudGlhbCI6dHJ1ZSwidmFsdWUiOiIxIn19fQ=="`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer vault.Close()
	secrets, err := azsecrets.NewClient(vault.URL, credential, &azsecrets.ClientOptions{
		ClientOptions: azcore.ClientOptions{Transport: vault.Client()}, DisableChallengeResourceVerification: true,
	})
	must(t, err)
	secret, err := secrets.GetSecret(t.Context(), "open", "", nil)
	if err != nil || *secret.Value != "opened" {
		t.Fatalf("%v", err)
	}
	_, err = secrets.GetSecret(t.Context(), "shut", "", nil)
	if err == nil || !strings.Contains(err.Error(), "wants another token, and there is none") ||
		strings.Contains(err.Error(), token.Token) || refused != 1 {
		t.Errorf("refused %d times: %v", refused, err)
	}

	var advised []api.Advice
	direct := &http.Client{Transport: &client.Transport{
		Client: &client.Client{Socket: d.Module(
			"vision")}, Resource: harness.VaultURI, Hosts: []string{strings.TrimPrefix(vault.URL, "https://")},
		Base: vault.Client().Transport, Advised: func(a api.Advice) { advised = append(advised, a) },
	}}
	for path, status := range map[string]int{"/secrets/open/": 200, "/secrets/shut/": 401} {
		response, err := direct.Get(vault.URL + path)
		must(t, err)
		must(t, response.Body.Close())
		if response.StatusCode != status {
			t.Errorf("%s: %d", path, response.StatusCode)
		}
	}
	if len(advised) != 1 || len(advised[0].Findings) == 0 {
		t.Errorf("advised %+v", advised)
	}
}

// groupVault is a key vault over TLS for the members of one group, as it reads them in the token.
func groupVault(t *testing.T, group string) *httptest.Server {
	t.Helper()
	vault := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, has := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !has {
			w.Header().Set("WWW-Authenticate",
				`Bearer authorization="https://login.microsoftonline.com/a", resource="https://vault.azure.net"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if groups, _ := harness.Claims(t, token)["groups"].([]any); !slices.Contains(groups, any(group)) {
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(map[string]any{"error": map[string]string{"code": "Forbidden",
				"message": "not a member"}})
			return
		}
		_, _ = w.Write([]byte(`{"value":"opened"}`))
	}))
	t.Cleanup(vault.Close)
	return vault
}

// A module joins a group that a key vault is for. Its token is stale, so the vault answers 403, and perceptd says why
// when it is told of that; after the rollover that the module watches for, the vault opens.
func TestGoModuleOutlastsStalePermissions(t *testing.T) {
	t.Parallel()
	const group = "00000000-0000-0000-0002-000000004711"
	vault := groupVault(t, group)
	d := harness.LaunchDaemon(t, fastDays())
	c := &client.Client{Socket: d.Token()}
	credential := azcredential.New(c, nil)
	const scope = harness.VaultURI + "/.default"
	get := func() error {
		// A client keeps its token until it is to be refreshed, so another is made to have the credential asked.
		secrets, err := azsecrets.NewClient(vault.URL, credential, &azsecrets.ClientOptions{
			ClientOptions: azcore.ClientOptions{Transport: vault.Client()}, DisableChallengeResourceVerification: true,
		})
		must(t, err)
		_, err = secrets.GetSecret(t.Context(), "open", "", nil)
		return err
	}
	var advised []api.Advice
	direct := &http.Client{Transport: &client.Transport{
		Client: c, Resource: harness.VaultURI, Hosts: []string{strings.TrimPrefix(vault.URL, "https://")},
		Base: vault.Client().Transport, Advised: func(a api.Advice) { advised = append(advised, a) },
	}}
	status := func() int {
		response, err := direct.Get(vault.URL + "/secrets/open/")
		must(t, err)
		must(t, response.Body.Close())
		return response.StatusCode
	}

	stale, err := c.Token(t.Context(), client.TokenRequest{Resource: harness.VaultURI})
	must(t, err)
	harness.SimulatorDo(t, nil, "permissions", "--at", "http://"+d.Status(t).Source.Address, "--identity", "device",
		"--groups", group)
	harness.RecordChange(t, d, `{"resource":"`+harness.VaultURI+`","effect":"changed","note":"joined the group"}`)
	var refused *azcore.ResponseError
	if err := get(); !errors.As(err, &refused) || refused.StatusCode != http.StatusForbidden {
		t.Fatalf("before the rollover: %v", err)
	}
	advice, err := credential.Rejected(t.Context(), scope, refused.StatusCode)
	must(t, err)
	if advice.Retry || advice.SHA256 != stale.SHA256 || advice.Findings[0].Cause != api.CauseStale ||
		advice.Findings[0].Action == "" {
		t.Errorf("advised %+v", advice)
	}
	if got := status(); got != http.StatusForbidden || len(advised) != 1 ||
		advised[0].Findings[0].Cause != api.CauseStale {
		t.Errorf("the transport: %d, advised %+v", got, advised)
	}

	for event, err := range credential.Watch(t.Context(), scope) {
		must(t, err)
		if event.SHA256 != stale.SHA256 && event.Permissions.State == api.PermissionsCurrent {
			break
		}
	}
	if err := get(); err != nil {
		t.Errorf("after the rollover: %v", err)
	}
	if got := status(); got != http.StatusOK || len(advised) != 1 {
		t.Errorf("the transport after the rollover: %d, advised %+v", got, advised)
	}
}
