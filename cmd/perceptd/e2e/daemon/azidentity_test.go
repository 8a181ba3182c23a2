package daemon

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/simulator"
	"perceptd/cmd/perceptd/e2e/harness"
)

// bothEnds grants this user every identity of the simulated device, each for a resource of its own so
// that none is ambiguous, and vision for all.
func bothEnds(endpoint string) string {
	vision := simulator.DefaultIdentities()[1]
	speech := simulator.DefaultIdentities()[2]
	return fmt.Sprintf(`[source]
endpoint = %q

[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = %q
object_id = %q
resource_id = %q

[[identity]]
name = "speech"
resource_id = %q

[[grant]]
caller = { uid = %[6]d }
identity = "device"
resources = ["https://vault.azure.net"]

[[grant]]
caller = { uid = %[6]d }
identity = "vision"
resources = ["https://vault.azure.net", "https://storage.azure.com"]

[[grant]]
caller = { uid = %[6]d }
identity = "speech"
resources = ["https://vault.azure.net"]
`, endpoint, vision.ClientID, vision.ObjectID, vision.ResourceID, speech.ResourceID, os.Getuid())
}

// Both ends real: the built daemon gets its tokens through azidentity from a simulator in a process of
// its own, in each form, and the real azidentity in a third process gets them from the daemon.
func TestBothEndsReal(t *testing.T) {
	t.Parallel()
	for _, form := range []string{"app-service", "imds", "arc"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			if form == "arc" && os.Getuid() != 0 {
				t.Skip("needs root: azidentity takes Arc's key files from /var/opt/azcmagent/tokens only")
			}
			testBothEnds(t, form)
		})
	}
}

func testBothEnds(t *testing.T, form string) {
	device, vision, speech := simulator.DefaultIdentities()[0], simulator.DefaultIdentities()[1],
		simulator.DefaultIdentities()[2]
	_, environment := harness.StartSimulator(t, form)
	d := harness.LaunchDaemon(t, bothEnds(form), environment...)
	if got := d.Status(t).Source; got.Kind != "managed-identity" || got.Endpoint != form {
		t.Errorf("source %+v", got)
	}
	rows := []struct {
		name, ask string
		want      simulator.Identity
	}{
		{"system-assigned", harness.VaultURI, device},
		{"client ID", harness.VaultURI + " client_id " + vision.ClientID, vision},
		{"object ID", harness.VaultURI + " object_id " + vision.ObjectID, vision},
		{"resource ID", harness.VaultURI + " resource_id " + vision.ResourceID, vision},
		{"asked for by resource ID at both ends", harness.VaultURI + " resource_id " + speech.ResourceID, speech},
		{"the only one granted", "https://storage.azure.com", vision},
	}
	var asks []string
	for _, row := range rows {
		asks = append(asks, row.ask)
	}
	for sdkForm, asForm := range map[string][]string{
		"App Service": {"IDENTITY_ENDPOINT=http://localhost/msi/token", "IDENTITY_HEADER=any"},
		"IMDS":        nil,
	} {
		tokens, err := sdk(d.Token(), asForm, asks...)
		if err != nil || len(tokens) != len(rows) {
			t.Fatalf("SDK in %s form: %d tokens, %v", sdkForm, len(tokens), err)
		}
		for i, row := range rows {
			resource, _, _ := strings.Cut(row.ask, " ")
			if c := harness.Claims(t, tokens[i]); c["oid"] != row.want.ObjectID || c["aud"] != resource ||
				c["simulated"] != true {
				t.Errorf("%s, SDK in %s form: token of %v for %v", row.name, sdkForm, c["oid"], c["aud"])
			}
		}
	}
	if got := d.Status(t).Requests; got.Served != 2*int64(len(rows)) {
		t.Errorf("%d answers: azidentity's own cache was in the way", got.Served)
	}
	if _, err := sdk(d.Token(), nil, "https://graph.microsoft.com"); err == nil ||
		!strings.Contains(err.Error(), "no [[grant]] lets uid") {
		t.Errorf("not granted: %v", err)
	}
	if got := d.Status(t).Requests; got.Denied != 1 {
		t.Errorf("%d denials: an SDK does not repeat a 403", got.Denied)
	}
	if fetches := d.Status(t).Tokens; len(fetches) != 4 {
		t.Errorf("%d keys", len(fetches))
	} else {
		for _, key := range fetches {
			if key.Fetches != 1 {
				t.Errorf("%d calls for %s of %s", key.Fetches, key.Resource, key.Identity)
			}
		}
	}
	if status := d.Stop(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// sdk runs azidentity in a process of its own and returns the tokens that it got, or what it said.
func sdk(socket string, environment []string, args ...string) (tokens []string, err error) {
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append([]string{harness.SDKVariable + "=" + socket}, environment...)
	var said strings.Builder
	c.Stderr = &said
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, &said)
	}
	return strings.Fields(string(out)), nil
}

// An Arc agent that knows no user-assigned identities answers with the machine's own: never a token.
func TestLegacyArcAgent(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: azidentity takes Arc's key files from /var/opt/azcmagent/tokens only")
	}
	_, environment := harness.StartSimulator(t, "arc", "--arc-legacy")
	d := harness.LaunchDaemon(t, bothEnds("arc"), environment...)
	status, body, err := d.Get(d.Token(), api.PathToken+"?resource="+harness.VaultURI+"&identity=vision")
	if err != nil || status != 400 || !strings.Contains(body, `"identity_not_found"`) ||
		!strings.Contains(body, "another identity") {
		t.Errorf("%d %s %v", status, body, err)
	}
	if status, body, err := d.Get(d.Token(),
		api.PathToken+"?resource="+harness.VaultURI+"&identity=device"); err != nil || status != 200 {
		t.Errorf("the machine's own identity: %d %s %v", status, body, err)
	}
}

// Each way in which a back end goes wrong has its code, its kind in the status, and an end: when the
// faults are over the daemon recovers without a restart.
func TestBackEndFaults(t *testing.T) {
	t.Parallel()
	_, environment := harness.StartSimulator(t, "imds")
	d := harness.LaunchDaemon(t, manyResources(), environment...)
	rows := []struct {
		fault []string
		code  api.Code
		says  string
	}{
		{[]string{"html"}, api.CodeUnreachable, "a sign-in page on the way"},
		{[]string{"html", "--status", "403"}, api.CodeUnreachable, "403 with a web page"},
		{[]string{"html", "--status", "400", "--body", "<?xml version='1.0'?>"}, api.CodeUnreachable, "or XML"},
		{[]string{"unavailable", "--retry-after-ms", "500"}, api.CodeUnreachable, "for the moment"},
		{[]string{"past-exp"}, api.CodeMalformedAnswer, "its own exp"},
		{[]string{"not-json"}, api.CodeUnreachable, "no JSON object"},
		{[]string{"huge-body"}, api.CodeUnreachable, "64 KiB"},
		{[]string{"gzip-bomb"}, api.CodeUnreachable, ""},
		{[]string{"redirect", "--location", "http://127.0.0.1:1/elsewhere"}, api.CodeUnreachable, "redirect"},
		{[]string{"empty-token"}, api.CodeMalformedAnswer, "access_token"},
		{[]string{"times", "--expires-in", "-25h", "--expires-on", "-25h"}, api.CodeMalformedAnswer, "expired"},
		{[]string{"times", "--expires-in", "never", "--expires-on", "never"}, api.CodeMalformedAnswer, "expires_in"},
		{[]string{"reset"}, api.CodeUnreachable, "connection"},
		{[]string{"truncated"}, api.CodeUnreachable, "closed the connection"},
		{[]string{"status", "--status", "500"}, api.CodeUnreachable, "500"},
		{[]string{"status", "--status", "403"}, api.CodeRefused, "403"},
		{[]string{"wrong-identity"}, api.CodeIdentityNotFound, "another identity"},
		{[]string{"throttle", "--retry-after", "1"}, api.CodeThrottled, ""}, // last, since it is a pause for all
	}
	for i, row := range rows {
		resource := fmt.Sprintf("api://%d", i)
		harness.SimulatorDo(t, environment, append(append([]string{"fault"}, row.fault...), "--resource", resource)...)
		response, body, err := d.Exchange(d.Token(), "GET", api.PathToken+"?resource="+resource, "")
		if err != nil {
			t.Errorf("%v: %v", row.fault, err)
			continue
		}
		var problem api.Problem
		if json.Unmarshal([]byte(body), &problem) != nil || problem.Code != row.code ||
			!strings.Contains(problem.Detail, row.says) {
			t.Errorf("%v: %s", row.fault, body)
		}
		if retry := response.Header.Get("Retry-After"); (retry != "") != (response.StatusCode == 503) {
			t.Errorf("%v: %d with Retry-After %q", row.fault, response.StatusCode, retry)
		}
	}
	for _, key := range d.Status(t).Tokens {
		row := rows[number(t, key.Resource)]
		if key.State != api.StateMissing || key.LastOutcome != api.OutcomeFailed ||
			!strings.Contains(key.LastError, row.says) {
			t.Errorf("%v, in the status: %+v", row.fault, key)
		}
	}
	if got := d.Status(t).Trouble; len(got) != len(rows) {
		t.Errorf("%d troubles %q", len(got), got)
	}
	harness.SimulatorDo(t, environment, "fault", "--clear")
	for i, row := range rows {
		if row.code == api.CodeRefused || row.code == api.CodeIdentityNotFound {
			continue // remembered for half a minute
		}
		harness.Until(t, "recovery from "+row.fault[0], d.Ended, func() bool {
			status, _, _ := d.Get(d.Token(), fmt.Sprintf("%s?resource=api://%d", api.PathToken, i))
			return status == 200
		})
	}
}

// number is the N of api://N.
func number(t *testing.T, resource string) int {
	t.Helper()
	var n int
	if _, err := fmt.Sscanf(resource, "api://%d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func manyResources() string {
	var all []string
	for i := range 21 {
		all = append(all, fmt.Sprintf("%q", fmt.Sprintf("api://%d", i)))
	}
	return fmt.Sprintf("[[identity]]\nname = \"device\"\n\n[[grant]]\ncaller = { uid = %d }\nidentity = "+
		"\"device\"\nresources = [%s]\n",
		os.Getuid(), strings.Join(all, ", "))
}

// Whatever the back end does, each form is answered within 10 seconds; what is cached, at once.
func TestHangingBackEnd(t *testing.T) {
	t.Parallel()
	_, environment := harness.StartSimulator(t, "imds")
	d := harness.LaunchDaemon(t, manyResources(), environment...)
	ask := func(path, resource string) (status int, header http.Header, body string) {
		response, body, err := d.Exchange(d.Token(), "GET", path+"resource="+resource, "")
		if err != nil {
			t.Error(err)
			return 0, nil, ""
		}
		return response.StatusCode, response.Header, body
	}
	if status, _, body := ask(api.PathToken+"?", "api://0"); status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	harness.SimulatorDo(t, environment, "fault", "hang")
	var all sync.WaitGroup
	for i, path := range []string{
		api.PathToken + "?",
		api.PathIMDSToken + "?api-version=2018-02-01&",
		api.PathAppServiceToken + "?api-version=2019-08-01&",
	} {
		all.Go(func() {
			status, header, body := ask(path, fmt.Sprintf("api://%d", i+1))
			if status != 503 || header.Get("Retry-After") == "" || !strings.Contains(body, "ask again") {
				t.Errorf("%s: %d %v %s", path, status, header, body)
			}
		})
		all.Go(func() {
			if status, _, body := ask(path, "api://0"); status != 200 {
				t.Errorf("%s, cached: %d %s", path, status, body)
			}
		})
	}
	all.Wait()
}
