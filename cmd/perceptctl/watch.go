package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) watchCommand() *cobra.Command {
	var request client.WatchRequest
	var asJSON bool
	command := &cobra.Command{
		Use:   "watch RESOURCE",
		Short: "tell when a token or its permissions change",
		Long: `Print a line for what perceptd holds of a token that this process is granted, at once
and at each change, until Ctrl-C:

  token        a new token; ask for it with perceptctl token
  permissions  the same token, judged otherwise
  expired      there is no valid token any more
  ended        the grant is gone or perceptd goes down: the watch is over

No token text is shown. The exit status is 0 once you end it with Ctrl-C, and 4
where the token is denied meanwhile. --timeout bounds the wait for the first line.`,
		Example:           `  perceptctl watch https://vault.azure.net --identity vision`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.fromStatus(cachedResources),
	}
	command.RunE = a.verbWithArgs(func(ctx context.Context, args []string) error {
		request.Resource = api.FullResource(args[0])
		return a.watchToken(ctx, request, asJSON)
	})
	flags := command.Flags()
	flags.StringVar(&request.Identity, "identity", "", "`name` of the identity (default: what your grants say)")
	flags.BoolVar(&asJSON, "json", false, "print each event as a line of JSON")
	a.completeFrom(command, "identity", identityNames)
	return command
}

// watchToken prints events until ctx ends, which is how it is meant to end.
func (a *app) watchToken(ctx context.Context, request client.WatchRequest, asJSON bool) error {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	timeout := a.timeout
	if timeout <= 0 {
		timeout = math.MaxInt64
	}
	overdue := time.AfterFunc(timeout, stop)
	defer overdue.Stop()
	s := a.screen(a.stdout)
	for event, err := range a.client.Watch(watching, request) {
		switch {
		case err != nil && ctx.Err() != nil:
			return nil
		case err != nil && watching.Err() != nil:
			return &client.UnreachableError{Socket: a.client.TokenSocketPath(), Err: context.DeadlineExceeded}
		case err != nil:
			return a.withMissingGrant(err)
		}
		overdue.Stop()
		if err := a.printEvent(s, event, asJSON); err != nil {
			return err
		}
		if event.Name == api.EventEnded {
			switch event.Code {
			case api.CodeDenied, api.CodeNotGranted, api.CodeFaultyGrant, api.CodeRevoked:
				return deniedError(event.Code, "the watch is over, since the token is denied: "+event.Detail)
			}
			return &hintedError{errors.New("perceptd ended the watch"), "systemctl status perceptd tells how it is"}
		}
	}
	return nil
}

// eventLine is an event as --json prints it.
type eventLine struct {
	Event string `json:"event"`
	api.WatchEvent
}

func (a *app) printEvent(s screen, event client.Event, asJSON bool) error {
	if asJSON {
		return a.printJSONLine(eventLine{event.Name, event.WatchEvent})
	}
	return a.print(s.event(event))
}

// event is one line for what there is now.
func (s screen) event(event client.Event) string {
	text := event.Now.In(s.location()).Format(time.TimeOnly) + fmt.Sprintf("  %-11s  ", term.Clean(event.Name))
	switch {
	case event.Detail != "":
		text += term.Clean(event.Detail)
	case event.SHA256 == "":
		text += "no valid token"
	default:
		text += fmt.Sprintf("%s until %s, ", term.Clean(explain.ShortDigest(event.SHA256)), s.at(event.Now, event.ExpiresOn))
		text += s.permissionsText(event.Now, event.Permissions)
	}
	return text + "\n"
}
