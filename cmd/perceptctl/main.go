// Perceptctl asks the perceptd of this device for tokens, shows its status, and makes it refresh or
// reload. It also runs a simulated managed-identity back end. `perceptctl --help` lists the verbs
// and the exit status.
//
// It speaks to the daemon's sockets only and never to Azure. Token text goes to standard output, on
// request, and nowhere else.
package main

import (
	"context"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"
)

// Set by the linker (-X main.version=…); empty in a plain `go build`.
var version, commit, date string

func main() {
	// Libraries say nothing by themselves: net/http quotes to the standard logger what was sent beside an answer, and
	// that may be a token. Under exec it would be among the module's own output.
	log.SetOutput(io.Discard)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Environ())
	stop()
	os.Exit(code)
}
