// Command perceptd obtains managed-identity tokens, caches them, and hands each local module the
// tokens that it was granted, over Unix sockets.
package main

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// Set by the linker: see the Makefile.
var version, commit, date string

func main() {
	// A core dump would hold every token. systemd is told the same, for daemons that it starts.
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}
