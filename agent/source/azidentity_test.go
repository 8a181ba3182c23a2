package source

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"perceptd/tokencache"
)

// What azidentity alone takes, perceptd takes too, on a device whose clock is known to be right, unless it is
// dangerous. Where they differ the row has the reason.
func TestWhatAzidentityTakes(t *testing.T) {
	t.Parallel()
	now := time.Now()
	on := now.Add(24 * time.Hour)
	type verdict = bool
	const takes, refuses verdict = true, false
	past := makeJWT(claimsAt(now).with(object{"exp": now.Unix() - 3600, "iat": now.Unix() - 90000,
		"nbf": now.Unix() - 90000}))
	for _, row := range []struct {
		name       string
		changes    object
		azidentity verdict
		ours       verdict
		reason     string
	}{
		{"as it should be", nil, takes, takes, ""},
		{"an opaque token of another type", object{"token_type": "pop"}, takes, refuses,
			"a token that is bound to a key is no bearer token, and a resource refuses it"},
		{"no token", object{"access_token": nil}, takes, refuses, "there is nothing to hand out"},
		{"expires_in alone", object{"expires_on": nil, "not_before": nil}, takes, takes, ""},
		{"expires_in 86399.5", object{"expires_in": 86399.5}, refuses, takes,
			"half a second is no reason for an outage"},
		{`expires_in "86399.0"`, object{"expires_in": "86399.0"}, refuses, takes, "likewise"},
		{"expires_in 0 with expires_on", object{"expires_in": "0"}, takes, takes, ""},
		{"expires_in -1 with expires_on", object{"expires_in": "-1"}, takes, takes, ""},
		{"expires_in of 1000 days with expires_on", object{"expires_in": 86400000}, takes, takes, ""},
		{"expires_in of 1000 days alone", object{"expires_in": 86400000, "expires_on": nil}, takes, refuses,
			"no token of a managed identity lives so long: it would be served long after its end"},
		{"expires_in -1 alone", object{"expires_in": -1, "expires_on": nil}, takes, refuses,
			"it has expired, and the next answer may have a newer one"},
		{"expires_on with a fraction", object{"expires_in": nil, "expires_on": float64(on.Unix()) + 0.5}, takes, takes,
			""},
		{"expires_on with a fraction, as a string",
			object{"expires_in": nil, "expires_on": strconv.FormatInt(on.Unix(), 10) +
				".5"}, refuses, takes, "half a second is no reason for an outage"},
		{"expires_on in words", object{"expires_in": nil, "expires_on": "tomorrow"}, refuses, refuses, ""},
		{"expires_on in milliseconds", object{"expires_in": nil, "expires_on": on.UnixMilli()}, takes, refuses,
			"it would be served for fifty thousand years"},
		{"expires_on past", object{"expires_in": nil, "expires_on": now.Unix() - 60}, takes, refuses,
			"it has expired by this device's clock; the error asks whether that is right"},
		{"expires_on of 24 hours", object{"expires_in": nil, "expires_on": on.UTC().Format("01/02/2006 15:04:05")},
			takes, takes, ""},
		{"expires_on of 12 hours", object{"expires_in": nil,
			"expires_on": on.UTC().Format("1/2/2006 3:04:05 PM -07:00")}, refuses, takes,
			"App Service's first version writes it, and it has one meaning"},
		{"expires_on of RFC 3339", object{"expires_in": nil, "expires_on": on.UTC().Format(time.RFC3339Nano)}, takes,
			takes, ""},
		{"expires_on in words, with expires_in", object{"expires_on": "tomorrow"}, refuses, takes,
			"the back end has counted the life that is left"},
		{"not_before in words", object{"not_before": "11/24/2026 1:09:39 AM, or so"}, takes, takes, ""},
		{"not_before after the expiry", object{"not_before": on.Unix() + 1}, takes, takes, ""},
		{"resource in capitals", object{"resource": strings.ToUpper(vault)}, takes, takes, ""},
		{"resource with a slash", object{"resource": vault + "/"}, takes, takes, ""},
		{"another resource", object{"resource": "https://storage.azure.com"}, takes, refuses,
			"it is another resource's token, by the endpoint's own word"},
		{"another audience in the token alone",
			object{"access_token": makeJWT(claimsAt(now).and("aud",
				"https://management.azure.com"))}, takes, takes, ""},
		{"refresh_in with a fraction", object{"refresh_in": 43200.5}, refuses, takes, "it is advice"},
		{"refresh_in -1", object{"refresh_in": -1}, takes, takes, ""},
		{"refresh_in of 30 days", object{"refresh_in": 30 * 86400}, takes, takes, ""},
		{"refresh_in in words", object{"refresh_in": "soon"}, refuses, takes, "it is advice"},
		{"ext_expires_in in words", object{"ext_expires_in": "later"}, refuses, takes, "nobody reads it"},
		{"the token expired by its own exp", object{"access_token": past}, takes, refuses,
			"by the back end's count it is over, and every resource refuses it"},
		{"another client ID", object{"client_id": objectID}, takes, refuses,
			"it is another identity's token, by the endpoint's own word"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(answering(200, goodAnswer(now).with(row.changes).String()))
			t.Cleanup(server.Close)
			address := server.Listener.Addr().String()
			if got := azidentityTakes(t, address); got != row.azidentity {
				t.Errorf("azidentity takes it: %v, want %v", got, row.azidentity)
			}
			_, err := imdsAt(t, address, Options{ClockTrusted: func() bool { return true }}).Fetch(t.Context(),
				byClient)
			if got := err == nil; got != row.ours {
				t.Errorf("taken: %v, want %v: %v", got, row.ours, err)
			}
			if err != nil {
				wantFailure(t, err, err.(*tokencache.FetchError).Kind, "")
			}
			if (row.azidentity != row.ours) != (row.reason != "") {
				t.Error("a difference has a reason, and nothing else has one")
			}
		})
	}
}

// azidentityTakes asks as a program would that has azidentity and no more.
func azidentityTakes(t *testing.T, address string) bool {
	t.Helper()
	plain := &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}}
	credential, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
		ID: azidentity.ClientID(clientID),
		ClientOptions: azcore.ClientOptions{
			Transport: &http.Client{Transport: plain},
			Retry:     policy.RetryOptions{MaxRetries: -1},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = credential.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{vault},
		Claims: bypassCacheClaims})
	return err == nil
}
