package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// StartSimulator runs `perceptctl simulate` and returns the variables that point azidentity at it.
func StartSimulator(t testing.TB, form string, args ...string) (*Process, []string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "env")
	p := Launch(t, nil, "perceptctl", append([]string{"simulate", "--form", form, "--env-file", file}, args...)...)
	var text []byte
	Until(t, "the simulator", p.Ended, func() bool {
		var err error
		text, err = os.ReadFile(file)
		return err == nil
	})
	var environment []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(strings.TrimPrefix(line, "export "))
		if name, value, ok := strings.Cut(line, "="); ok {
			environment = append(environment, name+"="+strings.Trim(value, `'"`))
		}
	}
	return p, environment
}

// SimulatorDo steers a running simulator.
func SimulatorDo(t testing.TB, environment []string, args ...string) {
	t.Helper()
	c := exec.Command(Binary(t, "perceptctl"), append([]string{"simulate"}, args...)...)
	c.Env = environment
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}
