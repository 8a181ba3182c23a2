//go:build staleness

package staleness

import (
	"fmt"
	"strings"
	"time"
)

// minutes writes a duration as minutes, with a tenth where that matters.
func minutes(d time.Duration) string {
	if d >= 100*time.Minute {
		return grouped(fmt.Sprintf("%.0f", d.Minutes()))
	}
	return fmt.Sprintf("%.1f", d.Minutes())
}

// grouped puts a comma before each three digits of a number's whole part.
func grouped(number string) string {
	whole, rest, _ := strings.Cut(number, ".")
	if rest != "" {
		rest = "." + rest
	}
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	return whole + rest
}

func count(n int) string { return grouped(fmt.Sprint(n)) }

// table is rows of a Markdown table, the first of them its head.
type table [][]string

func (t table) String() string {
	var b strings.Builder
	for i, row := range t {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			b.WriteString(strings.Repeat("|---", len(row)) + "|\n")
		}
	}
	return b.String()
}

// tables is the generated part of the document.
func tables(all []*comparison, bars []bar, curve []point) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%d keys, %d days, seed %d.\n", benchKeys, benchDays, benchSeed)
	fmt.Fprintf(&b, "\n### What is asked of perceptd\n\n%v", barTable(bars))
	fmt.Fprintf(&b, "\n### From the rollover to the hand, in minutes\n\n%v", lagTable(all))
	fmt.Fprintf(&b, "\n### Calls to the back end\n\n%v", callTable(all))
	fmt.Fprintf(&b, "\n### Lag against calls, back end random\n\n%v\n", curveTable(curve))
	return b.String()
}

func barTable(bars []bar) table {
	t := table{{"back end", "figure", "at most", arrangements[together], "", arrangements[alone], ""}}
	last := ""
	for _, b := range bars {
		name := b.backEnd
		if name == last {
			name = ""
		}
		last = b.backEnd
		t = append(t, []string{
			name, b.what, b.atMost(), b.number(b.measured[together]), b.verdict(together),
			b.number(b.measured[alone]), b.verdict(alone),
		})
	}
	return t
}

// rows returns every strategy's figures on a back end, perceptd's first.
func (c *comparison) rows() []named {
	return append([]named{
		{"**perceptd**", c.of(together, learnt)}, {"its first days", c.of(together, unlearnt)},
		{"**perceptd, one key**", c.of(alone, learnt)}, {"its first days", c.of(alone, unlearnt)},
	}, c.others...)
}

func (c *comparison) nameFor(row int) string {
	if row == 0 {
		return c.name
	}
	return ""
}

func lagTable(all []*comparison) table {
	t := table{{"back end", "strategy", "episodes", "lag: mean", "p50", "p99", "module's: mean", "p99", "stale: mean",
		"p99", "failed requests"}}
	for _, c := range all {
		for i, r := range c.rows() {
			failed := count(r.failed)
			if r.failedAway > 0 {
				failed = fmt.Sprintf("%s, and %s in the outage", count(r.failed-r.failedAway), count(r.failedAway))
			}
			if i == 1 || i == 3 {
				failed = "" // counted for the whole time
			}
			t = append(t, []string{
				c.nameFor(i), r.name, count(r.episodes),
				minutes(r.lag.mean()), minutes(r.lag.quantile(0.5)), minutes(r.lag.quantile(0.99)),
				minutes(r.module.mean()), minutes(r.module.quantile(0.99)), minutes(r.stale.mean()),
				minutes(r.stale.quantile(0.99)), failed,
			})
		}
	}
	return t
}

func callTable(all []*comparison) table {
	t := table{{"back end", "strategy", "ordinary day", "episode", "of polling's", "episode's hour",
		"of polling as long", "a key in the outage", "lost", "forced", "ripe"}}
	for _, c := range all {
		poll := c.other(polling(pollingEvery5).name)
		for i, r := range c.rows() {
			outage := ""
			if c.outage.length() > 0 && i != 1 && i != 3 {
				outage = grouped(fmt.Sprintf("%.0f", r.inOutage))
			}
			t = append(t, []string{
				c.nameFor(i), r.name, fmt.Sprintf("%.2f", r.ordinary), fmt.Sprintf("%.1f",
					r.calls), percent(r.calls / poll.calls),
				fmt.Sprintf("%.2f", r.staleHour), percent(r.share), outage, count(r.lost), count(r.forced),
				count(r.ripe),
			})
		}
	}
	return t
}

func percent(share float64) string { return fmt.Sprintf("%.1f %%", share*100) }

func curveTable(curve []point) table {
	best := bestProduct()
	t := table{{"strategy", "calls an episode", "calls an hour of it", "lag: mean",
		"least lag possible for these calls"}}
	for _, p := range curve {
		least := time.Duration(best / p.calls * float64(time.Minute))
		t = append(t, []string{p.name, fmt.Sprintf("%.1f", p.episode), fmt.Sprintf("%.2f", p.calls), minutes(p.lag),
			minutes(least)})
	}
	return t
}
