// Command perceptd obtains managed-identity tokens, caches them, and hands each local module the
// tokens that it was granted, over Unix sockets.
package main

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	// A core dump would hold every token. The limit is for files; a program that the kernel pipes dumps to
	// gets them in spite of it, but nothing of a process that is not dumpable. /proc/self, which the sockets are made
	// through, stays open to the process itself.
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	silenceLibraries()
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}
