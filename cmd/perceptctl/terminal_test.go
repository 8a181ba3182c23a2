package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

// terminal opens a pseudo-terminal of that width: what is written to tty is read from master.
func terminal(t *testing.T, width uint16) (master, tty *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	// Through SyscallConn, since Fd would make reads block for ever.
	conn, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var number int
	var failure error
	err = conn.Control(func(fd uintptr) {
		if failure = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); failure != nil {
			return
		}
		if number, failure = unix.IoctlGetInt(int(fd), unix.TIOCGPTN); failure != nil {
			return
		}
		failure = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: width})
	})
	if err != nil || failure != nil {
		t.Fatal(err, failure)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { tty.Close() })
	return master, tty
}

// onTerminal runs perceptctl with a terminal as its standard output and returns what the terminal got.
func onTerminal(t *testing.T, ctx context.Context, width uint16, args, environ []string) (shown, stderr string,
	code int) {
	t.Helper()
	master, tty := terminal(t, width)
	read := make(chan string)
	go func() {
		// Reading ends with an error once no one has the terminal open.
		text, _ := io.ReadAll(master)
		read <- string(text)
	}()
	var errors bytes.Buffer
	code = run(ctx, args, nil, tty, &errors, environ)
	tty.Close()
	return strings.ReplaceAll(<-read, "\r\n", "\n"), errors.String(), code
}

const longStatus = `{"version":"1.2.3","now":"2026-11-23T12:00:00Z","started_on":"2026-11-23T11:00:00Z","ready":true,"simulated":true,
	"source":{"kind":"managed-identity","endpoint":"arc"},"config":{"loaded_on":"2026-11-23T11:00:00Z"},
	"tokens":[{"identity":"a-name-of-some-length","resource":"https://a-rather-long-name.example.net/","state":"fresh","expires_in":42720}]}`

func TestColour(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		environ  []string
		coloured bool
	}{
		{"terminal", []string{"TERM=xterm"}, true},
		{"NO_COLOR", []string{"TERM=xterm", "NO_COLOR=1"}, false},
		{"empty NO_COLOR", []string{"TERM=xterm", "NO_COLOR="}, true},
		{"dumb terminal", []string{"TERM=dumb"}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t)
			d.answer(api.PathStatus, fakeAnswer{status: 200, body: longStatus})
			shown, _, _ := onTerminal(t, t.Context(), 80, []string{"status"}, d.environ(test.environ...))
			if got := strings.Contains(shown, "\x1b["); got != test.coloured {
				t.Errorf("coloured: %t, want %t:\n%q", got, test.coloured, shown)
			}
			if test.coloured && !strings.HasPrefix(shown, "\x1b[1;7;33mSIMULATED: ") {
				t.Errorf("output %q", shown)
			}
		})
	}
}

// TestTimelineOnATerminal is as wide as the terminal, up to 160 columns, and its colours take no columns.
func TestTimelineOnATerminal(t *testing.T) {
	t.Parallel()
	control := regexp.MustCompile("\x1b\\[[0-9;]*m")
	for width, want := range map[uint16]int{80: 80, 100: 100, 160: 160, 250: 160} {
		status, err := json.Marshal(api.Status{Now: noon, Tokens: []api.TokenStatus{
			aToken("device", "https://vault.azure.net", 9*time.Hour),
			lacking(aToken("vision", "https://vault.azure.net", 3*time.Hour), api.PermissionsStale, time.Minute),
			{Identity: "none", Resource: "r"},
		}})
		if err != nil {
			t.Fatal(err)
		}
		d := startDaemon(t)
		d.answer(api.PathStatus, fakeAnswer{status: 200, body: string(status)})
		shown, _, _ := onTerminal(t, t.Context(), width, []string{"timeline"},
			d.environ("TERM=xterm", "LANG=C.UTF-8", "TZ=UTC"))
		lines := strings.Split(control.ReplaceAllString(shown, ""), "\n")
		if got := utf8.RuneCountInString(lines[1]); got != want {
			t.Errorf("%d columns: an axis of %d", width, got)
		}
		checkWidth(t, strings.Join(lines, "\n"), want, false)
		if !strings.Contains(shown, "\x1b[33m") || !strings.Contains(shown, "\x1b[32m") {
			t.Errorf("not coloured: %q", shown)
		}
	}
}

func TestWidthIsTheTerminals(t *testing.T) {
	t.Parallel()
	const whole = "a-name-of-some-length  https://a-rather-long-name.example.net/  fresh"
	for width, fits := range map[uint16]bool{0: false, 20: false, 80: false, 120: true} {
		d := startDaemon(t)
		d.answer(api.PathStatus, fakeAnswer{status: 200, body: longStatus})
		shown, _, _ := onTerminal(t, t.Context(), width, []string{"status"}, d.environ("TERM=dumb"))
		if strings.Contains(shown, whole) != fits {
			t.Errorf("%d columns:\n%s", width, shown)
		}
	}
}

func TestWatchRedrawsOnATerminal(t *testing.T) {
	t.Parallel()
	for variable, redraws := range map[string]bool{"TERM=xterm": true, "TERM=dumb": false} {
		d := startDaemon(t)
		d.answer(api.PathStatus, fakeAnswer{status: 200, body: longStatus})
		ctx, cancel := context.WithCancel(t.Context())
		d.afterRequests(3, cancel)
		shown, _, code := onTerminal(t, ctx, 80, []string{"status", "--watch", "--every", "1ms"}, d.environ(variable))
		cancel()
		cleared := strings.HasPrefix(shown, "\x1b[2J\x1b[H") && strings.Contains(shown, "\x1b[K\n\x1b[J")
		if code != exitOK || cleared != redraws {
			t.Errorf("%s: exit status %d, output %q", variable, code, shown)
		}
	}
}

func TestTokenOnATerminalIsWarnedOf(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.answer(api.PathToken, fakeAnswer{status: 200, body: `{"access_token":"` + canary + `","expires_in":42720}`})
	shown, stderr, code := onTerminal(t, t.Context(), 80, []string{"token", "--resource", "r"}, d.environ())
	if code != exitOK || shown != canary+"\n" {
		t.Errorf("exit status %d, output %q", code, shown)
	}
	if want := "careful: this is a secret for the next 11h 52m; --short shows less\n"; stderr != want {
		t.Errorf("remark %q, want %q", stderr, want)
	}
}

// TestPolicyChangesShowWholeIDs shows that the IDs that withdraw takes are not cut, those of a twin neither.
func TestPolicyChangesShowWholeIDs(t *testing.T) {
	t.Parallel()
	const id = "twin-d6e0c5bb9d1e1754"
	text := screen{Screen: term.Screen{Width: 80}, zone: time.UTC}.policyChanges(noon,
		[]api.PolicyChange{{ID: id, At: noon,
			Resource: "https://a-vault-with-a-long-name.vault.azure.net", Identity: "an-identity-with-a-long-name",
			Effect: api.EffectGranted, EndsOn: noon.Add(time.Hour)}})
	if !strings.Contains(text, id) {
		t.Error(text)
	}
	checkWidth(t, text, 80, false)
}
