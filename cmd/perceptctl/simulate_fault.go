package main

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/simulator"
)

// faultRequest is a fault with its durations as the control path takes them.
type faultRequest struct {
	simulator.Fault
	For   string `json:"for,omitempty"`
	Every string `json:"every,omitempty"`
}

func (a *app) simulateFaultCommand() *cobra.Command {
	var at string
	var clear bool
	var fault faultRequest
	var lasts, every time.Duration
	command := &cobra.Command{
		Use:   "fault KIND | --clear",
		Short: "make a simulated back end go wrong, or right again",
		Long: `Put a fault in force at a simulated back end that runs. It strikes token requests
until its count or time is used up, or until --clear ends all faults.

Kinds: ` + faultKinds(),
		Args:      cobra.MaximumNArgs(1),
		ValidArgs: strings.Split(faultKinds(), ", "),
	}
	command.RunE = func(command *cobra.Command, args []string) error {
		return a.verb(func(ctx context.Context) error {
			fault.For, fault.Every = written(lasts), written(every)
			return a.fault(ctx, at, args, fault, clear)
		})(command, args)
	}
	flags := command.Flags()
	flags.BoolVar(&clear, "clear", false, "end every fault")
	flags.IntVar(&fault.Count, "count", 0, "how many requests it strikes (default no limit)")
	flags.DurationVar(&lasts, "for", 0, "how long it lasts, by the back end's clock (default until cleared)")
	flags.Float64Var(&fault.Probability, "probability", 1, "how likely it strikes a request")
	flags.StringVar(&fault.Resource, "resource", "", "App ID `URI` that requests must be for (default any)")
	flags.BoolVar(&fault.Challenge, "challenge", false, "strike the first of Arc's two requests")
	flags.IntVar(&fault.Status, "status", 0, "of status and html: the HTTP status to answer with (default 200 for html)")
	flags.StringVar(&fault.RetryAfter, "retry-after", "", "of status, throttle and unavailable: the Retry-After header's `value`")
	flags.StringVar(&fault.RetryAfterMS, "retry-after-ms", "", "likewise: the x-ms-retry-after-ms header's `value`")
	flags.StringVar(&fault.Body, "body", "", "`text` to answer with instead of the kind's own")
	flags.Int64Var(&fault.Size, "size", 0, "of huge-body and gzip-bomb: `bytes` (default 64 MiB)")
	flags.StringVar(&fault.Location, "location", "", "of redirect: the `URL` to send callers to")
	flags.DurationVar(&every, "every", 0, "of slow-body: time between bytes (default 50ms)")
	flags.StringVar(&fault.ExpiresIn, "expires-in", "", "of times: a `lie` such as -25h, +90s, never or missing")
	flags.StringVar(&fault.ExpiresOn, "expires-on", "", "of times: likewise")
	a.atFlag(command, &at)
	return command
}

func (a *app) fault(ctx context.Context, at string, args []string, fault faultRequest, clear bool) error {
	switch {
	case clear == (len(args) == 1):
		return &usageError{errors.New("a fault's kind or --clear, one of the two")}
	case clear:
		if err := a.steer(ctx, at, http.MethodDelete, "faults", nil, nil); err != nil {
			return err
		}
		return a.print("no faults are in force\n")
	}
	var err error
	if fault.Kind, err = simulator.ParseFaultKind(args[0]); err != nil {
		return &usageError{err}
	}
	if err := a.steer(ctx, at, http.MethodPost, "faults", fault, nil); err != nil {
		return err
	}
	return a.print(fault.Kind.String() + " is in force\n")
}

func faultKinds() string {
	var names []string
	for _, kind := range simulator.FaultKinds() {
		names = append(names, kind.String())
	}
	return strings.Join(names, ", ")
}

// written is a duration as the control path takes it; none is left out.
func written(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.String()
}
