package server

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"perceptd/tokencache"
)

// BenchmarkCached measures a token that is there beside a bare handler that writes the same bytes, over
// one kept connection of a Unix socket.
func BenchmarkCached(b *testing.B) {
	long := strings.Repeat("aBcDeFgHiJkLmN-_", 112) // 1,792 bytes: a usual token
	fetch := func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		fetched, err := fetchDay(ctx, k)
		fetched.Token.Text = tokencache.NewSecret(long)
		return fetched, err
	}
	d := newDaemon(b, fetch)
	d.Log = nil
	d.Now = nil
	d.Limits.PerSecond, d.Limits.Burst = 1_000_000_000, 1
	socket := d.tokens("")
	for _, form := range []struct{ name, text string }{
		{"imds", get(imdsVault, metadata, "User-Agent: bench")},
		{"v1", get(v1Vault, "User-Agent: bench")},
	} {
		same := send(b, socket, form.text)
		if same.status != 200 {
			b.Fatalf("%+v", same)
		}
		bare := d.bare([]byte(same.body))
		b.Run(form.name+"/bare", func(b *testing.B) { repeat(b, bare, form.text) })
		b.Run(form.name+"/perceptd", func(b *testing.B) { repeat(b, socket, form.text) })
	}
}

// bare serves body to whoever asks.
func (d *daemon) bare(body []byte) string {
	l := d.listen("bare" + strconv.Itoa(len(body)))
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = hs.Serve(l) }()
	d.t.Cleanup(func() { hs.Close(); <-done })
	return l.Addr().String()
}

func repeat(b *testing.B, socket, text string) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReaderSize(conn, 16<<10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := io.WriteString(conn, text); err != nil {
			b.Fatal(err)
		}
		skipAnswer(b, in)
	}
}

// skipAnswer reads an answer with a Content-Length as cheaply as can be.
func skipAnswer(b *testing.B, in *bufio.Reader) {
	length := 0
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			b.Fatal(err)
		}
		if len(line) == 2 {
			break
		}
		if value, ok := strings.CutPrefix(string(line), "Content-Length: "); ok {
			length, _ = strconv.Atoi(strings.TrimSpace(value))
		}
	}
	if _, err := in.Discard(length); err != nil {
		b.Fatal(err)
	}
}
