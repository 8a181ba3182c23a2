package server

import (
	"fmt"
	"log"
	"runtime"
	"strings"
	"time"

	"go.uber.org/zap"
)

func (s *Server) log() *zap.Logger {
	if s.Log == nil {
		return zap.NewNop()
	}
	return s.Log
}

func (s *Server) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}

// logRefusal leaves a trace of the correlation ID that a caller was given, empty for none. What a
// technician should see of a refusal the agent has logged already.
func (s *Server) logRefusal(e *apiError, correlationID string) {
	s.log().Debug("request refused",
		zap.String("code", string(e.code)),
		zap.Int("status", e.status),
		zap.String("detail", e.detail),
		zap.String("correlation_id", correlationID))
}

// panicked logs that a handler panicked: of which type the value was and where, but not the value,
// which may hold what the handler had in its hands.
func (s *Server) panicked(value any) *apiError {
	s.log().Error("request handler panicked",
		zap.String("type", fmt.Sprintf("%T", value)),
		zap.Strings("stack", stack(panicDepth)))
	return internalError()
}

// panicDepth leaves out stack, panicked and the deferred function.
const panicDepth = 3

// stack returns function and line of each caller, without arguments.
func stack(skip int) []string {
	var counters [32]uintptr
	frames := runtime.CallersFrames(counters[:runtime.Callers(skip+1, counters[:])])
	var lines []string
	for {
		frame, more := frames.Next()
		lines = append(lines, fmt.Sprintf("%s:%d", frame.Function, frame.Line))
		if !more {
			return lines
		}
	}
}

// httpLog takes what net/http has to say. Most of it quotes what a caller sent, so only that there was
// something is logged; a listener that cannot accept is what a technician must see in full.
func httpLog(to *zap.Logger) *log.Logger { return log.New(httpLogWriter{to}, "", 0) }

type httpLogWriter struct{ to *zap.Logger }

func (w httpLogWriter) Write(line []byte) (int, error) {
	if text, ok := strings.CutPrefix(string(line), "http: Accept error: "); ok {
		w.to.Warn("connections cannot be accepted", zap.String("error", strings.TrimSpace(text)))
	} else {
		w.to.Debug("net/http complained about a connection")
	}
	return len(line), nil
}
