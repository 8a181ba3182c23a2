package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptctl/term"
	"perceptd/cmd/perceptd/e2e/harness"
)

// canary is the token's text in every transcript.
const canary = "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9.canary-token-text-that-only-token-may-print.c2lnbmF0dXJl"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asTool) != "":
		_ = os.Unsetenv(asTool)
		main()
	case os.Getenv(asCommand) != "":
		tellSignals()
	default:
		heedSignals()
		goleak.VerifyTestMain(m)
	}
}

// heedSignals has the commands that tests start heed every signal, though this process was started to ignore some, as
// nohup and a shell's background do: what is ignored stays so in what is started, what has a handler does not. Nothing
// reads the channel, so this process goes on ignoring them.
func heedSignals() {
	for s := syscall.Signal(1); s <= 64; s++ {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
}

// TestTranscripts plays testdata/*.txtar: each runs perceptctl in this process, against a daemon on
// Unix sockets that answers as the script told it. With UPDATE_TRANSCRIPTS set, what came out is
// written into the scripts.
func TestTranscripts(t *testing.T) {
	t.Parallel()
	if os.Getenv("UPDATE_TRANSCRIPTS") != "" {
		play(t, "testdata", scriptSetting, true)
		return
	}
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatal(scripts, err)
	}
	for _, s := range []setting{scriptSetting, {2027, "Europe/Berlin"}, {2026, "America/St_Johns"},
		{2027, "America/St_Johns"}} {
		t.Run(fmt.Sprint(s.year, " in ", filepath.Base(s.zone)), func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			for _, script := range scripts {
				text, err := os.ReadFile(script)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(folder, filepath.Base(script)), []byte(s.moved(t, string(text))),
					0o644); err != nil {
					t.Fatal(err)
				}
			}
			play(t, folder, s, false)
		})
	}
}

// play runs the transcripts of a folder.
func play(t *testing.T, folder string, at setting, update bool) {
	group := groupOfThis(t)
	testscript.Run(t, testscript.Params{
		Dir:           folder,
		UpdateScripts: update,
		WorkdirRoot:   harness.ShortFolder(t),
		Setup: func(env *testscript.Env) error {
			daemon := newFakeDaemon(env.WorkDir)
			env.Defer(daemon.close)
			env.Values[daemonKey{}] = daemon
			env.Values[settingKey{}] = at
			env.Setenv(api.SocketVariable, daemon.client.Socket)
			env.Setenv("TOKEN", canary)
			env.Setenv("TZ", at.zone)
			env.Setenv("LANG", "C.UTF-8")
			env.Setenv("GROUP", group)
			return daemon.start()
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"perceptctl": transcribe,
			"code":       checkCode,
			"answer":     setAnswer,
			"hang":       setHang,
			"requests":   checkRequests,
			"deaf":       leaveDeafSocket,
			"program":    makeProgram,
			"simulator":  startSimulator,
			"ask":        askSimulator,
		},
	})
}

type (
	daemonKey  struct{}
	settingKey struct{}
)

// transcribe runs perceptctl and checks what holds for every run: token text is printed by `token`
// alone, nothing is coloured away from a terminal, and no line for people is over 80 columns.
func transcribe(ts *testscript.TestScript, neg bool, args []string) {
	var stdout, stderr bytes.Buffer
	var environ []string
	for _, name := range []string{api.SocketVariable, simulatorVariable, simulator.ClockVariable, "IDENTITY_ENDPOINT",
		"IDENTITY_HEADER", "NO_COLOR", "TERM", "TZ", "LANG", "PATH",
		"RUNTIME_DIRECTORY"} {
		environ = append(environ, name+"="+ts.Getenv(name))
	}
	daemon := ts.Value(daemonKey{}).(*fakeDaemon)
	code := run(daemon.ctx, args, strings.NewReader(ts.Getenv("STDIN")), &stdout, &stderr, environ)
	daemon.code = code
	_, _ = ts.Stdout().Write(stdout.Bytes())
	_, _ = ts.Stderr().Write(stderr.Bytes())

	wantsToken := slices.Contains(args, "token") && !slices.Contains(args, "--short")
	if strings.Contains(stderr.String(), "canary") || !wantsToken && strings.Contains(stdout.String(), "canary") {
		ts.Fatalf("token text was printed")
	}
	if strings.Contains(stdout.String()+stderr.String(), "\x1b") {
		ts.Fatalf("control sequences away from a terminal")
	}
	fits := []string{"status", "explain", "timeline", "policy-changed", "policy-changes", "refresh", "doctor", "whoami",
		"cache-key", "deny"}
	isFor := func(verb string) bool { return slices.Contains(args, verb) }
	if slices.ContainsFunc(fits, isFor) && !slices.ContainsFunc([]string{"--json", "--help", "__complete"}, isFor) {
		for line := range strings.Lines(stdout.String()) {
			if overWide(strings.TrimSuffix(line, "\n"), term.DefaultWidth) {
				ts.Fatalf("a line of %d columns: %s", utf8.RuneCountInString(line), line)
			}
		}
	}
	if (code != 0) != neg {
		ts.Fatalf("exit status %d", code)
	}
}

// checkCode is `code N`: the last perceptctl ended with exit status N.
func checkCode(ts *testscript.TestScript, _ bool, args []string) {
	if got := strconv.Itoa(ts.Value(daemonKey{}).(*fakeDaemon).code); got != args[0] {
		ts.Fatalf("exit status %s, want %s", got, args[0])
	}
}

// setAnswer is `answer PATH STATUS FILE [RETRY-AFTER]`; a method and a space may stand before the path.
func setAnswer(ts *testscript.TestScript, _ bool, args []string) {
	status, err := strconv.Atoi(args[1])
	ts.Check(err)
	body := strings.NewReplacer("$TOKEN", canary, "WORK/", ts.Getenv("WORK")+"/").Replace(ts.ReadFile(args[2]))
	ts.Value(daemonKey{}).(*fakeDaemon).answer(args[0],
		fakeAnswer{status: status, body: body, retryAfter: strings.Join(args[3:], "")})
}

// setHang is `hang PATH`: the daemon takes the request and never answers.
func setHang(ts *testscript.TestScript, _ bool, args []string) {
	ts.Value(daemonKey{}).(*fakeDaemon).answer(args[0], fakeAnswer{hangs: true})
}

// checkRequests is `requests`: it prints what the daemon was asked since the last time.
func checkRequests(ts *testscript.TestScript, _ bool, _ []string) {
	_, _ = ts.Stdout().Write([]byte(ts.Value(daemonKey{}).(*fakeDaemon).takeRequests()))
}

// leaveDeafSocket is `deaf FILE`: a socket that a dead daemon left behind.
func leaveDeafSocket(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(filepath.Dir(path), 0o755))
	// It never listens: a program that another test starts just now may have its descriptor for a moment.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	ts.Check(err)
	ts.Check(unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	ts.Check(unix.Close(fd))
}

// makeProgram is `program FILE [TO]`: TO, or FILE itself, becomes a program with FILE's text. It is always a new file:
// another test's child may still have one open that testscript has written.
func makeProgram(ts *testscript.TestScript, _ bool, args []string) {
	text, to := ts.ReadFile(args[0]), ts.MkAbs(args[len(args)-1])
	ts.Check(os.Remove(to))
	ts.Check(harness.WriteProgram(to, []byte(text)))
}

// startSimulator is `simulator`: it runs a simulated back end whose clock stands still.
func startSimulator(ts *testscript.TestScript, _ bool, _ []string) {
	noon := time.Date(ts.Value(settingKey{}).(setting).year, 11, 23, 12, 0, 0, 0, time.UTC)
	backend := simulator.New(simulator.Options{Now: func() time.Time { return noon },
		PropagationDelay: 10 * time.Minute})
	ctx := ts.Value(daemonKey{}).(*fakeDaemon).ctx
	server, err := simulator.Start(ctx, simulator.ServerOptions{Backend: backend})
	ts.Check(err)
	ts.Defer(func() { _ = server.Close(ctx) })
	ts.Setenv(simulatorVariable, server.URL())
}

// askSimulator is `ask RESOURCE`: it asks the simulated back end for a token, as an SDK does.
func askSimulator(ts *testscript.TestScript, _ bool, args []string) {
	target := ts.Getenv(simulatorVariable) + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" +
		args[0]
	request, err := http.NewRequest(http.MethodGet, target, nil)
	ts.Check(err)
	request.Header.Set("Metadata", "true")
	transport := &http.Transport{DisableKeepAlives: true}
	response, err := transport.RoundTrip(request)
	ts.Check(err)
	ts.Check(response.Body.Close())
	_, _ = fmt.Fprintln(ts.Stdout(), response.StatusCode)
}

// overWide reports whether a line is over the width, but for one that is because of a word which is that long by
// itself, behind what the longest lead takes.
func overWide(line string, width int) bool {
	const longestLead = 14
	words := strings.Fields(line)
	return utf8.RuneCountInString(line) > width && utf8.RuneCountInString(words[len(words)-1]) <= width-longestLead
}
