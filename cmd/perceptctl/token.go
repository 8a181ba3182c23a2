package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
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
		return a.withMissingGrant(ctx, err, request)
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

// withMissingGrant adds to a denial the grant that would lift it, for the caller as perceptd sees it: in a container
// this process's own uid would name another user of the device.
func (a *app) withMissingGrant(ctx context.Context, err error, request client.TokenRequest) error {
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Code != api.CodeNotGranted {
		return err
	}
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	caller := ""
	if who, err := a.client.WhoAmI(ctx); err == nil && who.Proved {
		caller = grantable(who.Caller)
	}
	if caller == "" {
		return &hintedError{err,
			"perceptctl whoami tells how perceptd sees this process, and so whether a grant can be for it"}
	}
	const hint = `if it should be allowed, add this to /etc/percept/config.toml and run perceptctl reload:
  [[grant]]
  caller    = %s
  identity  = %q
  resources = [%q]`
	return &hintedError{err, fmt.Sprintf(hint, caller, cmp.Or(request.Identity, "NAME"), request.Resource)}
}

// grantable returns the caller of a grant that would be for c, as a configuration has it; empty: none would.
func grantable(c api.Caller) string {
	switch {
	case c.Module != "":
		return fmt.Sprintf("{ module = %q }", c.Module)
	case c.Container != nil && len(c.Container.RepoDigests) > 0:
		return fmt.Sprintf("{ container_image = %q }", c.Container.RepoDigests[0])
	case c.Container != nil && c.Container.Digest != "":
		return fmt.Sprintf("{ container_image = %q }", c.Container.Digest)
	case c.Container != nil:
		return ""
	case c.Unit != "":
		return fmt.Sprintf("{ unit = %q }", c.Unit)
	case c.Nested:
		return "" // its user says nothing
	case c.User != "":
		return fmt.Sprintf("{ user = %q }", c.User)
	case c.UID != nil:
		return fmt.Sprintf("{ uid = %d }", *c.UID)
	}
	return ""
}
