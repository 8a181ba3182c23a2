package limit

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
)

// pairs returns a function that makes a connection, and returns both its ends.
func pairs(t *testing.T, network string) func() (client, server net.Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return func() (client, server net.Conn) {
		client, err := net.Dial(network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		if server, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		return client, server
	}
}

// read returns the answer on conn. What follows it must be the end.
func read(t *testing.T, conn net.Conn) (answer *http.Response, body string) {
	t.Helper()
	from := bufio.NewReader(conn)
	answer, err := http.ReadResponse(from, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := from.ReadByte(); err != io.EOF {
		t.Errorf("after the answer: %v", err)
	}
	return answer, string(text)
}

// Whatever a caller has sent by then, and however much, it has its answer and no reset: nothing, a part of a request, a
// whole one, one with a body.
func TestRefuse(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"unix", "tcp"} {
		pair := pairs(t, network)
		r := Refusals{Most: 9}
		defer r.Close()
		for _, sent := range []string{"", "GET /v1/tok", "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
			"POST / HTTP/1.1\r\n\r\n" + strings.Repeat("x", 16<<10)} {
			client, server := pair()
			if _, err := io.WriteString(client, sent); err != nil {
				t.Fatal(err)
			}
			r.Refuse(server, Key{UID: 7})
			if _, err := io.WriteString(client, "more\r\n"); err != nil { // the caller may not have read it yet
				t.Errorf("%s: %v", network, err)
			}
			answer, body := read(t, client)
			if answer.StatusCode != 429 || answer.Header.Get("Retry-After") != "1" || !answer.Close ||
				answer.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s: %+v", network, answer)
			}
			var problem api.Problem
			var sdk struct {
				Error       string
				Description string `json:"error_description"`
				Message     string
				StatusCode  int
			}
			if err := errors.Join(json.Unmarshal([]byte(body), &problem),
				json.Unmarshal([]byte(body), &sdk)); err != nil {
				t.Fatal(err)
			}
			if problem.Code != api.CodeBusy || problem.Type != "urn:percept:problem:too_many_requests" ||
				problem.Status != 429 || problem.Title == "" || problem.Detail == "" ||
				sdk.Error != "invalid_request" || sdk.Description != problem.Detail || sdk.Message != problem.Detail ||
				sdk.StatusCode != 429 {
				t.Errorf("%s: %s", network, body)
			}
			client.Close()
		}
	}
}

// One caller has no more than twice what is left, so that others have something left; and what is closed makes room
// again.
func TestShares(t *testing.T) {
	t.Parallel()
	pair := pairs(t, "unix")
	r := Refusals{Most: 12}
	defer r.Close()
	var clients []net.Conn
	refuse := func(of string, n int) (answered int) {
		for range n {
			client, server := pair()
			r.Refuse(server, Key{Module: of})
			if got, err := client.Read(make([]byte, 1)); got == 1 {
				answered++
				clients = append(clients, client)
			} else if !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
		return answered
	}
	for _, row := range []struct {
		of   string
		want int
	}{{"one", 8}, {"another", 3}, {"a third", 1}} {
		if got := refuse(row.of, 20); got != row.want {
			t.Errorf("%s has %d answers, want %d", row.of, got, row.want)
		}
	}
	for _, client := range clients {
		client.Close()
	}
	for r.count() > 0 {
		time.Sleep(time.Millisecond)
	}
	if got := refuse("one", 9); got != 8 || len(r.of) != 1 {
		t.Errorf("afterwards: %d answers, %v", got, r.of)
	}
}

func (r *Refusals) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// On a Unix socket one that has not read its answer counts, whatever else it does, until it has read it.
func TestUnreadCounts(t *testing.T) {
	t.Parallel()
	client, server := pairs(t, "unix")()
	r := Refusals{Most: 1}
	defer r.Close()
	r.Refuse(server, Key{UID: 7})
	if err := client.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if !hasUnread(server) || r.count() != 1 {
		t.Error("it counts no more")
	}
	read(t, client)
	for r.count() > 0 {
		time.Sleep(time.Millisecond)
	}
}

// Who is left when all ends is closed, and has its answer; who comes later has none.
func TestRefusalsClose(t *testing.T) {
	t.Parallel()
	pair := pairs(t, "unix")
	var none Refusals
	none.Close()
	r := Refusals{Most: 9}
	client, server := pair()
	r.Refuse(server, Key{UID: 7})
	r.Close()
	r.Close()
	read(t, client)
	if _, err := server.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
	client, server = pair()
	r.Refuse(server, Key{UID: 7})
	if n, err := client.Read(make([]byte, 1)); n != 0 ||
		!(errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
		t.Errorf("%d %v", n, err)
	}
}
