package simulator

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

const (
	portalPage = "<!DOCTYPE html>\n<title>Simulated portal</title>\n<p>Please sign in to use this network.\n"
	notJSON    = "this is not JSON"
	chunk      = 32 << 10 // bytes of a huge body written at once
)

// instead does what a fault does in place of an answer, and reports whether it did: a request that
// hung until the faults were cleared is answered after all.
func (h *handler) instead(w http.ResponseWriter, r *http.Request, p protocol, f struck) bool {
	switch f.Kind {
	case FaultStatus:
		h.fail(w, p, f, refusal{f.Status, "simulated_fault", "Simulated fault: status " + strconv.Itoa(f.Status)})
	case FaultThrottle:
		h.fail(w, p, f, refusal{http.StatusTooManyRequests, "invalid_request", "Temporarily throttled, too many requests"})
	case FaultUnavailable:
		h.fail(w, p, f, refusal{http.StatusBadRequest, "temporarily_unavailable", "AADSTS90033: A transient error has occurred. Please try again."})
	case FaultHang:
		select {
		case <-f.released:
			return false
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	case FaultReset:
		reset(w)
	case FaultHTML:
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(max(f.Status, http.StatusOK))
		_, _ = io.WriteString(w, orElse(f.Body, portalPage))
	case FaultNotJSON:
		writeJSON(w, http.StatusOK, []byte(orElse(f.Body, notJSON)))
	case FaultHugeBody:
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		writeHuge(r.Context(), w, f.Size)
	case FaultGzipBomb:
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Content-Encoding", "gzip") // whether it was asked for or not
		unpacked, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		writeHuge(r.Context(), unpacked, f.Size)
		_ = unpacked.Close()
	case FaultRedirect:
		w.Header().Set("Location", f.Location)
		w.WriteHeader(http.StatusFound)
	default:
		return false
	}
	return true
}

// fail answers with an error, and with the fault's own body and Retry-After where it has them.
func (h *handler) fail(w http.ResponseWriter, p protocol, f struck, as refusal) {
	if f.RetryAfter != "" {
		w.Header().Set("Retry-After", f.RetryAfter)
	}
	if f.RetryAfterMS != "" {
		w.Header().Set("x-ms-retry-after-ms", f.RetryAfterMS)
	}
	body := p.failure(as)
	if f.Body != "" {
		body = []byte(f.Body)
	}
	writeJSON(w, as.status, body)
}

func orElse(text, usual string) string {
	if text == "" {
		return usual
	}
	return text
}

// reset ends the connection so that the peer sees a reset rather than an end of file.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil { // not a connection of its own: ending the answer is all there is
		panic(http.ErrAbortHandler)
	}
	if wrapped, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = wrapped.NetConn()
	}
	if tcp, ok := conn.(interface{ SetLinger(seconds int) error }); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// writeHuge writes a JSON object of size bytes, or less when the peer has had enough.
func writeHuge(ctx context.Context, w io.Writer, size int64) {
	const head, tail = `{"access_token":"`, `"}`
	filler := bytes.Repeat([]byte{'A'}, chunk)
	if _, err := io.WriteString(w, head); err != nil {
		return
	}
	for left := size - int64(len(head)+len(tail)); left > 0; {
		if ctx.Err() != nil {
			panic(http.ErrAbortHandler)
		}
		n, err := w.Write(filler[:min(left, chunk)])
		if err != nil {
			return
		}
		left -= int64(n)
	}
	_, _ = io.WriteString(w, tail)
}

// bend changes an answer's fields as the fault says.
func (f struck) bend(fields []field) []field {
	var bent []field
	for _, o := range fields {
		told := true
		switch {
		case f.Kind == FaultEmptyToken && o.name == "access_token":
			o.value = ""
		case f.Kind == FaultTimes && o.name == "expires_in":
			o.value, told = lie(o.value, f.ExpiresIn)
		case f.Kind == FaultTimes && o.name == "expires_on":
			o.value, told = lie(o.value, f.ExpiresOn)
		}
		if told {
			bent = append(bent, o)
		}
	}
	return bent
}

// lie returns what is told in place of a number of seconds, and whether anything is; see Fault.ExpiresIn.
func lie(truth, how string) (value string, told bool) {
	switch {
	case how == "":
		return truth, true
	case how == missing:
		return "", false
	case how[0] != '+' && how[0] != '-':
		return how, true
	}
	by, err := time.ParseDuration(how)
	if err != nil {
		return how, true
	}
	seconds, _ := strconv.ParseInt(truth, 10, 64) // we wrote it
	return strconv.FormatInt(seconds+int64(by/time.Second), 10), true
}

// send writes a body whole, or as FaultSlowBody and FaultTruncated do.
func (h *handler) send(w http.ResponseWriter, r *http.Request, f struck, status int, body []byte) {
	if f.Kind != FaultSlowBody && f.Kind != FaultTruncated {
		writeJSON(w, status, body)
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if f.Kind == FaultTruncated {
		writeJSON(w, status, body[:len(body)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	writeJSON(w, status, nil)
	tick := time.NewTicker(f.Every)
	defer tick.Stop()
	for i := range body {
		select {
		case <-tick.C:
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(body[i : i+1]); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
	}
}
