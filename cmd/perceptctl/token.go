package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) tokenCommand() *cobra.Command {
	var request client.TokenRequest
	var asJSON, short bool
	var issuedAfter string
	command := &cobra.Command{
		Use:   "token --resource URI",
		Short: "print a token that this process is granted",
		Long: `Print the token alone on standard output, or all that perceptd says of it with
--json. perceptd decides by the socket and the user who asks; what it grants to
others it does not grant to you.

The token is a secret: whoever has it has the identity's rights until it expires.

--issued-after asks for a token that was minted after that moment, such as the one
at which permissions changed. The back end cannot be made to mint one, so perceptd
refuses until it hands one out; --wait gives it some time.`,
		Example: `  curl -H "Authorization: Bearer $(perceptctl token --resource https://vault.azure.net)" ...
  perceptctl token --resource https://storage.azure.com --identity vision --min-ttl 30m --json
  perceptctl token --resource https://vault.azure.net --issued-after 14:05 --wait 10m --short`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			switch {
			case request.MinTTL < 0:
				return &usageError{fmt.Errorf("--min-ttl %v is negative", request.MinTTL)}
			case request.Wait < 0:
				return &usageError{fmt.Errorf("--wait %v is negative", request.Wait)}
			}
			var err error
			if request.IssuedAfter, err = a.timeFlag("issued-after", issuedAfter, func() (time.Time, error) {
				ctx, cancel := a.withTimeout(ctx)
				defer cancel()
				who, err := a.client.WhoAmI(ctx)
				return who.Now, err
			}); err != nil {
				return err
			}
			request.Resource = api.FullResource(request.Resource)
			return a.token(ctx, request, asJSON, short)
		}),
	}
	flags := command.Flags()
	flags.StringVar(&request.Resource, "resource", "", "App ID `URI` that the token is for (required)")
	flags.StringVar(&request.Identity, "identity", "", "`name` of the identity (default: what your grants say)")
	flags.DurationVar(&request.MinTTL, "min-ttl", 0, "life that the token must have left")
	flags.StringVar(&issuedAfter, "issued-after", "",
		"`time` after which the token must have been minted: 14:05, 10m ago, or RFC 3339")
	flags.DurationVar(&request.Wait, "wait", 0,
		"how long to wait for a token that will do, at most 10m; --timeout comes on top")
	flags.BoolVar(&asJSON, "json", false, "print perceptd's whole answer")
	flags.BoolVar(&short, "short", false, "print the token's beginning and length only, fit to be shown")
	a.completeFrom(command, "identity", identityNames)
	a.completeFrom(command, "resource", cachedResources)
	command.MarkFlagsMutuallyExclusive("json", "short")
	// It fails only for a flag that is not defined.
	_ = command.MarkFlagRequired("resource")
	return command
}

// tokenText is what a bearer token is made of (RFC 6750, 2.1).
var tokenText = regexp.MustCompile(`^[0-9A-Za-z._~+/-]+=*$`)

func (a *app) token(ctx context.Context, request client.TokenRequest, asJSON, short bool) error {
	ctx, cancel := a.withTimeoutBeyond(ctx, request.Wait)
	defer cancel()
	token, err := a.client.Token(ctx, request)
	if err != nil {
		return a.withMissingGrant(err)
	}
	if !tokenText.MatchString(token.AccessToken) {
		return errors.New("perceptd's answer has no token, but text that no token has: nothing of it is printed")
	}
	if short {
		return a.print(shortened(token.AccessToken) + "\n")
	}
	if a.stdout.IsTerminal() {
		// A remark only: the token is printed whether or not it can be made.
		_, _ = fmt.Fprintf(a.stderr, "%s this is a secret for the next %s; --short shows less\n",
			a.screen(a.stderr).Paint(term.Warning, "careful:"), explain.Duration(seconds(token.ExpiresIn)))
	}
	if asJSON {
		return a.printJSON(token)
	}
	return a.print(token.AccessToken + "\n")
}

// shortened shows that there is a token and no more: its first characters are the beginning of a
// JWT's header, which is the same for all.
func shortened(token string) string {
	const shown = 12
	return fmt.Sprintf("%s… (%d characters)", token[:min(shown, len(token)/4)], len(token))
}

// withMissingGrant adds to a denial the grant that would lift it, as perceptd suggests it.
func (a *app) withMissingGrant(err error) error {
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Code != api.CodeNotGranted || refusal.NearMiss != nil {
		return err // the detail says what to do
	}
	if refusal.Suggestion == nil {
		return &hintedError{err,
			"perceptctl whoami tells how perceptd sees this process, and so whether a grant can be for it"}
	}
	return &hintedError{err, suggestionHint(*refusal.Suggestion)}
}

// mend says how an administrator gives a caller what it was denied, with a command that is short enough to be copied.
func mend(d api.Denial) string {
	text := "if it should have it: "
	if d.Suggestion.AddTo != nil {
		text += fmt.Sprintf("add the resource to %v and run perceptctl reload, or ", d.Suggestion.AddTo)
	}
	return fmt.Sprintf("%ssudo perceptctl grants add --from-denial %d", text, d.ID)
}

// suggestionHint says how an administrator gives a caller what it was denied.
func suggestionHint(s api.Suggestion) string {
	hint := "if it should be allowed, on the device: "
	if s.AddTo != nil {
		hint += "add the resource to " + term.Clean(s.AddTo.String()) + " and run perceptctl reload, or\n"
	}
	return hint + "sudo " + term.Clean(s.Command) + "\nwhich adds this grant:\n" +
		strings.TrimSuffix(linesOf(s.TOML, term.Gap), "\n")
}

// linesOf returns a text's lines as they are, each behind a lead.
func linesOf(text, lead string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(strings.TrimRight(lead+term.Clean(strings.TrimSuffix(line, "\n")), " ") + "\n")
	}
	return b.String()
}
