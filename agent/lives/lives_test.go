package lives

import (
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// What is to be lived is told by the environment, so that nothing is compiled anew for it.
const (
	seedVariable    = "LIVES_SEED"    // the first seed; the others follow
	countVariable   = "LIVES_COUNT"   // how many lives
	secondsVariable = "LIVES_SECONDS" // or for how long, in real time
	commitVariable  = "LIVES_COMMIT"  // a commit's hash, from which the first seed is made
	aboutVariable   = "LIVES_ABOUT"   // what the lives are about; empty: anything
	allVariable     = "LIVES_ALL"     // not empty: goes on after a fault, and tells the first of each sort
	shortenVariable = "LIVES_SHORTEN" // for how many seconds a history is shortened that goes wrong
	twiceVariable   = "LIVES_TWICE"   // how many lives are lived twice
)

// usual is how many lives each run of the tests lives.
const usual = 24

// inBubble lives a plan in a bubble of its own.
func inBubble(t *testing.T, p plan) (f *fault, told tally) {
	synctest.Test(t, func(*testing.T) { f, told = live(p) })
	return f, told
}

// TestLives lives the lives of seeds that follow each other: the same ones each time, unless the environment says
// otherwise.
func TestLives(t *testing.T) {
	t.Parallel()
	m := mayLive(t)
	t.Run("lives", func(t *testing.T) {
		for worker := range 2 {
			t.Run(strconv.Itoa(worker), func(t *testing.T) {
				t.Parallel()
				for seed, more := m.next(t); more; seed, more = m.next(t) {
					m.live(t, seed)
				}
			})
		}
	})
	t.Log(m)
}

// many is many lives.
type many struct {
	first, count uint64
	ends         time.Time // zero: after so many
	about        subject
	all          bool
	shorten      time.Duration

	mu    sync.Mutex // protects what follows
	begun uint64
	lived int
	found map[string]bool // sorts of faults
	tally
}

func mayLive(t *testing.T) *many {
	m := &many{
		first: number(t, seedVariable, 1), count: number(t, countVariable, usual), all: os.Getenv(allVariable) != "",
		about: aboutOf(t), shorten: time.Duration(number(t, shortenVariable, 60)) * time.Second,
		found: make(map[string]bool), tally: tally{excused: make(map[excuse]int)},
	}
	if hash := os.Getenv(commitVariable); hash != "" {
		seed, err := strconv.ParseUint(hash[:min(len(hash), 12)], 16, 64)
		if err != nil {
			t.Fatalf("%s: %v", commitVariable, err)
		}
		m.first = seed
	}
	if seconds := number(t, secondsVariable, 0); seconds > 0 {
		m.ends, m.count = time.Now().Add(time.Duration(seconds)*time.Second), 1<<62
	}
	return m
}

func number(t *testing.T, name string, otherwise uint64) uint64 {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// next returns the seed of another life, if there is to be one.
func (m *many) next(t *testing.T) (seed uint64, more bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.begun == m.count || !m.ends.IsZero() && time.Now().After(m.ends) || !m.all && len(m.found) > 0 {
		return 0, false
	}
	m.begun++
	return m.first + m.begun - 1, true
}

func (m *many) live(t *testing.T, seed uint64) {
	p := draw(seed, m.about)
	f, told := inBubble(t, p)
	if !m.add(told, f) {
		return
	}
	n := len(p.events)
	p, f, whole := shrink(t, p, f, time.Now().Add(m.shorten))
	if !m.all || m.isNew(sortOf(p, f)) {
		t.Errorf("the life of seed %d goes wrong: %v\n%s", seed, f, report(p, n, whole))
	}
}

// report tells how to live a life again that goes wrong, and what is left of its history.
func report(p plan, ofEvents int, whole bool) string {
	var b strings.Builder
	b.WriteString("This life again, from the repository's root: ")
	if p.about != anything {
		fmt.Fprintf(&b, "%s='%s' ", aboutVariable, p.about)
	}
	fmt.Fprintf(&b, "%s=%d %s=1 go test -count=1 -run '^TestLives$' ./agent/lives\n",
		seedVariable, p.seed, countVariable)
	fmt.Fprintf(&b, "The shortest history found that goes wrong so, %d of its %d events, by the time since it began",
		len(p.events), ofEvents)
	if !whole {
		fmt.Fprintf(&b, " (the time for it was over: %s=SECONDS gives it more)", shortenVariable)
	}
	fmt.Fprintf(&b, ":\n%v", p)
	return b.String()
}

// add takes in a life, and reports whether its fault is to be told.
func (m *many) add(told tally, f *fault) (tell bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lived++
	m.days, m.calls, m.answers, m.refusals = m.days+told.days, m.calls+told.calls, m.answers+told.answers,
		m.refusals+told.refusals
	for e, times := range told.excused {
		m.excused[e] += times
	}
	if f == nil {
		return false
	}
	tell = m.all || len(m.found) == 0
	if !m.all {
		m.found[f.kind] = true
	}
	return tell
}

func (m *many) isNew(sort string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.found[sort]
	m.found[sort] = true
	return !before
}

func (m *many) String() string {
	var b strings.Builder
	fmt.Fprintf(&b,
		"%d lives from seed %d on, %.0f days, %d calls to the back end, %d tokens handed out, %d requests refused",
		m.lived, m.first, m.days, m.calls, m.answers, m.refusals)
	for _, e := range slices.Sorted(maps.Keys(m.excused)) {
		fmt.Fprintf(&b, "\n  excused %d times: %s", m.excused[e], e)
	}
	return b.String()
}

// A seed is one history, on any machine: else a life that went wrong could not be lived again.
func TestSameHistory(t *testing.T) {
	t.Parallel()
	for seed := range number(t, twiceVariable, 3) {
		_, a := inBubble(t, draw(seed, anything))
		_, b := inBubble(t, draw(seed, anything))
		if !reflect.DeepEqual(a, b) {
			t.Errorf("seed %d has two histories: %+v and %+v", seed, a, b)
		}
	}
}
