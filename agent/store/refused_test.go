//go:build amd64 || arm64

package store

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// refuse makes a system call fail whose argument has any of these bits, as an older kernel, a sandbox or a broken
// device does: for the goroutine alone that calls it, and for its thread, which ends with it.
func refuse(t *testing.T, call, argument, bits uint32, with unix.Errno) {
	runtime.LockOSThread()
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16 + 8*argument},
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: bits, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(with)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Error(err)
	}
	_, _, errno := unix.Syscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER,
		uintptr(unsafe.Pointer(&filter)))
	if errno != 0 {
		t.Error(errno)
	}
}

// The best that the kernel has is used, and less where it refuses that.
func TestWhereItIsHandedOver(t *testing.T) {
	t.Parallel()
	secret, noexec := true, true
	if f, err := writeSecretMemfd([]byte("x")); err == nil {
		_ = f.Close()
	} else {
		secret = false
		t.Logf("there is no memfd_secret here: %v", err)
	}
	if fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL); err == nil {
		_ = unix.Close(fd)
	} else {
		noexec = false
		t.Logf("there is no MFD_NOEXEC_SEAL here: %v", err)
	}
	for _, row := range []struct {
		name           string
		refuse         func(t *testing.T)
		secret, noexec bool // where this kernel has them
		fails          string
	}{
		{"nothing is refused", func(*testing.T) {}, secret, noexec, ""},
		{"no memfd_secret", func(t *testing.T) { refuse(t, sysMemfdSecret, 0, unix.O_CLOEXEC, unix.ENOSYS) }, false,
			noexec, ""},
		{"no shared mapping", func(t *testing.T) { refuse(t, unix.SYS_MMAP, 3, unix.MAP_SHARED, unix.EAGAIN) }, false,
			noexec, ""},
		{"nor MFD_NOEXEC_SEAL", func(t *testing.T) {
			refuse(t, sysMemfdSecret, 0, unix.O_CLOEXEC, unix.ENOSYS)
			refuse(t, unix.SYS_MEMFD_CREATE, 1, unix.MFD_NOEXEC_SEAL, unix.EINVAL)
		}, false, false, ""},
		{"no memfd at all", func(t *testing.T) {
			refuse(t, sysMemfdSecret, 0, unix.O_CLOEXEC, unix.ENOSYS)
			refuse(t, unix.SYS_MEMFD_CREATE, 1, unix.MFD_CLOEXEC, unix.EINVAL)
		}, false, false, "memfd_create"},
		{"no seals", func(t *testing.T) {
			refuse(t, sysMemfdSecret, 0, unix.O_CLOEXEC, unix.ENOSYS)
			refuse(t, unix.SYS_FCNTL, 2, unix.F_SEAL_WRITE, unix.EINVAL)
		}, false, false, "invalid argument"},
	} {
		var f *os.File
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			row.refuse(t)
			f, err = WriteMemfd(whole(1))
		}()
		<-done
		if row.fails != "" {
			if err == nil || !strings.Contains(err.Error(), row.fails) {
				t.Errorf("%s: %v", row.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		if is, err := isSecret(f); err != nil || is != row.secret {
			t.Errorf("%s: secret %t, %v", row.name, is, err)
		}
		seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
		if !row.secret && (err != nil || seals&allSeals != allSeals || (seals&unix.F_SEAL_EXEC != 0) != row.noexec) {
			t.Errorf("%s: seals %#x, %v", row.name, seals, err)
		}
		carries(t, f)
		_ = f.Close()
	}
}

// Where less memory may be locked than was, what is carried cannot be mapped.
func TestSecretThatCannotBeMapped(t *testing.T) {
	t.Parallel()
	f := secretly(t, framed(t, whole(1)))
	done := make(chan struct{})
	go func() {
		defer close(done)
		refuse(t, unix.SYS_MMAP, 3, unix.MAP_SHARED, unix.EAGAIN)
		if m, err := ReadMemfd(f); m != nil || !errors.Is(err, unix.EAGAIN) ||
			!strings.Contains(err.Error(), "LimitMEMLOCK") {
			t.Errorf("%v, %v", m, err)
		}
	}()
	<-done
}

// Where the device fails, what is there stays where it is, and is what it was once the device works again.
func TestTokensOnABrokenDevice(t *testing.T) {
	t.Parallel()
	const anything = 1<<32 - 1
	for _, row := range []struct {
		name                 string
		call, argument, bits uint32
		with                 unix.Errno
		loads                bool
	}{
		{"no descriptors left", unix.SYS_OPENAT, 2, unix.O_NOFOLLOW, unix.EMFILE, false},
		{"no file can be read", unix.SYS_READ, 2, anything &^ 15, unix.EIO, false},
		// But for 4,096 bytes, which is what package testing writes of the files that were opened, on any thread.
		{"no file can be written", unix.SYS_WRITE, 2, anything &^ (15 | 4096), unix.EIO, true},
		{"nothing reaches the disk", unix.SYS_FSYNC, 0, anything, unix.EIO, true},
		{"nothing can be renamed", unix.SYS_RENAMEAT, 0, anything, unix.EIO, true},
	} {
		tokens := openTokens(t, t.TempDir())
		if err := tokens.Save(whole(1)); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		var loaded, saved error
		go func() {
			defer close(done)
			refuse(t, row.call, row.argument, row.bits, row.with)
			_, loaded = tokens.Load()
			saved = tokens.Save(whole(2))
		}()
		<-done
		for what, got := range map[string]struct {
			err   error
			works bool
		}{"loading": {loaded, row.loads}, "saving": {saved, false}} {
			if got.works != (got.err == nil) || !got.works && !errors.Is(got.err, row.with) {
				t.Errorf("%s, %s: %v", row.name, what, got.err)
			}
		}
		if m, err := tokens.Load(); err != nil || !reflect.DeepEqual(*m, whole(1)) {
			t.Errorf("%s: afterwards: %v, %v", row.name, m, err)
		}
		if err := tokens.Save(whole(3)); err != nil {
			t.Errorf("%s: afterwards: %v", row.name, err)
		}
		if names := listing(t, filepath.Dir(tokensFile(tokens))); len(names) != 1 {
			t.Errorf("%s: %q", row.name, names)
		}
	}
}

// A record that the kernel does not let be read now stays where it is, and is what it was once it can be read.
func TestRecordThatCannotBeReadNow(t *testing.T) {
	t.Parallel()
	const anything = 1<<32 - 1
	for _, row := range []struct {
		name                 string
		call, argument, bits uint32
		with                 unix.Errno
	}{
		{"no descriptors left", unix.SYS_OPENAT, 2, unix.O_NOFOLLOW, unix.EMFILE},
		{"none left on the device", unix.SYS_OPENAT, 2, unix.O_NOFOLLOW, unix.ENFILE},
		{"no memory left", unix.SYS_OPENAT, 2, unix.O_NOFOLLOW, unix.ENOMEM},
		{"not permitted", unix.SYS_OPENAT, 2, unix.O_NOFOLLOW, unix.EACCES},
		{"a read error", unix.SYS_READ, 2, anything &^ 15, unix.EIO},
	} {
		dir := t.TempDir()
		r := open(t, dir)
		if err := r.Save(all()); err != nil {
			t.Fatal(err)
		}
		before := listing(t, dir)
		var loaded error
		done := make(chan struct{})
		go func() {
			defer close(done)
			refuse(t, row.call, row.argument, row.bits, row.with)
			_, loaded = open(t, dir).Load()
		}()
		<-done
		if _, spoilt := errors.AsType[*SpoiltError](loaded); spoilt || !errors.Is(loaded, row.with) {
			t.Errorf("%s: %v", row.name, loaded)
		}
		if names := listing(t, dir); !slices.Equal(names, before) {
			t.Errorf("%s: %q, where there was %q", row.name, names, before)
		}
		if got, err := open(t, dir).Load(); err != nil || !reflect.DeepEqual(got, new(all())) {
			t.Errorf("%s: afterwards: %v, %v", row.name, got, err)
		}
	}
}

// A folder that can be read and not written to, as with mode 0500, is read; what fails is keeping, with what the kernel
// says.
func TestFolderThatCannotBeWrittenTo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := errors.Join(open(t, dir).Save(all()), openTokens(t, dir).Save(whole(1))); err != nil {
		t.Fatal(err)
	}
	before := listing(t, dir)
	done := make(chan struct{})
	go func() {
		defer close(done)
		refuse(t, unix.SYS_OPENAT, 2, unix.O_CREAT, unix.EACCES)
		r := OpenPolicyChanges(Disk(dir), uptime(time.Hour))
		tokens, err := OpenTokens(Disk(dir), testKey)
		if err != nil {
			t.Error(err)
			return
		}
		b := Recover(r, tokens, nil, anybodys, BootID())
		if !reflect.DeepEqual(b.Record, new(all())) || b.Snapshot == nil || !reflect.DeepEqual(*b.Snapshot, whole(1)) ||
			b.RecordFault != nil || b.TokensFault != nil {
			t.Errorf("%+v", b)
		}
		if err := r.Save(first(1)); !errors.Is(err, unix.EACCES) {
			t.Errorf("the record: %v", err)
		}
		if err := tokens.Save(whole(2)); !errors.Is(err, unix.EACCES) {
			t.Errorf("the tokens: %v", err)
		}
	}()
	<-done
	if names := listing(t, dir); !slices.Equal(names, before) {
		t.Errorf("%q, where there was %q", names, before)
	}
	if got, err := open(t, dir).Load(); err != nil || !reflect.DeepEqual(got, new(all())) {
		t.Errorf("afterwards: %v, %v", got, err)
	}
}
