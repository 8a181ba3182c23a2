package main

import (
	"fmt"
	"io"
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"

	"perceptd/systemd"
)

// newLog writes to the journal, with fields, when stderr goes there anyway, and readable lines to
// stderr otherwise.
func newLog(level string, stderr io.Writer) (*zap.Logger, error) {
	least, err := zapcore.ParseLevel(level)
	if err != nil || least > zapcore.ErrorLevel {
		return nil, fmt.Errorf("--log-level %q: it must be debug, info, warn or error", level)
	}
	core := zapcore.NewCore(lineEncoder(stderr), zapcore.Lock(zapcore.AddSync(stderr)), least)
	if stderr == os.Stderr && systemd.UnderJournal() {
		core = systemd.NewJournal(systemd.JournalOptions{Level: least, Fallback: stderr})
	}
	return zap.New(core, zap.ErrorOutput(zapcore.AddSync(newLibraries(zap.New(core))))), nil
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
