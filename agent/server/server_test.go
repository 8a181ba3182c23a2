package server

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

func TestModuleIsToldByItsSocket(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	open, module := d.tokens(""), d.tokens("vision")
	const target = "/v1/token?resource=https://module.only"
	if got := send(t, open, get(target)); got.status != 403 || got.problem(t).Code != api.CodeNotGranted {
		t.Errorf("on the open socket: %+v", got)
	}
	if got := send(t, module, get(target)); got.status != 200 || got.field(t, "identity") != "vision" {
		t.Errorf("on the module's socket: %+v", got)
	}
	if got := send(t, module, get("/v1/token?resource=https://device.only")); got.status != 403 {
		t.Errorf("the module's socket gives what its uid was granted: %+v", got)
	}
}

// anonymous accepts connections that tell nothing about their peer.
type anonymous struct{ net.Listener }

func (a anonymous) Accept() (net.Conn, error) {
	conn, err := a.Listener.Accept()
	return struct{ net.Conn }{conn}, err
}

func TestUnprovedCallerGetsNothing(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	l, la := d.listen("t"), d.listen("a")
	d.serving(func() error { return d.ServeTokens(anonymous{l}, "vision") })
	d.serving(func() error { return d.ServeAdmin(anonymous{la}) })
	for _, target := range []string{imdsVault, appVault, v1Vault, "/nowhere", "/v1/nowhere", probePlatform} {
		got := send(t, l.Addr().String(), get(target, metadata, appHeader))
		if got.status != 403 || got.field(t, "code") != string(api.CodeUnknownCaller) {
			t.Errorf("%s: %+v", target, got)
		}
	}
	for _, r := range routes {
		if r.socket != onAdmin {
			continue
		}
		got := send(t, la.Addr().String(), requestText(r.method, r.path, ""))
		if got.status != 403 || got.problem(t).Code != api.CodeUnknownCaller {
			t.Errorf("%s: %+v", r.path, got)
		}
	}
	if denied := d.denied.Load(); denied != 6 {
		t.Errorf("%d denials counted, want the 6 on the token socket", denied)
	}
	if !strings.Contains(d.log.String(), "caller not proved") {
		t.Error("the log does not say why")
	}
}

func TestListenersComeAndGo(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	stays := d.tokens("")
	l := d.listen("goes")
	done := make(chan error, 1)
	go func() { done <- d.ServeTokens(l, "vision") }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := exchangeOn(t, conn, get(v1Vault)); got.status != 200 {
		t.Fatalf("%+v", got)
	}
	l.Close()
	if err := <-done; err != nil {
		t.Errorf("ServeTokens returned %v after its listener was closed", err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the idle connection of a closed listener reads %v, want its end", err)
	}
	if got := send(t, stays, get(v1Vault)); got.status != 200 {
		t.Errorf("the other socket: %+v", got)
	}
	if err := d.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	late := d.listen("late")
	if err := d.ServeTokens(late, ""); err != nil {
		t.Errorf("serving after Shutdown returned %v", err)
	}
	if _, err := net.Dial("unix", late.Addr().String()); err == nil {
		t.Error("a listener that came after Shutdown is open")
	}
}

// broken is a listener whose Accept fails for good.
type broken struct{ net.Listener }

var errBroken = errors.New("descriptor gone")

func (b broken) Accept() (net.Conn, error) { return nil, errBroken }

func TestAcceptErrorIsReturned(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	if err := d.ServeTokens(broken{d.listen("b")}, ""); !errors.Is(err, errBroken) {
		t.Errorf("got %v", err)
	}
}

func TestShutdownWaitsThenCuts(t *testing.T) {
	t.Parallel()
	asked, release := make(chan struct{}), make(chan struct{})
	d := newDaemon(t, func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		close(asked)
		select {
		case <-release:
			return fetchDay(ctx, k)
		case <-ctx.Done():
			return tokencache.Fetched{}, ctx.Err()
		}
	})
	socket := d.tokens("")
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, get(v1Vault)); err != nil {
		t.Fatal(err)
	}
	<-asked
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.Shutdown(over); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown returned %v with a request under way and no time left", err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("the connection was not cut")
	}
	close(release)
}
