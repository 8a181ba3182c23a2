//go:build bench

package bench

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n == 0 {
		return 0
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// spread is how far apart the rounds lie, as a part of their median.
func spread(values []float64) float64 {
	return (slices.Max(values) - slices.Min(values)) / median(values)
}

// ratio compares what was measured side by side, round by round, since the machine's mood changes
// from one to the next.
func ratio(is, to []float64) float64 {
	var each []float64
	for i := range is {
		each = append(each, is[i]/to[i])
	}
	return median(each)
}

// report writes all that was measured.
func (b *bench) report(w io.Writer) {
	fmt.Fprintf(w, "\nperceptd beside net/http and nginx: %d bytes of JSON over HTTP/1.1 on a Unix socket\n",
		len(b.body))
	fmt.Fprintf(w, "%s, %s/%s; servers on CPU %d, client on CPU %d; medians of %d rounds of %v a line; load now %s\n\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH, b.cpus.server, b.cpus.client, rounds, b.cell, loadAverage())
	b.reportCells(w)
	b.reportDaemon(w)
	b.reportAims(w)
	if b.disturbed() {
		fmt.Fprintln(w,
			"\nSomething else used the servers' CPU: compare CPU µs/request, and repeat on an idle machine.")
	}
}

// disturbed reports whether a server that had all it could do did not get its CPU.
func (b *bench) disturbed() bool {
	return slices.ContainsFunc(b.cells, func(c *cell) bool { return c.conns > 1 && !c.fresh && median(c.busy) < 0.95 })
}

func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

func (b *bench) reportCells(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table,
		"server\tform\tconnections\trequests/s\tp50 µs\tp99 µs\tCPU µs/request\tCPU busy\tspread\tof net/http\tof "+
			"nginx\t")
	var before *cell
	for _, c := range b.cells {
		if before != nil && (before.conns != c.conns || before.fresh != c.fresh || before.form != c.form) {
			fmt.Fprintln(table, strings.Repeat("\t", 11))
		}
		before = c
		connections := fmt.Sprintf("%d kept", c.conns)
		if c.fresh {
			connections = fmt.Sprintf("%d new", c.conns)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%.0f\t%.0f\t%.0f\t%.1f\t%.0f %%\t%.0f %%\t%s\t%s\t\n",
			c.server.name, c.form, connections, median(c.perSecond), median(c.p50), median(c.p99), median(c.cpu),
			100*median(c.busy), 100*spread(c.perSecond), b.against(c, b.net), b.against(c, b.nginx))
	}
	_ = table.Flush()
}

// against is the cell's speed as a part of another server's under the same load.
func (b *bench) against(c *cell, other *contender) string {
	if to := b.find(other, c.conns, c.fresh); to != nil && to != c {
		return fmt.Sprintf("%.2f", ratio(c.perSecond, to.perSecond))
	}
	return "-"
}

// find returns a server's cell in the IMDS form, or nil.
func (b *bench) find(s *contender, conns int, fresh bool) *cell {
	for _, c := range b.cells {
		if c.server == s && c.form == "IMDS" && c.conns == conns && c.fresh == fresh {
			return c
		}
	}
	return nil
}

func (b *bench) reportDaemon(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table)
	fmt.Fprintf(table,
		"resident memory\t%.1f MB after start, %.1f MB after %d requests, %.1f MB at most; %.1f MB of it are the "+
			"program file's pages\n",
		b.atStart, b.afterRequests, warmRequests, b.peak, b.program)
	fmt.Fprintf(table, "start\t%.1f ms until it accepts, %.1f ms until the first token, median of %d\n",
		b.accept.Seconds()*1e3, b.token.Seconds()*1e3, starts)
	fmt.Fprintf(table, "idle\t%.0f context switches a minute, %.0f with systemd's watchdog at 30 s; watched for %v\n",
		b.idle, b.idleWatched, idleCells*b.cell)
	var sizes []string
	for i, arch := range architectures() {
		sizes = append(sizes, fmt.Sprintf("%.2f MB %s", b.size(i),
			cmp.Or(map[string]string{"arm": "arm/v7"}[arch], arch)))
	}
	fmt.Fprintf(table, "binary\t%s\n", strings.Join(sizes, ", "))
	_ = table.Flush()
}

// size returns a binary's size in megabytes.
func (b *bench) size(i int) float64 {
	info, err := os.Stat(b.binaries[i])
	b.must(err)
	return float64(info.Size()) / 1e6
}

// reportAims says which aims are met. A missed one is a reason to look, not a failure: the figures
// depend on the machine and on what else it does.
func (b *bench) reportAims(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\naim\t\tis\t\t")
	line := func(what, bound string, is float64, format string, met bool) {
		verdict := "not met"
		if met {
			verdict = "met"
		}
		fmt.Fprintf(table, "%s\t%s\t"+format+"\t%s\t\n", what, bound, is, verdict)
	}
	atLeast := func(conns int, fresh bool, bound float64) {
		mine := b.find(b.daemon, conns, fresh)
		what := fmt.Sprintf("requests/s of nginx's, %s, c=%d", mine.connections(), conns)
		if b.nginx == nil {
			fmt.Fprintf(table, "%s\t≥ %.2f\t-\tnot measured\t\n", what, bound)
			return
		}
		is := ratio(mine.perSecond, b.find(b.nginx, conns, fresh).perSecond)
		line(what, fmt.Sprintf("≥ %.2f", bound), is, "%.2f", is >= bound)
	}
	atMost := func(what string, bound float64, unit string, is float64) {
		line(what, fmt.Sprintf("≤ %.0f%s", bound, unit), is, "%.1f"+unit, is <= bound)
	}
	atLeast(1, false, 0.9)
	atLeast(16, false, 0.9)
	atLeast(64, false, 0.9)
	atLeast(256, false, 0.75)
	atLeast(16, true, 0.8)
	atMost("CPU a request, kept alive, c=16", 16, " µs", median(b.find(b.daemon, 16, false).cpu))
	atMost("resident memory at most", 16, " MB", b.peak)
	largest := 0.0
	for i := range b.binaries {
		largest = max(largest, b.size(i))
	}
	atMost("largest binary", 14, " MB", largest)
	atMost("start until it accepts", 15, " ms", b.accept.Seconds()*1e3)
	atMost("idle context switches a minute", 2, "", b.idle)
	_ = table.Flush()
}
