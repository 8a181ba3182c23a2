//go:build bench

package bench

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"perceptd/agent/client"
	"perceptd/agent/client/azcredential"
	"perceptd/cmd/perceptd/e2e/harness"
)

// TestBenchModules prints what a module waits for a cached token, one request after the other: through perceptctl exec
// and with the Go client, as ratios to a request on the socket itself. BENCH_SECONDS is how long each is measured (2).
func TestBenchModules(t *testing.T) {
	d := harness.LaunchDaemon(t, harness.SimulatedFor("vision")+"\n[callers]\nrequests_per_second = 1000000\n")
	socket := d.Module("vision")
	to := harness.LaunchExec(t, socket)
	length := 2 * time.Second
	if s, err := strconv.ParseFloat(os.Getenv("BENCH_SECONDS"), 64); err == nil {
		length = time.Duration(s * float64(time.Second))
	}
	dial := map[string]func() (net.Conn, error){
		"unix": func() (net.Conn, error) { return net.Dial("unix", socket) },
		"tcp":  func() (net.Conn, error) { return net.Dial("tcp", to.Address) },
	}
	kept := func(kind string) func() error {
		conn, err := dial[kind]()
		harness.Must(t, err)
		t.Cleanup(func() { conn.Close() })
		in := bufio.NewReader(conn)
		return func() error { return askOn(conn, in, to, "") }
	}
	anew := func(kind string) func() error {
		return func() error {
			conn, err := dial[kind]()
			if err != nil {
				return err
			}
			defer conn.Close()
			return askOn(conn, bufio.NewReader(conn), to, "Connection: close\r\n")
		}
	}
	c := &client.Client{Socket: socket}
	credential := azcredential.New(c, nil)
	rows := []struct {
		name, against string
		ask           func() error
	}{
		{"socket, connection kept", "", kept("unix")},
		{"exec, connection kept", "socket, connection kept", kept("tcp")},
		{"socket, connection anew", "", anew("unix")},
		{"exec, connection anew", "socket, connection anew", anew("tcp")},
		{"agent/client", "socket, connection anew", func() error {
			_, err := c.Token(t.Context(), client.TokenRequest{Resource: harness.VaultURI})
			return err
		}},
		{"azcredential", "socket, connection anew", func() error {
			_, err := credential.GetToken(t.Context(),
				policy.TokenRequestOptions{Scopes: []string{harness.VaultURI + "/.default"}})
			return err
		}},
	}
	medians := make(map[string]time.Duration)
	fmt.Printf("%-26s %10s %10s %8s\n", "way", "median", "p99", "ratio")
	for _, row := range rows {
		took := measure(t, row.ask, length)
		medians[row.name] = took[len(took)/2]
		ratio := ""
		if row.against != "" {
			ratio = fmt.Sprintf("%.2f", float64(medians[row.name])/float64(medians[row.against]))
		}
		fmt.Printf("%-26s %10v %10v %8s\n", row.name, medians[row.name].Round(time.Microsecond),
			took[len(took)*99/100].Round(time.Microsecond), ratio)
	}
}

// measure asks for a time, and returns how long each request took, the shortest first.
func measure(t *testing.T, ask func() error, length time.Duration) (took []time.Duration) {
	t.Helper()
	for range 20 {
		harness.Must(t, ask())
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		begun := time.Now()
		harness.Must(t, ask())
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	return took
}

func askOn(conn net.Conn, in *bufio.Reader, to harness.Exec, header string) error {
	if _, err := fmt.Fprintf(conn,
		"GET /msi/token?api-version=2019-08-01&resource=%s HTTP/1.1\r\nHost: %s\r\nX-IDENTITY-HEADER: %s\r\n%s\r\n",
		harness.VaultURI, to.Address, to.Secret, header); err != nil {
		return err
	}
	response, err := http.ReadResponse(in, nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err = io.Copy(io.Discard, response.Body); err == nil && response.StatusCode != 200 {
		err = fmt.Errorf("status %d", response.StatusCode)
	}
	return err
}
