package systemd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// receiver is a datagram socket as the service manager or the journal has one.
func receiver(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func receive(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	buffer := make([]byte, 256<<10)
	n, err := conn.Read(buffer)
	if err != nil {
		t.Fatal(err)
	}
	return string(buffer[:n])
}

func TestNotify(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "notify")
	conn := receiver(t, path)
	n, err := parseNotifySocket(path)
	if err != nil || !n.Enabled() {
		t.Fatalf("%+v, %v", n, err)
	}
	for want, send := range map[string]func() error{
		"READY=1":                          n.Ready,
		"STOPPING=1":                       n.Stopping,
		"WATCHDOG=1":                       n.Ping,
		"STATUS=2 tokens\nERRNO=0":         func() error { return n.Status("2 tokens") },
		"STATUS=a READY=1\nERRNO=0":        func() error { return n.Status("a\nREADY=1\n") },
		"STATUS=back end down\nERRNO=110":  func() error { return n.Trouble("back end down", syscall.ETIMEDOUT) },
		"STATUS=\nERRNO=0":                 func() error { return n.Status("") },
		"STATUS=caf\u00e9 \u2713\nERRNO=0": func() error { return n.Status("caf\u00e9\x1b \u2713\xff") },
	} {
		if err := send(); err != nil {
			t.Errorf("%q: %v", want, err)
			continue
		}
		if got := receive(t, conn); got != want {
			t.Errorf("sent %q, want %q", got, want)
		}
	}
}

func TestReloadingCarriesTheMonotonicTime(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "notify")
	conn := receiver(t, path)
	monotonic := func() int64 {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
			t.Fatal(err)
		}
		return now.Nano() / 1000
	}
	before := monotonic()
	if err := (Notify{address: path}).Reloading(); err != nil {
		t.Fatal(err)
	}
	text, ok := strings.CutPrefix(receive(t, conn), "RELOADING=1\nMONOTONIC_USEC=")
	at, err := strconv.ParseInt(text, 10, 64)
	if !ok || err != nil || at < before || at > monotonic() {
		t.Errorf("time %q, %v", text, err)
	}
}

func TestNotifyNobody(t *testing.T) {
	t.Parallel()
	var n Notify
	if n.Enabled() {
		t.Error("the zero value is enabled")
	}
	err := errors.Join(n.Ready(), n.Reloading(), n.Stopping(), n.Status("x"), n.Trouble("x", 5), n.Ping())
	if err != nil {
		t.Error(err)
	}
}

func TestNotifyErrors(t *testing.T) {
	t.Parallel()
	dir := harness.ShortFolder(t)
	unserved := filepath.Join(dir, "unserved")
	left := receiver(t, unserved)
	_ = left.Close() // its path stays
	for name, address := range map[string]string{
		"missing":  filepath.Join(dir, "missing"),
		"too long": "/" + strings.Repeat("x", 200),
		"unserved": unserved,
	} {
		if err := (Notify{address: address}).Ready(); err == nil ||
			!strings.HasPrefix(err.Error(), "notify systemd: ") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// Hundreds of messages to a service manager that reads none wait together as long as one may.
func TestPatience(t *testing.T) {
	t.Parallel()
	var p waitBudget
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, row := range []struct {
		later, waits, want time.Duration
	}{
		{0, 500 * time.Millisecond, 2 * time.Second},
		{500 * time.Millisecond, 5 * time.Second, 1500*time.Millisecond + 500*time.Millisecond/10},
		{0, 0, 0},
		{3 * time.Second, 0, 300 * time.Millisecond},
		{0, time.Second, 300 * time.Millisecond},
		{60 * time.Second, 0, 2 * time.Second},
		{time.Hour, 0, 2 * time.Second},
	} {
		now = now.Add(row.later)
		got := p.left(now)
		if (got - row.want).Abs() > time.Microsecond {
			t.Errorf("after %v: %v left, want %v", row.later, got, row.want)
		}
		p.spend(min(got, row.waits))
	}
}

func TestNotifyABusyManager(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "notify")
	conn := receiver(t, path)
	n, err := parseNotifySocket(path)
	if err != nil {
		t.Fatal(err)
	}
	n.budget.left(time.Now())
	n.budget.spend(notifyTimeout)
	sent := 0
	for ; ; sent++ {
		if err := n.Status("x"); errors.Is(err, ErrBusy) {
			break
		} else if err != nil || sent > 100_000 {
			t.Fatal(sent, err)
		}
	}
	if err := n.Store("x", 0); !errors.Is(err, ErrBusy) {
		t.Errorf("a descriptor: %v", err)
	}
	for range sent {
		receive(t, conn)
	}
	if err := n.Ready(); err != nil { // what is read again is told again, with no time left to wait
		t.Error(err)
	}
	if got := receive(t, conn); got != "READY=1" {
		t.Errorf("received %q", got)
	}
}

// Not parallel: the environment is the process's.
func TestNotifyFromEnvironment(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/run/systemd/notify")
	n, err := NotifyFromEnvironment()
	if err != nil || n.address != "/run/systemd/notify" {
		t.Errorf("%+v, %v", n, err)
	}
	if value, there := os.LookupEnv("NOTIFY_SOCKET"); there {
		t.Errorf("NOTIFY_SOCKET=%q is left to children", value)
	}
	if n, err := NotifyFromEnvironment(); err != nil || n.Enabled() {
		t.Errorf("outside systemd: %+v, %v", n, err)
	}
}

func TestOneLine(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", 300)
	for _, row := range []struct {
		text  string
		limit int
		want  string
	}{
		{"", 64, ""},
		{"as it is", 64, "as it is"},
		{"  a \t\r\n b\x00 ", 64, "a b"},
		{"\x1b[31mred\u202e\u2028x\u00a0y", 64, "[31mred x y"},
		{"\xff\xfe\ufffd", 64, ""},
		{`"a\x00b"`, 64, `"a⧵x00b"`},
		{long, 64, strings.Repeat("é", 30) + "…"},
		{"aaaaaaa b", 10, "aaaaaaa…"},
	} {
		if got := oneLine(row.text, row.limit); got != row.want {
			t.Errorf("oneLine(%q, %d) = %q, want %q", row.text, row.limit, got, row.want)
		}
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add("READY=1\nSTATUS=x", 16)
	f.Add(strings.Repeat("\u202e é", 40), 64)
	f.Fuzz(func(t *testing.T, text string, limit int) {
		limit = 8 + (limit&0x7fffffff)%1024
		got := oneLine(text, limit)
		if len(got) > limit || !utf8.ValidString(got) || got != strings.TrimSpace(got) || strings.Contains(got, "  ") {
			t.Errorf("oneLine(%q, %d) = %q", text, limit, got)
		}
		if i := strings.IndexFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("oneLine(%q, %d) = %q: byte %d is not printable", text, limit, got, i)
		}
	})
}

func FuzzParseNotifySocket(f *testing.F) {
	for _, seed := range []string{"", "/run/systemd/notify", "@abstract", "vsock:2:9999", "relative", "/", "/a\x00b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, address string) {
		n, err := parseNotifySocket(address)
		unix := len(address) > 1 && strings.ContainsAny(address[:1], "/@") && !strings.Contains(address, "\x00")
		if n.Enabled() != unix || (err != nil) != (!unix && address != "") {
			t.Errorf("%q: %+v, %v", address, n, err)
		}
	})
}
