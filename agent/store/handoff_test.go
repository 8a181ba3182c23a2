package store

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

// The test's own binary does in another process what this says.
const task = "KEEP_TEST_TASK"

func TestMain(m *testing.M) {
	switch os.Getenv(task) {
	case "read what is carried":
		readWhatIsCarried()
	case "save and be killed":
		saveAndBeKilled()
	default:
		unix.Umask(0o022) // what others may write to is refused
		os.Exit(m.Run())
	}
}

// readWhatIsCarried ends with 0 when the descriptor given holds whole(1).
func readWhatIsCarried() {
	f := os.NewFile(3, "carried")
	if m, err := ReadMemfd(f); err != nil {
		_, _ = os.Stderr.WriteString(err.Error())
		os.Exit(1)
	} else if !reflect.DeepEqual(*m, whole(1)) {
		_, _ = os.Stderr.WriteString("it is another")
		os.Exit(1)
	}
	os.Exit(0)
}

func framed(t testing.TB, m tokencache.Snapshot) []byte {
	t.Helper()
	text, err := encodeSnapshot(m)
	if err != nil {
		t.Fatal(err)
	}
	return frame(text)
}

// secretly carries text in a memfd_secret.
func secretly(t testing.TB, text []byte) *os.File {
	t.Helper()
	f, err := writeSecretMemfd(text)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		t.Skipf("this kernel, or what this runs in, has no memfd_secret: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func sealedly(t testing.TB, text []byte) *os.File {
	t.Helper()
	f, err := writeSealedMemfd(text)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// carries checks that f holds whole(1), here and in a process that it is passed to, and cannot be had by
// one that it is not passed to.
func carries(t *testing.T, f *os.File) {
	t.Helper()
	for range 2 {
		if m, err := ReadMemfd(f); err != nil || !reflect.DeepEqual(*m, whole(1)) {
			t.Errorf("%v, %+v", err, m)
		}
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("it is passed to whatever is executed: %v", err)
	}
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), task+"=read what is carried")
	child.ExtraFiles = []*os.File{f}
	if out, err := child.CombinedOutput(); err != nil {
		t.Errorf("in another process: %v: %s", err, out)
	}
}

func TestHandoffInSecretMemory(t *testing.T) {
	t.Parallel()
	f := secretly(t, framed(t, whole(1)))
	carries(t, f)
	if n, err := f.ReadAt(make([]byte, 1), 0); n != 0 || err == nil {
		t.Error("the kernel reads it")
	}
	if _, err := f.Write([]byte("x")); err == nil {
		t.Error("the kernel writes to it")
	}
	if err := f.Truncate(1); err == nil {
		t.Error("it can be cut")
	}
}

func TestHandoffInSealedMemory(t *testing.T) {
	t.Parallel()
	f := sealedly(t, framed(t, whole(1)))
	carries(t, f)
	if seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil || seals&allSeals != allSeals {
		t.Errorf("seals %#x, %v", seals, err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("it can be written to: %v", err)
	}
	for _, size := range []int64{1, 1 << 20} {
		if err := f.Truncate(size); !errors.Is(err, unix.EPERM) {
			t.Errorf("it can be made %d bytes long: %v", size, err)
		}
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("it can be sealed again: %v", err)
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, 1, unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
		t.Errorf("it can be mapped to be written to: %v", err)
	}
}

// A descriptor may be handed over that something else was put into, or nothing.
func TestWhatIsNotHandedOver(t *testing.T) {
	t.Parallel()
	sound := framed(t, whole(1))
	text, err := encodeSnapshot(whole(1))
	if err != nil {
		t.Fatal(err)
	}
	patched := func(at int, b byte) []byte {
		changed := bytes.Clone(sound)
		changed[at] ^= b
		return changed
	}
	for _, row := range []struct {
		name, says string
		text       []byte
	}{
		{"nothing", "0 bytes", nil},
		{"less than a head", "bytes are not", sound[:memfdHead-1]},
		{"a head", "not whole", sound[:memfdHead]},
		{"torn", "not whole", sound[:len(sound)-1]},
		{"longer", "not whole", append(bytes.Clone(sound), 0)},
		{"another text", "not whole", patched(len(sound)-1, 1)},
		{"another digest", "not whole", patched(memfdHead-1, 1)},
		{"another length", "not whole", patched(len(memfdMagic), 128)},
		{"another version", "not what this release", patched(len(memfdMagic)-1, 2)},
		{"zeros", "not what this release", make([]byte, 4096)},
		{"another document", "another release", frame(bytes.Replace(text, []byte(`"version":3`), []byte(`"version":4`),
			1))},
		{"a foreign document", "not JSON", frame([]byte(canary))},
	} {
		for kind, carry := range map[string]func([]byte) (*os.File, error){"sealed": writeSealedMemfd,
			"secret": writeSecretMemfd} {
			f, err := carry(row.text)
			if kind == "secret" && err != nil {
				continue // none here, or none of no bytes
			} else if err != nil {
				t.Fatal(err)
			}
			m, err := ReadMemfd(f)
			if m != nil || err == nil || !strings.Contains(err.Error(), row.says) ||
				strings.Contains(err.Error(), "canary") {
				t.Errorf("%s, %s: %v, %v", row.name, kind, m, err)
			}
			_ = f.Close()
		}
	}
}

func TestWhatIsNoHandoff(t *testing.T) {
	t.Parallel()
	sound := framed(t, whole(1))
	file := func(fd int, err error) *os.File {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "given")
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	memfd := func(seals int, size int64) *os.File {
		f := file(unix.MemfdCreate("given", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING))
		if _, err := f.Write(sound); err != nil {
			t.Fatal(err)
		}
		if size > 0 {
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return f
	}
	path := filepath.Join(t.TempDir(), "plain")
	if err := errors.Join(os.WriteFile(path, sound, 0o600), unix.Mkfifo(path+".pipe", 0o600)); err != nil {
		t.Fatal(err)
	}
	socket, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	const neither = "neither a sealed memfd nor a memfd_secret"
	closed := file(unix.Dup(0))
	_ = closed.Close()
	for _, row := range []struct {
		name, says string
		f          *os.File
	}{
		{"a file", neither, file(unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0))},
		{"a folder", neither, file(unix.Open(filepath.Dir(path), unix.O_RDONLY|unix.O_CLOEXEC, 0))},
		{"a file in memory", neither, file(unix.Open("/dev/shm", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600))},
		{"a pipe", neither, file(unix.Open(path+".pipe", unix.O_RDWR|unix.O_CLOEXEC, 0))},
		{"a socket", neither, file(socket[0], nil)},
		{"its other end", neither, file(socket[1], nil)},
		{"a device", neither, file(unix.Open("/dev/zero", unix.O_RDONLY|unix.O_CLOEXEC, 0))},
		{"an event", neither, file(unix.Eventfd(0, unix.EFD_CLOEXEC))},
		{"not sealed", neither, memfd(0, 0)},
		{"not to be cut", neither, memfd(unix.F_SEAL_SHRINK|unix.F_SEAL_GROW, 0)},
		{"may be written to", neither, memfd(allSeals&^unix.F_SEAL_WRITE, 0)},
		{"may be sealed further", neither, memfd(allSeals&^unix.F_SEAL_SEAL, 0)},
		{"huge", "bytes are not", memfd(allSeals, 1<<40)},
		{"closed", "bad file descriptor", closed},
	} {
		if m, err := ReadMemfd(row.f); m != nil || err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, %v", row.name, m, err)
		}
	}
}

func FuzzCarried(f *testing.F) {
	f.Add(framed(f, whole(1)), false)
	f.Add(framed(f, small()), true)
	f.Add([]byte(memfdMagic), false)
	f.Fuzz(func(t *testing.T, text []byte, frameIt bool) {
		if frameIt {
			text = frame(text)
		}
		carrier, err := writeSealedMemfd(text)
		if err != nil {
			t.Skip(err)
		}
		defer func() { _ = carrier.Close() }()
		if m, err := ReadMemfd(carrier); (m == nil) == (err == nil) {
			t.Fatal(m, err)
		} else if err == nil {
			checkMemory(t, text[memfdHead:])
		}
	})
}

// What was handed over last comes first, what is of no use is named, and systemd holds none of it any more once another
// is handed over. One that it does not discard goes with the next.
func TestHandoff(t *testing.T) {
	t.Parallel()
	held := make(map[string]*os.File)
	var stuck error
	h := Handoff{
		Store: func(name string, fd int) error {
			own, err := unix.Dup(fd)
			if err == nil {
				held[name] = os.NewFile(uintptr(own), name)
				t.Cleanup(func() { _ = held[name].Close() })
			}
			return err
		},
		Discard: func(name string) error {
			if stuck == nil {
				delete(held, name)
			}
			return stuck
		},
	}
	for boot := range 3 {
		m := small()
		m.Boot = time.Duration(boot + 9) // by the names alone 10 comes before 9
		stuck = errors.New("not now")
		if boot == 0 {
			stuck = nil
		}
		if err := h.Save(m); err != nil {
			t.Fatal(err)
		}
	}
	if len(held) != 3 {
		t.Errorf("systemd holds %d", len(held))
	}
	odd, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer odd.Close()
	held[HandoffPrefix+"odd"], held[HandoffPrefix+"12"] = odd, odd
	next := Handoff{Store: h.Store, Discard: h.Discard}
	unusable := 0
	all := next.Take(held, func(string, error) { unusable++ })
	if len(all) != 3 || all[0].Boot != 11 || all[1].Boot != 10 || all[2].Boot != 9 || unusable != 2 {
		t.Errorf("%d unusable, %+v", unusable, all)
	}
	stuck = nil
	m := small()
	m.Boot = 12
	if err := next.Save(m); err != nil || len(held) != 1 || held[HandoffPrefix+"12"] == odd {
		t.Errorf("%v, %d held", err, len(held))
	}
}
