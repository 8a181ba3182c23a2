package clock

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// scene is a witness in virtual time, with what answers it.
type scene struct {
	witness
	start time.Time
	step  time.Duration // by how much the wall clock was set
	yes   bool
	err   error
	asks  []time.Duration
}

func newScene() *scene {
	s := &scene{start: time.Now()}
	s.boot = func() time.Duration { return time.Minute + time.Since(s.start) }
	s.wall = func() time.Time { return time.Now().Round(0).Add(s.step) }
	s.ask = func() (bool, error) {
		s.asks = append(s.asks, time.Since(s.start))
		return s.yes, s.err
	}
	return s
}

// after lets time go by, looking every second, and returns the word at its end.
func (s *scene) after(d time.Duration) (synchronised, told bool) {
	for range d / time.Second {
		time.Sleep(time.Second)
		s.word()
		synctest.Wait()
	}
	return s.word()
}

func (s *scene) wants(t *testing.T, what string, synchronised, told bool, after time.Duration) {
	t.Helper()
	if y, k := s.after(after); y != synchronised || k != told {
		t.Errorf("%s: synchronised %v, told %v; want %v, %v (asked at %v)", what, y, k, synchronised, told, s.asks)
	}
}

func TestWitnessIsAskedSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScene()
		s.inquire()
		s.wants(t, "not synchronised", false, true, 10*time.Minute)
		s.yes = true
		s.wants(t, "five minutes after the daemon set the clock", true, true, askLatest)
		if n := len(s.asks); n > 8 {
			t.Errorf("asked %d times in a quarter of an hour: %v", n, s.asks)
		}
		s.asks = nil
		s.wants(t, "a day", true, true, 24*time.Hour)
		if n := len(s.asks); n > 144 {
			t.Errorf("asked %d times a day", n)
		}
		s.yes = false
		s.wants(t, "synchronisation was lost", false, true, confirmInterval+time.Second)
	})
}

func TestWitnessSoonAfterBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScene()
		s.inquire()
		s.yes = true
		s.wants(t, "the time daemon took 10 seconds", true, true, askSoonest+time.Second)
	})
}

// An answer does not count for ever, and not once the clock was set.
func TestWitnessIsDoubted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScene()
		s.yes = true
		s.inquire()
		s.err = errors.New("nobody is there")
		s.wants(t, "not answered for a while", true, true, wordLasts-time.Second)
		s.wants(t, "and not any more", false, false, 2*time.Second)
		s.err = nil
		s.wants(t, "answered again", true, true, askLatest+time.Second)

		for _, step := range []time.Duration{3 * time.Second, -time.Hour, 20 * 365 * 24 * time.Hour} {
			s.yes = false
			s.step += step
			if y, told := s.word(); y || told {
				t.Errorf("the clock was set by %v, and the answer from before counts", step)
			}
			s.wants(t, "asked about the step", false, true, askSoonest)
			s.yes = true
			s.wants(t, "set right by its daemon", true, true, askSoonest+time.Second)
		}
		// A leap second, and the small steps of a daemon, are no reason to ask.
		s.asks = nil
		for range 60 {
			s.step += 30 * time.Millisecond
			s.wants(t, "moved a little", true, true, time.Minute)
		}
		if n := len(s.asks); n > 7 {
			t.Errorf("asked %d times an hour: %v", n, s.asks)
		}
	})
}

func TestAskSocket(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		says      string
		yes, fine bool
	}{
		"yes":      {"synchronised\n", true, true},
		"no":       {"not synchronised\n", false, true},
		"nothing":  {"", false, false},
		"nonsense": {"synchronised, more or less\n", false, false},
		"too much": {strings.Repeat("synchronised\n", 1000), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "s")
			listener, err := net.Listen("unix", path)
			if err != nil {
				t.Skip(err) // where the temporary folder's name is too long
			}
			served := make(chan struct{})
			go func() {
				defer close(served)
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Write([]byte(row.says)) // cut off, where it is too much
				_ = conn.Close()
			}()
			yes, err := askSocket(path)
			_ = listener.Close()
			<-served
			if yes != row.yes || (err == nil) != row.fine {
				t.Errorf("%v, %v", yes, err)
			}
		})
	}
	if _, err := askSocket(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("nobody is there, and it was answered")
	}
	if Sentence(true) != "synchronised" || Sentence(false) != "not synchronised" {
		t.Error("the words of the socket are others by now")
	}
}
