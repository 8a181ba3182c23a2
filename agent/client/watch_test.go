package client_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

const eventType = "text/event-stream"

// stream serves text as a stream of events and ends.
func stream(t *testing.T, mediaType, text string) *client.Client {
	t.Helper()
	return serve(t, func(w http.ResponseWriter, _ *http.Request) { answer(w, 200, mediaType, text) })
}

// collect watches to the end.
func collect(ctx context.Context, c *client.Client, r client.WatchRequest) (all []client.Event, err error) {
	for event, fault := range c.Watch(ctx, r) {
		if fault != nil {
			return all, fault
		}
		all = append(all, event)
	}
	return all, nil
}

func TestWatch(t *testing.T) {
	t.Parallel()
	var asked *http.Request
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked = r
		answer(w, 200, eventType+"; charset=utf-8", "retry: 2000\n\n"+
			"event: token\nid: 1\ndata: "+
			"{\"identity\":\"vision\",\"resource\":\"r\",\"token_sha256\":\"ab\","+
			"\"expires_on\":\"2026-11-24T12:00:00Z\",\"received_on\":\"2026-11-23T12:00:00Z\","+
			"\"permissions\":{\"standing\":\"current\"},\"now\":\"2026-11-23T12:00:01Z\"}\n\n"+
			": alive\n\n:\n\n"+
			"data:{\"identity\":\"vision\",\"resource\":\"r\",\"permissions\":{\"standing\":\"stale\","+
			"\"changed\":\"2026-11-23T11:00:00Z\"}}\r\nevent:permissions\r\n\r\n"+
			"unknown: field\n\n"+
			"event: later\ndata: {}\nunknown\n\n"+
			"event: ended\nid: 4\ndata: "+
			"{\"identity\":\"vision\",\"resource\":\"r\",\"permissions\":{\"standing\":\"\"},\"detail\":\"the "+
			"end\"}\n\n"+
			"event: token\ndata: {}\n\n")
	})
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	got, err := collect(t.Context(), c, client.WatchRequest{Resource: "a&b=c", Identity: "vision"})
	want := []client.Event{
		{Name: "token", WatchEvent: api.WatchEvent{
			Identity: "vision", Resource: "r", SHA256: "ab", ExpiresOn: noon.Add(24 * time.Hour), ReceivedOn: noon,
			Permissions: api.Permissions{State: api.PermissionsCurrent}, Now: noon.Add(time.Second),
		}},
		{Name: "permissions", WatchEvent: api.WatchEvent{Identity: "vision", Resource: "r",
			Permissions: api.Permissions{State: api.PermissionsStale, Changed: noon.Add(-time.Hour)}}},
		{Name: "later"},
		{Name: "ended", WatchEvent: api.WatchEvent{Identity: "vision", Resource: "r", Detail: "the end"}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v (%v)\nwant %+v", got, err, want)
	}
	if asked.Method != "GET" || asked.RequestURI != "/v1/watch?identity=vision&resource=a%26b%3Dc" ||
		asked.Header.Get("Accept") != eventType || asked.Host != "localhost" {
		t.Errorf("asked with %+v", asked)
	}
}

func TestWatchOutsideTheContract(t *testing.T) {
	t.Parallel()
	const notOurs = "the answer is not one of perceptd's"
	for _, test := range []struct{ name, mediaType, text, want string }{
		{"JSON", "application/json", `{"token_sha256":"` + canary + `"}`, notOurs},
		{"no media type", "", "event: token\ndata: {}\n\n", notOurs},
		{"no data", eventType, "event: token\n\n", notOurs},
		{"no name", eventType, "data: {}\n\n", notOurs},
		{"an empty name", eventType, "event:\ndata: {}\n\n", notOurs},
		{"two names", eventType, "event: token\nevent: token\ndata: {}\n\n", notOurs},
		{"two lines of data", eventType, "event: token\ndata: {\ndata: }\n\n", notOurs},
		{"data twice", eventType, "event: token\ndata: {}\ndata: {}\n\n", notOurs},
		{"no JSON", eventType, "event: token\ndata: " + canary + "\n\n", notOurs},
		{"null", eventType, "event: token\ndata: null\n\n", notOurs},
		{"another type", eventType, "event: token\ndata: {\"expires_on\":\"" + canary + "\"}\n\n", notOurs},
		{"no UTF-8", eventType, "event: token\ndata: {\"detail\":\"\xff\"}\n\n", notOurs},
		{"a NUL", eventType, "event: tok\x00en\ndata: {}\n\n", notOurs},
		{"CR as a line's end", eventType, "event: token\rdata: {}\r\r\n", notOurs},
		{"an endless line", eventType, ": " + strings.Repeat("x", 64<<10) + "\n\n", "longer than 65536 bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, err := collect(t.Context(), stream(t, test.mediaType, test.text), client.WatchRequest{Resource: "r"})
			if len(got) != 0 || err == nil || !strings.Contains(err.Error(), test.want) ||
				strings.Contains(err.Error(), "canary") {
				t.Errorf("got %+v, %v", got, err)
			}
			var unreachable *client.UnreachableError
			if errors.As(err, &unreachable) {
				t.Error("the daemon answered, and is said not to be there")
			}
		})
	}
}

// A stream that ends without having said so is a daemon that is gone.
func TestWatchOfADaemonThatGoesAway(t *testing.T) {
	t.Parallel()
	const whole = "event: token\ndata: {}\n\n"
	for _, text := range []string{"", whole, whole + "event: token\n", whole + "event: token\ndata: {}",
		whole + "event: token\ndata: {}\n"} {
		c := stream(t, eventType, text)
		got, err := collect(t.Context(), c, client.WatchRequest{Resource: "r"})
		var unreachable *client.UnreachableError
		if !errors.As(err, &unreachable) || unreachable.Socket != c.Socket || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q: error %v", text, err)
		}
		if len(got) != strings.Count(text, whole) {
			t.Errorf("%q: events %+v", text, got)
		}
	}
	none := &client.Client{Socket: client.ShortFolder(t) + "/token.sock"}
	if _, err := collect(t.Context(), none, client.WatchRequest{Resource: "r"}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("without a daemon: %v", err)
	}
}

func TestWatchThatIsRefused(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "5")
		answer(w, 429, "application/problem+json", `{"status":429,"detail":"too many","code":"too_many_requests"}`)
	})
	got, err := collect(t.Context(), c, client.WatchRequest{Resource: "r"})
	var refusal *client.Error
	if len(got) != 0 || !errors.As(err, &refusal) || refusal.Code != api.CodeBusy ||
		refusal.RetryAfter != 5*time.Second {
		t.Errorf("got %+v, %v", got, err)
	}
	cut := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		answer(w, 403, "application/problem+json", `{"status":`)
	})
	var unreachable *client.UnreachableError
	if _, err := collect(t.Context(), cut, client.WatchRequest{Resource: "r"}); !errors.As(err, &unreachable) {
		t.Errorf("a refusal that breaks off: %v", err)
	}
}

// endless serves one event and then nothing, and tells when the watcher has gone.
func endless(t *testing.T) (c *client.Client, gone <-chan struct{}) {
	t.Helper()
	left := make(chan struct{})
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		answer(w, 200, eventType, "event: token\ndata: {}\n\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		close(left)
	}), left
}

func TestWatchEndsWithItsTaker(t *testing.T) {
	t.Parallel()
	c, gone := endless(t)
	for _, err := range c.Watch(t.Context(), client.WatchRequest{Resource: "r"}) {
		if err != nil {
			t.Error(err)
		}
		break
	}
	<-gone
	c, gone = endless(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range c.Watch(ctx, client.WatchRequest{Resource: "r"}) {
		cancel()
		if err != nil && err != context.Canceled {
			t.Errorf("error %v", err)
		}
	}
	<-gone
}

func FuzzWatch(f *testing.F) {
	f.Add([]byte(
		"retry: 2000\n\nevent: token\nid: 1\ndata: {\"identity\":\"a\"}\n\n: alive\n\nevent: ended\ndata: {}\n\n"))
	f.Add([]byte("event\ndata\n\n"))
	f.Add([]byte("event: x\r\ndata:{}\r\n\r\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) { answer(w, 200, eventType, string(text)) })
		got, err := collect(t.Context(), c, client.WatchRequest{Resource: "r"})
		if len(got) > strings.Count(string(text), "data") {
			t.Errorf("%d events of %q", len(got), text)
		}
		ended := len(got) > 0 && got[len(got)-1].Name == api.EventEnded
		if (err == nil) != ended || err != nil && err.Error() == "" {
			t.Errorf("%q: %+v beside %v", text, got, err)
		}
		for _, event := range got {
			if event.Name == "" {
				t.Errorf("%q: an event without a name", text)
			}
		}
	})
}
