package server

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

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
