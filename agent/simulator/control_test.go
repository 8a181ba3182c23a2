package simulator

import (
	"encoding/json"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// steer makes a control request.
func steer(t *testing.T, s *Server, method, path, body string) answer {
	t.Helper()
	return send(t, request(t, method, s.URL()+path, body, "Simulator-Control", "true"))
}

func TestControlPermissions(t *testing.T) {
	t.Parallel()
	s := start(t,
		ServerOptions{Backend: New(Options{Now: func() time.Time { return epoch }, PropagationDelay: time.Minute})})
	got := steer(t, s, "POST", "/simulator/permissions", `{"identity":"vision","groups":["g"],"wids":[]}`)
	var changed PermissionsChanged
	if err := json.Unmarshal([]byte(got.body), &changed); err != nil || got.status != 200 ||
		!changed.Reaches.Equal(epoch.Add(time.Minute)) {
		t.Fatalf("%d %s, %v", got.status, got.body, err)
	}
	id := s.Backend().State().Identities[1]
	if id.Permissions.Groups[0] != "g" || len(id.Permissions.WIDs) != 0 ||
		id.Permissions.Roles[0] != "Simulated.Read" || id.InForce.Groups[0] == "g" {
		t.Errorf("%+v", id)
	}
}

func TestControlFaults(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	got := steer(t, s, "POST", "/simulator/faults",
		`{"kind":"status","status":503,"retry_after":"2","count":3,"for":"10m","every":"1ms","probability":1,`+
			`"resource":"`+vault+`"}`)
	var all []struct {
		Kind  string
		Count int
		Until time.Time
		Every string
	}
	if err := json.Unmarshal([]byte(got.body), &all); err != nil || got.status != 200 || len(all) != 1 ||
		all[0].Kind != "status" || all[0].Count != 3 || !all[0].Until.Equal(epoch.Add(10*time.Minute)) ||
		all[0].Every != "1ms" {
		t.Fatalf("%d %s, %v", got.status, got.body, err)
	}
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 503 || got.header.Get("Retry-After") != "2" {
		t.Errorf("%d %v", got.status, got.header)
	}
	if got := steer(t, s, "DELETE", "/simulator/faults", ""); got.status != 204 || len(s.Backend().Faults()) != 0 {
		t.Errorf("%d %s", got.status, got.body)
	}
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 200 {
		t.Errorf("after clearing: %d", got.status)
	}
}

func TestControlState(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	if err := s.Backend().AddFault(Fault{Kind: FaultHang, Resource: "other"}); err != nil {
		t.Fatal(err)
	}
	m := token(t, s.Backend(), vision, vault)
	token(t, s.Backend(), vision, vault+"/")
	got := steer(t, s, "GET", "/simulator/state", "")
	if strings.Contains(got.body, m.Text) || strings.Contains(got.body, strings.Split(m.Text, ".")[1]) {
		t.Error("the state shows a token's text")
	}
	var state struct {
		Simulated, Life, Rollover string
		Identities                []struct{ Name string }
		Tokens                    []struct {
			Identity, Resource string
			RollsOn            time.Time `json:"rolls_on"`
		}
		Calls struct {
			Total  int
			PerKey []struct {
				Resource string
				Calls    int
			} `json:"per_key"`
		}
		Faults []struct{ Kind, Resource string }
	}
	if err := json.Unmarshal([]byte(got.body), &state); err != nil || got.status != 200 {
		t.Fatalf("%d %s, %v", got.status, got.body, err)
	}
	if state.Simulated != warningText || state.Life != "24h0m0s" || state.Rollover != "expiry" ||
		len(state.Identities) != 3 ||
		len(state.Tokens) != 2 || state.Tokens[0].Identity != "vision" || state.Tokens[0].Resource != vault ||
		!state.Tokens[0].RollsOn.Equal(m.RollsOn) ||
		state.Calls.Total != 2 || len(state.Calls.PerKey) != 2 || state.Calls.PerKey[1].Resource != vault+"/" ||
		state.Calls.PerKey[0].Calls != 1 ||
		len(state.Faults) != 1 || state.Faults[0].Kind != "hang" {
		t.Errorf("%s", got.body)
	}
}

func TestControlRefusals(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"POST", "/simulator/permissions", `{"identity":"nobody"}`, 400, "nobody"},
		{"POST", "/simulator/permissions", `{"identity":1}`, 400, "not understood"},
		{"POST", "/simulator/permissions", `{"identity":"vision","owner":true}`, 400, "owner"},
		{"POST", "/simulator/permissions", `{} {}`, 400, "after its JSON value"},
		{"POST", "/simulator/permissions", "", 400, "not understood"},
		{"POST", "/simulator/permissions", strings.Repeat(" ", maxControl+1), 413, "too large"},
		{"POST", "/simulator/faults", `{"kind":"flood"}`, 400, "choose one of status, throttle"},
		{"POST", "/simulator/faults", `{}`, 400, "choose one of status, throttle"},
		{"POST", "/simulator/faults", `[`, 400, "not understood"},
		{"POST", "/simulator/faults", `{"kind":"hang","for":"soon"}`, 400, "not a duration"},
		{"POST", "/simulator/faults", `{"kind":"hang","every":"5"}`, 400, "not a duration"},
		{"POST", "/simulator/faults", `{"kind":"status","status":99}`, 400, "from 200 to 599"},
		{"GET", "/simulator/faults", "", 404, "DELETE /simulator/faults"},
		{"GET", "/simulator/other", "", 404, "GET /simulator/state"},
	} {
		got := steer(t, s, c.method, c.path, c.body)
		var body struct{ Error string }
		if err := json.Unmarshal([]byte(got.body), &body); err != nil || got.status != c.status ||
			!strings.Contains(body.Error, c.want) {
			t.Errorf("%s %s %.60s: %d %s, %v", c.method, c.path, c.body, got.status, got.body, err)
		}
	}
}

func TestControlKeepsWebPagesOut(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	at := s.URL() + "/simulator/state"
	if got := get(t, at); got.status != 403 {
		t.Errorf("without the header: %d", got.status)
	}
	if got := get(t, at, "Simulator-Control", "true", "Origin", "null"); got.status != 403 {
		t.Errorf("with an origin: %d", got.status)
	}
	for _, header := range []string{"Referer", "Sec-Fetch-Site"} {
		if got := get(t, at, "Simulator-Control", "true", header, "x"); got.status != 403 {
			t.Errorf("with %s: %d", header, got.status)
		}
	}
	for host, want := range map[string]int{"rebound.example:80": 403, "192.0.2.1": 403, "localhost": 200,
		"127.0.0.1": 200, "[::1]:80": 200} {
		r := request(t, http.MethodGet, at, "", "Simulator-Control", "true")
		r.Host = host
		if got := send(t, r); got.status != want {
			t.Errorf("host %s: %d %s, want %d", host, got.status, got.body, want)
		}
	}
}

// Other users get tokens, and do not steer.
func TestSteeredByItsUser(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	users := map[int]string{os.Getuid(): "200"}
	if os.Getuid() == 0 {
		users[65534] = "403"
	} else {
		t.Log("as another user only where root runs it")
	}
	for uid, state := range users {
		for path, want := range map[string]string{"/simulator/state": state, imdsQuery: "200"} {
			child := exec.Command("/proc/self/exe")
			child.Env = []string{asSteerer + "=" + s.URL() + path}
			if uid != os.Getuid() {
				child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid),
					Gid: uint32(uid)}}
			}
			if out, err := child.Output(); string(out) != want || err != nil {
				t.Errorf("uid %d at %s: %s %v, want %s", uid, path, out, err, want)
			}
		}
	}
}

// More connections than there is room for keep nobody from an answer.
func TestSimulatorHasRoom(t *testing.T) {
	t.Parallel()
	s := start(t, ServerOptions{})
	idle := make([]net.Conn, 2*maxConns)
	for i := range idle {
		conn, err := net.Dial("tcp", s.address.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle[i] = conn
	}
	if got := get(t, s.URL()+imdsQuery, "Metadata", "true"); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	for _, conn := range idle[:maxConns] {
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Error("one that has made room is still there")
		}
	}
}

func FuzzTokenQuery(f *testing.F) {
	f.Add("api-version=2018-02-01&resource=https://vault.azure.net")
	f.Add("api-version=2020-06-01&resource=a&msi_res_id=%2Fsubscriptions%2Fx")
	f.Add("api-version=2019-08-01&resource=a&principal_id=b&client_id=c")
	f.Add("resource=%zz;a=b&resource=&api-version")
	f.Fuzz(func(t *testing.T, query string) {
		for _, p := range []protocol{imds(), arc(), legacyArc(), appService("secret")} {
			q, refused := p.parse(query)
			if refused != nil {
				if refused.status != 400 || refused.code == "" || refused.text == "" ||
					!json.Valid(p.failure(*refused)) {
					t.Errorf("refusal %+v", refused)
				}
				continue
			}
			values, err := url.ParseQuery(query)
			if err != nil || q.resource == "" || q.resource != values.Get("resource") ||
				(q.param == "") != (q.sel.ID == "") {
				t.Errorf("%q was understood as %+v, %v", query, q, err)
			}
			if !json.Valid(encodeFields(p.fields(q, Token{}, time.Time{}))) {
				t.Errorf("%q: the answer is not JSON", query)
			}
		}
	})
}

func FuzzControlBody(f *testing.F) {
	f.Add([]byte(`{"kind":"status","status":503,"for":"10m"}`))
	f.Add([]byte(`{"identity":"vision","groups":[],"roles":null}`))
	f.Add([]byte(`{"kind":"times","expires_on":"never"} x`))
	f.Fuzz(func(t *testing.T, body []byte) {
		b := New(Options{})
		if fault, err := parseFault(body); err == nil && b.AddFault(fault) == nil {
			if got := b.Faults()[0]; !got.Kind.known() || got.Count < 0 || got.Size < 0 || got.Every <= 0 ||
				!(got.Probability > 0 && got.Probability <= 1) {
				t.Errorf("in force: %+v", got)
			}
		}
		if c, err := parsePermissions(body); err == nil {
			_, _ = b.ChangePermissions(c.Identity, c.Permissions)
		}
		if !json.Valid(encodeJSON(b.State())) {
			t.Error("the state is not JSON")
		}
	})
}
