package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	standardlog "log"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/config"
)

// Exit statuses, as systemd and scripts see them.
const (
	exitOK     = 0  // stopped because it was asked to, or a check found nothing
	exitFailed = 1  // could not start, or could not go on
	exitUsage  = 2  // the command line is wrong
	exitConfig = 78 // the configuration is wrong (EX_CONFIG): it stays so until somebody mends it
)

// gcPercent, half of Go's own default, keeps the heap close to what is held. It saves two megabytes, which
// count on a small device; collecting twice as often costs no time that can be measured. GOGC overrides it.
const gcPercent = 50

// memoryLimit is what Go's runtime tries to keep to: more than everything in use ever is, by server.Limits, and so
// little that with the program itself and what the kernel holds for connections half of the unit's MemoryMax= is
// enough. When callers take all that they may, what waits to be collected is less then. GOMEMLIMIT overrides it.
const memoryLimit = 103 << 20

const usage = `perceptd hands managed-identity tokens to local modules over Unix sockets.

usage: perceptd [flags]

  --config FILE        configuration (default /etc/percept/config.toml); FILE's
                       neighbour config.d/*.toml is read after it
  --runtime-dir DIR    where the sockets are (default /run/percept)
  --state-dir DIR      where tokens, sealed, and policy changes are kept (default
                       $STATE_DIRECTORY, as systemd sets it, else /var/lib/percept;
                       with another runtime folder or a simulated source
                       DIR-state beside the runtime folder, not over a reboot)
  --cache-key FILE     the key that tokens are sealed with, where systemd gives no
                       credential percept-cache-key and has opened none in
                       /run/percept-cache-key (default /etc/percept/cache-key)
  --check              check the configuration, say what it allows, and exit
  --log-level LEVEL    debug, info, warn or error (default info)
  --version            print the version and exit

exit status: 0 stopped on request, 1 could not start or go on, 2 wrong usage,
78 wrong configuration. SIGHUP reloads the configuration, SIGTERM stops.
`

// flags is the command line.
type flags struct {
	config, runtimeDir, stateDir, cacheKey, logLevel string
	check, version                                   bool
	// the state folder is not the device's, and is not kept over a reboot
	passing bool
}

// parseFlags says on stderr what is wrong; flag.ErrHelp is not.
func parseFlags(args []string, stderr io.Writer) (flags, error) {
	var f flags
	set := flag.NewFlagSet("perceptd", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.StringVar(&f.config, "config", "/etc/percept/config.toml", "")
	set.StringVar(&f.runtimeDir, "runtime-dir", api.RuntimeDir, "")
	set.StringVar(&f.stateDir, "state-dir", "", "")
	set.StringVar(&f.cacheKey, "cache-key", "/etc/percept/cache-key", "")
	set.StringVar(&f.logLevel, "log-level", "info", "")
	set.BoolVar(&f.check, "check", false, "")
	set.BoolVar(&f.version, "version", false, "")
	err := set.Parse(args)
	if err == nil && set.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stderr, "perceptd: %v\n\n%s", err, usage)
	}
	return f, err
}

// placeState names the state folder where the command line does not: the first that systemd made, the device's own, or,
// for a daemon beside it or one whose tokens open nothing, one beside the runtime folder.
func (f *flags) placeState(source, made string) {
	first, _, _ := strings.Cut(made, ":")
	runtimeDir := filepath.Clean(f.runtimeDir)
	switch {
	case f.stateDir != "":
	case first != "":
		f.stateDir = first
	case runtimeDir == api.RuntimeDir && source != config.Simulated:
		f.stateDir = "/var/lib/percept"
	default:
		f.stateDir, f.passing = runtimeDir+"-state", true
	}
}

// run is the program: everything but the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	f, err := parseFlags(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return exitOK
	case err != nil:
		return exitUsage
	case f.version:
		fmt.Fprintln(stdout, versionLine())
		return exitOK
	}
	if f.check {
		return check(f.config, stdout, stderr)
	}
	conf, err := config.Load(f.config)
	if err != nil {
		fmt.Fprintf(stderr, "perceptd: the configuration is not usable:\n%v\n", err)
		return exitConfig
	}
	log, level, err := newLog(f.logLevel, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "perceptd: %v\n", err)
		return exitUsage
	}
	defer func() { _ = log.Sync() }()
	standardlog.SetOutput(newLibraries(log))
	defer standardlog.SetOutput(io.Discard)
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	f.placeState(conf.Source.Kind, os.Getenv("STATE_DIRECTORY"))
	d, err := start(f, conf, log, level)
	if err != nil {
		fmt.Fprintf(stderr, "perceptd: %v\n", err)
		return exitFailed
	}
	if err := d.serve(ctx); err != nil {
		fmt.Fprintf(stderr, "perceptd: %v\n", err)
		return exitFailed
	}
	return exitOK
}
