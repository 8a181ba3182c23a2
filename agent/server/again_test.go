package server

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/client"
)

// waitingBefore has a request written before anybody serves the socket, as through a restart, where the kernel gives no handle on
// processes, and returns the connection when it is served.
func waitingBefore(t *testing.T, text string) (*daemon, net.Conn) {
	t.Helper()
	d := newDaemon(t, fetchDay)
	d.Callers = attest.New(attest.Options{NoPidfd: true})
	l := d.listen("token.sock")
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	d.serving(func() error { return d.ServeTokens(l, "") })
	return d, conn
}

// Who may be another than connected is asked for another request, on the same connection, and proved by that.
func TestAskAgain(t *testing.T) {
	t.Parallel()
	report := fmt.Sprintf(`{"resource":%q,"status":403}%s`, vault, strings.Repeat(" ", 20<<10)) // more than is read at once
	for name, text := range map[string]string{
		"IMDS":        get(imdsVault, metadata),
		"App Service": get(appVault, appHeader),
		"our own":     get(v1Vault),
		"who I am":    get(api.PathWhoAmI),
		"a report":    post(api.PathRejected, report),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, conn := waitingBefore(t, text)
			first := exchangeOn(t, conn, "")
			checkRefusal(t, name, first, 503, api.CodeAskAgain)
			if first.header.Get("Retry-After") != "1" || first.closes {
				t.Errorf("%+v", first)
			}
			if second := exchangeOn(t, conn, text); second.status != 200 {
				t.Errorf("again: %+v", second)
			}
			if denials := d.Agent.Status().Denials; len(denials) != 0 || strings.Contains(d.log.String(), "caller not proved") {
				t.Errorf("it is noted as denied: %+v", denials)
			}
		})
	}
}

// The client does that by itself.
func TestClientAsksAgain(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Callers = attest.New(attest.Options{NoPidfd: true})
	l := d.listen("token.sock")
	done := make(chan error, 1)
	go func() {
		c := client.Client{Socket: l.Addr().String()}
		_, err := c.Token(t.Context(), client.TokenRequest{Resource: vault})
		done <- err
	}()
	raw, err := l.(*net.UnixListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { // until it has connected
		for n := 0; n == 0; {
			n, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		}
	}); err != nil {
		t.Fatal(err)
	}
	d.serving(func() error { return d.ServeTokens(l, "") })
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := d.denied.Load(); n != 1 {
		t.Errorf("asked again %d times", n)
	}
}

// A second request that was there before proves nothing; the one after that does. A body that is too long is not waited for.
func TestAskAgainOfWhoDoesNotWait(t *testing.T) {
	t.Parallel()
	_, conn := waitingBefore(t, get(v1Vault)+get(v1Vault))
	answers := bufio.NewReader(conn)
	for range 2 {
		if answer, err := http.ReadResponse(answers, nil); err != nil || answer.StatusCode != 503 {
			t.Fatal(answer, err)
		} else if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			t.Fatal(err)
		}
	}
	if got := exchangeOn(t, conn, get(v1Vault)); got.status != 200 {
		t.Errorf("after an answer: %+v", got)
	}
	_, conn = waitingBefore(t, post(api.PathRejected, strings.Repeat(" ", maxBody+1)))
	if got := exchangeOn(t, conn, ""); got.status != 503 || !got.closes {
		t.Errorf("a long body: %+v", got)
	}
}
