package azcredential_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/agent/client/azcredential"
)

// A client of Azure Key Vault that gets its tokens over perceptd's socket.
func Example() {
	socket, vault, stop := aDevice()
	defer stop()

	credential := azcredential.New(&client.Client{Socket: socket}, nil) // client.FromEnvironment() on a device
	secrets, err := azsecrets.NewClient(vault.URL, credential, &azsecrets.ClientOptions{
		// these two are for the fake vault
		ClientOptions:                        azcore.ClientOptions{Transport: vault.Client()},
		DisableChallengeResourceVerification: true,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	secret, err := secrets.GetSecret(context.Background(), "camera-key", "", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(*secret.Value)

	// A 403: perceptd knows more of the token than the resource says.
	_, err = secrets.GetSecret(context.Background(), "forbidden", "", nil)
	var refused *azcore.ResponseError
	if errors.As(err, &refused) && refused.StatusCode == http.StatusForbidden {
		advice, err := credential.Rejected(context.Background(), "https://vault.azure.net/.default", refused.StatusCode)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(advice.Findings[0].Detail)
		fmt.Println(advice.Findings[0].Action)
	}

	// Output:
	// rtsp://camera
	// the token was minted before a known policy change
	// wait for the rollover
}

// aDevice stands for perceptd's socket and a key vault, which answers as Azure's does: a challenge at first.
func aDevice() (socket string, vault *httptest.Server, stop func()) {
	folder, err := os.MkdirTemp("/tmp", "percept") // a socket's path may have 107 bytes
	if err != nil {
		panic(err)
	}
	socket = filepath.Join(folder, "token.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		panic(err)
	}
	perceptd := &http.Server{Handler: http.HandlerFunc(answerAsPerceptd)}
	served := make(chan struct{})
	go func() { defer close(served); _ = perceptd.Serve(l) }()
	vault = httptest.NewTLSServer(http.HandlerFunc(answerAsVault))
	return socket, vault, func() {
		vault.Close()
		_ = perceptd.Close()
		<-served
		_ = os.RemoveAll(folder)
	}
}

func answerAsPerceptd(w http.ResponseWriter, r *http.Request) {
	var answer any = api.Token{AccessToken: "a.b.c", Resource: "https://vault.azure.net", ExpiresIn: 86000,
		RefreshIn: 43000, SHA256: "digest"}
	if r.URL.Path == api.PathRejected {
		answer = api.Advice{Findings: []api.Finding{{
			Cause: api.CauseStale, Detail: "the token was minted before a known policy change",
			Action: "wait for the rollover",
		}}}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

func answerAsVault(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Header.Get("Authorization") == "":
		w.Header().Set("WWW-Authenticate",
			`Bearer authorization="https://login.microsoftonline.com/00000000-0000-0000-0000-00000000000a", `+
				`resource="https://vault.azure.net"`)
		w.WriteHeader(http.StatusUnauthorized)
	case r.Header.Get("Authorization") != "Bearer a.b.c", r.URL.Path != "/secrets/camera-key/":
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		_, _ = w.Write([]byte(`{"error":{"code":"Forbidden","message":"the caller does not have permission"}}`))
	default:
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"value":"rtsp://camera","id":"https://vault/secrets/camera-key/1"}`))
	}
}

// The real azsecrets client over TLS: refused by a claims challenge that perceptd has no other token for, it says so
// once.
func TestClaimsChallengeInAPipeline(t *testing.T) {
	socket, _, stop := aDevice()
	defer stop()
	calls := 0
	vault := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			answerAsVault(w, r)
			return
		}
		calls++
		w.Header().Set("WWW-Authenticate",
			`Bearer authorization="https://login.microsoftonline.com/a", error="insufficient_claims", `+
				`claims="eyJhY2Nlc3NfdG9rZW4iOnt9fQ=="`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer vault.Close()
	secrets, err := azsecrets.NewClient(vault.URL, azcredential.New(&client.Client{Socket: socket}, nil),
		&azsecrets.ClientOptions{
			ClientOptions: azcore.ClientOptions{Transport: vault.Client(),
				Retry: policy.RetryOptions{MaxRetries: 3}},
			DisableChallengeResourceVerification: true,
		})
	if err != nil {
		t.Fatal(err)
	}
	_, err = secrets.GetSecret(t.Context(), "camera-key", "", nil)
	var final *azcredential.Error
	if !errors.As(err, &final) || calls != 1 {
		t.Errorf("after %d calls: %v", calls, err)
	}
}
