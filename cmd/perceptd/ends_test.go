package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/simulator"
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
	device, vision, speech := simulator.DefaultIdentities()[0], simulator.DefaultIdentities()[1], simulator.DefaultIdentities()[2]
	for _, form := range []string{"app-service", "imds", "arc"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			if form == "arc" && os.Getuid() != 0 {
				t.Skip("needs root: azidentity takes Arc's key files from /var/opt/azcmagent/tokens only")
			}
			_, environment := startSimulator(t, form)
			d := launchDaemon(t, bothEnds(form), environment...)
			if got := d.status(t).Source; got.Kind != managedIdentity || got.Endpoint != form {
				t.Errorf("source %+v", got)
			}
			for _, row := range []struct {
				name string
				ask  []string
				want simulator.Identity
			}{
				{"system-assigned", []string{vaultURI}, device},
				{"client ID", []string{vaultURI, "client_id", vision.ClientID}, vision},
				{"object ID", []string{vaultURI, "object_id", vision.ObjectID}, vision},
				{"resource ID", []string{vaultURI, "resource_id", vision.ResourceID}, vision},
				{"asked for by resource ID at both ends", []string{vaultURI, "resource_id", speech.ResourceID}, speech},
				{"the only one granted", []string{"https://storage.azure.com"}, vision},
			} {
				for sdkForm, asForm := range map[string][]string{
					"App Service": {"IDENTITY_ENDPOINT=http://localhost/msi/token", "IDENTITY_HEADER=any"},
					"IMDS":        nil,
				} {
					out, err := sdk(d.token(), asForm, row.ask...)
					if err != nil {
						t.Errorf("%s, SDK in %s form: %v %s", row.name, sdkForm, err, out)
						continue
					}
					if c := claims(t, out); c["oid"] != row.want.ObjectID || c["aud"] != row.ask[0] || c["simulated"] != true {
						t.Errorf("%s, SDK in %s form: token of %v for %v", row.name, sdkForm, c["oid"], c["aud"])
					}
				}
			}
			out, err := sdk(d.token(), nil, "https://graph.microsoft.com")
			if err == nil || !strings.Contains(out, "no [[grant]] lets uid") {
				t.Errorf("not granted: %v %s", err, out)
			}
			if got := d.status(t).Requests; got.Denied != 1 {
				t.Errorf("%d denials: an SDK does not repeat a 403", got.Denied)
			}
			if fetches := d.status(t).Tokens; len(fetches) != 4 {
				t.Errorf("%d keys", len(fetches))
			} else {
				for _, key := range fetches {
					if key.Fetches != 1 {
						t.Errorf("%d calls for %s of %s", key.Fetches, key.Resource, key.Identity)
					}
				}
			}
			if status := d.stop(t); status != 0 {
				t.Errorf("exit status %d", status)
			}
		})
	}
}

// sdk runs azidentity in a process of its own and returns all that it printed.
func sdk(socket string, environment []string, args ...string) (string, error) {
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append([]string{sdkVariable + "=" + socket}, environment...)
	out, err := c.CombinedOutput()
	return string(out), err
}

// An Arc agent that knows no user-assigned identities answers with the machine's own: never a token.
func TestLegacyArcAgent(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: azidentity takes Arc's key files from /var/opt/azcmagent/tokens only")
	}
	_, environment := startSimulator(t, "arc", "--arc-legacy")
	d := launchDaemon(t, bothEnds("arc"), environment...)
	status, body, err := d.get(d.token(), api.PathToken+"?resource="+vaultURI+"&identity=vision")
	if err != nil || status != 400 || !strings.Contains(body, `"identity_not_found"`) || !strings.Contains(body, "another identity") {
		t.Errorf("%d %s %v", status, body, err)
	}
	if status, body, err := d.get(d.token(), api.PathToken+"?resource="+vaultURI+"&identity=device"); err != nil || status != 200 {
		t.Errorf("the machine's own identity: %d %s %v", status, body, err)
	}
}

// Each way in which a back end goes wrong has its code, its kind in the status, and an end: when the
// fault is over the daemon recovers without a restart.
func TestBackEndFaults(t *testing.T) {
	t.Parallel()
	_, environment := startSimulator(t, "imds")
	d := launchDaemon(t, manyResources(), environment...)
	for i, row := range []struct {
		fault []string
		code  api.Code
		says  string
	}{
		{[]string{"html"}, api.CodeMalformedAnswer, "web page"},
		{[]string{"not-json"}, api.CodeMalformedAnswer, "not a JSON object"},
		{[]string{"huge-body"}, api.CodeMalformedAnswer, "64 KiB"},
		{[]string{"gzip-bomb"}, api.CodeMalformedAnswer, ""},
		{[]string{"redirect", "--location", "http://127.0.0.1:1/elsewhere"}, api.CodeMalformedAnswer, "redirect"},
		{[]string{"empty-token"}, api.CodeMalformedAnswer, "access_token"},
		{[]string{"times", "--expires-in", "-25h"}, api.CodeMalformedAnswer, "expired"},
		{[]string{"times", "--expires-in", "never"}, api.CodeMalformedAnswer, "expires_in"},
		{[]string{"reset"}, api.CodeUnreachable, "connection"},
		{[]string{"truncated"}, api.CodeUnreachable, "closed the connection"},
		{[]string{"status", "--status", "500"}, api.CodeUnreachable, "500"},
		{[]string{"status", "--status", "403"}, api.CodeRefused, "403"},
	} {
		resource := fmt.Sprintf("api://%d", i)
		simulatorDo(t, environment, append(append([]string{"fault"}, row.fault...), "--resource", resource)...)
		_, body, err := d.get(d.token(), api.PathToken+"?resource="+resource)
		var problem api.Problem
		if err != nil || json.Unmarshal([]byte(body), &problem) != nil || problem.Code != row.code || !strings.Contains(problem.Detail, row.says) {
			t.Errorf("%v: %v %s", row.fault, err, body)
		}
		simulatorDo(t, environment, "fault", "--clear")
		until(t, "recovery from "+row.fault[0], d.ended, func() bool {
			status, _, _ := d.get(d.token(), api.PathToken+"?resource="+resource)
			return status == 200 || row.code == api.CodeRefused // a refusal is remembered for half a minute
		})
	}
	simulatorDo(t, environment, "fault", "throttle", "--retry-after", "7", "--resource", "api://20")
	status, body, err := d.get(d.token(), api.PathToken+"?resource=api://20")
	if err != nil || status != 503 || !strings.Contains(body, `"throttled"`) {
		t.Errorf("throttled: %d %s %v", status, body, err)
	}
}

func manyResources() string {
	var all []string
	for i := range 21 {
		all = append(all, fmt.Sprintf("%q", fmt.Sprintf("api://%d", i)))
	}
	return fmt.Sprintf("[[identity]]\nname = \"device\"\n\n[[grant]]\ncaller = { uid = %d }\nidentity = \"device\"\nresources = [%s]\n",
		os.Getuid(), strings.Join(all, ", "))
}

// Whatever the back end does, each form is answered within 10 seconds; what is cached, at once.
func TestHangingBackEnd(t *testing.T) {
	t.Parallel()
	_, environment := startSimulator(t, "imds")
	d := launchDaemon(t, manyResources(), environment...)
	if status, body, err := d.get(d.token(), api.PathToken+"?resource=api://0"); err != nil || status != 200 {
		t.Fatalf("%d %s %v", status, body, err)
	}
	simulatorDo(t, environment, "fault", "hang")
	for _, path := range []string{
		api.PathToken + "?resource=api://1",
		api.PathIMDSToken + "?api-version=2018-02-01&resource=api://2",
		api.PathAppServiceToken + "?api-version=2019-08-01&resource=api://3",
	} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			status, body, err := d.get(d.token(), path)
			if err != nil || status != 503 || !strings.Contains(body, "ask again") {
				t.Errorf("%d %s %v", status, body, err)
			}
		})
	}
	if status, body, err := d.get(d.token(), api.PathIMDSToken+"?api-version=2018-02-01&resource=api://0"); err != nil || status != 200 {
		t.Errorf("cached: %d %s %v", status, body, err)
	}
}
