package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"
)

// Set by the linker: see the Makefile.
var version, commit, date string

// versionLine names this build: what the linker was told, else what Go recorded.
func versionLine() string {
	return fmt.Sprintf("perceptd %s (commit %s, built %s, %s %s/%s)", versionName(),
		cmp.Or(commit, recorded("vcs.revision"), "unknown"), cmp.Or(date, recorded("vcs.time"), "unknown"),
		runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func versionName() string { return cmp.Or(version, "development") }

func recorded(setting string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == setting {
			return s.Value
		}
	}
	return ""
}
