package hubtest

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// service is a back-end application.
type service struct {
	hub    *Hub
	client *http.Client
}

func newService(t *testing.T, h *Hub) service {
	t.Helper()
	client := h.ServiceClient()
	t.Cleanup(client.CloseIdleConnections)
	return service{h, client}
}

// ask sends a request and returns the status, the body, and the header.
func (s service) ask(t *testing.T, method, path, body string, headers ...string) (int, any, http.Header) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "https://"+s.hub.Name()+path+"?api-version=2021-04-12",
		strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	expires := time.Now().Add(time.Hour).Unix()
	mac := hmac.New(sha256.New, s.hub.policyKey)
	fmt.Fprintf(mac, "%s\n%d", url.QueryEscape(s.hub.Name()), expires)
	r.Header.Set("Authorization", fmt.Sprintf("SharedAccessSignature sr=%s&sig=%s&se=%d&skn=%s", s.hub.Name(),
		url.QueryEscape(base64.StdEncoding.EncodeToString(mac.Sum(nil))), expires, policyName))
	for n := 0; n+1 < len(headers); n += 2 {
		r.Header.Set(headers[n], headers[n+1])
	}
	answer, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	var value any
	if len(text) > 0 {
		if err := json.Unmarshal(text, &value); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	return answer.StatusCode, value, answer.Header
}

func (s service) expect(t *testing.T, status int, method, path, body string, headers ...string) any {
	t.Helper()
	got, value, _ := s.ask(t, method, path, body, headers...)
	if got != status {
		t.Errorf("%s %s %s: %d, want %d: %v", method, path, body, got, status, value)
	}
	return value
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	h, _ := started(t, Options{})
	s := newService(t, h)
	s.expect(t, 200, "PUT", "/devices/cam", `{"deviceId":"cam"}`)
	s.expect(t, 409, "PUT", "/devices/cam", `{"deviceId":"cam"}`)
	s.expect(t, 412, "PUT", "/devices/cam", `{}`, "If-Match", `"x"`)
	s.expect(t, 200, "PUT", "/devices/cam", `{"status":"disabled"}`, "If-Match", "*")
	s.expect(t, 200, "PUT", "/devices/cam/modules/percept", `{}`)
	s.expect(t, 404, "PUT", "/devices/none/modules/percept", `{}`)
	s.expect(t, 404, "GET", "/devices/none", "")
	s.expect(t, 404, "GET", "/twins/cam/modules/none", "")
	s.expect(t, 400, "PUT", "/devices/other", "[")
	s.expect(t, 404, "GET", "/nothing", "")
	if all := s.expect(t, 200, "GET", "/devices", "").([]any); len(all) != 1 {
		t.Error(all)
	}
	if all := s.expect(t, 200, "GET", "/devices/cam/modules", "").([]any); len(all) != 1 {
		t.Error(all)
	}
	counts := s.expect(t, 200, "GET", "/statistics/devices", "").(map[string]any)
	if counts["totalDeviceCount"] != 1.0 || counts["disabledDeviceCount"] != 1.0 {
		t.Error(counts)
	}
	s.expect(t, 204, "DELETE", "/devices/cam", "")
	s.expect(t, 404, "GET", "/twins/cam/modules/percept", "")
	r, _ := http.NewRequestWithContext(t.Context(), "GET", "https://"+h.Name()+"/devices?api-version=1", http.NoBody)
	answer, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != 401 {
		t.Error(answer.StatusCode)
	}
}

func TestTwinsOverREST(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	s := newService(t, h)
	d := connected(t, h, h.CreateDevice("cam"))
	_, body, header := s.ask(t, "GET", "/twins/cam", "")
	if body.(map[string]any)["connectionState"] != "Connected" {
		t.Error(body)
	}
	tag := header.Get("ETag")
	s.expect(t, 200, "PATCH", "/twins/cam", `{"tags":{"site":"a"},"properties":{"desired":{"percept":{"deny":[]}}}}`,
		"If-Match", tag)
	if topic, payload := d.next(t, ctx); !strings.HasPrefix(topic, topicDesired) ||
		!strings.Contains(payload, `"deny":[]`) {
		t.Error(topic, payload)
	}
	s.expect(t, 412, "PATCH", "/twins/cam", `{"tags":{"site":"b"}}`, "If-Match", tag)
	s.expect(t, 400, "PATCH", "/twins/cam", `{"properties":{"desired":{"a.b":1}}}`)
	s.expect(t, 200, "PUT", "/twins/cam", `{"properties":{"desired":{"other":1}}}`)
	if desired := h.Desired("cam"); desired["percept"] != nil || desired["other"] == nil {
		t.Error(desired)
	}
	h.SetLimits(Limits{TwinUpdates: 1})
	s.expect(t, 200, "PATCH", "/twins/cam", `{}`)
	s.expect(t, 429, "PATCH", "/twins/cam", `{}`)
}

func TestMethodsOverREST(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	s := newService(t, h)
	connection := h.CreateDevice("cam")
	s.expect(t, 404, "POST", "/twins/cam/methods", `{"methodName":"x"}`)
	s.expect(t, 400, "POST", "/twins/cam/methods", `{"methodName":"x","responseTimeoutInSeconds":1}`)
	s.expect(t, 400, "POST", "/twins/cam/methods", `{}`)
	s.expect(t, 404, "POST", "/twins/none/methods", `{"methodName":"x"}`)
	d := connected(t, h, connection)
	go func() {
		topic, payload := d.next(t, ctx)
		d.Publish("$iothub/methods/res/201/?"+topic[strings.Index(topic, "$rid="):], 1, false, payload)
	}()
	answer := s.expect(t, 200, "POST", "/twins/cam/methods", `{"methodName":"x","payload":{"a":1}}`).(map[string]any)
	if answer["status"] != 201.0 || fmt.Sprint(answer["payload"]) != "map[a:1]" {
		t.Error(answer)
	}
}

func TestQueries(t *testing.T) {
	t.Parallel()
	h, _ := started(t, Options{})
	s := newService(t, h)
	for n := range 5 {
		id := fmt.Sprintf("cam%d", n)
		h.CreateDevice(id)
		h.CreateModule(id, "percept")
		s.expect(t, 200, "PATCH", "/twins/"+id, fmt.Sprintf(
			`{"tags":{"site":"s%d","list":[1]},"properties":{"desired":{"n":%d,"on":%t,"text":"it"}}}`, n%2, n, n > 2))
	}
	ask := func(text string) string {
		t.Helper()
		body, _ := json.Marshal(map[string]string{"query": text})
		status, value, _ := s.ask(t, "POST", "/devices/query", string(body))
		if status != 200 {
			return fmt.Sprint(status)
		}
		var ids []string
		for _, row := range value.([]any) {
			ids = append(ids, strings.TrimPrefix(fmt.Sprint(row.(map[string]any)["deviceId"]), "cam"))
		}
		return strings.Join(ids, " ")
	}
	for text, want := range map[string]string{
		"SELECT * FROM devices": "0 1 2 3 4",
		"select deviceId from devices where properties.desired.n > " +
			"2": "3 4",
		"SELECT * FROM devices WHERE properties.desired.n >= 1 AND NOT properties.desired.n = " +
			"3": "1 2 4",
		"SELECT * FROM devices WHERE (tags.site = 's1' OR deviceId IN ['cam0', \"cam4\"]) AND properties.desired.n " +
			"<> 4": "0 1 3",
		"SELECT * FROM devices WHERE properties.desired.on = true":                                "3 4",
		"SELECT * FROM devices WHERE tags.list = 1":                                               "",
		"SELECT * FROM devices WHERE tags.none != 'x'":                                            "",
		"SELECT * FROM devices WHERE NOT tags.none = 'x'":                                         "",
		"SELECT * FROM devices WHERE NOT is_defined(tags.none) AND properties.desired.text < 'j'": "0 1 2 3 4",
		"SELECT * FROM devices WHERE properties.desired.n = '1'":                                  "",
		"SELECT * FROM devices.modules WHERE moduleId = 'percept' AND deviceId != 'cam1'":         "0 2 3 4",
		"SELECT * FROM devices WHERE connectionState = 'Connected'":                               "",
		"SELECT": "400", "SELECT * FROM twins": "400", "SELECT * FROM devices WHERE": "400", "": "400",
		"SELECT * FROM devices WHERE n = 1": "400", "SELECT * FROM devices WHERE tags.a = 'x": "400",
		"SELECT * FROM devices WHERE tags.a LIKE 'x'": "400", "SELECT * FROM devices ORDER BY deviceId": "400",
		"SELECT * FROM devices WHERE ARRAY_CONTAINS(tags.list, 1)": "400", "SELECT * FROM devices; DROP": "400",
		"SELECT * FROM devices WHERE " + strings.Repeat("NOT ", 40) + "tags.a = 1": "400",
	} {
		if got := ask(text); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
	counted := s.expect(t, 200, "POST", "/devices/query", `{"query":"SELECT COUNT() AS n FROM devices"}`)
	if fmt.Sprint(counted) != "[map[n:5]]" {
		t.Error(counted)
	}
	projected := s.expect(t, 200, "POST", "/devices/query",
		`{"query":"SELECT properties.desired.n AS x, tags.site FROM devices WHERE deviceId = 'cam1'"}`)
	if fmt.Sprint(projected) != "[map[site:s1 x:1]]" {
		t.Error(projected)
	}
	var pages []int
	for token := ""; ; {
		_, rows, header := s.ask(t, "POST", "/devices/query", `{"query":"SELECT * FROM devices"}`,
			"x-ms-max-item-count", "2", "x-ms-continuation", token)
		pages = append(pages, len(rows.([]any)))
		if token = header.Get("x-ms-continuation"); token == "" {
			break
		}
	}
	if fmt.Sprint(pages) != "[2 2 1]" {
		t.Error(pages)
	}
}

// Automatic configurations set properties, the one with the higher priority wins, and what none sets is removed.
func TestConfigurations(t *testing.T) {
	t.Parallel()
	h, ctx := started(t, Options{})
	s := newService(t, h)
	d := connected(t, h, h.CreateModule("cam", "percept"))
	h.CreateModule("other", "percept")
	h.CreateDevice("cam")
	put := func(id, condition string, priority int, content string) {
		t.Helper()
		s.expect(t, 200, "PUT", "/configurations/"+id, fmt.Sprintf(
			`{"id":%q,"targetCondition":%q,"priority":%d,"content":%s}`, id, condition, priority, content))
	}
	const modules = "FROM devices.modules WHERE moduleId = 'percept' AND deviceId = 'cam'"
	put("low", modules, 1, `{"moduleContent":{"properties.desired.percept.deny":[{"module":"vision"}]}}`)
	if _, payload := d.next(t, ctx); payload != `{"$version":2,"percept":{"deny":[{"module":"vision"}]}}` {
		t.Error(payload)
	}
	put("high", modules, 2, `{"moduleContent":{"properties.desired.percept.deny":[{"module":"log"}]}}`)
	if _, payload := d.next(t, ctx); payload != `{"$version":3,"percept":{"deny":[{"module":"log"}]}}` {
		t.Error(payload)
	}
	s.expect(t, 204, "DELETE", "/configurations/high", "")
	if _, payload := d.next(t, ctx); payload != `{"$version":4,"percept":{"deny":[{"module":"vision"}]}}` {
		t.Error(payload)
	}
	s.expect(t, 204, "DELETE", "/configurations/low", "")
	if _, payload := d.next(t, ctx); payload != `{"$version":5,"percept":{"deny":null}}` {
		t.Error(payload)
	}
	if other := h.Desired("other/percept"); other["percept"] != nil {
		t.Error(other)
	}
	// Those for devices follow tags.
	put("site", "tags.site = 'a'", 1, `{"deviceContent":{"properties.desired.percept":{"logLevel":"debug"}}}`)
	s.expect(t, 200, "PATCH", "/twins/cam", `{"tags":{"site":"a"}}`)
	if desired := fmt.Sprint(h.Desired("cam")["percept"]); desired != "map[logLevel:debug]" {
		t.Error(desired)
	}
	s.expect(t, 200, "PATCH", "/twins/cam", `{"tags":{"site":null}}`)
	if desired := h.Desired("cam"); desired["percept"] != nil {
		t.Error(desired)
	}
	for _, bad := range []string{
		`{"targetCondition":"LIKE","content":{"deviceContent":{"properties.desired.a":1}}}`, `{"targetCondition":"*"}`,
		`{"targetCondition":"*","content":{"deviceContent":{"properties.reported.a":1}}}`,
	} {
		s.expect(t, 400, "PUT", "/configurations/bad", bad)
	}
	s.expect(t, 404, "GET", "/configurations/none", "")
	s.expect(t, 200, "GET", "/configurations/site", "")
}

func FuzzQuery(f *testing.F) {
	f.Add("SELECT deviceId, tags.a AS b FROM devices WHERE NOT (tags.a.b >= -1.5 OR deviceId IN ['x', \"y\"])")
	f.Add("SELECT COUNT() AS n FROM devices.modules WHERE is_defined(properties.reported.percept)")
	twin := object{"deviceId": "x", "tags": object{"a": object{"b": json.Number("1")}, "l": []any{"x"}}}
	f.Fuzz(func(t *testing.T, text string) {
		q, err := parseQuery(text)
		if err != nil {
			return
		}
		if rows := q.run([]object{twin, {}}); q.where == nil && q.count == "" && len(rows) != 2 {
			t.Errorf("%q: %d rows of 2", text, len(rows))
		}
	})
}

func FuzzRequestID(f *testing.F) {
	f.Add("$rid=1&$version=2")
	f.Fuzz(func(t *testing.T, query string) {
		if id := requestID(query); id != "" && !bytes.Contains([]byte(query), []byte("$rid="+id)) {
			t.Error(id)
		}
	})
}

// A device changes from keys to a certificate, to the hub's authority and back to keys: it signs in by what holds now
// alone.
func TestChangedAuthentication(t *testing.T) {
	t.Parallel()
	h, _ := started(t, Options{})
	s := newService(t, h)
	key := func(b byte) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }
	signature := func(b byte) string {
		_, pass := password("HostName="+h.Name()+";DeviceId=cam;SharedAccessKey="+key(b), time.Hour)
		return pass
	}
	symmetric := func(b byte) string {
		return fmt.Sprintf(`{"authentication":{"type":"sas","symmetricKey":{"primaryKey":%q,"secondaryKey":%q}}}`,
			key(b),
			key(b+1))
	}
	certificate, _, _, err := h.NewClientCertificate("cam")
	if err != nil {
		t.Fatal(err)
	}
	own := fmt.Sprintf(`{"authentication":{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":%q}}}`,
		strings.ToUpper(thumbprint(certificate.Leaf.Raw)))
	s.expect(t, 200, "PUT", "/devices/cam", symmetric(1))
	for _, step := range []struct {
		name, body         string
		first, third, with bool // which of the keys sign in, and whether the certificate does
	}{
		{"keys", "", true, false, false},
		{"a certificate", own, false, false, true},
		{"other keys", symmetric(3), false, true, false},
		{"the authority", `{"authentication":{"type":"certificateAuthority"}}`, false, false, true},
		{"the first keys", symmetric(1), true, false, false},
	} {
		if step.body != "" {
			s.expect(t, 200, "PUT", "/devices/cam", step.body, "If-Match", "*")
		}
		for name, one := range map[string]struct {
			d    device
			want bool
		}{
			"the first key":   {dial(h, "tls", "cam", signature(1)), step.first},
			"the other key":   {dial(h, "tls", "cam", signature(3)), step.third},
			"its certificate": {dial(h, "tls", "cam", "", certificate), step.with},
		} {
			token := one.d.Connect()
			if !token.WaitTimeout(10*time.Second) || (token.Error() == nil) != one.want {
				t.Errorf("with %s, by %s: %v", step.name, name, token.Error())
			}
			one.d.Disconnect(0)
		}
	}
}
