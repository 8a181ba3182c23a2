package clock

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

func device() tokencache.Clock { c, _ := Device(); return c }

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDeviceClock(t *testing.T) {
	t.Parallel()
	c, word := Device()
	if w := c.Wall(); strings.Contains(w.String(), "m=") {
		t.Errorf("Wall() = %v carries a monotonic reading", w)
	}
	first := c.Boot()
	if second := c.Boot(); first <= 0 || second < first {
		t.Errorf("Boot() = %v, then %v", first, second)
	}
	var state unix.Timex
	if _, err := unix.Adjtimex(&state); err != nil {
		t.Skipf("the kernel does not tell whether the clock is synchronised: %v", err)
	}
	if got, want := c.Synchronised(), state.Status&unix.STA_UNSYNC == 0; got != want ||
		word() != (Word{want, ByKernel}) {
		t.Errorf("Synchronised() = %v, %+v, the kernel says %v", got, word(), want)
	}
}

func TestTimerFires(t *testing.T) {
	t.Parallel()
	clocks := map[string]tokencache.Clock{"device": device(), "fast": Fast(1000)}
	for name, c := range clocks {
		for _, d := range []time.Duration{-time.Hour, 0, 1, time.Millisecond} {
			begun := c.Boot()
			fired, stop := c.Timer(d)
			<-fired
			if gone := c.Boot() - begun; gone < d {
				t.Errorf("%s: a timer of %v fired after %v", name, d, gone)
			}
			for range 2 {
				if stop() {
					t.Errorf("%s: stop of a timer that fired reports that it was in time", name)
				}
			}
		}
	}
}

func TestTimerStops(t *testing.T) {
	t.Parallel()
	fired, stop := device().Timer(time.Hour)
	if !stop() {
		t.Error("the first stop reports that the timer had fired")
	}
	if stop() {
		t.Error("the second stop reports that it stopped the timer")
	}
	select {
	case at := <-fired:
		t.Errorf("a stopped timer fired at %v", at)
	default:
	}
}

func TestTimerStopRacesWithFiring(t *testing.T) {
	t.Parallel()
	for range 200 {
		fired, stop := timer(50 * time.Microsecond)
		if !stop() {
			<-fired // a stop that came late means that the channel is sent to
		}
	}
}

// A timer descriptor is close-on-exec, on CLOCK_BOOTTIME, and closed once the timer is done.
func TestTimerFile(t *testing.T) {
	t.Parallel()
	file, err := timerFile(time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	raw, err := file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor flags %#x, %v: children inherit it", flags, err)
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(int(fd)))
		if err != nil || !strings.Contains(string(info), "clockid: 7\n") {
			t.Errorf("fdinfo %q, %v: not CLOCK_BOOTTIME", info, err)
		}
	})
	if _, err := timerFile(-1); err == nil {
		t.Error("a negative time was armed")
	}
}

// Without descriptors a timer still fires. In a process of its own, since the limit is the process's.
func TestTimerWithoutDescriptors(t *testing.T) {
	t.Parallel()
	const child = "PERCEPT_TEST_NO_DESCRIPTORS"
	if os.Getenv(child) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestTimerWithoutDescriptors$")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	_, stop := device().Timer(time.Hour) // starts Go's poller, which needs descriptors of its own
	stop()
	var usual unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &usual); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: usual.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &usual) }()
	if _, err := timerFile(time.Hour); err == nil {
		t.Fatal("a descriptor was had under a limit of none")
	}
	fired, _ := device().Timer(time.Millisecond)
	<-fired
	if _, stop = device().Timer(time.Hour); !stop() || stop() {
		t.Error("stop reports the wrong thing")
	}
}

func TestFastRunsAhead(t *testing.T) {
	t.Parallel()
	device, fast := device(), Fast(1e9)
	fired, _ := device.Timer(time.Millisecond)
	<-fired
	// 1 ms at a thousand million times is eleven days.
	if ahead := fast.Boot() - device.Boot(); ahead < 11*24*time.Hour {
		t.Errorf("Boot is %v ahead", ahead)
	}
	if ahead := fast.Wall().Sub(device.Wall()); ahead < 11*24*time.Hour {
		t.Errorf("Wall is %v ahead", ahead)
	}
	if !fast.Synchronised() {
		t.Error("not synchronised")
	}
	day, _ := fast.Timer(24 * time.Hour) // 86.4 µs
	<-day
}

func TestFastRefusesNonsense(t *testing.T) {
	t.Parallel()
	for _, speed := range []float64{0, -1, math.NaN(), math.Inf(1), math.Inf(-1)} {
		before := boot()
		c := Fast(speed)
		now := c.Boot()
		if after := boot(); now < before || now > after {
			t.Errorf("Fast(%v).Boot() = %v, want one between %v and %v", speed, now, before, after)
		}
	}
}

func TestScale(t *testing.T) {
	t.Parallel()
	const longest = time.Duration(math.MaxInt64 / 2)
	for _, row := range []struct {
		d    time.Duration
		by   float64
		want time.Duration
	}{
		{time.Hour, 24, 24 * time.Hour},
		{time.Hour, 1.0 / 3600, time.Second},
		{1, 0.5, 1}, // up: never early
		{0, 1000, 0},
		{-3, 0.5, -2},
		{math.MaxInt64, 1, longest},
		{time.Hour, 1e300, longest},
		{-time.Hour, 1e300, -longest},
	} {
		if got := scale(row.d, row.by); got != row.want {
			t.Errorf("scale(%v, %v) = %v, want %v", row.d, row.by, got, row.want)
		}
	}
}

func TestSynchronisedIsReadSeldom(t *testing.T) {
	t.Parallel()
	var now time.Duration
	answer, reads := false, 0
	s := &synchronisation{
		elapsed: func() time.Duration { return now },
		read:    func() bool { reads++; return answer },
	}
	for _, step := range []struct {
		at           time.Duration
		answer, want bool
		reads        int
	}{
		{0, false, false, 1},
		{time.Second, true, false, 1}, // remembered
		{syncCheck + 1, true, true, 2},
		{2 * syncCheck, false, true, 2}, // remembered
		{2*syncCheck + 1, false, false, 3},
	} {
		now, answer = step.at, step.answer
		if got := s.known(); got != step.want || reads != step.reads {
			t.Errorf("at %v: %v after %d reads, want %v after %d", step.at, got, reads, step.want, step.reads)
		}
	}
}

func TestWord(t *testing.T) {
	t.Parallel()
	marker := filepath.Join(t.TempDir(), "synchronized")
	if err := os.WriteFile(marker, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	none := marker + ".none"
	never := time.Duration(math.MaxInt64)
	yes := witness{boot: boot, wall: wall, next: never, told: true, synchronised: true}
	no := witness{boot: boot, wall: wall, next: never, told: true}
	dumb := witness{boot: boot, wall: wall, next: never}
	for name, row := range map[string]struct {
		state  int
		status int32
		err    error
		by     *witness
		marker string
		want   Word
	}{
		"kernel yes": {state: unix.TIME_OK, by: &no, marker: none, want: Word{true, ByKernel}},
		"leap second": {state: unix.TIME_INS, status: unix.STA_INS, by: &no, marker: none,
			want: Word{true, ByKernel}},
		"kernel no": {state: unix.TIME_ERROR, status: unix.STA_UNSYNC, by: &yes, marker: marker,
			want: Word{false, ByKernel}},
		"clock error":             {state: unix.TIME_ERROR, by: &yes, marker: marker, want: Word{false, ByKernel}},
		"withheld, witness yes":   {err: unix.EPERM, by: &yes, marker: none, want: Word{true, ByKernel}},
		"withheld, witness no":    {err: unix.EPERM, by: &no, marker: marker, want: Word{false, ByKernel}},
		"no witness, marked":      {err: unix.EPERM, by: &dumb, marker: marker, want: Word{true, ByTimesyncd}},
		"no witness and no mark":  {err: unix.EPERM, by: &dumb, marker: none},
		"a filter without a call": {err: unix.ENOSYS, by: &dumb, marker: none},
	} {
		if row.by.told {
			row.by.at = boot()
			row.by.ahead = row.by.aheadAt(row.by.at)
		}
		got := wordOf(func(t *unix.Timex) (int, error) {
			if t.Modes != 0 {
				return 0, unix.EINVAL // would set the clock
			}
			t.Status = row.status
			return row.state, row.err
		}, row.by, row.marker)
		if got != row.want {
			t.Errorf("%s: %+v, want %+v", name, got, row.want)
		}
	}
}

func BenchmarkSynchronised(b *testing.B) {
	c, _ := Device()
	b.ReportAllocs()
	for b.Loop() {
		c.Synchronised()
	}
}

func BenchmarkBoot(b *testing.B) {
	for b.Loop() {
		boot()
	}
}

func BenchmarkTimer(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		_, stop := timer(time.Hour)
		stop()
	}
}
