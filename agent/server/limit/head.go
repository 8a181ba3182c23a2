package limit

import (
	"bytes"
	"strconv"
)

// head counts what comes in on a connection. A head is what stands between two empty lines: whatever a server takes
// for the beginning of one, it finds the end of it within the bounds. So nothing here rests on where a server thinks
// that a body ends, but for one thing: the body that a plain Content-Length announces is passed uncounted, as long as
// every head before it was plain too. The zero value is a connection's beginning.
type head struct {
	body  int64 // bytes of a body that are still to come
	lines int   // of this head, its request line included, that have ended
	bytes int   // of this head
	line  int   // bytes of the line that has not ended
	start [startSize]byte

	lengths int   // Content-Length lines of this head
	length  int64 // what the last of them says
	obscure bool  // from some head on it cannot be told where bodies end; no body is passed uncounted from then on

	ended uint32 // heads
}

// startSize is how much of a line is kept when it comes in pieces: a Content-Length line, and some space in it.
const startSize = 64

// pass counts p and returns how many of its bytes are within the bounds. When that is not all of them, nothing that
// follows is.
func (h *head) pass(p []byte) int {
	for passed := 0; passed < len(p); {
		if h.body > 0 {
			uncounted := min(h.body, int64(len(p)-passed))
			h.body -= uncounted
			passed += int(uncounted)
			continue
		}
		rest := p[passed:]
		end := bytes.IndexByte(rest, '\n')
		if end >= 0 {
			rest = rest[:end+1]
		}
		room := h.room(rest)
		if room < len(rest) {
			h.take(rest[:room])
			return passed + room
		}
		passed += len(rest)
		if end < 0 {
			h.take(rest)
			continue
		}
		h.end(rest)
	}
	return len(p)
}

// room returns how many bytes of rest, which go on with the line that has not ended, are within the bounds.
func (h *head) room(rest []byte) int {
	room := min(len(rest), HeadBytes-h.bytes)
	if h.lines <= HeadLines {
		return room
	}
	for i, b := range rest[:room] { // only the empty line may come
		if b != '\n' && (b != '\r' || h.line+i > 0) {
			return i
		}
	}
	return room
}

// take notes a part of a line.
func (h *head) take(part []byte) {
	if h.line < startSize {
		copy(h.start[h.line:], part)
	}
	h.line += len(part)
	h.bytes += len(part)
}

// end notes the last part of a line, which has its line feed.
func (h *head) end(last []byte) {
	line, size := last, h.line+len(last)
	if h.line > 0 {
		h.take(last)
		line = h.start[:min(h.line, startSize)]
	} else {
		h.bytes += len(last)
	}
	h.line = 0
	switch {
	case size > 2 || size == 2 && line[0] != '\r':
		if h.lines++; h.lines > 1 {
			h.field(line, size)
		}
	case h.lines == 0: // before a request line: servers refuse it, or skip it
		h.bytes = 0
	default:
		h.endHead()
	}
}

// field looks at the beginning of a line of size bytes for where the body ends.
func (h *head) field(line []byte, size int) {
	switch line[0] | 0x20 {
	case ' ', '\t' | 0x20: // goes on with the line before it, which may be any
		h.obscure = true
	case 't':
		h.obscure = h.obscure || isField(line, "transfer-encoding:")
	case 'c':
		if !isField(line, contentLength) {
			return
		}
		h.lengths++
		length, err := strconv.ParseUint(string(bytes.Trim(line[len(contentLength):], " \t\r\n")), 10, 63)
		h.length = int64(length)
		h.obscure = h.obscure || h.lengths > 1 || err != nil || size > startSize
	}
}

const contentLength = "content-length:"

func isField(line []byte, name string) bool {
	return len(line) >= len(name) && bytes.EqualFold(line[:len(name)], []byte(name))
}

// endHead has the body come, and then the next head.
func (h *head) endHead() {
	if h.lengths == 1 && !h.obscure {
		h.body = h.length
	}
	h.lines, h.bytes, h.lengths, h.length = 0, 0, 0, 0
	h.ended++
}
