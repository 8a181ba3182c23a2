package harness

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

// SDKVariable makes the test binary an SDK's client instead: what it holds is the socket to ask on, or OverTCP.
// azidentity's environment and cache belong to a process, so both ends need one of their own.
const SDKVariable = "PERCEPTD_TEST_SDK"

// OverTCP has that client be as it comes, and go by its environment alone.
const OverTCP = "tcp"

// askAsSDK gets tokens through the real azidentity over a Unix socket and prints them, one a line. Each
// argument is a resource and, for a user-assigned identity, the kind of ID and the ID.
func askAsSDK(socket string, args []string) int {
	var dialer net.Dialer
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", socket)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial}}
	if socket == OverTCP {
		client = http.DefaultClient
	}
	for _, arg := range args {
		token, err := sdkToken(client, strings.Fields(arg))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(token)
	}
	return 0
}

func sdkToken(client *http.Client, ask []string) (string, error) {
	options := azidentity.ManagedIdentityCredentialOptions{ClientOptions: azcore.ClientOptions{Transport: client}}
	if len(ask) == 3 {
		switch ask[1] {
		case "client_id":
			options.ID = azidentity.ClientID(ask[2])
		case "object_id":
			options.ID = azidentity.ObjectID(ask[2])
		case "resource_id":
			options.ID = azidentity.ResourceID(ask[2])
		}
	}
	credential, err := azidentity.NewManagedIdentityCredential(&options)
	if err != nil {
		return "", err
	}
	token, err := credential.GetToken(context.Background(),
		policy.TokenRequestOptions{Scopes: []string{ask[0] + "/.default"}})
	return token.Token, err
}
