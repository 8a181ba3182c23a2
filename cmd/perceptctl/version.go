package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/client"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "print the versions of perceptctl and of the running perceptd",
		Long: `Print perceptctl's version and, where the admin socket lets you, that of the running
perceptd. A perceptd that cannot be reached is said so and is no error.`,
		Args: cobra.NoArgs,
		RunE: a.verb(a.version),
	}
}

func (a *app) version(ctx context.Context) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	text := "perceptctl  " + ownVersion() + "\n"
	daemon, err := a.client.Version(ctx)
	var unreachable *client.UnreachableError
	switch {
	case err == nil:
		text += "perceptd    " + term.Clean(daemon) + "\n"
	case errors.As(err, &unreachable):
		text += "perceptd    cannot be reached: " + term.Clean(err.Error()) + "\n"
	default:
		return err
	}
	return a.print(text)
}

// ownVersion returns the version that the linker was given, or else the one that the Go toolchain recorded.
func ownVersion() string {
	v, revision, built := version, commit, date
	if v == "" {
		v = "unversioned"
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
			v = info.Main.Version
		}
	}
	details := []string{runtime.Version()}
	if revision != "" {
		details = append(details, "commit "+revision)
	}
	if built != "" {
		details = append(details, "built "+built)
	}
	return fmt.Sprintf("%s (%s)", v, strings.Join(details, ", "))
}
