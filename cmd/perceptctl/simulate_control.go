package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/client"
	"perceptd/agent/explain"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptctl/term"
)

// simulatorVariable names the URL of a simulated back end that runs.
const simulatorVariable = simulator.URLVariable

const maxControlAnswer = 4 << 20 // bytes; a full state is far below

// atFlag adds the flag by which the verbs that steer a simulated back end find it.
func (a *app) atFlag(command *cobra.Command, at *string) {
	command.Flags().StringVar(at, "at", a.getenv(simulatorVariable),
		"`URL` of the simulated back end; $"+simulatorVariable+" sets the default")
}

// controlSimulator asks the simulated back end at that URL and decodes what it says into answer. A nil body is
// not sent, a nil answer not read.
func (a *app) controlSimulator(ctx context.Context, at, method, path string, body, answer any) error {
	if err := checkSimulator(at); err != nil {
		return &usageError{err}
	}
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, at+"/simulator/"+path, content)
	if err != nil {
		return err
	}
	request.Header.Set("Simulator-Control", "true")
	transport := &http.Transport{DisableKeepAlives: true} // and no proxy
	response, err := transport.RoundTrip(request)
	if err != nil {
		return simulatorUnreachable(ctx, at, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxControlAnswer))
	if err != nil {
		return simulatorUnreachable(ctx, at, err)
	}
	return decodeSimulatorAnswer(at, response.StatusCode, text, answer)
}

// decodeSimulatorAnswer decodes an answer, or makes an error of it.
func decodeSimulatorAnswer(at string, status int, text []byte, answer any) error {
	var refusal struct{ Error string }
	switch {
	case status == http.StatusNoContent, status == http.StatusOK && answer == nil:
		return nil
	case status == http.StatusOK:
		if json.Unmarshal(text, answer) == nil {
			return nil
		}
	case json.Unmarshal(text, &refusal) == nil && refusal.Error != "":
		return errors.New(refusal.Error)
	}
	return fmt.Errorf("what answers at %s is no simulated back end", at)
}

// checkSimulator refuses what --at cannot be.
func checkSimulator(at string) error {
	if at == "" {
		return errors.New("which simulated back end? --at or $" + simulatorVariable + " must say")
	}
	if err := simulator.CheckURL(at); err != nil {
		return fmt.Errorf("--at: %w", err)
	}
	return nil
}

func simulatorUnreachable(ctx context.Context, at string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	var dial *net.OpError
	if errors.As(err, &dial) {
		err = dial.Err
	}
	return &hintedError{
		&client.UnreachableError{Socket: at, Err: err},
		"no simulated back end is there: perceptctl simulate starts one and prints its URL",
	}
}

// simulatorState is simulator.State as it comes over the wire, where the rollover is a word.
type simulatorState struct {
	simulator.State
	Rollover string `json:"rollover"`
}

func (a *app) simulateStateCommand() *cobra.Command {
	var at string
	var asJSON bool
	command := &cobra.Command{
		Use:   "state",
		Short: "show what a simulated back end knows",
		Long: `Show a simulated back end's identities, the tokens in its cache, when each rolls
over, how often it was asked, and the faults in force. Times are by its clock.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			var state simulatorState
			if err := a.controlSimulator(ctx, at, http.MethodGet, "state", nil, &state); err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(state)
			}
			return a.print(a.screen(a.stdout).simulation(state))
		}),
	}
	a.atFlag(command, &at)
	command.Flags().BoolVar(&asJSON, "json", false, "print the whole state")
	return command
}

func (s screen) simulation(state simulatorState) string {
	text := s.Paragraph("SIMULATED: ", simulatedWarning, term.Loud)
	text += s.Paragraph("clock     ", state.Now.UTC().Format(time.DateTime)+" UTC", term.Plain)
	text += s.Paragraph("tokens    ", fmt.Sprintf("live %s, rollover at %s, spread %s, replicas %d",
		state.Life, state.Rollover, state.PropagationDelay, state.Replicas), term.Plain)
	text += s.Paragraph("requests  ", fmt.Sprintf("%d, at most %d at once", state.Calls.Total, state.Calls.Peak),
		term.Plain)
	text += "\n" + s.simulatedIdentities(state.Identities)
	text += "\n" + s.simulatedTokens(state)
	text += "\n" + s.faults(state)
	return text
}

func (s screen) simulatedIdentities(identities []simulator.IdentityState) string {
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "SELECTOR", Shrinks: true}, {Title: "GROUPS"},
		{Title: "ROLES"}, {Title: "WIDS"}}
	rows := make([]term.Row, len(identities))
	for i, identity := range identities {
		selector := "client_id " + identity.ClientID
		if identity.SystemAssigned {
			selector = "system-assigned"
		}
		now := identity.InForce
		rows[i] = term.Row{Cells: []term.Cell{
			{Text: identity.Name}, {Text: selector}, count(now.Groups), count(now.Roles), count(now.WIDs),
		}}
		to := identity.Permissions
		if !slices.Equal(now.Groups, to.Groups) || !slices.Equal(now.Roles, to.Roles) ||
			!slices.Equal(now.WIDs, to.WIDs) {
			rows[i].Notes = []term.Cell{{Text: "its permissions were changed, which has not reached new tokens yet",
				Style: term.Warning}}
		}
	}
	return s.Table(columns, rows)
}

func count(list []string) term.Cell { return term.Cell{Text: strconv.Itoa(len(list))} }

func (s screen) simulatedTokens(state simulatorState) string {
	if len(state.Tokens) == 0 {
		return "no tokens were handed out\n"
	}
	calls := make(map[simulator.Key]int)
	for _, c := range state.Calls.PerKey {
		calls[c.Key] = c.Calls
	}
	columns := []term.Column{{Title: "IDENTITY", Shrinks: true}, {Title: "RESOURCE", Shrinks: true}, {Title: "NO"},
		{Title: "REPLICA"},
		{Title: "EXPIRES"}, {Title: "ROLLOVER"}, {Title: "ASKED"}}
	rows := make([]term.Row, len(state.Tokens))
	for i, token := range state.Tokens {
		rows[i] = term.Row{Cells: []term.Cell{
			{Text: token.Identity}, {Text: token.Resource},
			{Text: strconv.FormatUint(token.Serial, 10)}, {Text: strconv.Itoa(token.Replica)},
			{Text: explain.Duration(token.ExpiresOn.Sub(state.Now))},
			{Text: explain.Duration(token.RollsOn.Sub(state.Now))},
			{Text: strconv.Itoa(calls[token.Key])},
		}}
	}
	return s.Table(columns, rows)
}

func (s screen) faults(state simulatorState) string {
	if len(state.Faults) == 0 {
		return "no faults are in force\n"
	}
	columns := []term.Column{{Title: "FAULT"}, {Title: "RESOURCE", Shrinks: true}, {Title: "STRUCK"}, {Title: "ENDS"}}
	rows := make([]term.Row, len(state.Faults))
	for i, fault := range state.Faults {
		resource, struck, ends := "all", strconv.Itoa(fault.Struck), "when cleared"
		if fault.Resource != "" {
			resource = fault.Resource
		}
		if fault.Count > 0 {
			struck += " of " + strconv.Itoa(fault.Count)
		}
		if !fault.Until.IsZero() {
			ends = "in " + explain.Duration(fault.Until.Sub(state.Now))
		}
		rows[i] = term.Row{Cells: []term.Cell{{Text: fault.Kind.String(), Style: term.Warning}, {Text: resource},
			{Text: struck}, {Text: ends}}}
	}
	return s.Table(columns, rows)
}

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
			fault.For, fault.Every = durationFlag(lasts), durationFlag(every)
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
	flags.IntVar(&fault.Status, "status", 0,
		"of status and html: the HTTP status to answer with (default 200 for html)")
	flags.StringVar(&fault.RetryAfter, "retry-after", "",
		"of status, throttle and unavailable: the Retry-After header's `value`")
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
		if err := a.controlSimulator(ctx, at, http.MethodDelete, "faults", nil, nil); err != nil {
			return err
		}
		return a.print("no faults are in force\n")
	}
	var err error
	if fault.Kind, err = simulator.ParseFaultKind(args[0]); err != nil {
		return &usageError{err}
	}
	if err := a.controlSimulator(ctx, at, http.MethodPost, "faults", fault, nil); err != nil {
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

// durationFlag is a duration as the control path takes it; none is left out.
func durationFlag(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.String()
}

func (a *app) simulatePermissionsCommand() *cobra.Command {
	var at string
	var change simulator.PermissionsChange
	command := &cobra.Command{
		Use:   "permissions --identity NAME",
		Short: "change an identity's permissions at a simulated back end",
		Long: `Change the permissions that new tokens of an identity carry. What is not named stays
as it is; --groups= takes all groups away. Tokens in the back end's cache keep
what they were minted with, as Azure's do.`,
		Example: `  perceptctl simulate permissions --identity vision --roles Secrets.Read --groups=`,
		Args:    cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			var changed simulator.PermissionsChanged
			if err := a.controlSimulator(ctx, at, http.MethodPost, "permissions", change, &changed); err != nil {
				return err
			}
			return a.print(fmt.Sprintf("changed; tokens minted from %s UTC on carry it\n",
				changed.Reaches.UTC().Format(time.DateTime)))
		}),
	}
	flags := command.Flags()
	flags.StringVar(&change.Identity, "identity", "", "`name` of the identity (required)")
	flags.StringSliceVar(&change.Groups, "groups", nil, "object `IDs` of groups, with commas between")
	flags.StringSliceVar(&change.Roles, "roles", nil, "app `roles`, likewise")
	flags.StringSliceVar(&change.WIDs, "wids", nil, "template `IDs` of directory roles, likewise")
	a.atFlag(command, &at)
	command.MarkFlagsOneRequired("groups", "roles", "wids")
	// It fails only for a flag that is not defined.
	_ = command.MarkFlagRequired("identity")
	return command
}
