package server

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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

// BenchmarkBesideAFlood measures what a quiet caller notices of another one that asks as fast as it can on
// many connections, with the limits and without: its latency at the median and at the 99th percentile.
func BenchmarkBesideAFlood(b *testing.B) {
	for _, row := range []struct {
		name      string
		flood     int
		perSecond int
	}{
		{"alone", 0, 200},
		{"flood of 64 connections, limited", 64, 200},
		{"flood of 64 connections, unlimited", 64, 1_000_000},
	} {
		b.Run(row.name, func(b *testing.B) {
			d := newDaemon(b, fetchDay)
			d.Log, d.Now = nil, nil
			d.Limits.PerSecond, d.Limits.Burst = row.perSecond, 2*row.perSecond
			quiet, flooded := d.tokens("vision"), d.tokens("")
			asked, stop := flood(b, flooded, row.flood)
			defer stop()
			before, began := asked.Load(), time.Now()
			measureQuiet(b, quiet)
			b.ReportMetric(float64(asked.Load()-before)/time.Since(began).Seconds(), "flood/s")
		})
	}
}

// flood asks on that many connections until stop is called, and counts the answers.
func flood(b *testing.B, socket string, connections int) (asked *atomic.Int64, stop func()) {
	asked = new(atomic.Int64)
	var all []net.Conn
	var running sync.WaitGroup
	for range connections {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, conn)
		running.Go(func() {
			in := bufio.NewReader(conn)
			for {
				if _, err := io.WriteString(conn, get(v1Vault)); err != nil {
					return
				}
				if !skipped(in) {
					return
				}
				asked.Add(1)
			}
		})
	}
	return asked, func() {
		for _, conn := range all {
			conn.Close()
		}
		running.Wait()
	}
}

// measureQuiet asks a hundred times a second, as nobody honest does, and reports the latency.
func measureQuiet(b *testing.B, socket string) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	var took []time.Duration
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for b.Loop() {
		<-tick.C
		began := time.Now()
		if _, err := io.WriteString(conn, get(v1Vault)); err != nil || !skipped(in) {
			b.Fatal("no answer")
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// skipped reads an answer and reports whether there was one.
func skipped(in *bufio.Reader) bool {
	response, err := http.ReadResponse(in, nil)
	if err != nil {
		return false
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return err == nil
}
