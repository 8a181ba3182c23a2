package client

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"perceptd/agent/api"
)

const canary = "canary-4f1d2c7e9b"

// What a daemon sends beside its answer, or in the place of one, is in no error, and not printed for a module by
// net/http. It is no parallel test, since it listens to the standard logger.
func TestNothingUnsolicitedIsPrinted(t *testing.T) {
	var printed bytes.Buffer // read when every connection has ended
	defer log.SetOutput(log.Writer())
	log.SetOutput(&printed)
	body := `{"access_token":"a.b.c"}`
	good := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		len(body), body)
	for name, row := range map[string]struct {
		first, answer string
		good          bool
	}{
		"twice":                {"", good + "HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n" + canary, true},
		"more than its length": {"", good + canary, true},
		"before it is asked":   {canary, "", false},
		"no HTTP":              {"", canary + "\r\n\r\n", false},
		"a bad header":         {"", "HTTP/1.1 200 OK\r\n" + canary + "\r\n\r\n", false},
		"a bad length":         {"", "HTTP/1.1 200 OK\r\nContent-Length: " + canary + "\r\n\r\n", false},
		"a bad encoding":       {"", "HTTP/1.1 200 OK\r\nTransfer-Encoding: " + canary + "\r\n\r\n", false},
		"a bad trailer": {"",
			"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" +
				canary + "\r\n\r\n", false},
	} {
		path := filepath.Join(ShortFolder(t), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		var talking sync.WaitGroup
		talking.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(conn, row.first)
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					_, _ = io.WriteString(conn, row.answer)
				}
				if !row.good {
					_ = conn.(*net.UnixConn).CloseWrite()
				}
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}
		})
		c := &Client{Socket: path}
		_, err = c.Token(context.Background(), TokenRequest{Resource: "r"})
		if (err == nil) != row.good || strings.Contains(fmt.Sprint(err), canary) {
			t.Errorf("%s: %v", name, err)
		}
		if row.first != "" || !row.good {
			for _, err := range c.Watch(context.Background(), WatchRequest{Resource: "r"}) {
				if strings.Contains(fmt.Sprint(err), canary) {
					t.Errorf("%s, watched: %v", name, err)
				}
			}
		}
		if _, err := c.Rejected(context.Background(), api.Rejection{}); strings.Contains(fmt.Sprint(err), canary) {
			t.Errorf("%s, reported: %v", name, err)
		}
		_ = l.Close()
		talking.Wait()
	}
	if printed.Len() > 0 {
		t.Errorf("printed: %s", &printed)
	}
}
