package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// astray are variables that lead SDKs elsewhere, which exec must take away.
var astray = []string{
	"IDENTITY_ENDPOINT=http://127.0.0.1:1/", "IDENTITY_HEADER=other", "IDENTITY_SERVER_THUMBPRINT=00",
	"MSI_ENDPOINT=http://127.0.0.1:1/",
	"HTTP_PROXY=http://127.0.0.1:1", "http_proxy=http://127.0.0.1:1", "AZURE_FEDERATED_TOKEN_FILE=/nowhere",
}

// runExec runs `perceptctl exec` on a socket of d's to its end, with an environment that leads astray and what else
// there is.
func runExec(t testing.TB, d *harness.Daemon, socket string, environment []string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(harness.Binary(t, "perceptctl"), append([]string{"--socket", socket, "exec"}, args...)...)
	cmd.Env = append(append(os.Environ(), astray...), environment...)
	var says strings.Builder
	cmd.Stderr = &says
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, says.String())
	}
	return string(out), err
}

// The real azidentity, unchanged, gets the token of the module whose socket is mounted, in both forms.
func TestExecServesUnmodifiedSDKs(t *testing.T) {
	t.Parallel()
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	self, err := os.Executable()
	must(t, err)
	forms := map[string][]string{"App Service's form": {"--"}}
	if os.Getuid() == 0 { // the folder of Arc's keys is root's
		forms["Arc's form"] = []string{"--arc", "--"}
	}
	for name, form := range forms {
		out, err := runExec(t, d, d.Module("vision"), []string{harness.SDKVariable + "=" + harness.OverTCP},
			append(form, self, harness.VaultURI)...)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if id := harness.Claims(t, out)["appid"]; id != "00000000-0000-0000-0000-000000000001" {
			t.Errorf("%s: the token is %v's", name, id)
		}
	}
	_, err = runExec(t, d, d.Module("vision"), []string{harness.SDKVariable + "=" + harness.OverTCP}, "--",
		self, "https://graph.microsoft.com")
	if err == nil || !strings.Contains(err.Error(), "no [[grant]] lets module vision") {
		t.Errorf("a resource that is not granted: %v", err)
	}
}

// A command that starts before perceptd gets its first token when that has come, and none of its requests fails while
// perceptd is killed and started anew, its socket gone meanwhile.
func TestExecOutlastsPerceptd(t *testing.T) {
	t.Parallel()
	harness.Binary(t, "perceptd")
	d := harness.NewDaemon(t, harness.SimulatedFor("vision"))
	socket := d.Module("vision")
	to := harness.LaunchExec(t, socket)
	first := make(chan string, 1)
	begun := time.Now()
	go func() {
		status, _, err := askTCP(t, to.Address, to.Secret)
		first <- fmt.Sprint(status, " ", err)
	}()
	d.Process = harness.Launch(t, nil, "perceptd", d.Arguments()...)
	d.AwaitHealth(t)
	longest := time.Since(begun) // that perceptd was away; a device that is too busy has it be longer than exec waits
	if got := <-first; got != "200 <nil>" && longest < 7*time.Second {
		t.Errorf("the first request: %s, perceptd came after %v", got, longest)
	}

	var asking sync.WaitGroup
	var answered atomic.Int64
	enough, failed := make(chan struct{}), make(chan string, 1)
	for range 4 {
		asking.Go(func() {
			for {
				select {
				case <-enough:
					return
				default:
				}
				status, body, err := askTCP(t, to.Address, to.Secret)
				if status == 200 {
					answered.Add(1)
					continue
				}
				select {
				case failed <- fmt.Sprintf("%d %.300s %v", status, body, err):
				default:
				}
			}
		})
	}
	for i := range 6 {
		begun = time.Now()
		if i%2 == 0 {
			must(t, d.Cmd.Process.Kill())
			<-d.Ended
		} else if status := d.Stop(t); status != 0 {
			t.Errorf("perceptd ended with %d", status)
		}
		d.Process = harness.Launch(t, nil, "perceptd", d.Arguments()...)
		d.AwaitHealth(t)
		longest = max(longest, time.Since(begun))
		before := answered.Load()
		harness.Until(t, "more answers", d.Ended, func() bool { return answered.Load() > before+20 })
	}
	close(enough)
	asking.Wait()
	select {
	case what := <-failed:
		if longest < 7*time.Second {
			t.Errorf("a request failed, perceptd was away for %v at most: %s", longest, what)
		}
	default:
	}
}

// Another user on the same network reaches the port, and gets no token without the secret, which he cannot read.
func TestExecOtherUser(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: the child is another user")
	}
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("needs curl")
	}
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision"))
	to := harness.LaunchExec(t, d.Module("vision"))
	if status, _, err := askTCP(t, to.Address, to.Secret); status != 200 {
		t.Fatalf("with the secret: %d %v", status, err)
	}
	asOther := func(name string, args ...string) string {
		c := exec.Command(name, args...)
		c.Env = []string{"PATH=" + os.Getenv("PATH")}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, _ := c.CombinedOutput() // that it is refused is what is looked at
		return string(out)
	}
	target := "http://" + to.Address + "/msi/token?api-version=2019-08-01&resource=" + harness.VaultURI
	for header, want := range map[string]string{"X-None: 1": "must be there once", "X-IDENTITY-HEADER: " +
		strings.Repeat("0", 64): "is not the value"} {
		if out := asOther("curl", "-sS", "--noproxy", "*", "-H", header, target); !strings.Contains(out, want) ||
			strings.Contains(out, "access_token") {
			t.Errorf("%s: %s", header, out)
		}
	}
	if out := asOther("cat", fmt.Sprintf("/proc/%d/environ", to.PID)); !strings.Contains(out, "Permission denied") ||
		strings.Contains(out, to.Secret) {
		t.Errorf("another user reads the environment: %d bytes", len(out))
	}
}
