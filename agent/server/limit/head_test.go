package limit

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

// manyLines are n header lines, as short as they can be.
func manyLines(n int) string {
	var lines strings.Builder
	for i := range n {
		lines.WriteString(string([]byte{'a' + byte(i/26%26), 'a' + byte(i%26), ':', '\n'}))
	}
	return lines.String()
}

// passed returns how much of stream is within the bounds, when it comes in pieces of that size.
func passed(h *head, stream string, piece int) (total int) {
	for rest := stream; rest != ""; {
		next := rest[:min(piece, len(rest))]
		n := h.pass([]byte(next))
		total += n
		if n < len(next) {
			return total
		}
		rest = rest[n:]
	}
	return total
}

const get = "GET / HTTP/1.1\r\nHost: x\r\n"

func TestBounds(t *testing.T) {
	t.Parallel()
	full := "GET / HTTP/1.1\r\n" + manyLines(HeadLines)
	long := "GET / HTTP/1.1\r\nX: "
	long += strings.Repeat("x", HeadBytes-len(long)-4) + "\r\n\r\n"
	body := strings.Repeat("{\n", 40<<10)
	plain := get + "content-LENGTH: \t" + strconv.Itoa(len(body)) + " \r\n\r\n" + body
	chunked := get + "Transfer-Encoding: chunked\r\n\r\n"
	for name, row := range map[string]struct {
		stream string
		beyond int // bytes of stream's end; 0: it is all within the bounds
		heads  uint32
	}{
		"nothing":                    {"", 0, 0},
		"a head":                     {get + "\r\n", 0, 1},
		"line feeds alone":           {"GET / HTTP/1.1\nHost: x\n\n", 0, 1},
		"as many lines as may be":    {full + "\r\n", 0, 1},
		"the same, and a line feed":  {full + "\n", 0, 1},
		"one more":                   {full + "b:\n\r\n", 5, 0},
		"one more, without an end":   {full + "b", 1, 0},
		"one more, that looks empty": {full + "\rb", 1, 0},
		"two returns":                {full + "\r\r\n", 2, 0},
		"a continued line too many":  {full + " x\r\n", 4, 0},
		"as many as 16 KiB hold":     {"GET / HTTP/1.1\r\n" + manyLines(3716), 4 * (3716 - HeadLines), 0},
		"as long as may be":          {long, 0, 1},
		"a byte more":                {long[:len(long)-4] + "x\r\n\r\n", 1, 0},
		"a long request line":        {"GET /" + strings.Repeat("x", HeadBytes), 5, 0},
		"the next head is counted":   {full + "\r\n" + full + "b:\n\r\n", 5, 1},
		"and the one after a body":   {plain + full + "b:\n\r\n", 5, 1},
		"a body":                     {plain + plain + get + "\r\n", 0, 3},
		"empty lines first":          {"\r\n\n" + full + "\n", 0, 1},
		"many heads":                 {strings.Repeat(get+"\r\n", 1000), 0, 1000},
		"a body of nothing":          {get + "Content-Length: 0\r\n\r\n" + full + "b", 1, 1},
		"a body in chunks":           {chunked + "5\r\nhello\r\n0\r\n\r\n" + full + "\r\n", 0, 3},
		"trailers count":             {chunked + "0\r\n" + manyLines(HeadLines+1), 4, 1},
		"a head within a chunk":      {chunked + "99\r\nx\r\nContent-Length: 999999\r\n\r\n" + full + "b:\n", 3, 2},
		"two lengths": {get + "Content-Length: 9\r\nContent-Length: 9999\r\n\r\n" + full + "b:\n",
			3, 1},
		"a length and chunks": {get + "Content-Length: 9999\r\ntransfer-encoding: chunked\r\n\r\n" +
			full + "b:\n", 3, 1},
		"a length that goes on":      {get + "Content-Length: 9999\r\n 9\r\n\r\n" + full + "b:\n", 3, 1},
		"a length in a folded line":  {get + "X: \r\n Content-Length: 9999\r\n\r\n" + full + "b:\n", 3, 1},
		"a length that is none":      {get + "Content-Length: +9999\r\n\r\n" + full + "b:\n", 3, 1},
		"a length that is too large": {get + "Content-Length: 9999999999999999999\r\n\r\n" + full + "b:\n", 3, 1},
		"a length with much space": {get + "Content-Length: " + strings.Repeat(" ", startSize) + "9999\r\n\r\n" +
			full + "b:\n", 3, 1},
		"a length of another name":    {get + "Content-Length : 9999\r\n\r\n" + full + "b:\n", 3, 1},
		"a length in a request line":  {"Content-Length: 9999\r\nHost: x\r\n\r\n" + full + "b:\n", 3, 1},
		"no plain one after a doubt":  {get + "X: a\r\n b\r\n\r\n" + plain, len(body) - 2*(HeadLines+1), 2},
		"a body that goes on and on":  {get + "Content-Length: 9223372036854775807\r\n\r\n" + full + "b:\n", 0, 1},
		"a body of as much as it can": {get + "Content-Length: 18446744073709551615\r\n\r\n" + full + "b:\n", 3, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, piece := range []int{1, 2, 3, 5, 64, 4096, len(row.stream) + 1} {
				var h head
				if got := passed(&h, row.stream, piece); got != len(row.stream)-row.beyond || h.ended != row.heads {
					t.Errorf("in pieces of %d: passed %d of %d bytes and %d heads, want all but %d and %d", piece, got,
						len(row.stream), h.ended, row.beyond, row.heads)
				}
			}
		})
	}
}

// Counting costs a request no allocation.
func TestCountingAllocatesNothing(t *testing.T) {
	request := []byte(get + "Content-Length: 2\r\nX-Identity-Header: x\r\n\r\n{}")
	var h head
	if n := testing.AllocsPerRun(100, func() { h.pass(request) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzHead has net/http read what is passed: whatever comes in, in whatever pieces, it finds no head beyond the bounds,
// begun or whole; and what it can read, all of it within the bounds, is passed unchanged.
func FuzzHead(f *testing.F) {
	full := "POST / HTTP/1.1\r\nHost: x\r\n" + manyLines(HeadLines-2)
	for _, stream := range []string{
		get + "\r\n", full + "b:\n\r\n", full + "b:\nc:\n", full + "Content-Length: 70\r\n\r\n" + manyLines(100),
		full + "Transfer-Encoding: chunked\r\n\r\n5\r\na\n\nb\n\r\n0\r\n" + manyLines(70) + "\r\n" + full,
		get + "Transfer-Encoding: chunked\r\n\r\n28\r\nx\r\nContent-Length: 999999\r\n\r\nxxxxxxxxxx\r\n0\r\n\r\nGET " +
			"/ HTTP/1.1\r\nHost: x\r\n" + manyLines(100),
		"\r\n\r\n" + full, get + "X: a\r\n b\r\n\r\n",
	} {
		f.Add([]byte(stream), []byte{1, 7, 250})
	}
	f.Fuzz(func(t *testing.T, stream, pieces []byte) {
		var whole, cut head
		within := whole.pass(stream)
		total := 0
		for i, rest := 0, stream; len(rest) > 0; i++ {
			piece := len(rest)
			if len(pieces) > 0 {
				piece = min(piece, int(pieces[i%len(pieces)])+1)
			}
			n := cut.pass(rest[:piece])
			total += n
			if n < piece {
				break
			}
			rest = rest[n:]
		}
		if total != within || whole.ended != cut.ended {
			t.Fatalf("%d bytes and %d heads at once, %d and %d in pieces", within, whole.ended, total, cut.ended)
		}
		read := readAll(stream[:within])
		if lines := linesOf(stream[read.to:within]); read.lines > HeadLines || lines > 1+HeadLines {
			t.Errorf("a head of %d lines, and one of %d that has not ended", read.lines, lines)
		}
		if read = readAll(stream); read.plain && read.to == len(stream) && within < len(stream) {
			t.Errorf("%d bytes that are within the bounds, %d were passed", len(stream), within)
		}
	})
}

// requests are what net/http reads in a stream.
type requests struct {
	to    int // where the first begins that is not whole
	lines int // the most in a head, or in what comes after a body in chunks
	// all are within the bounds, and none has what counts as head beside its own: chunks, folded lines, two lengths
	plain bool
}

func readAll(stream []byte) (all requests) {
	source := bytes.NewReader(stream)
	buffered := bufio.NewReader(source)
	for all.plain = true; ; {
		all.to = len(stream) - source.Len() - buffered.Buffered()
		if all.to == len(stream) {
			return all
		}
		request, err := http.ReadRequest(buffered)
		if err == nil {
			_, err = io.Copy(io.Discard, request.Body)
		}
		if err != nil {
			return all
		}
		for _, header := range []http.Header{request.Header, request.Trailer} {
			n := 0
			for _, values := range header {
				n += len(values)
			}
			all.lines = max(all.lines, n)
		}
		text := stream[all.to:]
		all.plain = all.plain && request.TransferEncoding == nil && isPlain(text)
	}
}

// isPlain reports whether the head that text begins with is within the bounds and plain.
func isPlain(text []byte) bool {
	size, lengths, odd := 0, 0, false
	for line := range bytes.Lines(text) {
		size += len(line)
		if len(bytes.TrimRight(line, "\r\n")) == 0 {
			break
		}
		odd = odd || line[0] == ' ' || line[0] == '\t' || len(line) > startSize && isField(line, contentLength)
		if isField(line, contentLength) {
			lengths++
		}
	}
	return !odd && lengths <= 1 && size <= HeadBytes && linesOf(text) <= 1+HeadLines
}

// linesOf counts the lines of a head up to its end, the request line included; one that has not ended is none.
func linesOf(text []byte) (lines int) {
	for line := range bytes.Lines(text) {
		if line[len(line)-1] != '\n' || len(bytes.TrimSuffix(line[:len(line)-1], []byte("\r"))) == 0 {
			return lines
		}
		lines++
	}
	return lines
}
