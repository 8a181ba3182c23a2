package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	strainEvery = 5 * time.Millisecond // how often the watch wants to run
	lateFrom    = 250 * time.Millisecond
	lateShare   = 0.25 // of a time in which the watch came late
	othersShare = 0.10 // of the processors that others took, or the host of this machine
)

// strain watches whether this machine has time for the demonstration. How fast something is cannot be judged on one
// that has not.
type strain struct {
	mu    sync.Mutex // protects what follows
	late  []lateness
	stop  chan struct{}
	ended sync.WaitGroup
}

// lateness is a moment at which the watch ran, and by how much too late.
type lateness struct {
	at time.Time
	by time.Duration
}

// watchStrain begins to watch. Close it.
func watchStrain() *strain {
	s := &strain{stop: make(chan struct{})}
	s.ended.Go(func() {
		for {
			before := time.Now()
			select {
			case <-time.After(strainEvery):
			case <-s.stop:
				return
			}
			now := time.Now()
			if by := now.Sub(before) - strainEvery; by > strainEvery {
				s.mu.Lock()
				s.late = append(s.late, lateness{now, by})
				s.mu.Unlock()
			}
		}
	})
	return s
}

func (s *strain) close() {
	close(s.stop)
	s.ended.Wait()
}

// processors is what the processors have done, in the kernel's ticks, and what of it was for this process.
type processors struct {
	all, idle, stolen, own float64
	known                  bool
}

// ticks are the kernel's in a second, as it counts for programs on every architecture.
const ticks = 100

// readProcessors asks the kernel.
func readProcessors() processors {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return processors{}
	}
	p := parseProcessors(stat)
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		return processors{}
	}
	p.own = float64(own.Utime.Nano()+own.Stime.Nano()) / 1e9 * ticks
	return p
}

// parseProcessors reads the first line of /proc/stat: user nice system idle iowait irq softirq steal, and the guests,
// which are in user and nice as well.
func parseProcessors(stat []byte) (p processors) {
	line, _, _ := bytes.Cut(stat, []byte("\n"))
	fields := strings.Fields(string(line))
	if len(fields) < 9 || fields[0] != "cpu" {
		return processors{}
	}
	for i, field := range fields[1:9] {
		n, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return processors{}
		}
		p.all += n
		switch i {
		case 3, 4:
			p.idle += n
		case 7:
			p.stolen += n
		}
	}
	p.known = true
	return p
}

// stretch is a part of the demonstration that may have come too short.
type stretch struct {
	begun  time.Time
	before processors
}

func beginStretch() stretch { return stretch{time.Now(), readProcessors()} }

// since says in words what has kept this machine from the demonstration in a stretch that ends now; empty: nothing.
func (s *strain) since(from stretch) string {
	s.mu.Lock()
	var late []time.Duration
	for _, l := range s.late {
		if l.at.After(from.begun) {
			late = append(late, l.by)
		}
	}
	s.mu.Unlock()
	return strainOf(time.Since(from.begun), late, from.before, readProcessors())
}

// strainOf says it from how late the watch was and from what the processors did.
func strainOf(took time.Duration, late []time.Duration, before, after processors) string {
	var reasons []string
	var sum, worst time.Duration
	for _, by := range late {
		sum, worst = sum+by, max(worst, by)
	}
	if worst >= lateFrom || float64(sum) >= lateShare*float64(took) {
		reasons = append(reasons, fmt.Sprintf("this process came late by up to %v, %v in all",
			worst.Round(time.Millisecond), sum.Round(time.Millisecond)))
	}
	if all := after.all - before.all; before.known && after.known && all > 0 {
		stolen := (after.stolen - before.stolen) / all
		others := (all-(after.idle-before.idle)-(after.own-before.own))/all - stolen
		if others >= othersShare {
			reasons = append(reasons, fmt.Sprintf("other processes had %.0f %% of the processors", 100*others))
		}
		if stolen >= othersShare {
			reasons = append(reasons, fmt.Sprintf("the host of this machine had %.0f %% of them", 100*stolen))
		}
	}
	return strings.Join(reasons, ", ")
}
