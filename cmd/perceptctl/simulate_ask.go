package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

// sdkLeaves is how long before its expiry Azure's SDKs ask for another token than the one they hold.
const sdkLeaves = 5 * time.Minute

func (a *app) simulateAskCommand() *cobra.Command {
	var at, resource string
	command := &cobra.Command{
		Use:   "ask --resource URI",
		Short: "ask a simulated back end as an SDK alone does, and show what it gives",
		Long: `Ask a simulated back end for the system-assigned identity's token, without perceptd,
as an SDK does. It shows what the token carries, and until when such an SDK keeps it.
One that answers as app-service is asked with the variables that it printed; any
other as Azure's instance metadata service.`,
		Example: `  perceptctl simulate ask --resource https://vault.azure.net`,
		Args:    cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			given, err := a.askSimulator(ctx, at, resource)
			if err != nil {
				return err
			}
			return a.print(a.screen(a.stdout).given(given))
		}),
	}
	a.atFlag(command, &at)
	command.Flags().StringVar(&resource, "resource", "", "App ID `URI` that the token is for (required)")
	// It fails only for a flag that is not defined.
	_ = command.MarkFlagRequired("resource")
	return command
}

// given is what a back end gave to an SDK alone.
type given struct {
	sha256    string
	now       time.Time // by the back end's clock
	expiresOn time.Time
	claims    simulatedClaims
}

// simulatedClaims are the claims of a simulated token that are shown.
type simulatedClaims struct {
	Simulated bool     `json:"simulated"`
	ExpiresOn int64    `json:"exp"`
	Groups    []string `json:"groups"`
	Roles     []string `json:"roles"`
	WIDs      []string `json:"wids"`
}

// askSimulator asks for a token in the form that the variables are of.
func (a *app) askSimulator(ctx context.Context, at, resource string) (given, error) {
	request, err := a.sdkRequest(at, resource)
	if err != nil {
		return given{}, &usageError{err}
	}
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true} // and no proxy
	response, err := transport.RoundTrip(request.WithContext(ctx))
	if err != nil {
		return given{}, simulatorUnreachable(ctx, at, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxControlAnswer))
	if err != nil {
		return given{}, simulatorUnreachable(ctx, at, err)
	}
	if response.StatusCode != http.StatusOK {
		return given{}, fmt.Errorf("the simulated back end answered %d", response.StatusCode)
	}
	g, err := readGiven(body)
	if err == nil {
		g.now, err = http.ParseTime(response.Header.Get("Date"))
	}
	if err != nil {
		return given{}, errors.New("what answers is not a simulated back end, or a fault is in force there")
	}
	return g, nil
}

// sdkRequest is the request that an SDK makes which finds these variables.
func (a *app) sdkRequest(at, resource string) (*http.Request, error) {
	if err := checkSimulator(at); err != nil {
		return nil, err
	}
	target, version := at+"/metadata/identity/oauth2/token", "2018-02-01"
	headers := http.Header{"Metadata": {"true"}}
	endpoint, secret := a.getenv("IDENTITY_ENDPOINT"), a.getenv("IDENTITY_HEADER")
	if secret != "" && strings.HasPrefix(endpoint, at+"/") {
		target, version, headers = endpoint, "2019-08-01", http.Header{"X-Identity-Header": {secret}}
	}
	query := url.Values{"api-version": {version}, "resource": {resource}}
	request, err := http.NewRequest(http.MethodGet, target+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	request.Header = headers
	return request, nil
}

// readGiven reads an answer, whose token has to say that it is simulated.
func readGiven(body []byte) (g given, err error) {
	var answer struct {
		Token string `json:"access_token"`
	}
	if err = json.Unmarshal(body, &answer); err != nil {
		return g, err
	}
	parts := strings.Split(answer.Token, ".")
	if len(parts) != 3 {
		return g, errors.New("it is not a token")
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return g, err
	}
	if err = json.Unmarshal(claims, &g.claims); err != nil {
		return g, err
	}
	if !g.claims.Simulated || g.claims.ExpiresOn <= 0 {
		return g, errors.New("it is not a simulated token")
	}
	sum := sha256.Sum256([]byte(answer.Token))
	g.sha256, g.expiresOn = hex.EncodeToString(sum[:6]), time.Unix(g.claims.ExpiresOn, 0)
	return g, nil
}

func (s screen) given(g given) string {
	text := s.Paragraph("token    ", "sha256 "+g.sha256, term.Plain)
	text += s.Paragraph("carries  ", carriedIn("group", g.claims.Groups)+"; "+carriedIn("app role", g.claims.Roles)+
		"; "+carriedIn("directory role", g.claims.WIDs), term.Plain)
	text += s.Paragraph("expires  ", s.atRelative(g.now, g.expiresOn), term.Plain)
	return text + s.Paragraph("kept     ", fmt.Sprintf("by an SDK alone until %s, %s before its expiry",
		s.atRelative(g.now, g.expiresOn.Add(-sdkLeaves)), explain.Duration(sdkLeaves)), term.Plain)
}

// carriedIn counts values of a claim, and lists them.
func carriedIn(what string, values []string) string {
	switch len(values) {
	case 0:
		return "no " + what + "s"
	case 1:
		return "1 " + what + " (" + term.Clean(values[0]) + ")"
	}
	return fmt.Sprintf("%d %ss (%s)", len(values), what, term.Clean(strings.Join(values, ", ")))
}
