package main

import (
	"os"
	"regexp"
	"strconv"
	"testing"

	"perceptd/agent/server"
)

// unitSetting returns a number that perceptd.service sets.
func unitSetting(t *testing.T, name string) int {
	t.Helper()
	text, err := os.ReadFile("../../systemd/perceptd.service")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^` + name + `=(\d+)(M?)$`).FindSubmatch(text)
	if found == nil {
		t.Fatalf("the unit does not set %s=", name)
	}
	n, err := strconv.Atoi(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	if len(found[2]) > 0 {
		n <<= 20
	}
	return n
}

// What all callers together can take fits the unit: a quarter of its descriptors is left to everything else, and half
// of its memory is enough for the program, for what callers have in use and for what the kernel holds for them.
func TestLimitsFitTheUnit(t *testing.T) {
	t.Parallel()
	var limits server.Limits
	if files := unitSetting(t, "LimitNOFILE"); limits.Descriptors() > files/4*3 {
		t.Errorf("callers can take %d of %d descriptors", limits.Descriptors(), files)
	}
	// Also beside as many modules as systemd keeps sockets of, and more.
	if files := descriptorsOfCallers(uint64(unitSetting(t, "LimitNOFILE")), 1000); limits.Descriptors() > files {
		t.Errorf("1000 modules leave callers %d descriptors, who can take %d", files, limits.Descriptors())
	}
	const (
		daemon  = 8 << 20  // the cache, and what the runtime needs for itself
		program = 12 << 20 // pages of the program's file
		kernel  = 4 << 10  // of a connection: its two descriptors
	)
	if most := limits.Memory() + daemon; most > memoryLimit {
		t.Errorf("%d MB can be in use, and the runtime keeps to %d", most>>20, memoryLimit>>20)
	}
	half := unitSetting(t, "MemoryMax") / 2
	if most := memoryLimit + program + limits.Descriptors()/2*kernel; most > half {
		t.Errorf("%d MB of %d", most>>20, half>>20)
	}
}

func TestLimitsOfACaller(t *testing.T) {
	t.Parallel()
	if limits := callerLimits(1000, 2); limits.PerSecond != 1000 || limits.Burst != 2000 || limits.Connections == 0 {
		t.Errorf("%+v", limits)
	}
}

// Where descriptors are few, what modules' sockets take is no caller's to take, and never less than nothing.
func TestDescriptorsOfCallers(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		all           uint64
		modules, want int
	}{
		{16384, 0, 12288}, {16384, 260, 11703}, {1024, 260, 183}, {1024, 400, 0}, {64, 0, 48},
		{1 << 60, 1, (1<<31 - 4) / 4 * 3},
	} {
		if got := descriptorsOfCallers(row.all, row.modules); got != row.want {
			t.Errorf("%d descriptors and %d modules leave %d, want %d", row.all, row.modules, got, row.want)
		}
	}
}
