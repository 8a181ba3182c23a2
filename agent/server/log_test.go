package server

import (
	"errors"
	"strings"
	"testing"

	"perceptd/agent/api"
)

func TestPanicsAreAnsweredAndLoggedWithoutTheirValue(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Describe = func() api.Status { panic(errors.New(canary)) }
	admin := d.admin()
	d.count(internalError())
	if d.failed.Load() != 1 || d.invalid.Load() != 0 {
		t.Error("a panic counts as the caller's fault")
	}
	for range 2 { // the daemon lives on
		got := send(t, admin, get(api.PathStatus))
		checkRefusal(t, "panic", got, 500, api.CodeInternal)
	}
	for _, want := range []string{"request handler panicked", "*errors.errorString", "server.(*Server).status:"} {
		if !strings.Contains(d.log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, d.log)
		}
	}
	if got := send(t, admin, get(api.PathHealth)); got.status != 200 {
		t.Errorf("after a panic: %+v", got)
	}
}

func TestHTTPLogQuotesNobody(t *testing.T) {
	t.Parallel()
	log := new(logged)
	l := httpLog(log.logger())
	l.Printf("http: something about %s", canary)
	l.Print("http: Accept error: too many open files; retrying in 5ms")
	text := log.String()
	if strings.Contains(text, "canary") {
		t.Errorf("a request is quoted:\n%s", text)
	}
	for _, want := range []string{`"level":"debug"`, "too many open files", `"level":"warn"`} {
		if !strings.Contains(text, want) {
			t.Errorf("the log lacks %q:\n%s", want, text)
		}
	}
}

func TestServerNeedsNoLog(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Log, d.Now = nil, nil
	if got := send(t, d.tokens(""), get("/nowhere")); got.status != 400 {
		t.Errorf("%+v", got)
	}
	if d.now().IsZero() {
		t.Error("no clock")
	}
}
