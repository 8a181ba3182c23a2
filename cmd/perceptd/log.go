package main

import (
	"fmt"
	"io"
	"log"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	azlog "github.com/Azure/azure-sdk-for-go/sdk/azcore/log"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
	"golang.org/x/time/rate"

	"perceptd/systemd"
)

// newLog writes to the journal, with fields, when stderr goes there anyway, and readable lines to
// stderr otherwise. least is the level of what is written, which may change.
func newLog(level string, stderr io.Writer) (_ *zap.Logger, least zap.AtomicLevel, _ error) {
	parsed, err := zapcore.ParseLevel(level)
	if err != nil || parsed > zapcore.ErrorLevel {
		return nil, least, fmt.Errorf("--log-level %q: it must be debug, info, warn or error", level)
	}
	least = zap.NewAtomicLevelAt(parsed)
	core := zapcore.NewCore(lineEncoder(stderr), zapcore.Lock(zapcore.AddSync(stderr)), least)
	if stderr == os.Stderr && systemd.UnderJournal() {
		core = systemd.NewJournal(systemd.JournalOptions{Level: least, Fallback: stderr})
	}
	return zap.New(core, zap.ErrorOutput(zapcore.AddSync(newLibraries(zap.New(core))))), least, nil
}

// lineEncoder writes for people, in colour on a terminal.
func lineEncoder(w io.Writer) zapcore.Encoder {
	encoding := zap.NewDevelopmentEncoderConfig()
	encoding.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
	encoding.EncodeDuration = zapcore.StringDurationEncoder
	encoding.CallerKey = zapcore.OmitKey
	encoding.StacktraceKey = zapcore.OmitKey
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" {
		encoding.EncodeLevel = zapcore.CapitalColorLevelEncoder
	}
	return zapcore.NewConsoleEncoder(encoding)
}

// silenceLibraries has no library say anything by itself until there is a log. azcore's log, which
// AZURE_SDK_GO_LOGGING turns on, writes requests and answers to standard error: it stays off.
func silenceLibraries() {
	log.SetOutput(io.Discard)
	azlog.SetListener(nil)
}

// libraries takes what libraries write to the standard logger, which is slog's default as well. net/http quotes there
// what a back end has sent beside its answer, and that may be a token. So the log gets a line that names the function
// which spoke, and nothing of what it said. Five lines at once and one a minute are written, and the next tells how
// many were left out.
type libraries struct {
	to *zap.Logger

	mu      sync.Mutex // protects what follows
	limit   *rate.Limiter
	leftOut int
}

func newLibraries(to *zap.Logger) *libraries {
	return &libraries{to: to, limit: rate.NewLimiter(rate.Every(time.Minute), 5)}
}

func (l *libraries) Write(line []byte) (int, error) {
	l.mu.Lock()
	isTold := l.limit.Allow()
	leftOut := l.leftOut
	if l.leftOut++; isTold {
		l.leftOut = 0
	}
	l.mu.Unlock()
	if isTold {
		l.to.Warn("a library complained; its words may quote a token and are not repeated",
			zap.String("function", speaker()), zap.Int("left_out", leftOut))
	}
	return len(line), nil
}

// speaker names the function that wrote to a logger: the first on the stack that belongs to none.
func speaker() string {
	var counters [32]uintptr
	const skip = 3 // runtime.Callers, speaker and Write
	frames := runtime.CallersFrames(counters[:runtime.Callers(skip, counters[:])])
	for {
		frame, more := frames.Next()
		if !more || !isLogger(frame.Function) {
			return frame.Function
		}
	}
}

func isLogger(function string) bool {
	for _, loggers := range []string{"log.", "log/", "go.uber.org/zap", "fmt.", "io."} {
		if strings.HasPrefix(function, loggers) {
			return true
		}
	}
	return false
}

// told notes that systemd could not be told something, which is no reason to stop.
func (d *daemon) told(err error) {
	if err != nil {
		d.log.Debug("systemd was not told", zap.Error(err))
	}
}
