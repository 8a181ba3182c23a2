package source

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"perceptd/tokencache"
)

const (
	vault    = "https://vault.azure.net"
	clientID = "11111111-aaaa-bbbb-cccc-000000000001"
	objectID = "22222222-aaaa-bbbb-cccc-000000000002"
	armID    = "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/vision"

	canary = "canary-that-must-not-be-seen"
)

var (
	system   = tokencache.Key{Resource: vault}
	byClient = tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ClientID, ID: clientID}, Resource: vault}
	byObject = tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ObjectID, ID: objectID}, Resource: vault}
	byARM    = tokencache.Key{Selector: tokencache.Selector{Kind: tokencache.ResourceID, ID: armID}, Resource: vault}
)

func TestMain(m *testing.M) {
	// azidentity reads these at every call; a test that needs one sets it for itself.
	for _, name := range []string{envEndpoint, envHeader, envThumbprint, envIMDS, envMSI, envMSISecret,
		envAuthorityHost} {
		if err := os.Unsetenv(name); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(m)
}

type object map[string]any

// with returns o changed by the members of changes; a nil value takes a member away.
func (o object) with(changes object) object {
	out := object{}
	for _, from := range []object{o, changes} {
		for name, value := range from {
			out[name] = value
			if value == nil {
				delete(out, name)
			}
		}
	}
	return out
}

// and returns o with one member changed.
func (o object) and(name string, value any) object { return o.with(object{name: value}) }

func (o object) String() string {
	text, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func fieldsOf(o object) fields { return parseFields([]byte(o.String())) }

func makeJWT(claims object) string {
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"none"}`)) + "." + encode([]byte(claims.String())) + "." + encode([]byte(canary))
}

// claimsAt are those of a token of the user-assigned identity, minted at now.
func claimsAt(now time.Time) object {
	return object{
		"aud": vault, "appid": clientID, "oid": objectID, "tid": "t", "xms_mirid": armID,
		"iat": now.Unix() - 300, "nbf": now.Unix() - 300, "exp": now.Unix() + 86400,
		"groups": []string{"g1", "g2"}, "roles": []string{"r"}, "wids": []string{"w"},
	}
}

// goodAnswer is what IMDS answers for an opaque token minted at now.
func goodAnswer(now time.Time) object {
	return object{
		"access_token": canary, "token_type": "Bearer", "resource": vault, "refresh_token": "",
		"expires_in": "86400", "expires_on": strconv.FormatInt(now.Unix()+86400, 10),
		"not_before": strconv.FormatInt(now.Unix()-300, 10),
	}
}

// imdsAt is the metadata service, redirected to a listener on the loopback interface.
func imdsAt(t *testing.T, address string, o Options) *ManagedIdentity {
	t.Helper()
	m := newAt(target{form: IMDS, scheme: "http", host: "169.254.169.254", dial: address}, o)
	return m
}

func imds(t *testing.T, handler http.HandlerFunc) *ManagedIdentity {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return imdsAt(t, server.Listener.Addr().String(), Options{})
}

// answering serves one body under one status.
func answering(status int, body string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

// talking serves connections with a function that reads and writes them raw.
func talking(t *testing.T, talk func(net.Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			talk(conn)
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = listener.Close(); <-done })
	return listener.Addr().String()
}

// wantFailure checks an error's kind and words, and that no canary is in it whichever way it is printed.
// It returns an empty failure when err is none.
func wantFailure(t *testing.T, err error, kind tokencache.Kind, words string) *tokencache.FetchError {
	t.Helper()
	failed := new(tokencache.FetchError)
	if !errors.As(err, &failed) {
		t.Errorf("got error %v, want a *tokencache.FetchError", err)
		return failed
	}
	if failed.Kind != kind || !strings.Contains(failed.Detail, words) {
		t.Errorf("got %v: %q\nwant %v with %q", failed.Kind, failed.Detail, kind, words)
	}
	noCanary(t, err)
	return failed
}

func noCanary(t *testing.T, values ...any) {
	t.Helper()
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
			if s := fmt.Sprintf(verb, v); strings.Contains(s, canary) {
				t.Errorf("a secret is printed by %s: %s", verb, s)
			}
		}
	}
}
