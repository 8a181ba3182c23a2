package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	crashDir  = "KEEP_TEST_DIR"
	crashSave = "KEEP_TEST_MEMORY"

	begins = unix.SIGUSR1 // the writer tells its tracer by these where the save begins and ends
	ends   = unix.SIGUSR2
)

// saveAndBeKilled is the writer: it saves a memory, on one thread.
func saveAndBeKilled() {
	runtime.LockOSThread()
	n, err := strconv.Atoi(os.Getenv(crashSave))
	if err != nil {
		os.Exit(2)
	}
	tokens, err := OpenTokens(Disk(os.Getenv(crashDir)), testKey)
	if err != nil {
		os.Exit(3)
	}
	m, pid, thread := whole(n), os.Getpid(), unix.Gettid()
	// what the runtime needs for it, it has now
	if _, err := tokens.sealed(m); err != nil || syncDir(os.Getenv(crashDir)) != nil {
		os.Exit(5)
	}
	_ = unix.Tgkill(pid, thread, begins)
	err = tokens.Save(m)
	_ = unix.Tgkill(pid, thread, ends)
	if err != nil {
		os.Exit(4)
	}
	os.Exit(0)
}

// writer is a process that this thread traces, since it alone may: it is locked to its goroutine.
type writer struct {
	pid     int
	saver   int // the thread that saves
	saving  bool
	steps   int            // entries of system calls, and returns, since the save began: not of futex
	call    uint64         // the last one
	entered map[uint64]int // how often each was
}

func startWriter(dir string, n int) (*writer, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer func() { _ = null.Close() }()
	p, err := os.StartProcess(os.Args[0], os.Args[:1], &os.ProcAttr{
		Env: append(os.Environ(), task+"=save and be killed", crashDir+"="+dir, crashSave+"="+strconv.Itoa(n),
			"GOGC=off", "GODEBUG=asyncpreemptoff=1"),
		Files: []*os.File{null, null, os.Stderr},
		Sys:   &unix.SysProcAttr{Ptrace: true},
	})
	if err != nil {
		return nil, err
	}
	defer func() { _ = p.Release() }()
	w := &writer{pid: p.Pid, entered: make(map[uint64]int)}
	var status unix.WaitStatus
	if _, err := unix.Wait4(w.pid, &status, unix.WALL, nil); err != nil || !status.Stopped() {
		return nil, fmt.Errorf("it is not traced: %v, %#x", err, status)
	}
	const follow = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL
	return w, errors.Join(unix.PtraceSetOptions(w.pid, follow), unix.PtraceCont(w.pid, 0))
}

// killAt kills the writer at a step of the save, 1 being the entry of the first system call, and returns
// that call. When the save has fewer, over is true and the writer has ended by itself.
func (w *writer) killAt(step int) (call uint64, over bool, err error) {
	for {
		var status unix.WaitStatus
		thread, err := unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, false, err
		case status.Stopped():
			if err := w.stopped(thread, status, step); err != nil {
				return 0, false, err
			}
		case thread == w.pid && status.Signaled() && w.steps == step:
			return w.call, false, nil
		case thread == w.pid && status.Exited() && status.ExitStatus() == 0:
			return 0, true, nil
		case thread == w.pid:
			return 0, false, fmt.Errorf("the writer ended with %#x after %d steps", status, w.steps)
		}
	}
}

// stopped lets a thread that has stopped go on, or kills the writer.
func (w *writer) stopped(thread int, status unix.WaitStatus, step int) error {
	signal := 0
	switch stop := status.StopSignal(); stop {
	case unix.SIGTRAP | 0x80: // a system call of the saver
		if call, enters := callEntered(thread); enters {
			w.call = call
			w.entered[call]++
		}
		if w.call == unix.SYS_FUTEX {
			break // the runtime's, now and then: no step of the save
		}
		if w.steps++; w.steps == step {
			return unix.Kill(w.pid, unix.SIGKILL)
		}
	case unix.SIGTRAP, unix.SIGSTOP: // another thread
	case begins:
		w.saver, w.saving = thread, true
	case ends:
		w.saving = false
	default:
		signal = int(stop)
	}
	goOn := unix.PtraceCont
	if w.saving && thread == w.saver {
		goOn = unix.PtraceSyscall
	}
	if err := goOn(thread, signal); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// callEntered returns the system call that a thread enters. False: it returns from the one that it entered last.
func callEntered(thread int) (call uint64, enters bool) {
	var info struct {
		Op          uint8
		_           [3]uint8
		Arch        uint32
		Instruction uint64
		Stack       uint64
		Number      uint64
		Arguments   [6]uint64
	}
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO,
		uintptr(thread), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	return info.Number, errno == 0 && info.Op == unix.PTRACE_SYSCALL_INFO_ENTRY
}

// A writer is killed at every entry of a system call of a save and at every return from one. Whoever comes next
// has the older memory or the newer, whole, and no error.
func TestKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	const kills = 500
	runtime.LockOSThread() // and never unlocked: the thread ends with its tracees
	dir := t.TempDir()
	if err := openTokens(t, dir).Save(whole(0)); err != nil {
		t.Fatal(err)
	}
	held, killed, passes, olds, news := 0, 0, 0, 0, 0
	at := make(map[uint64]int)
	for n, step := 1, 1; killed < kills || step > 1; n++ {
		w, err := startWriter(dir, n)
		if errors.Is(err, fs.ErrPermission) {
			t.Skipf("not run: nobody may trace a process here: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
		call, over, err := w.killAt(step)
		if err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		if step++; over {
			step, passes = 1, passes+1
			if w.entered[unix.SYS_FSYNC] < 2 || w.entered[unix.SYS_WRITE] == 0 {
				t.Errorf("save %d was not followed by all its steps: %v", n, w.entered)
			}
		} else {
			killed++
			at[call]++
		}
		m, err := openTokens(t, dir).Load()
		if err != nil || m == nil {
			t.Fatalf("killed at step %d, system call %d: %v", step-1, call, err)
		}
		switch {
		case reflect.DeepEqual(*m, whole(held)) && !over:
			olds++
		case reflect.DeepEqual(*m, whole(n)):
			news, held = news+1, n
		default:
			t.Fatalf("killed at step %d, system call %d: neither the older nor the newer", step-1, call)
		}
		// which the next save takes away
		if names := listing(t, dir); len(names) > 2 || len(names) == 2 && names[1] != tokensName+beingWritten {
			t.Fatalf("killed at step %d: %q", step-1, strings.Join(names, " "))
		}
	}
	t.Logf("%d kills in %d saves' every step, by system call %v: %d times the older, %d times the newer",
		killed, passes, at, olds, news)
	// Now and then the runtime has a call of its own at a step: then a pass kills at one step of the save fewer.
	if at[unix.SYS_WRITE] == 0 || at[unix.SYS_FSYNC] < passes || olds == 0 || news <= passes {
		t.Error("a step of the save was left out")
	}
}
