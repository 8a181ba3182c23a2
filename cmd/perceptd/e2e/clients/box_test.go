//go:build clients

package clients

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"golang.org/x/sys/unix"
)

// These variables make the test binary something else.
const (
	// "closed", or the socket that IMDS's address leads to: it runs a command in a namespace
	boxVariable = "PERCEPTD_TEST_BOX"
	goVariable  = "PERCEPTD_TEST_AZIDENTITY"
)

const (
	imdsAddress = "169.254.169.254"
	armAddress  = "127.0.0.1:8443" // of what stands in for Azure Resource Manager, in a namespace
)

func init() {
	if socket := os.Getenv(boxVariable); socket != "" {
		os.Exit(boxed(socket, os.Args[1:]))
	}
	if kind := os.Getenv(goVariable); kind != "" && len(os.Args) == 1 {
		os.Exit(serveAzidentity(kind, func() {}, http.DefaultClient))
	}
}

// boxed runs a command in this process's network namespace, which has nothing but a loopback interface, and returns its
// exit status. With a socket, the instance metadata service's address leads there.
func boxed(socket string, command []string) int {
	_ = os.Unsetenv(boxVariable) // which the command must not see, in case it is this binary
	setUp := [][]string{{"link", "set", "lo", "up"}}
	if socket != "closed" {
		setUp = append(setUp, []string{"address", "add", imdsAddress + "/32", "dev", "lo"})
	}
	for _, args := range setUp {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "ip %v: %v: %s\n", args, err, out)
			return 1
		}
	}
	if socket != "closed" {
		if err := lead(imdsAddress+":80", socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		server, err := standInARM()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer server.Close()
	}
	c := exec.Command(command[0], command[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	// init runs on the main thread, which lives as long as the process: the command ends with it.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Run(); c.ProcessState == nil {
		fmt.Fprintln(os.Stderr, err)
		return 127
	}
	return c.ProcessState.ExitCode()
}

// lead has connections to an address go to a Unix socket, as long as the process lives.
func lead(address, socket string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			go join(from, socket)
		}
	}()
	return nil
}

func join(from net.Conn, socket string) {
	defer from.Close()
	to, err := net.Dial("unix", socket)
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		_, _ = io.Copy(to, from)
		_ = to.(*net.UnixConn).CloseWrite()
	}()
	_, _ = io.Copy(from, to)
}

// standInARM knows no subscriptions, as is asked of Azure Resource Manager when Azure CLI logs in.
func standInARM() (*httptest.Server, error) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"value":[]}`)
	}))
	l, err := net.Listen("tcp", armAddress)
	if err != nil {
		return nil, err
	}
	_ = server.Listener.Close()
	server.Listener = l
	server.StartTLS()
	return server, nil
}

// serveAzidentity is the client of the Go SDK: it gets a token for each resource that it reads and writes a line of
// JSON for each. Before is called before each.
func serveAzidentity(kind string, before func(), client *http.Client) int {
	credential, err := azidentityCredential(kind, os.Getenv("CLIENT_ID"), client)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("{}")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		before()
		var said answer
		options := policy.TokenRequestOptions{Scopes: []string{lines.Text() + "/.default"}}
		token, err := credential.GetToken(context.Background(), options)
		if err != nil {
			said.Error = err.Error()
		}
		said.Token = token.Token
		if err := json.NewEncoder(os.Stdout).Encode(said); err != nil {
			return 1
		}
	}
	return 0
}

func azidentityCredential(kind, clientID string, client *http.Client) (azcore.TokenCredential, error) {
	with := azcore.ClientOptions{Transport: client}
	if kind == "default" {
		return azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{ClientOptions: with})
	}
	options := azidentity.ManagedIdentityCredentialOptions{ClientOptions: with}
	if clientID != "" {
		options.ID = azidentity.ClientID(clientID)
	}
	return azidentity.NewManagedIdentityCredential(&options)
}

// TestAzidentityByAFastClock is no test but a client of the Go SDK that lives by the clock of a simulated back end:
// before each request it passes the time that has gone by there. A bubble's time stands still during a request.
func TestAzidentityByAFastClock(t *testing.T) {
	start, err := time.Parse(time.RFC3339, os.Getenv("START"))
	if err != nil {
		t.SkipNow()
	}
	began := sinceBoot(t)
	synctest.Test(t, func(t *testing.T) {
		pass := func() { time.Sleep(time.Until(start.Add((sinceBoot(t) - began) * fast))) }
		transport := &http.Transport{DisableKeepAlives: true} // an open connection would hold the bubble's time up
		serveAzidentity(os.Getenv(goVariable), pass, &http.Client{Transport: transport})
	})
}

// sinceBoot reads a clock that no bubble has.
func sinceBoot(t *testing.T) time.Duration {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}
