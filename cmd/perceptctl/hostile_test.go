package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptd/e2e/harness"
)

// hostile is what a hostile daemon says wherever the wire has text: control sequences of 7 and of 8 bits, line breaks
// that would begin lines of their own, marks that turn the order of text, and bytes that are not UTF-8.
const hostile = "a\x1b[2J\x1b]0;title\x07b\u009b31mc\rFORGED d\nFORGED e\n\nFORGED: " +
	"f\x7f\u202eg\u2066h\u200b\x00i\tj\u2028k\x1b[31ml" + brokenText

const (
	brokenText  = "BROKEN" // stands for brokenBytes, which no encoder writes
	brokenBytes = "\xff\x9b2J\xc2"
)

// heard is hostile as a decoder reads it.
var heard = strings.ReplaceAll(hostile, brokenText, "\ufffd\ufffd2J\ufffd")

// said is a hostile answer of v's type: every text in it is hostile, but for those of the types in words.
func said[T any](t *testing.T, yes bool, words map[reflect.Type]string) string {
	t.Helper()
	var v T
	fill(reflect.ValueOf(&v).Elem(), yes, words)
	return spoken(t, v)
}

func spoken(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), brokenText, brokenBytes)
}

func fill(v reflect.Value, yes bool, words map[reflect.Type]string) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(hostile)
		if word, ok := words[v.Type()]; ok {
			v.SetString(word)
		}
	case reflect.Bool:
		v.SetBool(yes)
	case reflect.Int64, reflect.Uint64:
		if v.CanInt() {
			v.SetInt(7)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), yes, words)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fill(v.Index(i), yes, words)
		}
	case reflect.Struct:
		if moment, ok := v.Addr().Interface().(*time.Time); ok {
			*moment = noon
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(v.Field(i), yes, words)
			}
		}
	}
}

// knownWords lead the verbs past words that they do not know.
var knownWords = map[reflect.Type]string{
	reflect.TypeFor[api.PermissionState](): string(api.PermissionsStale),
	reflect.TypeFor[api.Effect]():          string(api.EffectRevoked),
	reflect.TypeFor[api.Outcome]():         string(api.OutcomeFailed),
	reflect.TypeFor[api.TokenState]():      string(api.StateFailing),
	reflect.TypeFor[api.RolloverPattern](): string(api.RolloverRegular),
	reflect.TypeFor[api.Cause]():           string(api.CauseStale),
	reflect.TypeFor[api.Code]():            string(api.CodeNotGranted),
	reflect.TypeFor[api.DenyOrigin]():      string(api.DenyTwin),
	reflect.TypeFor[api.HubFailure]():      string(api.HubFailureRefused),
}

// answerAll has a daemon say hostile things on every path.
func answerAll(t *testing.T, d *fakeDaemon, yes bool, words map[reflect.Type]string) {
	t.Helper()
	events := ""
	for _, name := range []string{api.EventToken, "other\x1b[2J\u009b31m" + brokenBytes, api.EventEnded} {
		event := said[api.WatchEvent](t, yes, words)
		if name == api.EventToken {
			event = strings.Replace(event, `"detail":`, `"other":`, 1)
		}
		events += "event: " + name + "\ndata: " + event + "\n\n"
	}
	for path, body := range map[string]string{
		api.PathStatus:                    said[api.Status](t, yes, words),
		api.PathToken:                     said[api.Token](t, yes, words),
		api.PathWhoAmI:                    said[api.WhoAmI](t, yes, words),
		api.PathLoopback:                  said[api.Loopback](t, yes, words),
		api.PathRefresh:                   said[api.RefreshResponse](t, yes, words),
		api.PathReload:                    said[api.ReloadResponse](t, yes, words),
		"GET " + api.PathPolicyChanges:    said[api.PolicyChanges](t, yes, words),
		"POST " + api.PathPolicyChanges:   said[api.PolicyChangeAnswer](t, yes, words),
		"DELETE " + api.PathPolicyChanges: said[api.PolicyChangeAnswer](t, yes, words),
		"GET " + api.PathDeny:             said[api.DenyRules](t, yes, words),
		"POST " + api.PathDeny:            said[api.DenyAnswer](t, yes, words),
		"DELETE " + api.PathDeny:          said[api.DenyAnswer](t, yes, words),
		api.PathDenyHub:                   said[api.DenyRules](t, yes, words),
		api.PathDenyLost:                  said[api.DenyRules](t, yes, words),
		api.PathGrants:                    said[api.Grants](t, yes, words),
		api.PathGrantsCheck:               said[api.Decision](t, yes, words),
		api.PathWatch:                     events,
	} {
		d.answer(path, fakeAnswer{status: http.StatusOK, body: body})
	}
}

// refuseAll has a daemon refuse everything.
func refuseAll(t *testing.T, d *fakeDaemon, status int, code api.Code, yes bool) {
	t.Helper()
	problem := api.Problem{Type: hostile, Title: hostile, Status: status, Detail: hostile, Code: code}
	if yes {
		problem.Choices = []string{hostile, hostile}
	}
	for _, path := range []string{api.PathStatus, api.PathToken, api.PathWhoAmI, api.PathLoopback, api.PathRefresh,
		api.PathReload,
		api.PathPolicyChanges, api.PathGrants, api.PathGrantsCheck, api.PathWatch, api.PathDeny, api.PathDenyHub,
		api.PathDenyLost} {
		d.answer(path, fakeAnswer{status: status, body: spoken(t, problem)})
	}
}

// hostileLines are the command lines, by the path of their verb. $SIMULATOR, $FOLDER and $WORD are filled in.
var hostileLines = map[string][]string{
	"completion bash": {""}, "completion zsh": {""}, "completion fish": {""}, "completion powershell": {""},
	"help":     {"", "status"},
	"status":   {"", "--json", "$WORD"},
	"explain":  {"$WORD", "$WORD --json", "other"},
	"timeline": {""},
	"policy-changed": {"r --effect revoked", "r --effect granted --json", "r --effect $WORD",
		"r --effect granted --at $WORD", "r --effect granted --at 14:05"},
	"policy-changes":          {"", "--json"},
	"policy-changes withdraw": {"$WORD $WORD", "--resource $WORD", "--resource r --identity $WORD"},
	"deny":                    {"", "--json", "--all", "--module $WORD --note $WORD", "--identity $WORD --json"},
	"deny lift":               {"$WORD $WORD", "$WORD --json", "--from-hub", "--from-hub --json"},
	"deny heed-hub":           {"", "--json"},
	"deny forget-lost":        {"", "--json"},
	"token": {"--resource r", "--resource r --short", "--resource r --json",
		"--resource $WORD --identity $WORD", "--resource r --issued-after 14:05"},
	"watch":   {"r", "r --json"},
	"refresh": {"", "--json", "--identity $WORD --resource $WORD"},
	"reload":  {""},
	"version": {""},
	"whoami":  {"", "--json"},
	"grants":  {"", "--json"},
	"grants check": {"--module $WORD --resource $WORD", "--uid 0 --resource r",
		"--user $WORD --resource r", "--unit u.service --resource r --json"},
	"grants add": {"--module $WORD --identity $WORD --resource $WORD --yes --config $FOLDER/none/config.toml",
		"--unit u --identity i --resource r --yes --config $FOLDER/config.toml", "--from-denial 1",
		"--from-denial 7 --config $FOLDER/$WORD", "--user $WORD --identity i --resource $WORD"},
	"doctor":    {"", "--json", "--socket $FOLDER/none", "--socket $WORD"},
	"cache-key": {"--file $FOLDER/none-$WORD"},
	"cache-key make": {"--file $FOLDER/key-$WORD", "--file $FOLDER/key-$WORD --with host --dry-run",
		"--with $WORD", "--file $FOLDER/$WORD/$WORD --with file --group $WORD"},
	"cache-key show": {"--file $FOLDER/sealed", "--file $FOLDER/$WORD"},
	"cache-key open": {"--file $FOLDER/$WORD", "--file $FOLDER/sealed"},
	"clock":          {"", "$WORD"},
	// Without a word it looks at the device's own folders; what it says of them is a module's name and quoted.
	"module-folders": {"$WORD"},
	"exec":           {"--socket $FOLDER/none -- $WORD", "-- $FOLDER/$WORD"},
	"env": {"", "--format dotenv", "--format compose", "--format json", "--format $WORD",
		"--user $WORD"},
	"simulate":       {"--form $WORD", "--fault $WORD", "--env-file $FOLDER/none/$WORD"},
	"simulate state": {"--at $SIMULATOR", "--at $SIMULATOR --json", "--at http://127.0.0.1/$WORD"},
	"simulate fault": {"--at $SIMULATOR throttle", "--at $SIMULATOR $WORD",
		"--at $SIMULATOR --clear"},
	"simulate ask":                        {"--at $SIMULATOR --resource r", "--at $SIMULATOR --resource $WORD"},
	"simulate permissions":                {"--at $SIMULATOR --identity $WORD --roles $WORD"},
	"__complete explain":                  {"$EMPTY"},
	"__complete token --identity":         {"$EMPTY"},
	"__complete policy-changes withdraw":  {"$EMPTY"},
	"__complete deny lift":                {"$EMPTY"},
	"__complete deny --module":            {"$EMPTY"},
	"__complete grants add --from-denial": {"$EMPTY"},
	"__complete grants add --resource":    {"$EMPTY"},
}

// TestNothingFromOutsideSteersATerminal plays every verb against a daemon, a simulated back end and programs that are
// hostile in all that they say, with arguments and variables that are so too, away from a terminal and on one.
func TestNothingFromOutsideSteersATerminal(t *testing.T) {
	t.Parallel()
	root := (&app{}).rootCommand()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, command := range verbsOf(root) {
		if hostileLines[command] == nil {
			t.Errorf("%q is not played: add it to hostileLines", command)
		}
	}
	type daemon struct {
		name string
		set  func(*testing.T, *fakeDaemon)
	}
	daemons := []daemon{
		{"hostile", func(t *testing.T, d *fakeDaemon) { answerAll(t, d, true, nil) }},
		{"hostile in known words", func(t *testing.T, d *fakeDaemon) { answerAll(t, d, true, knownWords) }},
		{"hostile and not well", func(t *testing.T, d *fakeDaemon) { answerAll(t, d, false, knownWords) }},
		{"refusing", func(t *testing.T, d *fakeDaemon) { refuseAll(t, d, 403, api.CodeNotGranted, true) }},
		{"not keeping", func(t *testing.T, d *fakeDaemon) { refuseAll(t, d, 507, api.CodeNotKept, false) }},
		{"refusing by a code of its own", func(t *testing.T, d *fakeDaemon) { refuseAll(t, d, 400, hostile, true) }},
		{"refusing by name", func(t *testing.T, d *fakeDaemon) { refuseAll(t, d, 400, api.CodeAmbiguous, true) }},
		{"not a daemon", func(t *testing.T, d *fakeDaemon) {
			for _, path := range []string{api.PathStatus, api.PathToken, api.PathWhoAmI, api.PathWatch,
				api.PathPolicyChanges, api.PathLoopback, api.PathDeny, api.PathDenyHub} {
				d.answer(path, fakeAnswer{status: 200, body: hostile + brokenBytes})
			}
		}},
	}
	for i, of := range daemons {
		t.Run(of.name, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t)
			of.set(t, d)
			folder := hostilePrograms(t)
			back := hostileSimulator(t)
			for verb, lines := range hostileLines {
				if verb, _, _ := strings.Cut(verb, " "); i > 0 &&
					slices.Contains([]string{"completion", "help", "simulate", "cache-key", "exec"}, verb) {
					continue // they ask no daemon
				}
				for _, line := range lines {
					var args []string
					for _, word := range strings.Fields(verb + " " + line) {
						word = strings.NewReplacer("$SIMULATOR", back, "$FOLDER", folder, "$WORD", heard, "$EMPTY",
							"").Replace(word)
						args = append(args, strings.ReplaceAll(word, "\x00", "")) // no argument has that
					}
					environ := d.environ("PATH="+folder+":/usr/bin:/bin", "RUNTIME_DIRECTORY="+folder, "TERM=xterm",
						"NO_PROXY="+heard,
						simulatorVariable+"="+heard, "TZ="+heard, "LANG=C.UTF-8")
					checkHostile(t, verb+" "+line, args, environ)
				}
			}
		})
	}
}

func checkHostile(t *testing.T, line string, args, environ []string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), args, strings.NewReader(""), &stdout, &stderr, environ)
	checkHarmless(t, line, stdout.String(), line != "" && !strings.HasPrefix(line, "__complete") &&
		!strings.HasPrefix(line, "completion"))
	checkHarmless(t, line+" (stderr)", stderr.String(), true)
	if strings.Contains(line, "--json") && code == exitOK {
		checkHeard(t, line, stdout.String())
	}
	if strings.HasPrefix(line, "token") && stdout.Len() > 0 {
		t.Errorf("%s: printed %q", line, &stdout)
	}
	for locale, want := range map[string]func(rune) bool{"LANG=C.UTF-8": unicode.IsPrint,
		"LANG=C": func(r rune) bool { return r <= unicode.MaxASCII && unicode.IsPrint(r) }} {
		shown, _, _ := onTerminal(t, t.Context(), 80, args, append([]string{locale}, environ...))
		plain := painted.ReplaceAllString(shown, "")
		for _, r := range plain {
			if r != '\n' && r != '\t' && !want(r) {
				t.Errorf("%s: on a terminal (%s) %q", line, locale, shown)
				break
			}
		}
		checkForged(t, line+" on a terminal", plain)
	}
}

// painted are the control sequences of paint, whole.
var painted = regexp.MustCompile("\x1b\\[(?:1|2|32|33|1;31|1;7;33)m|\x1b\\[0m")

// checkHarmless finds what is not text in output that goes to no terminal.
func checkHarmless(t *testing.T, line, shown string, lines bool) {
	t.Helper()
	if !utf8.ValidString(shown) {
		t.Errorf("%s: not UTF-8: %q", line, shown)
	}
	for _, r := range shown {
		if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
			t.Errorf("%s: %q in %q", line, r, shown)
			return
		}
	}
	if lines {
		checkForged(t, line, shown)
	}
}

// checkForged finds lines that text from outside began.
func checkForged(t *testing.T, line, shown string) {
	t.Helper()
	for one := range strings.Lines(shown) {
		if strings.HasPrefix(one, "FORGED") {
			t.Errorf("%s: a line of another's:\n%s", line, shown)
			return
		}
	}
}

// checkHeard finds that JSON has the hostile text as it came, in each line or document.
func checkHeard(t *testing.T, line, shown string) {
	t.Helper()
	decoder := json.NewDecoder(strings.NewReader(shown))
	found := false
	for {
		var v any
		if err := decoder.Decode(&v); err == io.EOF {
			break
		} else if err != nil {
			t.Errorf("%s: %v in %s", line, err, shown)
			return
		}
		found = found || has(v, heard)
	}
	// these tell it in sentences
	if !found && !strings.HasPrefix(line, "doctor") && !strings.HasPrefix(line, "explain") {
		t.Errorf("%s: the text is not as it came: %s", line, shown)
	}
}

func has(v any, text string) bool {
	switch v := v.(type) {
	case string:
		return v == text
	case []any:
		return slices.ContainsFunc(v, func(one any) bool { return has(one, text) })
	case map[string]any:
		for _, one := range v {
			if has(one, text) {
				return true
			}
		}
	}
	return false
}

// verbsOf lists the paths of all verbs that do something.
func verbsOf(command *cobra.Command) (all []string) {
	for _, one := range command.Commands() {
		all = append(all, verbsOf(one)...)
	}
	if command.Runnable() && command.HasParent() && command.Name() != "completion" {
		all = append(all, strings.TrimPrefix(command.CommandPath(), "perceptctl "))
	}
	return all
}

// hostilePrograms makes a folder with the programs that perceptctl asks, which are hostile, and a sealed key.
func hostilePrograms(t *testing.T) string {
	t.Helper()
	folder := t.TempDir()
	for name, text := range map[string]string{
		"words":         strings.ReplaceAll(hostile, brokenText, brokenBytes),
		"systemctl":     "#!/bin/sh\ncat \"${0%/*}/words\"\n",
		"perceptd":      "#!/bin/sh\nprintf 'perceptd: '; cat \"${0%/*}/words\"\n",
		"systemd-creds": "#!/bin/sh\ncat \"${0%/*}/words\" >&2; cat\n",
		"sealed.cred":   "anything",
	} {
		if err := harness.WriteProgram(filepath.Join(folder, name), []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

// hostileSimulator runs what passes for a simulated back end.
func hostileSimulator(t *testing.T) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/state"):
			_, _ = io.WriteString(w, said[simulatorState](t, true, nil))
		case strings.HasSuffix(r.URL.Path, "/permissions"):
			_, _ = io.WriteString(w, said[simulator.PermissionsChanged](t, true, nil))
		case strings.HasSuffix(r.URL.Path, "/token"):
			claims := spoken(t, map[string]any{"simulated": true, "exp": 1e9, "groups": []string{hostile},
				"roles": []string{hostile, hostile}})
			_, _ = io.WriteString(w, spoken(t, map[string]string{
				"access_token": "x." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".x"}))
		default:
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, spoken(t, map[string]string{"error": hostile}))
		}
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// TestHostileStatusWatch redraws a hostile status; no picture but perceptctl's own clears the screen.
func TestHostileStatusWatch(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	answerAll(t, d, true, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d.afterRequests(3, cancel)
	shown, _, _ := onTerminal(t, ctx, 80, []string{"status", "--watch", "--every", "1ms"},
		d.environ("TERM=xterm", "LANG=C.UTF-8"))
	if n := strings.Count(shown, "\x1b[2J"); n != 1 {
		t.Errorf("cleared %d times: %q", n, shown)
	}
	checkHarmless(t, "status --watch", strings.NewReplacer("\x1b[2J", "", "\x1b[H", "", "\x1b[K", "", "\x1b[J",
		"").Replace(painted.ReplaceAllString(shown, "")), true)
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	d.afterRequests(3, cancel)
	var stdout, stderr bytes.Buffer
	run(ctx, []string{"status", "--watch", "--json", "--every", "1ms"}, nil, &stdout, &stderr, d.environ())
	checkHarmless(t, "status --watch --json", stdout.String(), true)
	checkHeard(t, "status --watch --json", stdout.String())
}

// TestHostileHeader has a daemon that is hostile before its answer begins.
func TestHostileHeader(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"status line": "HTTP/1.1 200\x1b[2J" + hostile,
		"reason":      "HTTP/1.1 400 \x1b[2J\u009b31m\r\nContent-Length: 0\r\n\r\n",
		"header":      "HTTP/1.1 200 OK\r\nX\x1b[2J: y\r\n\r\n",
		"content type": "HTTP/1.1 400 OK\r\nContent-Type: \x1b[2J\u009b31m\r\nRetry-After: " +
			"\x1b[2J\r\nContent-Length: 0\r\n\r\n",
		"protocol": hostile,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(harness.ShortFolder(t), api.TokenSocketName)
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan struct{})
			go func() {
				defer close(served)
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Read(make([]byte, 4096))
					_, _ = io.WriteString(conn, answer)
					_ = conn.Close()
				}
			}()
			defer func() { l.Close(); <-served }()
			for _, verb := range []string{"token --resource r", "watch r", "whoami", "env", "doctor"} {
				var stdout, stderr bytes.Buffer
				code := run(t.Context(), strings.Fields(verb), nil, &stdout, &stderr,
					[]string{api.SocketVariable + "=" + socket})
				if code == exitOK {
					t.Errorf("%s: %s", verb, &stdout)
				}
				checkHarmless(t, verb, stdout.String(), true)
				checkHarmless(t, verb, stderr.String(), true)
			}
		})
	}
}

// TestTokenThatIsNone has a daemon that hands out what is no token.
func TestTokenThatIsNone(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for _, text := range []string{"a b", "a\n", "\nb", "a\x1b[2J", "a\u009b", "é", "a=b", `a"`, "a;", "$(a)"} {
		d.answer(api.PathToken, fakeAnswer{status: 200, body: spoken(t, api.Token{AccessToken: text})})
		for _, more := range [][]string{nil, {"--short"}, {"--json"}} {
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), append([]string{"token", "--resource", "r"}, more...), nil, &stdout, &stderr,
				d.environ())
			if code != exitError || stdout.Len() > 0 || !strings.Contains(stderr.String(), "text that no token has") {
				t.Errorf("%q %v: status %d, %q, %q", text, more, code, &stdout, &stderr)
			}
		}
	}
}
