//go:build bench

package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cpus are the two that servers and client run on, which are the same where there is only one.
type cpus struct{ server, client int }

// twoCPUs picks the first and the last that this process may use.
func twoCPUs() (cpus, error) {
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return cpus{}, err
	}
	var all []int
	for cpu := 0; len(all) < may.Count(); cpu++ {
		if may.IsSet(cpu) {
			all = append(all, cpu)
		}
	}
	return cpus{server: all[0], client: all[len(all)-1]}, nil
}

func cpuSet(cpu int) *unix.CPUSet {
	var set unix.CPUSet
	set.Set(cpu)
	return &set
}

// pin keeps this process's threads, and those that they start, on one CPU.
func pin(cpu int) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, thread := range threads {
		id, err := strconv.Atoi(thread.Name())
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(id, cpuSet(cpu)); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// contender is a server under measurement.
type contender struct {
	name   string
	socket string
	cmd    *exec.Cmd
	begun  time.Time     // just before it was started
	ended  chan struct{} // closed when it has ended
	stderr bytes.Buffer  // complete when ended is closed
}

// startServer starts a process on one CPU; the socket is where it is going to answer. stop ends it.
func startServer(cpu int, name, socket string, cmd *exec.Cmd) (*contender, error) {
	s := &contender{name: name, socket: socket, cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = &s.stderr
	if cmd.Env == nil {
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")} // no GOGC, no NOTIFY_SOCKET, nobody's settings
	}
	s.begun = time.Now()
	if err := startOn(cpu, cmd); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() {
		defer close(s.ended)
		_ = cmd.Wait() // how it ended matters only where it was not asked to, and then stderr says
	}()
	return s, nil
}

// startOn starts cmd on one CPU: a child begins with the affinity of the thread that starts it.
func startOn(cpu int, cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return err
	}
	if err := unix.SchedSetaffinity(0, cpuSet(cpu)); err != nil {
		return err
	}
	return errors.Join(cmd.Start(), unix.SchedSetaffinity(0, &before))
}

func (s *contender) pid() int { return s.cmd.Process.Pid }

// stop asks the process to end and waits until it has.
func (s *contender) stop() {
	_ = s.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(10 * time.Second):
		_ = s.cmd.Process.Kill()
		<-s.ended
	}
}

// firstAnswer is how long a server may take to answer for the first time.
const firstAnswer = 20 * time.Second

// await returns the first token that the server answers with, as the whole HTTP answer.
func (s *contender) await(request []byte) (answer []byte, err error) {
	err = s.untilNil(func() error {
		answer, err = askOnce(s.socket, request)
		return err
	})
	return answer, err
}

// accepts waits until the server's socket accepts and returns how long that took from its start.
func (s *contender) accepts() (time.Duration, error) {
	err := s.untilNil(func() error {
		conn, err := net.Dial("unix", s.socket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return time.Since(s.begun), err
}

func (s *contender) untilNil(try func() error) error {
	var err error
	for due := time.Now().Add(firstAnswer); time.Now().Before(due); {
		if err = try(); err == nil {
			return nil
		}
		select {
		case <-s.ended:
			return fmt.Errorf("%s ended: %s", s.name, s.stderr.String())
		case <-time.After(100 * time.Microsecond):
		}
	}
	return fmt.Errorf("%s gave no answer in %v: %w", s.name, firstAnswer, err)
}

// askOnce sends one request and returns the whole answer, which is a token.
func askOnce(socket string, request []byte) ([]byte, error) {
	l, err := newLoader(socket, request, 1, false)
	if err != nil {
		return nil, err
	}
	defer l.close()
	s, err := l.run(0)
	return bytes.Clone(l.conns[0].answer), errors.Join(err, s.first)
}

// cpuTime returns the processor time that a process and its threads, ended ones too, have used so far.
func (s *contender) cpuTime() (time.Duration, error) {
	const allThreads = 2                     // CPUCLOCK_SCHED of the whole process
	clock := int32(^s.pid()<<3 | allThreads) // see clock_getcpuclockid(3)
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0, fmt.Errorf("CPU clock of %s: %w", s.name, err)
	}
	return time.Duration(t.Nano()), nil
}

// memory returns a line of /proc/PID/status, such as VmRSS, in megabytes of 1e6 bytes.
func (s *contender) memory(field string) (float64, error) {
	kib, err := statusField(filepath.Join("/proc", strconv.Itoa(s.pid()), "status"), field)
	return float64(kib) * 1024 / 1e6, err
}

// switches returns how often the process's threads have been switched to and from so far.
func (s *contender) switches() (int, error) {
	tasks, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(s.pid()), "task", "*", "status"))
	if err != nil {
		return 0, err
	}
	sum := 0
	for _, task := range tasks {
		for _, field := range []string{"voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"} {
			n, err := statusField(task, field)
			if errors.Is(err, fs.ErrNotExist) {
				break // the thread has ended meanwhile
			}
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return sum, nil
}

func statusField(path, field string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		}
	}
	return 0, fmt.Errorf("%s: no %s", path, field)
}

// stopAtEnd ends the process with the test, which shows what it wrote where the test failed.
func (s *contender) stopAtEnd(t *testing.T) {
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("%s wrote:\n%s", s.name, s.stderr.String())
		}
	})
}
