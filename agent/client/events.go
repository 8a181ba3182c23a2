package client

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// maxLine bounds a line of a stream of events; the daemon's are far shorter.
const maxLine = 64 << 10

var (
	errLongLine = fmt.Errorf("a line of the stream is longer than %d bytes", maxLine)
	errNoEvent  = errors.New("the stream is not one of perceptd's")
)

// eventReader reads server-sent events (the HTML standard, 9.2) as the daemon writes them: lines end with
// LF or CRLF, an event has a name and one line of JSON.
type eventReader struct{ in *bufio.Reader }

func newEventReader(r io.Reader) *eventReader {
	return &eventReader{in: bufio.NewReaderSize(r, maxLine)}
}

// next returns the next event. The error is errLongLine, errNoEvent, or that of the reader, which is
// io.ErrUnexpectedEOF at the end, since no stream ends without having said so.
func (r *eventReader) next() (Event, error) {
	var event Event
	named, filled := false, false
	for {
		line, err := r.line()
		switch {
		case err != nil:
			return Event{}, err
		case len(line) == 0 && named && filled:
			return event, nil
		case len(line) == 0 && (named || filled):
			return Event{}, errNoEvent
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(name) {
		case "event":
			if named || len(value) == 0 {
				return Event{}, errNoEvent
			}
			event.Name, named = string(value), true
		case "data":
			// The decoder's error is left out, since it quotes what it read.
			if filled || !isObject(value) || json.Unmarshal(value, &event.WatchEvent) != nil {
				return Event{}, errNoEvent
			}
			filled = true
		}
		// Comments keep the connection busy; ids and the advice when to connect again are not used; what
		// is not known is to be left alone.
	}
}

// line returns one line without its end, good until the next call.
func (r *eventReader) line() ([]byte, error) {
	line, err := r.in.ReadSlice('\n')
	switch {
	case err == bufio.ErrBufferFull:
		return nil, errLongLine
	case err == io.EOF:
		return nil, io.ErrUnexpectedEOF
	case err != nil:
		return nil, err
	}
	line = bytes.TrimSuffix(line[:len(line)-1], []byte("\r"))
	if !utf8.Valid(line) || bytes.ContainsAny(line, "\x00\r") {
		return nil, errNoEvent
	}
	return line, nil
}

func isObject(text []byte) bool { return len(text) > 0 && text[0] == '{' }
