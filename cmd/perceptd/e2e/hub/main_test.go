//go:build hub

package hub

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// must is said too often for a long name.
var must = harness.Must

// insideVariable says that this process has a network of its own.
const insideVariable = "PERCEPTD_TEST_HUB_INSIDE"

// TestMain runs the tests in a network namespace that has nothing but a loopback interface: the SDKs know no other
// ports than IoT Hub's own, and none of what they send leaves the device.
func TestMain(m *testing.M) {
	if os.Getenv(insideVariable) == "" {
		os.Exit(runInside())
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "ip link set lo up: %v: %s\n", err, out)
		os.Exit(1)
	}
	harness.Main(m)
}

// runInside runs this binary again with a network of its own, and returns its exit status.
func runInside() int {
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	c := exec.Command(self, os.Args[1:]...)
	c.Env = append(os.Environ(), insideVariable+"=yes")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	err = c.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "a network namespace needs root: %v\n", err)
		return 1
	}
	return 0
}
