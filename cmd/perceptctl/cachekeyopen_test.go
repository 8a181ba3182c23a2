package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// Tries to open a key are spaced out, for as long as it takes, and end where it can never be opened.
func TestOpeningIsTriedAgain(t *testing.T) {
	t.Parallel()
	for within, want := range map[time.Duration]int{
		time.Millisecond: 1, 2 * time.Second: 2, 4 * time.Second: 3, 8 * time.Second: 4, 512 * time.Second: 10,
		24 * time.Hour: 296, // each five minutes in the end
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			tries, waits := 0, 0
			got := retryOpening(ctx, func(context.Context) *sealFault { tries++; return &lockedOut },
				func(*sealFault) { waits++ })
			if got != &lockedOut || tries != want || waits != tries {
				t.Errorf("within %v: %+v after %d tries, want %d", within, got, tries, want)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		opens := func(context.Context) *sealFault {
			if tries++; tries == 7 {
				return nil
			}
			return &notHere
		}
		if got := retryOpening(t.Context(), opens, func(*sealFault) {}); got != nil || tries != 7 {
			t.Errorf("%+v after %d tries", got, tries)
		}
		if got := retryOpening(t.Context(), func(context.Context) *sealFault { return &otherTPM },
			func(*sealFault) { t.Error("it waits for another TPM to be the one from before") }); got != &otherTPM {
			t.Errorf("%+v", got)
		}
	})
}

// As a unit it counts as started after the first try, says what it waits for to systemd and to perceptd, and opens the
// key when the TPM lets it.
func TestKeyOpensLate(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	path := func(name string) string { return filepath.Join(folder, name) }
	secret := strings.Repeat("k", cacheKeySize)
	harness.Must(t, harness.WriteProgram(path("systemd-creds"), []byte("#!/bin/sh\nif [ -e '"+path("unlocked")+
		"' ]; then exec /usr/bin/base64 -d; fi\nprintf '%s' '"+locked+"' >&2\nexit 1\n")))
	harness.Must(t, os.WriteFile(path("key.cred"), []byte(base64.StdEncoding.EncodeToString([]byte(secret))), 0o600))
	harness.Must(t, os.Mkdir(path("run"), 0o700))
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path("n"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	var stdout, stderr bytes.Buffer
	ended := make(chan int, 1)
	go func() {
		ended <- run(t.Context(), []string{"cache-key", "open", "--file", path("key")}, nil, &stdout, &stderr,
			[]string{"PATH=" + folder, "RUNTIME_DIRECTORY=" + path("run"), "NOTIFY_SOCKET=" + path("n")})
	}()
	told := func() string {
		text := make([]byte, 4096)
		n, err := socket.Read(text)
		if err != nil {
			t.Fatal(err)
		}
		return string(text[:n])
	}
	if first := told(); first != "READY=1\nSTATUS="+lockedOut.why+statusNext+lockedOut.next {
		t.Errorf("%q", first)
	}
	if why, err := os.ReadFile(path("run/waiting")); err != nil || string(why) != lockedOut.why+"\n" {
		t.Errorf("perceptd reads %q, %v", why, err)
	}
	if err := os.WriteFile(path("unlocked"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if last := told(); last != "READY=1\nSTATUS=the key is open" {
		t.Errorf("%q", last)
	}
	if code := <-ended; code != exitOK {
		t.Errorf("exit status %d", code)
	}
	if key, err := os.ReadFile(path("run/key")); err != nil || string(key) != secret {
		t.Errorf("the key: %v", err)
	}
	if _, err := os.Stat(path("run/waiting")); err == nil {
		t.Error("it still says that it waits")
	}
	said := stderr.String()
	if strings.Count(said, "is not open yet: "+lockedOut.why) != 1 || strings.Contains(said, "replace") ||
		strings.Contains(said, secret) {
		t.Errorf("the journal: %s", said)
	}
}

// A program that does not end when it is killed, as one that waits for a TPM within the kernel, holds nothing up: a try
// ends in time, and the next waits for that program and starts no other.
func TestOpeningThatDoesNotEnd(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "key.cred")
	harness.Must(t, os.WriteFile(file, []byte("sealed"), 0o600))
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		release := make(chan struct{})
		o := &opening{file: file, unseal: func(ctx context.Context, _ []byte) ([]byte, error) {
			if calls.Add(1) == 1 {
				<-release
				return nil, ctx.Err()
			}
			return []byte(strings.Repeat("k", cacheKeySize)), nil
		}}
		for range 3 {
			inTime, cancel := context.WithTimeout(t.Context(), openTimeout+endTimeout+time.Millisecond)
			if _, fault := o.try(inTime); fault == nil || fault.why != hangs.why || fault.final {
				t.Errorf("%+v", fault)
			}
			if inTime.Err() != nil || calls.Load() != 1 {
				t.Errorf("%v, with %d programs", inTime.Err(), calls.Load())
			}
			cancel()
		}
		close(release)
		if _, fault := o.try(t.Context()); fault == nil || calls.Load() != 1 {
			t.Errorf("%+v with %d programs", fault, calls.Load())
		}
		if secret, fault := o.try(t.Context()); fault != nil || len(secret) != cacheKeySize || calls.Load() != 2 {
			t.Errorf("%+v with %d programs", fault, calls.Load())
		}
	})
}

// The key that is opened is the one that is there: one that was replaced between tries, or during one, is not put in
// force.
func TestReplacedKeyIsOpened(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "key.cred")
	put := func(sealed string) { harness.Must(t, os.WriteFile(file, []byte(sealed), 0o600)) }
	put("a")
	during := func() {}
	o := &opening{file: file, unseal: func(_ context.Context, sealed []byte) ([]byte, error) {
		during()
		return bytes.Repeat(sealed, cacheKeySize), nil
	}}
	during = func() { put("b") }
	if secret, fault := o.try(t.Context()); secret != nil || fault == nil || fault.final {
		t.Errorf("%q, %+v", secret, fault)
	}
	during = func() {}
	if secret, fault := o.try(t.Context()); fault != nil || secret[0] != 'b' {
		t.Errorf("%q, %+v", secret, fault)
	}
	harness.Must(t, os.Remove(file))
	if _, fault := o.try(t.Context()); fault == nil || fault.final || !strings.Contains(fault.why, "key.cred") {
		t.Errorf("%+v", fault)
	}
}
