package systemd

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

var wanted = Names{Sockets: []string{TokenSocket, AdminSocket}, StoredSockets: "module-", StoredFiles: "cache-"}

// socketFile returns a socket as systemd would pass it, listening when backlog is not negative.
func socketFile(t *testing.T, domain, kind, backlog int) *os.File {
	t.Helper()
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "passed")
	t.Cleanup(func() { _ = file.Close() })
	var address unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if domain == unix.AF_UNIX {
		address = &unix.SockaddrUnix{Name: filepath.Join(harness.ShortFolder(t), "s")}
	}
	if err := unix.Bind(fd, address); err != nil {
		t.Fatal(err)
	}
	if backlog >= 0 {
		if err := unix.Listen(fd, backlog); err != nil {
			t.Fatal(err)
		}
	}
	return file
}

func TestClaim(t *testing.T) {
	t.Parallel()
	files := []*os.File{
		socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, 1),
		socketFile(t, unix.AF_INET, unix.SOCK_DGRAM, -1), // of another name: not ours to judge
		socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, 1),
	}
	given, err := claim(wanted, []string{"admin", "other", "token"}, files)
	found, unknown := given.Listeners, given.Unknown
	if err != nil || !slices.Equal(unknown, []string{"other"}) || len(found) != 2 {
		t.Fatalf("%v, %v, %v", found, unknown, err)
	}
	for _, file := range files {
		if file.Close() == nil {
			t.Error("a passed descriptor was left open")
		}
	}
	for name, l := range found {
		path := l.Addr().String()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("%s: closing removed the path, which is systemd's: %v", name, err)
		}
	}
}

func TestClaimRefuses(t *testing.T) {
	t.Parallel()
	plain, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	shut, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	_ = shut.Close()
	stream := func() *os.File { return socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, 1) }
	for name, row := range map[string]struct {
		names []string
		files []*os.File
		says  string
	}{
		"datagram": {[]string{"token"}, []*os.File{socketFile(t, unix.AF_UNIX, unix.SOCK_DGRAM, -1)},
			"descriptor 3 (token): not a stream socket: set ListenStream="},
		"packet": {[]string{"token"}, []*os.File{socketFile(t, unix.AF_UNIX, unix.SOCK_SEQPACKET, 1)},
			"not a stream socket"},
		"TCP": {[]string{"token"}, []*os.File{socketFile(t, unix.AF_INET, unix.SOCK_STREAM, 1)},
			"not a Unix socket: set ListenStream= to a path"},
		"connection": {[]string{"admin", "token"},
			[]*os.File{stream(), socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM,
				-1)}, "descriptor 4 (token): not listening: set Accept=no"},
		"file":        {[]string{"token"}, []*os.File{plain}, "not a socket"},
		"closed file": {[]string{"token"}, []*os.File{shut}, "descriptor 3 (token)"},
		"same name": {[]string{"token", "token"}, []*os.File{stream(), stream()},
			`descriptor 4 is a second socket named "token"`},
		"lost name": {[]string{"token"}, []*os.File{stream(), stream()}, "passed 2 descriptors and 1 names"},
	} {
		given, err := claim(wanted, row.names, row.files)
		if err == nil || !strings.Contains(err.Error(), row.says) || given.Listeners != nil || given.Unknown != nil {
			t.Errorf("%s: %v, error %v", name, given, err)
		}
		for _, file := range row.files {
			if file.Close() == nil {
				t.Errorf("%s: a passed descriptor was left open", name)
			}
		}
	}
}

func TestPassed(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		pid, fds, names string
		want            []string
		says            string
	}{
		{"", "", "", nil, ""},
		{"8", "2", "a:b", nil, ""},
		{"x", "2", "a:b", nil, ""},
		{"7", "0", "", nil, ""},
		{"7", "2", "token:admin", []string{"token", "admin"}, ""},
		{"7", "1", "token", []string{"token"}, ""},
		{"7", "", "", nil, "LISTEN_FDS"},
		{"7", "-1", "", nil, "LISTEN_FDS"},
		{"7", "two", "a:b", nil, "LISTEN_FDS"},
		{"7", "1000000000", "a", nil, "LISTEN_FDS"},
		{"7", "2", "", nil, "FileDescriptorName="},
		{"7", "2", "token", nil, "FileDescriptorName="},
		{"7", "2", "token:", nil, "FileDescriptorName="},
		{"7", "1", "token:admin", nil, "FileDescriptorName="},
	} {
		environment := map[string]string{"LISTEN_PID": row.pid, "LISTEN_FDS": row.fds, "LISTEN_FDNAMES": row.names}
		count, names, err := readPassed(func(name string) string { return environment[name] }, 7)
		if count != len(row.want) || !slices.Equal(names, row.want) || (err == nil) != (row.says == "") ||
			(err != nil && !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%v: %d, %v, %v", environment, count, names, err)
		}
	}
}

func FuzzPassed(f *testing.F) {
	f.Add("7", "2", "token:admin")
	f.Add("7", "-1", "")
	f.Add("07", "1024", ":::")
	f.Fuzz(func(t *testing.T, pid, fds, names string) {
		environment := map[string]string{"LISTEN_PID": pid, "LISTEN_FDS": fds, "LISTEN_FDNAMES": names}
		count, got, err := readPassed(func(name string) string { return environment[name] }, 7)
		if count < 0 || count > mostPassed || len(got) != count || (err != nil && count != 0) {
			t.Errorf("%v: %d, %q, %v", environment, count, got, err)
		}
	})
}

// The whole of Passed in a process of its own, which gets its descriptors as systemd passes them.
func TestListenersInAProcess(t *testing.T) {
	t.Parallel()
	const variable = "PERCEPT_TEST_LISTENERS"
	if os.Getenv(variable) != "" {
		given, err := Passed(wanted)
		fmt.Printf("found %d, unknown %v, error %v\n", len(given.Listeners), given.Unknown, err)
		for _, l := range given.Listeners {
			file, err := l.File()
			if err != nil {
				t.Fatal(err)
			}
			raw, err := l.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			_ = raw.Control(func(fd uintptr) {
				if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
					t.Errorf("flags %#x, %v", flags, err)
				}
			})
			_ = file.Close()
			_ = l.Close()
		}
		for _, entry := range os.Environ() {
			if strings.HasPrefix(entry, "LISTEN_") {
				fmt.Println("left to children:", entry)
			}
		}
		if again, err := Passed(wanted); len(again.Listeners) != 0 || err != nil {
			t.Errorf("second call: %v, %v", again, err)
		}
		return
	}
	for _, row := range []struct{ pid, names, want string }{
		{"$$", "admin:other:token", "found 2, unknown [other], error <nil>\n"},
		{"1", "admin:other:token", "found 0, unknown [], error <nil>\n"},
		{"$$", "admin:other", "found 0, unknown [], error LISTEN_FDNAMES="},
		{"$$", "other:admin:token", "found 0, unknown [], error descriptor 4 (admin): not a stream socket"},
	} {
		t.Run(row.pid+" "+row.names, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("/bin/sh", "-c",
				"LISTEN_PID="+row.pid+` exec "$0" -test.run='^TestListenersInAProcess$'`, os.Args[0])
			cmd.Env = append(os.Environ(), variable+"=1", "LISTEN_FDS=3", "LISTEN_FDNAMES="+row.names,
				"LISTEN_PIDFDID=1")
			cmd.ExtraFiles = []*os.File{
				socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, 1),
				socketFile(t, unix.AF_UNIX, unix.SOCK_DGRAM, -1),
				socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, 1),
			}
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), row.want) ||
				strings.Contains(string(out), "left to children") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// A client that connects before the daemon looks reaches the listener made from the descriptor.
func TestClaimedListenerAccepts(t *testing.T) {
	t.Parallel()
	file := socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, 1)
	address, err := unix.Getsockname(int(file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("unix", address.(*unix.SockaddrUnix).Name)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	given, err := claim(wanted, []string{"token"}, []*os.File{file})
	found := given.Listeners
	if err != nil {
		t.Fatal(err)
	}
	defer found[TokenSocket].Close()
	server, err := found[TokenSocket].Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
}
