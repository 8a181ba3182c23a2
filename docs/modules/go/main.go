// The program is a module that gets a token for $RESOURCE. Nothing in it knows of perceptd.
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

func main() {
	resource := cmp.Or(os.Getenv("RESOURCE"), "https://vault.azure.net")
	credential, err := azidentity.NewDefaultAzureCredential(nil)
	if err != nil {
		log.Fatal(err)
	}
	token, err := credential.GetToken(context.Background(), policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}})
	if err != nil {
		log.Fatalf("no token for %s: %v", resource, err)
	}
	fmt.Printf("a token for %s, to be used for %.0f minutes\n", resource, time.Until(token.ExpiresOn).Minutes())
}
