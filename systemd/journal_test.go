package systemd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

// decode reads a datagram of journald's native protocol, as strictly as journald does.
func decode(t *testing.T, datagram string) map[string][]string {
	t.Helper()
	fields := map[string][]string{}
	for datagram != "" {
		end := strings.IndexAny(datagram, "=\n")
		if end < 1 || end > longestName {
			t.Fatalf("no field name in %q", datagram)
		}
		name, rest := datagram[:end], datagram[end+1:]
		if strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" || name[0] == '_' {
			t.Fatalf("bad field name %q", name)
		}
		size := strings.IndexByte(rest, '\n')
		if datagram[end] == '\n' {
			if len(rest) < 8 {
				t.Fatalf("no length in %q", datagram)
			}
			size = int(binary.LittleEndian.Uint64([]byte(rest)))
			rest = rest[8:]
		}
		if size < 0 || size >= len(rest) || rest[size] != '\n' {
			t.Fatalf("field %s does not end", name)
		}
		fields[name] = append(fields[name], rest[:size])
		datagram = rest[size+1:]
	}
	return fields
}

func journalLogger(t *testing.T, options zap.Option) (*zap.Logger, func() map[string][]string) {
	t.Helper()
	path := filepath.Join(harness.ShortFolder(t), "journal")
	conn := receiver(t, path)
	logger := zap.New(NewJournal(JournalOptions{Socket: path, Level: zapcore.DebugLevel, Fallback: failWriter{}}),
		options)
	return logger, func() map[string][]string { return decode(t, receive(t, conn)) }
}

type failWriter struct{}

func (failWriter) Write([]byte) (int, error) {
	return 0, errors.New("the journal should have taken it")
}

func want(t *testing.T, fields map[string][]string, name string, values ...string) {
	t.Helper()
	if !slices.Equal(fields[name], values) {
		t.Errorf("%s = %q, want %q", name, fields[name], values)
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	logger, next := journalLogger(t, zap.AddCaller())
	const id = "0123456789abcdef0123456789abcdef"
	logger.Named("cache").With(zap.String("identity", "vision")).With(zap.String("resource",
		"https://vault.azure.net")).
		Warn("token\nrefreshed",
			zap.String("message_id", id),
			zap.Duration("left", 90*time.Minute),
			zap.Time("expires", time.Unix(0, 0).UTC()),
			zap.Int("count", 3),
			zap.Error(errors.New("two\nlines")),
			zap.Bool("ok", true),
			zap.ByteString("bytes", []byte("x y")),
			zap.Strings("choices", []string{"a", "b"}),
			zap.Any("address", netip.MustParseAddr("127.0.0.1")),
			zap.Dict("caller", zap.Int("uid", 7), zap.String("unit", "")),
			zap.Namespace("deep"), zap.String("kébab-case.x", "1"))
	f := next()
	want(t, f, "MESSAGE",
		`token refreshed address=127.0.0.1 bytes="x y" caller.uid=7 caller.unit="" choices="[\"a\",\"b\"]" `+
			`count=3 deep.kébab-case.x=1 error="two lines" expires=1970-01-01T00:00:00Z identity=vision left=1h30m0s `+
			`ok=true resource=https://vault.azure.net`)
	want(t, f, "PRIORITY", "4")
	want(t, f, "MESSAGE_ID", id)
	want(t, f, "PERCEPT_MESSAGE_ID")
	want(t, f, "PERCEPT_LOGGER", "cache")
	want(t, f, "PERCEPT_IDENTITY", "vision")
	want(t, f, "PERCEPT_RESOURCE", "https://vault.azure.net")
	want(t, f, "PERCEPT_LEFT", "1h30m0s")
	want(t, f, "PERCEPT_ERROR", "two\nlines")
	want(t, f, "PERCEPT_CALLER_UID", "7")
	want(t, f, "PERCEPT_CALLER_UNIT", "")
	want(t, f, "PERCEPT_DEEP_K__BAB_CASE_X", "1")
	if len(f["CODE_FILE"]) != 1 || !strings.HasSuffix(f["CODE_FILE"][0], "journal_test.go") ||
		len(f["CODE_LINE"]) != 1 || len(f["CODE_FUNC"]) != 1 {
		t.Errorf("caller %q %q %q", f["CODE_FILE"], f["CODE_LINE"], f["CODE_FUNC"])
	}
}

func TestJournalWithKeepsParentsApart(t *testing.T) {
	t.Parallel()
	logger, next := journalLogger(t, zap.WithCaller(false))
	parent := logger.With(zap.String("a", "1"), zap.String("b", "2"))
	left, right := parent.With(zap.String("c", "left")), parent.With(zap.String("c", "right"))
	left.Info("x")
	want(t, next(), "PERCEPT_C", "left")
	right.Info("x", zap.String("a", "later"))
	f := next()
	want(t, f, "PERCEPT_C", "right")
	want(t, f, "PERCEPT_A", "later")
	parent.Info("x")
	want(t, next(), "PERCEPT_C")
}

func TestJournalPriorities(t *testing.T) {
	t.Parallel()
	for level, priority := range map[zapcore.Level]string{
		zapcore.DebugLevel: "7", zapcore.InfoLevel: "6", zapcore.WarnLevel: "4", zapcore.ErrorLevel: "3",
		zapcore.DPanicLevel: "2", zapcore.PanicLevel: "2", zapcore.FatalLevel: "2", zapcore.DebugLevel - 1: "7",
	} {
		var out bytes.Buffer
		c := NewJournal(JournalOptions{Socket: filepath.Join(harness.ShortFolder(t), "none"), Fallback: &out})
		if err := errors.Join(c.Write(zapcore.Entry{Level: level, Message: "m"}, nil), c.Sync()); err != nil {
			t.Error(err)
		}
		if got := out.String(); got != "<"+priority+">m\n" {
			t.Errorf("%v: %q, want priority %s", level, got, priority)
		}
	}
}

func TestJournalLevel(t *testing.T) {
	t.Parallel()
	c := NewJournal(JournalOptions{})
	if c.Check(zapcore.Entry{Level: zapcore.DebugLevel}, nil) != nil || c.Check(zapcore.Entry{Level: zapcore.InfoLevel},
		nil) == nil {
		t.Error("the zero level is not info")
	}
}

func TestJournalFallsBackAndReturns(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "journal")
	var out bytes.Buffer
	logger := zap.New(NewJournal(JournalOptions{Socket: path, Fallback: &out}))
	logger.Error("first\n<0>forged", zap.String("text", "a\n<0>b"))
	if got := out.String(); got != "<3>first <0>forged text=\"a <0>b\"\n" {
		t.Errorf("line %q", got)
	}
	out.Reset()

	conn := receiver(t, path)
	logger.Info("second")
	want(t, decode(t, receive(t, conn)), "MESSAGE", "second")

	// The journal restarts with a new socket: the next entry reaches it.
	_ = conn.Close()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	conn = receiver(t, path)
	logger.Info("third")
	want(t, decode(t, receive(t, conn)), "MESSAGE", "third")
	if out.Len() != 0 {
		t.Errorf("fell back: %q", out.String())
	}
}

// A journal that does not read has the entry fall back, and is still used once it reads again.
func TestJournalDoesNotWaitForAFullJournal(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "journal")
	conn := receiver(t, path)
	var out bytes.Buffer
	logger := zap.New(NewJournal(JournalOptions{Socket: path, Fallback: &out}))
	sent := 0
	for ; out.Len() == 0; sent++ { // until its queue is full
		logger.Info("m")
	}
	if out.String() != "<6>m\n" {
		t.Errorf("fell back with %q", out.String())
	}
	for range sent - 1 {
		receive(t, conn)
	}
	logger.Info("again")
	want(t, decode(t, receive(t, conn)), "MESSAGE", "again")
}

func TestJournalReportsThatNothingTookTheEntry(t *testing.T) {
	t.Parallel()
	c := NewJournal(JournalOptions{Socket: filepath.Join(harness.ShortFolder(t), "none"), Fallback: failWriter{}})
	if err := c.Write(zapcore.Entry{Message: "m"}, nil); err == nil {
		t.Error("no error")
	}
}

func TestJournalBoundsSizes(t *testing.T) {
	t.Parallel()
	logger, next := journalLogger(t, zap.WithCaller(false))
	huge := strings.Repeat("é\n", 1<<20)
	fields := []zap.Field{zap.String(strings.Repeat("n", 200), huge)}
	for i := range 200 {
		fields = append(fields, zap.String(fmt.Sprintf("f%03d", i), huge))
	}
	logger.Info(huge, fields...)
	f := next()
	total := 0
	for name, values := range f {
		for _, value := range values {
			if total += len(name) + len(value); !utf8.ValidString(value) || len(value) > longestMessage {
				t.Errorf("%s has %d bytes", name, len(value))
			}
		}
	}
	if total > 128<<10 || len(f) != mostFields+2 {
		t.Errorf("%d bytes in %d fields", total, len(f))
	}
}

func TestJournalIsSharedByGoroutines(t *testing.T) {
	t.Parallel()
	logger, next := journalLogger(t, zap.WithCaller(false))
	var wg sync.WaitGroup
	const writers = 8
	for i := range writers {
		wg.Go(func() { logger.With(zap.Int("writer", i)).Info("m", zap.Int("entry", i)) })
	}
	seen := map[string]bool{}
	for range writers {
		seen[next()["PERCEPT_WRITER"][0]] = true
	}
	wg.Wait()
	if len(seen) != writers {
		t.Errorf("%d of %d entries arrived", len(seen), writers)
	}
}

type unprintable struct{ secret string }

func (unprintable) MarshalJSON() ([]byte, error) { return nil, errors.New("not for you") }

func TestValuesThatDoNotMarshalStayHidden(t *testing.T) {
	t.Parallel()
	const canary = "canary-7f3a"
	got := flatten([]zapcore.Field{zap.Any("x", unprintable{canary})})
	if len(got) != 1 || strings.Contains(got[0].value, canary) {
		t.Errorf("%v", got)
	}
}

func TestMessageIDMustBeOne(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"", "x", "0123456789ABCDEF0123456789ABCDEF", "0123456789abcdef0123456789abcde\n"} {
		f := decode(t, string(encode(zapcore.Entry{}, "m", []field{{messageIDField, id}})))
		want(t, f, "MESSAGE_ID")
		want(t, f, "PERCEPT_MESSAGE_ID", id)
	}
}

func FuzzEncode(f *testing.F) {
	f.Add("m", "name", "value", "logger")
	f.Add("a\nb", "é=\n", "x\ny", "")
	f.Add("", "", "\x00\xff", "\n")
	f.Fuzz(func(t *testing.T, message, name, value, logger string) {
		entry := zapcore.Entry{Message: message, LoggerName: logger}
		fields := flatten([]zapcore.Field{zap.String(name, value)})
		line := lineOf(entry, fields)
		if strings.ContainsAny(line, "\n\x00\x1b") || len(line) > longestMessage || !utf8.ValidString(line) {
			t.Errorf("line %q", line)
		}
		decoded := decode(t, string(encode(entry, line, fields)))
		if got := decoded["MESSAGE"]; len(got) != 1 || got[0] != line {
			t.Errorf("message %q", got)
		}
	})
}

func TestIsStream(t *testing.T) {
	t.Parallel()
	file, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	right := fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	for stream, want := range map[string]bool{right: true, "": false, "x": false, "1:2": false, right + "0": false,
		right + " ": false} {
		if got := isStream(stream, int(file.Fd())); got != want {
			t.Errorf("JOURNAL_STREAM=%q: %v", stream, got)
		}
	}
	if isStream(right, -1) {
		t.Error("a closed stderr is the journal")
	}
}

// Not parallel: the environment is the process's.
func TestUnderJournal(t *testing.T) {
	t.Setenv("JOURNAL_STREAM", "0:0")
	if UnderJournal() {
		t.Error("stderr is device 0, inode 0")
	}
}
