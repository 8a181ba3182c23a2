package server

import (
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// Who finds no place, and none in the line, is answered on every listener: at once, whatever it has sent.
func TestNoPlaceIsAnswered(t *testing.T) {
	t.Parallel()
	d, socket, _ := full(t, get("/v1/watch?resource="+vault), 1<<40, nil)
	waits, err := net.Dial("unix", socket) // the line has a place for one
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	for d.quotas().tokens.Usage().Waiting == 0 {
		time.Sleep(time.Millisecond)
	}
	for _, text := range []string{get(v1Vault), get(imdsVault, metadata), get(appVault, appHeader), "GET /half"} {
		got := send(t, socket, text)
		if got.status != 429 || got.header.Get("Retry-After") != "1" || !got.closes || got.field(t, "statusCode") != 429.0 || got.field(t, "code") != string(api.CodeBusy) {
			t.Errorf("%.20q: %+v", text, got)
		}
	}
	if away := d.quotas().tokens.Usage().TurnedAway; away != 4 {
		t.Errorf("%d were turned away", away)
	}
}

// Who waits in line for its time and has not asked is told so as well.
func TestSilentOneInLineIsAnswered(t *testing.T) {
	t.Parallel()
	_, socket, _ := full(t, get("/v1/watch?resource="+vault), 1, nil)
	if got := send(t, socket, "GET /half"); got.status != 429 || !got.closes {
		t.Errorf("%+v", got)
	}
}

// A user that asks 300 times at once on the loopback listener, where it has 64 places and 64 in the line, has 300 answers.
func TestLoopbackCallsAtOnce(t *testing.T) {
	t.Parallel()
	const calls = 300
	let := make(chan struct{})
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		select {
		case <-let:
		case <-ctx.Done():
		}
		return fetchDay(ctx, k)
	})
	d.Limits = Limits{Place: 1 << 40, Answer: 1 << 40}
	at, secrets := d.loopbackListener()
	text := asks(appVault, at, "Connection: close", secretLine(secrets.Header(agent.Match{Module: "vision"})))
	var all []net.Conn
	for range calls {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		all = append(all, conn)
	}
	for d.quotas().loopback.Usage().TurnedAway < calls-128 {
		time.Sleep(time.Millisecond)
	}
	var asking sync.WaitGroup
	status := make([]int, calls)
	for i, conn := range all { // they ask only now: what was refused before can still send
		if _, err := io.WriteString(conn, text); err != nil {
			t.Error(err)
		}
		asking.Go(func() { status[i] = exchangeOn(t, conn, "").status })
	}
	close(let)
	asking.Wait()
	slices.Sort(status)
	if status[0] != 200 || status[127] != 200 || status[128] != 429 || status[calls-1] != 429 {
		t.Errorf("%v", status)
	}
}

// What comes beyond the budget of new connections is answered, up to a number for each user; and then closed.
func TestBeyondTheBudgetIsAnswered(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	d.Limits = Limits{PerSecond: 1, Burst: 3}
	l := d.Callers.Listen(d.listen("s"))
	defer l.Close()
	defer d.quotas().tokens.Close()
	refuse := d.refuseEarly(d.quotas().tokens, d.newKeyOf())
	for i := range 5 {
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		refuse(conn)
		text, err := io.ReadAll(client)
		if isAnswered := strings.HasPrefix(string(text), "HTTP/1.1 429 "); isAnswered != (i < 3) || err != nil {
			t.Errorf("%d: %q %v", i, text, err)
		}
	}
}
