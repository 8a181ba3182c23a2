//go:build bench

package bench

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The requests that clients of each form send; the answer is the same token in each.
var (
	imdsRequest = []byte("GET " +
		"/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.net HTTP/1.1\r\n" +
		"Host: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\nMetadata: true\r\n\r\n")
	appServiceRequest = []byte(
		"GET /msi/token?api-version=2019-08-01&resource=https%3A%2F%2Fvault.azure.net HTTP/1.1\r\n" +
			"Host: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\nX-IDENTITY-HEADER: bench\r\n\r\n")
	v1Request = []byte("GET /v1/token?resource=https%3A%2F%2Fvault.azure.net HTTP/1.1\r\n" +
		"Host: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
)

// buildFor compiles the daemon for a platform as the Makefile does and returns the binary's path.
func buildFor(dir, arch string) (string, error) {
	binary := filepath.Join(dir, "perceptd-"+arch)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, "perceptd/cmd/perceptd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOARM=7")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build for %s: %w\n%s", arch, err, out)
	}
	return binary, nil
}

// startPerceptd starts the daemon on a simulated back end in a folder of its own.
func startPerceptd(cpu int, binary, dir string, environment ...string) (*contender, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf(`[source]
kind = "simulated"

[callers]
requests_per_second = 1000000

[[identity]]
name = "device"
default = true

[[grant]]
caller = { uid = %d }
identity = "device"
resources = ["https://vault.azure.net"]
prefetch = true
`, os.Getuid())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, "--config", config, "--runtime-dir", dir, "--state-dir", filepath.Join(dir, "state"))
	cmd.Env = append(environment, "PATH="+os.Getenv("PATH"))
	return startServer(cpu, "perceptd", filepath.Join(dir, "token.sock"), cmd)
}

const (
	bareSocket = "BENCH_BARE_SOCKET" // where the bare server listens
	bareBody   = "BENCH_BARE_BODY"   // the file whose text it answers with
)

// startBare starts this test's own binary again, as TestBareServer.
func startBare(cpu int, dir string, body []byte) (*contender, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	file, socket := filepath.Join(dir, "bare.json"), filepath.Join(dir, "bare.sock")
	if err := os.WriteFile(file, body, 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "-test.run=^TestBareServer$", "-test.timeout=0")
	cmd.Env = []string{bareSocket + "=" + socket, bareBody + "=" + file}
	return startServer(cpu, "net/http", socket, cmd)
}

// TestBareServer is no test but the server that perceptd is compared with: net/http and a handler that
// writes what it has in memory, whoever asks for whatever.
func TestBareServer(t *testing.T) {
	socket := os.Getenv(bareSocket)
	if socket == "" {
		t.Skip("it is a server, which TestBench starts")
	}
	body, err := os.ReadFile(os.Getenv(bareBody))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Fatal(http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body)
	})))
}

var errNoNginx = errors.New("nginx is not installed: apt-get install nginx-light")

// startNginx starts Debian's nginx in one process, with the same bytes in a file.
func startNginx(cpu int, dir string, body []byte) (*contender, error) {
	binary, err := exec.LookPath("nginx")
	if err != nil {
		if binary, err = exec.LookPath("/usr/sbin/nginx"); err != nil {
			return nil, errNoNginx
		}
	}
	files := filepath.Join(dir, "files", "metadata", "identity", "oauth2")
	if err := os.MkdirAll(files, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(files, "token"), body, 0o644); err != nil {
		return nil, err
	}
	socket, config := filepath.Join(dir, "nginx.sock"), filepath.Join(dir, "nginx.conf")
	// Without a master process the worker is the only one to measure.
	text := strings.ReplaceAll(`daemon off;
master_process off;
worker_processes 1;
pid DIR/nginx.pid;
error_log stderr error;
events { worker_connections 1024; }
http {
	access_log off;
	default_type application/json;
	sendfile on;
	keepalive_timeout 600s;
	keepalive_requests 1000000000;
	client_body_temp_path DIR/body;
	proxy_temp_path DIR/proxy;
	fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi;
	scgi_temp_path DIR/scgi;
	server {
		listen unix:DIR/nginx.sock;
		root DIR/files;
		add_header Cache-Control no-store;
	}
}
`, "DIR", dir)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	return startServer(cpu, "nginx", socket, exec.Command(binary, "-p", dir, "-e", "stderr", "-c", config))
}

// bodyOf returns what comes after the header of an HTTP answer.
func bodyOf(answer []byte) []byte {
	_, body, _ := bytes.Cut(answer, headerEnd)
	return body
}

// startTimes starts the daemon many times and returns the medians of how long it took to accept, and to
// hand out the first token.
func startTimes(cpu int, binary, dir string, times int) (accept, token time.Duration, err error) {
	var accepts, tokens []float64
	for i := range times {
		s, err := startPerceptd(cpu, binary, filepath.Join(dir, "start"+strconv.Itoa(i)))
		if err != nil {
			return 0, 0, err
		}
		took, err := s.accepts()
		if err == nil {
			_, err = s.await(imdsRequest)
		}
		tokens = append(tokens, float64(time.Since(s.begun)))
		accepts = append(accepts, float64(took))
		s.stop()
		if err != nil {
			return 0, 0, err
		}
	}
	return time.Duration(median(accepts)), time.Duration(median(tokens)), nil
}

// architectures are those that are released, this machine's first.
func architectures() []string {
	all := []string{runtime.GOARCH}
	for _, arch := range []string{"amd64", "arm64", "arm"} {
		if arch != runtime.GOARCH {
			all = append(all, arch)
		}
	}
	return all
}
