package systemd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

const (
	journalSocket = "/run/systemd/journal/socket"

	// journalTimeout is how long a log entry waits for a journal whose queue is full.
	// A request may be waiting for the entry to be written.
	journalTimeout = 250 * time.Millisecond
)

// UnderJournal reports whether stderr goes to the journal, as JOURNAL_STREAM tells: then NewJournal loses
// nothing that stderr would have shown. A service whose stderr was redirected has the variable too, so its
// device and inode are compared.
func UnderJournal() bool { return isStream(os.Getenv("JOURNAL_STREAM"), int(os.Stderr.Fd())) }

func isStream(stream string, fd int) bool {
	var st unix.Stat_t
	return stream != "" && unix.Fstat(fd, &st) == nil && stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// JournalOptions says where entries go.
type JournalOptions struct {
	Socket   string               // journald's native socket; empty for the usual one
	Fallback io.Writer            // for entries that the socket does not take; nil for stderr
	Level    zapcore.LevelEnabler // the least level that is sent; nil for info
}

// NewJournal returns a core that sends entries to journald in its native protocol.
//
// MESSAGE is the line that a person reads: the message with its fields behind it as name=value. For programs,
// PRIORITY is the level, and each field is PERCEPT_ and its name in capitals (`journalctl PERCEPT_IDENTITY=vision`);
// a field "message_id" of 32 hexadecimal digits is MESSAGE_ID instead. Names and sizes are bounded.
//
// An entry that the journal does not take within a quarter of a second is written to Fallback as one line with its
// priority in front ("<4>…"), which the journal and Docker understand where they read stderr. The core may be used by
// several goroutines.
func NewJournal(options JournalOptions) zapcore.Core {
	s := &sender{socket: options.Socket, fallback: options.Fallback}
	if s.socket == "" {
		s.socket = journalSocket
	}
	if s.fallback == nil {
		s.fallback = os.Stderr
	}
	level := options.Level
	if level == nil {
		level = zapcore.InfoLevel
	}
	return &core{LevelEnabler: level, to: s}
}

type core struct {
	zapcore.LevelEnabler
	to   *sender
	with []zapcore.Field
}

func (c *core) With(fields []zapcore.Field) zapcore.Core {
	return &core{LevelEnabler: c.LevelEnabler, to: c.to, with: joined(c.with, fields)}
}

func (c *core) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
		return checked.AddCore(entry, c)
	}
	return checked
}

func (c *core) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	named := flatten(joined(c.with, fields))
	line := lineOf(entry, named)
	if c.to.send(encode(entry, line, named)) == nil {
		return nil
	}
	return c.to.fallBack(fmt.Sprintf("<%d>%s\n", priority(entry.Level), line))
}

// Sync has nothing to do: entries are sent as they come.
func (c *core) Sync() error { return nil }

func joined(a, b []zapcore.Field) []zapcore.Field {
	return append(a[:len(a):len(a)], b...)
}

// sender writes datagrams to the journal. go-systemd's Send is not used: its socket path is fixed, it binds
// an abstract address that every process may write to, and it sends fields whose names it calls ignored.
type sender struct {
	socket string

	mu       sync.Mutex // protects the rest
	conn     *net.UnixConn
	fallback io.Writer
}

func (s *sender) send(datagram []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		err := write(s.conn, datagram)
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		// The journal may have been restarted with a new socket.
		_ = s.conn.Close()
		s.conn = nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: s.socket})
	if err != nil {
		return err
	}
	if err := write(conn, datagram); err != nil {
		_ = conn.Close()
		return err
	}
	s.conn = conn
	return nil
}

func write(conn *net.UnixConn, datagram []byte) error {
	if err := conn.SetWriteDeadline(time.Now().Add(journalTimeout)); err != nil {
		return err
	}
	_, err := conn.Write(datagram)
	return err
}

func (s *sender) fallBack(line string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := io.WriteString(s.fallback, line)
	return err
}
