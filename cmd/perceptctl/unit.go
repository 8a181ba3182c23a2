package main

import (
	"context"
	"strconv"
	"strings"

	"perceptd/cmd/perceptctl/term"
)

// unitState is what systemd says of a unit. The zero value: nothing.
type unitState struct {
	active, sub string
	text        string // that it has told of itself
	restarts    int
	exit        int // status that its main process ended with last
}

func (a *app) unit(ctx context.Context, name string) (u unitState) {
	output, _ := a.runProgram(ctx, "systemctl", "show", "--property=ActiveState,SubState,NRestarts,StatusText,"+
		"ExecMainStatus", name)
	for line := range strings.Lines(output) {
		switch key, value, _ := strings.Cut(strings.TrimSpace(line), "="); key {
		case "ActiveState":
			u.active = value
		case "SubState":
			u.sub = value
		case "StatusText":
			u.text = term.CleanLines(value)
		case "NRestarts":
			u.restarts, _ = strconv.Atoi(value) // 0, where it is not a number
		case "ExecMainStatus":
			u.exit, _ = strconv.Atoi(value) // likewise
		}
	}
	return u
}

// crashLoops reports whether systemd starts a service again and again that ends before it serves.
func (u unitState) crashLoops() bool {
	return u.active == "activating" && (u.restarts > 0 || strings.HasPrefix(u.sub, "auto-restart"))
}
