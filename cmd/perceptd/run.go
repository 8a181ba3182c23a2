package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	standardlog "log"
	"os"
	"runtime/debug"
)

// Exit statuses, as systemd and scripts see them.
const (
	exitOK     = 0  // stopped because it was asked to, or a check found nothing
	exitFailed = 1  // could not start, or could not go on, or a check found a fault
	exitUsage  = 78 // the command line is wrong (EX_CONFIG): nothing else keeps a start from being of use
)

// gcPercent, half of Go's own default, keeps the heap close to what is held. It saves two megabytes, which
// count on a small device; collecting twice as often costs no time that can be measured. GOGC overrides it.
const gcPercent = 50

// memoryLimit is what Go's runtime tries to keep to: more than everything in use ever is, by server.Limits, and so
// little that with the program itself and what the kernel holds for connections half of the unit's MemoryMax= is
// enough. When callers take all that they may, what waits to be collected is less then. GOMEMLIMIT overrides it.
const memoryLimit = 103 << 20

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
	switch made := os.Getenv(stateVariable); {
	case f.check:
		return check(f.config, stdout, stderr)
	case f.keepConfig:
		return keepConfig(f, made, stdout, stderr)
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
	d, err := start(ctx, f, log, level)
	switch {
	case errors.Is(err, errAskedToEnd):
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "perceptd: %v\n", err)
		return exitFailed
	}
	if err := d.serve(ctx); err != nil {
		fmt.Fprintf(stderr, "perceptd: %v\n", err)
		return exitFailed
	}
	return exitOK
}
