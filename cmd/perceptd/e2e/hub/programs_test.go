//go:build hub

package hub

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"perceptd/agent/iothub/hubtest"
	"perceptd/cmd/perceptd/e2e/harness"
)

// hubName is the name by which SDKs reach the hub, at IoT Hub's own ports.
const hubName = "localhost"

// started is a hub that listens, and the file of its certificate authority.
type started struct {
	*hubtest.Hub
	rootFile string
}

// startHub starts a hub. One test has it at a time, since the ports are the real ones.
func startHub(t *testing.T) started {
	t.Helper()
	h, err := hubtest.Start(hubtest.Options{
		Name: hubName, Address: "127.0.0.1", MQTTPort: 8883, HTTPSPort: 443, Logf: t.Logf,
	})
	must(t, err)
	t.Cleanup(h.Close)
	root := filepath.Join(t.TempDir(), "root.pem")
	must(t, os.WriteFile(root, h.RootPEM(), 0o644))
	return started{h, root}
}

// patience is how long a program of Node's may take: it does in seconds what there is to do.
const patience = 2 * time.Minute

// node runs a program of testdata with Microsoft's SDKs and the hub's certificate authority. It asserts what it does,
// and says on standard output how far it came. The environment holds connection strings, which are no arguments.
func (h started) node(t *testing.T, program string, environment ...string) {
	t.Helper()
	modules, err := filepath.Abs("../../../../bin/hub/node_modules")
	must(t, err)
	if _, err := os.Stat(modules); err != nil {
		t.Fatalf("%v: make test-hub installs it", err)
	}
	p := harness.Begin(t, append([]string{
		"NODE_PATH=" + modules, "NODE_EXTRA_CA_CERTS=" + h.rootFile, "SERVICE=" + h.ServiceConnectionString(),
	}, environment...), exec.Command("node", filepath.Join("testdata", program)))
	select {
	case <-p.Ended:
	case <-time.After(patience):
		t.Fatalf("%s has not ended after %v", program, patience)
	}
	t.Logf("%s said:\n%s", program, p.Text())
	if status := p.Cmd.ProcessState.ExitCode(); status != 0 {
		t.Fatalf("%s ended with status %d", program, status)
	}
}
