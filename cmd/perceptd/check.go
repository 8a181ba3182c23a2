package main

import (
	"fmt"
	"io"
	"os"

	"perceptd/agent/source"
	"perceptd/cmd/perceptd/config"
)

// check says what the configuration allows, or every fault that a start would find in it and what would become of it,
// and for whom that was judged where it is not this process's user.
func check(path string, stdout, stderr io.Writer) int {
	c := config.Check(path)
	by, judged := "", ""
	if c.JudgedFor != "" {
		by = fmt.Sprintf(" by user %s, whom perceptd.service runs as", c.JudgedFor)
		judged = fmt.Sprintf("checked for user %s, whom perceptd.service runs as\n", c.JudgedFor)
	}
	fault := c.Fault()
	if fault == nil {
		fmt.Fprint(stdout, c.Config.Describe())
		sayBeside(stdout, c)
		fmt.Fprint(stdout, judged)
		return exitOK
	}
	fmt.Fprintf(stderr, "perceptd: the configuration is not usable%s:\n%v\n", by, fault)
	sayAfterRestart(stderr, c)
	sayBeside(stderr, c)
	return exitFailed
}

// sayAfterRestart says what a reload and a restart would put in force of a configuration with a fault.
func sayAfterRestart(out io.Writer, c config.Checked) {
	if len(c.Faults)+len(c.Config.Idle) > 0 {
		fmt.Fprintln(out, "a reload refuses all of it, and what was removed from it stays in force")
	}
	switch {
	case len(c.Faults) > 0:
		fmt.Fprintln(out, "after a restart the configuration that was last in force goes on, as root keeps it; "+
			"without such a copy no caller gets a token")
		return
	case len(c.Files) == 0:
		fmt.Fprintln(out, "after a restart no caller gets a token")
		return
	case c.Missing:
		fmt.Fprintln(out, "after a restart only what is in config.d is in force")
	}
	if len(c.Config.Idle) > 0 {
		fmt.Fprintln(out, "after a restart the rest is in force, and these are idle:")
	}
	for _, idle := range c.Config.Idle {
		fmt.Fprintf(out, "  %s (%s)\n", idle.Element, idle.Place)
	}
}

// sayBeside says what is no fault, and may not be what was meant.
func sayBeside(out io.Writer, c config.Checked) {
	for _, unread := range c.Unread {
		fmt.Fprintf(out, "warning: %s\n", unread)
	}
	from := c.Config.Source
	if from.Kind != config.ManagedIdentity || from.Fault != "" {
		return
	}
	if _, err := source.New(source.Options{Endpoint: from.Endpoint}); err != nil {
		fmt.Fprintf(out, "warning: %v; until then a start serves without a source, and tries again "+
			"(judged by the environment of this process, pid %d)\n", err, os.Getpid())
	}
}
