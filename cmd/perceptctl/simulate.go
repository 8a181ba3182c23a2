package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/clock"
	"perceptd/agent/explain"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptctl/term"
)

const simulatedWarning = "this back end's tokens open nothing"

// simulateOptions is what the flags of `simulate` say.
type simulateOptions struct {
	backend  simulator.Options
	server   simulator.ServerOptions
	form     string
	rollover string
	speed    float64
	faults   []string
	envFile  string
	wroteEnv bool         // envFile is ours
	resume   bool         // one that ran before comes back
	began    clock.Origin // of the back end's clock; zero: it is the device's
}

func (a *app) simulateCommand() *cobra.Command {
	var s simulateOptions
	command := &cobra.Command{
		Use:   "simulate",
		Short: "run a simulated managed-identity back end",
		Long: `Run a simulated managed-identity back end on a loopback port until Ctrl-C, and
print the variables that point perceptd or an Azure SDK at it. Its tokens say
that they are simulated and open nothing.

It caches tokens as Azure does: a change of permissions is not seen in a token
until the cached one rolls over. --speed makes that day short. The verbs below
steer one that runs; they find it by --at or $` + simulatorVariable + `, and are for
` + simulator.Steerers + `.
Every user of this network namespace can have its tokens.

A perceptd with kind = "simulated" in its [source] uses a back end that answers as
app-service, and lives by its clock, where it is started with all its variables.
Stopped and resumed, the back end of such a perceptd goes and comes back.`,
		Example: `  perceptctl simulate --form imds --env-file /tmp/simulator.env &
  . /tmp/simulator.env
  perceptctl simulate fault throttle --count 3
  perceptctl simulate state`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.simulate(ctx, &s) }),
	}
	flags := command.Flags()
	flags.BoolVar(&s.resume, "resume", false,
		"come back as the app-service one that the variables in the environment are of, with an empty cache")
	flags.StringVar(&s.server.Listen, "listen", "127.0.0.1:0", "loopback `address` and port; port 0 takes a free one")
	flags.StringVar(&s.form, "form", "imds", "which service it answers as: imds, arc or app-service")
	flags.Float64Var(&s.speed, "speed", 1, "how many times as fast as the real one its clock runs")
	flags.DurationVar(&s.backend.Life, "life", 24*time.Hour, "a token's whole life")
	flags.StringVar(&s.rollover, "rollover", "expiry",
		"when newer tokens are handed out: expiry, half-life or jittered")
	flags.DurationVar(&s.backend.PropagationDelay, "spread", 0, "how long changed permissions take to reach new tokens")
	flags.DurationVar(&s.backend.Aged, "aged", 0, "how old a first token may be, as if others had asked before")
	flags.IntVar(&s.backend.Replicas, "replicas", 1, "how many caches there are; with several, older tokens come back")
	flags.Uint64Var(&s.backend.Seed, "seed", 0, "makes what is random repeatable")
	flags.StringVar(&s.server.ArcKeyDir, "arc-key-dir", simulator.DefaultArcKeyDir,
		"where the arc form puts its key `files`")
	flags.BoolVar(&s.server.LegacyArc, "arc-legacy", false,
		"answer as an Arc agent that knows the system-assigned identity only")
	flags.StringSliceVar(&s.faults, "fault", nil, "`kind` of fault in force from the start; may be repeated")
	flags.StringVar(&s.envFile, "env-file", "",
		"`path` of a file for the variables, for a shell or systemd; removed at the end")
	for _, taken := range [...]string{"listen", "speed", "form"} { // from the environment
		command.MarkFlagsMutuallyExclusive("resume", taken)
	}
	command.AddCommand(a.simulateStateCommand(), a.simulateFaultCommand(), a.simulatePermissionsCommand(),
		a.simulateAskCommand())
	return command
}

// simulate runs a back end until ctx ends, which is how it is meant to end.
func (a *app) simulate(ctx context.Context, s *simulateOptions) error {
	if err := s.complete(a.getenv); err != nil {
		return &usageError{err}
	}
	server, err := simulator.Start(ctx, s.server)
	if err != nil {
		return err
	}
	if err = a.printVariables(server, s); err == nil {
		// Its error is also Close's, which returns when nothing is left.
		_ = server.Wait()
	}
	return errors.Join(err, server.Close(ctx), s.removeEnvFile())
}

// complete turns the flags into a back end, or says which flag is wrong.
func (s *simulateOptions) complete(getenv func(string) string) error {
	var err error
	switch {
	case !(s.speed > 0):
		return fmt.Errorf("--speed %v: it must be above 0", s.speed)
	case s.backend.Life <= 0:
		return fmt.Errorf("--life %v: it must be above 0", s.backend.Life)
	case s.backend.PropagationDelay < 0 || s.backend.Aged < 0:
		return errors.New("--spread and --aged must not be negative")
	case s.backend.Replicas < 1:
		return fmt.Errorf("--replicas %d: it must be at least 1", s.backend.Replicas)
	}
	if s.server.Form, err = simulator.ParseForm(s.form); err != nil {
		return fmt.Errorf("--form: %w", err)
	}
	if s.backend.Rollover, err = simulator.ParseRollover(s.rollover); err != nil {
		return fmt.Errorf("--rollover: %w", err)
	}
	if s.speed != 1 {
		s.began = clock.Begin(s.speed)
	}
	if s.resume {
		if err := s.takeFrom(getenv); err != nil {
			return fmt.Errorf("--resume: %w", err)
		}
	}
	if s.began.Speed != 0 {
		s.backend.Now = s.began.Clock().Wall
	}
	s.server.Backend = simulator.New(s.backend)
	for _, name := range s.faults {
		kind, err := simulator.ParseFaultKind(name)
		if err == nil {
			err = s.server.Backend.AddFault(simulator.Fault{Kind: kind})
		}
		if err != nil {
			return fmt.Errorf("--fault %s: %w", name, err)
		}
	}
	return nil
}

// takeFrom takes the address, the secret and the clock of a back end that ran before from the variables that it wrote.
func (s *simulateOptions) takeFrom(getenv func(string) string) (err error) {
	at := getenv(simulatorVariable)
	if err := simulator.CheckURL(at); err != nil {
		return fmt.Errorf("$%s: %w", simulatorVariable, err)
	}
	s.server.Listen = strings.TrimPrefix(at, "http://")
	s.server.Form = simulator.FormAppService
	s.form = s.server.Form.String()
	if s.server.Secret = getenv("IDENTITY_HEADER"); s.server.Secret == "" {
		return errors.New("$IDENTITY_HEADER is missing: only one that answers as app-service can come back")
	}
	if text := getenv(simulator.ClockVariable); text != "" {
		if s.began, err = clock.ParseOrigin(text); err != nil {
			return fmt.Errorf("$%s: %w", simulator.ClockVariable, err)
		}
		s.speed = s.began.Speed
	}
	return nil
}

// printVariables writes where the back end is to standard output, and to the file that was asked for.
func (a *app) printVariables(server *simulator.Server, s *simulateOptions) error {
	variables := append(server.Environment(), simulatorVariable+"="+server.URL())
	if s.began.Speed != 0 {
		variables = append(variables, simulator.ClockVariable+"="+s.began.String())
	}
	if err := s.writeEnvFile(variables); err != nil {
		return fmt.Errorf("--env-file: %w", err)
	}
	screen := a.screen(a.stdout)
	text := screen.Paragraph("SIMULATED: ", simulatedWarning, term.Loud)
	text += screen.Paragraph("", fmt.Sprintf("listening on %s as %s until Ctrl-C", server.URL(), s.form), term.Plain)
	text += screen.Paragraph("", "every user here gets its tokens; "+simulator.Steerers+" can steer it", term.Plain)
	text += screen.Paragraph("", fmt.Sprintf("tokens live %s, rollover at %s, spread %s, clock runs %v times as fast",
		explain.Duration(s.backend.Life), s.rollover, explain.Duration(s.backend.PropagationDelay), s.speed),
		term.Plain)
	text += "\n"
	for _, variable := range variables {
		text += "export " + variable + "\n"
	}
	return a.print(text)
}

// writeEnvFile puts the variables into a file that is there whole or not at all. Only its owner may
// read it, since one of them lets its bearer have tokens.
func (s *simulateOptions) writeEnvFile(variables []string) error {
	if s.envFile == "" {
		return nil
	}
	// CreateTemp's files are readable to their owner alone.
	file, err := os.CreateTemp(filepath.Dir(s.envFile), filepath.Base(s.envFile)+".*")
	if err != nil {
		return err
	}
	_, err = file.WriteString("# SIMULATED: " + simulatedWarning + "\n" + strings.Join(variables, "\n") + "\n")
	if err = errors.Join(err, file.Close()); err == nil {
		err = os.Rename(file.Name(), s.envFile)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	s.wroteEnv = true
	return nil
}

// removeEnvFile removes what writeEnvFile wrote, if it is still there.
func (s *simulateOptions) removeEnvFile() error {
	if !s.wroteEnv {
		return nil
	}
	if err := os.Remove(s.envFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
