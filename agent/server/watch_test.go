package server

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/tokencache"
)

const watchVault = "/v1/watch?resource=https%3A%2F%2Fvault.azure.net"

// watched is a stream of events being read.
type watched struct {
	t    testing.TB
	conn net.Conn
	in   *bufio.Reader
	seen int // events
}

// watchAt begins to watch.
func (d *daemon) watchAt(socket, target string) *watched {
	d.t.Helper()
	conn := dial(d.t, socket, get(target))
	d.t.Cleanup(func() { conn.Close() })
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: "GET"})
	if err != nil {
		d.t.Fatal(err)
	}
	kind, cache := response.Header.Get("Content-Type"), response.Header.Get("Cache-Control")
	if response.StatusCode != 200 || kind != "text/event-stream" || cache != "no-store" {
		d.t.Fatalf("%s: %+v", target, response)
	}
	w := &watched{t: d.t, conn: conn, in: bufio.NewReader(response.Body)}
	if first := w.block(); first != "retry: 2000\n" {
		d.t.Fatalf("the stream begins with %q", first)
	}
	return w
}

// block returns the lines before the next empty one.
func (w *watched) block() string {
	w.t.Helper()
	var all string
	for {
		line, err := w.in.ReadString('\n')
		if err != nil {
			w.t.Fatalf("the stream broke off: %v after %q", err, all+line)
		}
		if line == "\n" {
			return all
		}
		all += line
	}
}

// next returns the next event, which must have that name.
func (w *watched) next(name string) api.WatchEvent {
	w.t.Helper()
	for {
		block := w.block()
		if block == ": alive\n" {
			continue
		}
		w.seen++
		return readEvent(w.t, block, name, w.seen)
	}
}

// readEvent reads one event strictly.
func readEvent(t testing.TB, block, name string, id int) api.WatchEvent {
	t.Helper()
	if strings.Contains(block, "canary") {
		t.Errorf("an event has the token: %s", block)
	}
	data, ok := strings.CutPrefix(block, "event: "+name+"\nid: "+strconv.Itoa(id)+"\ndata: ")
	if !ok || strings.Count(data, "\n") != 1 {
		t.Fatalf("got %q, want event %d, %q", block, id, name)
	}
	return decoded[api.WatchEvent](t, data)
}

// ends checks that the stream ends after an orderly last event.
func (w *watched) ends(detail string) {
	w.t.Helper()
	if last := w.next(api.EventEnded); !strings.Contains(last.Detail, detail) {
		w.t.Errorf("the stream ends with %+v, want %q", last, detail)
	}
	if rest, err := io.ReadAll(w.in); err != nil || len(rest) != 0 {
		w.t.Errorf("after the last event: %q, %v", rest, err)
	}
}

func TestWatchTellsEveryChange(t *testing.T) {
	t.Parallel()
	back := newRolling(3 * time.Hour)
	d := newDaemon(t, back.fetch)
	socket := d.tokens("")
	send(t, socket, get(v1Vault))
	w := d.watchAt(socket, watchVault)
	first := w.next(api.EventToken)
	if first.Identity != "device" || first.Resource != vault || len(first.SHA256) != 64 || first.Detail != "" ||
		first.Permissions != (api.Permissions{State: api.PermissionsCurrent}) || first.ExpiresOn.Before(time.Now()) ||
		first.ReceivedOn.IsZero() {
		t.Errorf("at first: %+v", first)
	}
	granted := d.change(tokencache.Granted, 2*time.Hour)
	stale := w.next(api.EventPermissions)
	if stale.SHA256 != first.SHA256 || stale.Permissions.State != api.PermissionsStale ||
		!stale.Permissions.Changed.Equal(api.Time(granted.At)) || stale.Permissions.CurrentBy.IsZero() {
		t.Errorf("after a change: %+v", stale)
	}
	back.roll("", 30*time.Minute)
	d.refresh()
	current := w.next(api.EventToken)
	if current.SHA256 == first.SHA256 || current.Permissions.State != api.PermissionsCurrent {
		t.Errorf("after the rollover: %+v", current)
	}
	revoked := d.change(tokencache.Revoked, 10*time.Minute)
	if withheld := w.next(api.EventPermissions); !withheld.Permissions.Withheld || withheld.SHA256 != current.SHA256 {
		t.Errorf("after a revocation: %+v", withheld)
	}
	if _, err := d.Agent.WithdrawChange("the test", revoked.ID); err != nil {
		t.Fatal(err)
	}
	again := w.next(api.EventPermissions)
	if late := again.ExpiresOn.Sub(current.ExpiresOn); late.Abs() == time.Second {
		again.ExpiresOn = current.ExpiresOn // told by the wall clock, in whole seconds, and reckoned on the boot clock
	}
	if !reflect.DeepEqual(again, current) {
		t.Errorf("after withdrawing: %+v, want %+v", again, current)
	}
	if _, err := d.Agent.Apply(agent.Rules{Rules: grants.Rules{Identities: rules().Identities}}); err != nil {
		t.Fatal(err)
	}
	w.ends("no [[grant]] lets uid ")
	if status := d.Agent.Counts(); status.Denied != 0 {
		t.Errorf("%+v", status)
	}
}

func TestWatchHasAMissingTokenFetched(t *testing.T) {
	t.Parallel()
	asked, release := make(chan struct{}), make(chan struct{})
	back := newRolling(time.Hour)
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		close(asked)
		<-release
		return back.fetch(ctx, k)
	})
	w := d.watchAt(d.tokens("vision"), watchVault)
	none := w.next(api.EventExpired)
	if none != (api.WatchEvent{Identity: "vision", Resource: vault, Now: noon}) {
		t.Errorf("before there is a token: %+v", none)
	}
	<-asked
	close(release)
	if got := w.next(api.EventToken); got.SHA256 == "" || got.Permissions.State != api.PermissionsCurrent {
		t.Errorf("%+v", got)
	}
}

func TestWatchRefusesBeforeItBegins(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("")
	for _, test := range []struct {
		target string
		status int
		code   api.Code
		text   string
	}{
		{api.PathWatch, 400, api.CodeBadRequest, "resource parameter is missing"},
		{api.PathWatch + "?resource=", 400, api.CodeBadRequest, "resource parameter is missing"},
		{api.PathWatch + "?resource=nonsense", 400, api.CodeBadRequest, "App ID URI"},
		{api.PathWatch + "?resource=%zz", 400, api.CodeBadRequest, "malformed"},
		{watchVault + "&identity=", 400, api.CodeBadRequest, "identity parameter is empty"},
		{watchVault + "&wait=30s", 400, api.CodeBadRequest, `"wait" is not known here: resource and identity are`},
		{watchVault + "&identity=nobody", 400, api.CodeUnknownIdentity, "Identity not found"},
		{api.PathWatch + "?resource=https://two.choices", 400, api.CodeAmbiguous, "name one"},
		{api.PathWatch + "?resource=https://not.granted", 403, api.CodeNotGranted, "[[grant]]"},
	} {
		got := send(t, socket, get(test.target))
		checkRefusal(t, test.target, got, test.status, test.code)
		if detail := got.problem(t).Detail; !strings.Contains(detail, test.text) {
			t.Errorf("%s: %q", test.target, detail)
		}
	}
	if d.denied.Load() != 1 || d.invalid.Load() != 8 {
		t.Errorf("counted %d denials and %d invalid requests", d.denied.Load(), d.invalid.Load())
	}
	d.Agent.Close()
	checkRefusal(t, "stopping", send(t, socket, get(watchVault)), 503, api.CodeUnreachable)
}

func TestWatchersAreBounded(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits.Watching, d.Limits.AllWatching = 2, 3
	socket, module := d.tokens(""), d.tokens("vision")
	first := d.watchAt(socket, watchVault)
	first.next(api.EventExpired)
	d.watchAt(socket, watchVault)
	got := send(t, socket, get(watchVault))
	checkRefusal(t, "one too many of a caller", got, 429, api.CodeBusy)
	if got.header.Get("Retry-After") != "5" {
		t.Errorf("%+v", got)
	}
	d.watchAt(module, watchVault)
	checkRefusal(t, "one too many of all", send(t, module, get(watchVault)), 429, api.CodeBusy)
	first.conn.Close()
	come(&d.quotas().watching, 2) // when the daemon has seen that
	d.watchAt(socket, watchVault)
}

func TestShutdownEndsStreams(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("")
	send(t, socket, get(v1Vault))
	w, idle := d.watchAt(socket, watchVault), d.watchAt(socket, watchVault+"&identity=vision")
	told := w.next(api.EventToken)
	if err := d.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	if last := w.next(api.EventEnded); last.Detail != stoppingDetail || last.SHA256 != told.SHA256 {
		t.Errorf("%+v", last)
	}
	idle.next(api.EventExpired)
	for {
		block := idle.block()
		if strings.HasPrefix(block, "event: "+api.EventEnded) {
			break
		}
	}
}

// The agent may be closed while streams are open; a connection that was admitted before still ends well.
func TestWatchOfAClosedAgent(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("")
	send(t, socket, get(v1Vault))
	w := d.watchAt(socket, watchVault)
	w.next(api.EventToken)
	d.Agent.Close()
	w.ends(stoppingDetail)
}

// The rest is about time, and so in a bubble.

func TestWatchShowsThatItIsAlive(t *testing.T) {
	t.Parallel()
	inBubble(t, fetchDay, func(b *bubble) {
		began := time.Now()
		w := newRecorder()
		leave, done := b.begin(w, watchVault)
		synctest.Wait()
		if text := w.take(); !strings.HasPrefix(text, "retry: 2000\n\nevent: expired\n") ||
			!strings.Contains(text, "event: token\nid: 2\n") {
			b.t.Errorf("at first: %q", text)
		}
		reads, cuts := w.deadlines()
		if len(reads) != 1 || !reads[0].IsZero() || !cuts[0].Equal(began.Add(transferTime)) {
			b.t.Errorf("read deadlines %v, write deadlines %v", reads, cuts)
		}
		for range 20 { // longer than any other answer may take
			time.Sleep(15 * time.Second)
			synctest.Wait()
			if text := w.take(); text != ": alive\n\n" {
				b.t.Fatalf("after %v: %q", time.Since(began), text)
			}
			_, cuts := w.deadlines()
			if last := cuts[len(cuts)-1]; !last.Equal(time.Now().Add(transferTime)) {
				b.t.Fatalf("the write is cut after %v", time.Until(last))
			}
		}
		leave()
		<-done
		if w.take() != "" {
			b.t.Error("something was written for a caller that has gone")
		}
		if count(&b.server.quotas().watching) != 0 {
			b.t.Error("the stream is still counted")
		}
	})
}

// A grant that is gone ends the stream at the next sign of life, also where the key stays for others.
func TestWatchEndsWithTheGrant(t *testing.T) {
	t.Parallel()
	inBubble(t, fetchDay, func(b *bubble) {
		w := newRecorder()
		leave, done := b.begin(w, watchVault)
		defer leave()
		synctest.Wait()
		w.take()
		r := rules()
		r.Grants[0].Resources = []string{"https://device.only"}
		r.Grants[1].Resources = []string{"https://two.choices"}
		r.Grants = append(r.Grants, grants.Grant{Caller: grants.Match{Module: "other"}, Identity: "device",
			Resources: []string{vault}})
		if _, err := b.agent.Apply(r); err != nil {
			b.t.Fatal(err)
		}
		<-done
		text := w.take()
		if last := readEvent(b.t, strings.TrimSuffix(strings.TrimPrefix(text, ": alive\n\n"), "\n"), api.EventEnded,
			3); !strings.Contains(last.Detail, "no [[grant]]") {
			b.t.Errorf("%q", text)
		}
	})
}

func TestWatchTellsTheExpiryAndWhatFollows(t *testing.T) {
	t.Parallel()
	back := newRolling(0)
	inBubble(t, back.fetch, func(b *bubble) {
		back.roll("", 23*time.Hour)
		w := newRecorder()
		leave, done := b.begin(w, watchVault)
		synctest.Wait()
		w.take()
		began := time.Now()
		back.fail(&tokencache.FetchError{Kind: tokencache.Unreachable, Detail: "an outage"})
		for !strings.Contains(w.take(), "event: expired\nid: 3\n") {
			time.Sleep(time.Second)
			if time.Since(began) > 2*time.Hour {
				b.t.Fatal("the expiry is not told")
			}
		}
		if took := time.Since(began); took < 59*time.Minute || took > 61*time.Minute {
			b.t.Errorf("the expiry is told after %v", took)
		}
		back.roll("", 0)
		back.fail(nil)
		began = time.Now()
		for !strings.Contains(w.take(), "event: token\nid: 4\n") {
			time.Sleep(time.Second)
			if time.Since(began) > time.Hour {
				b.t.Fatal("the token that followed is not told")
			}
		}
		leave()
		<-done
	})
}

// A back end that fails at first is asked on, without a request of anybody else's.
func TestWatchOutlastsAnOutage(t *testing.T) {
	t.Parallel()
	back := newRolling(0)
	back.fail(&tokencache.FetchError{Kind: tokencache.Unreachable, Extent: tokencache.OfSource, Detail: "an outage"})
	inBubble(t, back.fetch, func(b *bubble) {
		w := newRecorder()
		leave, done := b.begin(w, watchVault)
		time.Sleep(10 * time.Minute)
		if text := w.take(); strings.Count(text, "event: ") != 1 || !strings.Contains(text, "event: expired\n") {
			b.t.Errorf("in the outage: %q", text)
		}
		if n := back.asked(); n > 200 {
			b.t.Errorf("%d calls in ten minutes", n)
		}
		back.roll("", 0)
		back.fail(nil)
		time.Sleep(time.Minute)
		if text := w.take(); !strings.Contains(text, "event: token\nid: 2\n") {
			b.t.Errorf("a minute after the outage: %q", text)
		}
		leave()
		<-done
	})
}

// A reader that is slow gets the latest state, and nothing queues.
func TestWatchCollapsesChanges(t *testing.T) {
	t.Parallel()
	back := newRolling(0)
	inBubble(t, back.fetch, func(b *bubble) {
		back.roll("", 20*time.Hour)
		b.server.answer(b.t, b.proved, onToken, "GET", v1Vault, "")
		w := newRecorder()
		w.stuck = make(chan struct{}, 2)
		w.stuck <- struct{}{} // for the beginning
		w.stuck <- struct{}{} // for the first event
		leave, done := b.begin(w, watchVault)
		synctest.Wait()
		first := w.take()
		for hours := 19; hours > 0; hours-- {
			back.roll("", time.Duration(hours)*time.Hour)
			if _, err := b.agent.Refresh(context.Background(), "", "", true); err != nil {
				b.t.Fatal(err)
			}
			synctest.Wait() // the first of these is what the reader does not take
		}
		close(w.stuck)
		synctest.Wait()
		text := strings.TrimSuffix(w.take(), "\n")
		if n := strings.Count(text, "event: "); n != 2 {
			b.t.Fatalf("%d events:\n%s%s", n, first, text)
		}
		_, last, _ := strings.Cut(text, "\n\n")
		held, _, err := b.agent.Peek(grants.Caller{UID: uint32(os.Getuid()), PID: 1},
			agent.Request{Request: grants.Request{Resource: vault}})
		if event := readEvent(b.t, last, api.EventToken, 3); err != nil || event.SHA256 != held.SHA256 {
			b.t.Errorf("the last event is not of the token held: %+v (%v)", event, err)
		}
		leave()
		<-done
	})
}

func TestWatchCutsWhoTakesNothing(t *testing.T) {
	t.Parallel()
	inBubble(t, fetchDay, func(b *bubble) {
		for takes := range 5 { // the beginning, two events and a sign of life
			w := newRecorder()
			w.takes = takes
			leave, done := b.begin(w, watchVault)
			<-done // at the next sign of life but one, at the latest
			leave()
			if count(&b.server.quotas().watching) != 0 {
				b.t.Errorf("after %d writes the stream is still counted", takes)
			}
		}
	})
}

func TestEventNames(t *testing.T) {
	t.Parallel()
	current := api.Permissions{State: api.PermissionsCurrent}
	stale := api.Permissions{State: api.PermissionsStale, Changed: noon, CurrentBy: noon.Add(24 * time.Hour)}
	slewed, sooner, withheld := stale, stale, stale
	slewed.CurrentBy = slewed.CurrentBy.Add(time.Second)
	slewed.Likely = noon.Add(time.Hour)
	sooner.CurrentBy = sooner.CurrentBy.Add(-time.Hour)
	withheld.Withheld = true
	event := func(identity, digest string, p api.Permissions) api.WatchEvent {
		return api.WatchEvent{Identity: identity, SHA256: digest, Permissions: p}
	}
	for _, row := range []struct {
		name      string
		told, now api.WatchEvent
		want      string
	}{
		{"at first, a token", api.WatchEvent{}, event("a", "1", current), api.EventToken},
		{"at first, none", api.WatchEvent{}, event("a", "", api.Permissions{}), api.EventExpired},
		{"nothing new", event("a", "1", current), event("a", "1", current), ""},
		{"still none", event("a", "", api.Permissions{}), event("a", "", api.Permissions{}), ""},
		{"another token", event("a", "1", current), event("a", "2", current), api.EventToken},
		{"another token with others", event("a", "1", stale), event("a", "2", current), api.EventToken},
		{"a token at last", event("a", "", api.Permissions{}), event("a", "2", current), api.EventToken},
		{"none any more", event("a", "1", current), event("a", "", api.Permissions{}), api.EventExpired},
		{"another identity", event("a", "1", current), event("b", "1", current), api.EventToken},
		{"another identity without one", event("a", "", api.Permissions{}), event("b", "", api.Permissions{}),
			api.EventExpired},
		{"stale", event("a", "1", current), event("a", "1", stale), api.EventPermissions},
		{"withheld", event("a", "1", stale), event("a", "1", withheld), api.EventPermissions},
		{"current sooner than thought", event("a", "1", stale), event("a", "1", sooner), api.EventPermissions},
		{"a slewed clock", event("a", "1", stale), event("a", "1", slewed), ""},
	} {
		if got := eventName(row.told, row.now); got != row.want {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
}

func TestWhyEnded(t *testing.T) {
	t.Parallel()
	if got := whyEnded(errors.New(canary)); strings.Contains(got, "canary") || got == "" {
		t.Errorf("a fault is told: %q", got)
	}
	stopping := &agent.Error{Code: api.CodeUnreachable, Stopping: true}
	if got := whyEnded(stopping); got != stoppingDetail {
		t.Errorf("%q", got)
	}
	for _, row := range []struct {
		err  error
		want api.Code
	}{{stopping, ""}, {errors.New(canary), ""}, {&agent.Error{Code: api.CodeDenied, Detail: "a rule"},
		api.CodeDenied}} {
		if got := endCode(row.err); got != row.want {
			t.Errorf("%v: code %q, want %q", row.err, got, row.want)
		}
	}
}
