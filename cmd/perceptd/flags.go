package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/config"
)

// stateVariable is where systemd says which folders it made for the service's state.
const stateVariable = "STATE_DIRECTORY"

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

exit status: 0 stopped on request, 1 could not start or go on, or --check found
a fault, 78 wrong usage. A wrong configuration does not keep perceptd from
starting: what is sound in it is in force. SIGHUP reloads it, SIGTERM stops.
`

// flags is the command line.
type flags struct {
	config, runtimeDir, stateDir, cacheKey, logLevel string
	check, keepConfig, version                       bool
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
	set.BoolVar(&f.keepConfig, "keep-config", false, "") // for perceptd-config.service alone, and not in usage
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

// deviceStateDir is the device's own state folder.
const deviceStateDir = "/var/lib/percept"

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
		f.stateDir = deviceStateDir
	default:
		f.stateDir, f.passing = runtimeDir+"-state", true
	}
}
