package server

import (
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/agent/grants"
)

// hubOfTest is this device's identity at the hub.
const hubOfTest = "hub.azure-devices.net/edge-1"

// A rule of each side takes tokens away at once: on each form and socket, from requests that wait and streams that are
// open. When the side that set it lifts it, everything is answered as before.
func TestDenyOnEveryForm(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		set  func(t *testing.T, d *daemon) (lift func() error)
		says string // to a caller
	}{
		{"local", func(t *testing.T, d *daemon) func() error {
			rule, err := d.Agent.Deny("uid 0", api.DenySide{Origin: api.DenyLocal}, deniedModule)
			if err != nil {
				t.Fatal(err)
			}
			return func() error {
				_, err := d.Agent.LiftDeny("uid 0", api.DenySide{Origin: api.DenyLocal}, rule.ID)
				return err
			}
		}, "perceptctl deny lift "},
		{"twin", func(t *testing.T, d *daemon) func() error {
			if _, err := d.Agent.TightenTwinDeny(hubOfTest, []api.DenyRequest{deniedModule}, 7); err != nil {
				t.Fatal(err)
			}
			return func() error { return d.Agent.SetTwinDeny(hubOfTest, nil, 8) }
		}, "version 7"},
		{"method", func(t *testing.T, d *daemon) func() error {
			const by = "iothub " + hubOfTest + " method percept.deny"
			rule, err := d.Agent.Deny(by, api.DenySide{Origin: api.DenyMethod, Hub: hubOfTest}, deniedModule)
			if err != nil {
				t.Fatal(err)
			}
			return func() error {
				_, err := d.Agent.LiftDeny(by, api.DenySide{Origin: api.DenyMethod, Hub: hubOfTest}, rule.ID)
				return err
			}
		}, "a direct method from IoT Hub"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			testDenyOnEveryForm(t, row.set, row.says)
		})
	}
}

var deniedModule = api.DenyRequest{DenyTarget: deny.Target{Module: "vision"}, Note: "stolen from the yard"}

func testDenyOnEveryForm(t *testing.T, set func(*testing.T, *daemon) func() error, says string) {
	d := newDaemon(t, fetchDay)
	open, module := d.tokens(""), d.tokens("vision")
	at, secrets := d.loopbackListener()
	secret := secretLine(secrets.Header(grants.Match{Module: "vision"}))
	const report = `{"resource":"` + vault + `","status":401}`
	forms := map[string]func() reply{
		"IMDS":        func() reply { return send(t, module, get(imdsVault, metadata)) },
		"App Service": func() reply { return send(t, module, get(appVault, appHeader)) },
		"v1":          func() reply { return send(t, module, get(v1Vault)) },
		"v1 as a scope": func() reply {
			return send(t, module, get("/v1/token?resource=https%3A%2F%2Fvault.azure.net%2F.default"))
		},
		"v1 that waits": func() reply { return send(t, module, get(v1Vault+"&wait=10s")) },
		"loopback":      func() reply { return sendTCP(t, at, asks(appVault, at, secret)) },
		"advice": func() reply {
			return send(t, module, requestText("POST", "/v1/rejected", report, "Content-Type: application/json",
				"Content-Length: "+strconv.Itoa(len(report))))
		},
	}
	answer := func(when string, status int) {
		t.Helper()
		for name, ask := range forms {
			got := ask()
			if got.status != status {
				t.Errorf("%s, %s: %+v", when, name, got)
				continue
			}
			if (status == 200 && name != "advice") != strings.Contains(got.body, canary) {
				t.Errorf("%s, %s: %d with or without a token", when, name, got.status)
			}
			if status == 200 {
				continue
			}
			if code := got.field(t, "code"); code != string(api.CodeDenied) {
				t.Errorf("%s, %s: code %v", when, name, code)
			}
			for _, want := range []string{says, "module vision", "stolen from the yard"} {
				if !strings.Contains(got.body, want) {
					t.Errorf("%s, %s: %q is not in %s", when, name, want, got.body)
				}
			}
		}
	}
	answer("before", 200)
	w := d.watchAt(module, watchVault)
	w.next(api.EventToken)
	waiting := dial(t, module,
		get(v1Vault+"&wait=1m&issued_after="+strconv.Itoa(int(time.Now().Add(time.Hour).Unix()))))
	defer waiting.Close()

	lift := set(t, d)
	w.ends("stolen from the yard")
	if got := exchangeOn(t, waiting, ""); got.status != 403 || got.problem(t).Code != api.CodeDenied {
		t.Errorf("the request that waits: %+v", got)
	}
	answer("denied", 403)
	if got := send(t, module, get(watchVault)); got.status != 403 || got.problem(t).Code != api.CodeDenied {
		t.Errorf("a new stream: %+v", got)
	}
	if got := send(t, open, get(v1Vault)); got.status != 200 {
		t.Errorf("another caller: %+v", got)
	}
	check := send(t, d.admin(), get("/v1/grants/check?module=vision&resource=https%3A%2F%2Fvault.azure.net"))
	if check.field(t, "allowed") != false || check.field(t, "code") != string(api.CodeDenied) {
		t.Errorf("the check: %+v", check)
	}
	if err := lift(); err != nil {
		t.Fatal(err)
	}
	answer("lifted", 200)
}

// Where the record is lost, every form answers so that the caller comes again.
func TestLostDenyRulesOnEveryForm(t *testing.T) {
	t.Parallel()
	d := newDaemonOf(t, agent.Options{Fetch: fetchDay, Rules: rules(),
		Deny: agent.DenyStore{Lost: io.ErrUnexpectedEOF}})
	module := d.tokens("vision")
	for name, text := range map[string]string{
		"IMDS": get(imdsVault, metadata), "App Service": get(appVault, appHeader), "v1": get(v1Vault),
		"watch": get(watchVault),
	} {
		got := send(t, module, text)
		if got.status != 503 || got.field(t, "code") != string(api.CodeDenyRulesLost) ||
			got.header.Get("Retry-After") == "" || !strings.Contains(got.body, "forget-lost") {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if err := d.Agent.ForgetLostDenyRules("uid 0"); err != nil {
		t.Fatal(err)
	}
	if got := send(t, module, get(v1Vault)); got.status != 200 {
		t.Errorf("then: %+v", got)
	}
}
