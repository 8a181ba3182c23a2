package main

import (
	"fmt"
	"strings"
	"time"
)

// parts is in how many buckets a back-off's cap is divided.
const parts = 6

// reconnect is the shape in which a fleet comes back after an outage.
type reconnect struct {
	cap     time.Duration
	devices int
	buckets []int // connections in each sixth of the cap, from when the hub was back
}

// reconnectOf counts connections by sixths of the cap. back is how long after the hub each device was back.
func reconnectOf(back []time.Duration, devices int, cap time.Duration) reconnect {
	r := reconnect{cap: cap, devices: devices, buckets: make([]int, parts)}
	for _, at := range back {
		bucket := max(0, int(at*parts/cap))
		for len(r.buckets) <= bucket {
			r.buckets = append(r.buckets, 0)
		}
		r.buckets[bucket]++
	}
	return r
}

// peak returns the busiest bucket's connections.
func (r reconnect) peak() (peak int) {
	for _, n := range r.buckets {
		peak = max(peak, n)
	}
	return peak
}

// mean returns a bucket's connections where a fleet comes back evenly over one cap.
func (r reconnect) mean() float64 { return float64(r.devices) / parts }

// ratio returns how much busier the peak is than the mean.
func (r reconnect) ratio() float64 { return float64(r.peak()) / r.mean() }

// picture draws a bar for each bucket.
func (r reconnect) picture(columns int) string {
	text := ""
	for i, n := range r.buckets {
		bar := strings.Repeat("█", n*columns/max(1, r.peak()))
		text += fmt.Sprintf("  %8s  %-*s %d\n", seconds(r.cap*time.Duration(i)/parts), columns, bar, n)
	}
	perSecond := func(n float64) float64 { return n / (r.cap / parts).Seconds() }
	return text + fmt.Sprintf("  peak %d in a sixth of the cap (%.0f a second), mean %.1f (%.0f a second)\n"+
		"  the peak is %.2f times the mean\n",
		r.peak(), perSecond(float64(r.peak())), r.mean(), perSecond(r.mean()), r.ratio())
}
