// Command fleetdemo shows a fleet at work: real agents with their caches and links to IoT Hub, in one process, against
// a hub on loopback. A policy change spreads to all of them by their twins, and they come back after an outage. It ends
// with status 1 where something that it shows is not so.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// options is what a demonstration is made of.
type options struct {
	devices int
	cap     time.Duration // the longest wait of a device between two tries to connect
	speed   float64       // of the clock by which tokens live
	picture string        // file for an SVG; empty: none
}

func main() {
	var o options
	flag.IntVar(&o.devices, "devices", 200, "how many devices the fleet has")
	flag.DurationVar(&o.cap, "cap", 6*time.Second, "the longest wait between two tries to connect")
	flag.Float64Var(&o.speed, "speed", 5400, "how much faster than the hub's the clock of the tokens runs")
	flag.StringVar(&o.picture, "svg", "", "also draw into this `file`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleetdemo:", err)
		os.Exit(1)
	}
}
