package identityproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// asStrangers makes the test binary a process that floods the address that it holds.
const asStrangers = "RELAY_TEST_STRANGERS"

// strangers hold 300 connections to the address, each of which sends a request that does not end, and make each anew
// when it is closed, until standard input ends.
func strangers(address string) {
	var all sync.WaitGroup
	for i := range 300 {
		all.Add(1)
		go func() {
			first := sync.OnceFunc(all.Done)
			for {
				conn, err := net.Dial("tcp4", address)
				if err != nil {
					continue
				}
				text := ask + "X-Long: " + strings.Repeat("x", 15<<10)
				if i%2 == 0 {
					text = ask + strings.Repeat("X: "+strings.Repeat("x", 240)+"\r\n", 60)
				}
				_, _ = io.WriteString(conn, text)
				first()
				_, _ = io.Copy(io.Discard, conn)
				conn.Close()
			}
		}()
	}
	all.Wait()
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// flood has strangers of a uid flood a proxy until the test ends. It returns when each of their connections was made
// once.
func flood(t *testing.T, r *Proxy, uid uint32) {
	t.Helper()
	c := exec.Command("/proc/self/exe")
	c.Env = []string{asStrangers + "=127.0.0.1:" + r.port}
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if int(uid) != os.Getuid() {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // with which the strangers end
	t.Cleanup(runtime.UnlockOSThread)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = c.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q %v", line, err)
	}
}

// One connection that shows the secret keeps being answered, and so does each new one, while another user has more
// connections than there is room for; and what all of them hold stays below 24 MiB. It is measured with nothing beside
// it.
func TestFloodOfStrangers(t *testing.T) {
	const most = 24 << 20
	uid := uint32(os.Getuid())
	if uid == 0 {
		uid = 65534
	} else {
		t.Log("as another user only where root runs it: these strangers are this very user")
	}
	p := newFakePerceptd(t)
	r := serving(t, Options{Socket: p.socket})
	request := ask + "Host: 127.0.0.1:" + r.port + "\r\nX-IDENTITY-HEADER: " + r.secret + "\r\n\r\n"
	asks := func(conn net.Conn) {
		t.Helper()
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(answer.Body); answer.StatusCode != 200 || !strings.Contains(string(text), canary) ||
			err != nil {
			t.Errorf("%d %s %v", answer.StatusCode, text, err)
		}
	}
	dial := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp4", "127.0.0.1:"+r.port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	kept := dial()
	asks(kept)
	before := held()
	flood(t, r, uid)
	for range 20 {
		asks(kept)
		fresh := dial()
		asks(fresh)
		fresh.Close()
		if took := held() - before; took > most {
			t.Fatalf("%d bytes", took)
		}
	}
}

// held returns how many bytes the goroutines' stacks and what the collector finds alive take. What was thrown away, and
// waits to be collected, does not count, nor does where objects lie; since the collector takes for alive what is made
// while it looks, the least of several looks is the truest.
func held() int {
	least := math.MaxInt
	for range 3 {
		runtime.GC()
		in := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
		metrics.Read(in)
		least = min(least, int(in[0].Value.Uint64()+in[1].Value.Uint64()))
	}
	return least
}

// A connection ends with its refusal, and is kept after an answer.
func TestRefusalEndsTheConnection(t *testing.T) {
	t.Parallel()
	p := newFakePerceptd(t)
	r := serving(t, Options{Socket: p.socket})
	host, secret := "Host: 127.0.0.1:"+r.port+"\r\n", "X-IDENTITY-HEADER: "+r.secret+"\r\n"
	for _, request := range []string{ask + host + "\r\n", ask + host + "X-IDENTITY-HEADER: x\r\n\r\n",
		"PUT" + ask[3:] + host + secret + "\r\n"} {
		good := ask + host + secret + "\r\n"
		answers := raw(t, r, good+good+request+good)
		if n := strings.Count(answers, "HTTP/1.1 "); n != 3 || strings.Count(answers, canary) != 2 ||
			strings.Count(answers, "Connection: close\r\n") != 1 {
			t.Errorf("%s", answers)
		}
	}
}

// The port stays taken for every other, and refuses who connects, as long as a process has its holder open.
func TestHolder(t *testing.T) {
	t.Parallel()
	r, err := Listen(Options{Socket: "nowhere"})
	if err != nil {
		t.Fatal(err)
	}
	at := "127.0.0.1:" + r.port
	kept, err := syscall.Dup(int(r.Holder().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{at, "0.0.0.0:" + r.port, "[::]:" + r.port} {
		for _, option := range []int{0, syscall.SO_REUSEADDR, 15 /* SO_REUSEPORT */} {
			if err := listening(address, option); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("listening on %s with option %d: %v", address, option, err)
			}
		}
	}
	if conn, err := net.Dial("tcp4", at); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connecting: %v %v", conn, err)
	}
	if err := errors.Join(syscall.Close(kept), listening(at, 0)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// listening listens with an option and returns why it cannot.
func listening(address string, option int) error {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) {
			if option != 0 {
				err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, option, 1)
			}
		}), err)
	}}
	l, err := config.Listen(context.Background(), "tcp", address)
	if err != nil {
		return err
	}
	return l.Close()
}
