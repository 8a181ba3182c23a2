package hubtest

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// fail answers with an error as the service's are.
func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("iothub-errorcode", code)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(object{
		"Message": "ErrorCode:" + code + ";" + message, "ExceptionMessage": "Tracking ID:hubtest",
	})
}

// reply answers with a body. tag is its version; 0: none.
func reply(w http.ResponseWriter, tag uint64, body any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	if tag != 0 {
		w.Header().Set("ETag", `"`+etag(tag)+`"`)
	}
	_ = json.NewEncoder(w).Encode(body)
}

func etag(n uint64) string {
	return base64.StdEncoding.EncodeToString([]byte(strconv.FormatUint(n, 10)))
}

// matchesETag reports whether a request may change what has that version.
func matchesETag(r *http.Request, n uint64) bool {
	want := strings.Trim(r.Header.Get("If-Match"), `"`)
	return want == "" || want == "*" || want == etag(n)
}

// maxBody bounds a request, in bytes.
const maxBody = 1 << 20

// readBody reads a JSON object, or answers why it cannot.
func readBody(w http.ResponseWriter, r *http.Request) (object, bool) {
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil && len(text) == 0 {
		return object{}, true
	}
	var body object
	if err == nil {
		body, err = readObject(text)
	}
	if err != nil {
		fail(w, http.StatusBadRequest, "ArgumentInvalid", err.Error())
		return nil, false
	}
	return body, true
}

const neverTime = "0001-01-01T00:00:00Z"

func (i *identity) connectionState() string {
	if i.session == nil {
		return "Disconnected"
	}
	return "Connected"
}

func (i *identity) status() string {
	if i.disabled {
		return "disabled"
	}
	return "enabled"
}

func (i *identity) authenticationType() string {
	if i.byAuthority {
		return "certificateAuthority"
	}
	if i.thumbprint != "" {
		return "selfSigned"
	}
	return "sas"
}

// body is the registry's entry.
func (i *identity) body() object {
	o := object{
		"deviceId": i.device, "generationId": i.generation, "etag": etag(i.etag),
		"connectionState": i.connectionState(), "connectionStateUpdatedTime": neverTime, "lastActivityTime": neverTime,
		"cloudToDeviceMessageCount": 0,
		"authentication": object{
			"type":           i.authenticationType(),
			"symmetricKey":   object{"primaryKey": encodeKey(i.primary), "secondaryKey": encodeKey(i.secondary)},
			"x509Thumbprint": object{"primaryThumbprint": i.thumbprint, "secondaryThumbprint": ""},
		},
	}
	if i.module != "" {
		o["moduleId"], o["managedBy"] = i.module, ""
		return o
	}
	o["status"], o["statusReason"], o["statusUpdatedTime"] = i.status(), nil, neverTime
	o["capabilities"] = object{"iotEdge": false}
	return o
}

// twinBody is a twin as the service's side gets it.
func (h *Hub) twinBody(i *identity) object {
	o := object{
		"deviceId": i.device, "etag": etag(i.twin.etag), "deviceEtag": etag(i.etag), "status": i.status(),
		"statusUpdateTime": neverTime, "connectionState": i.connectionState(), "lastActivityTime": neverTime,
		"cloudToDeviceMessageCount": 0, "authenticationType": i.authenticationType(), "version": i.twin.etag,
		"x509Thumbprint": object{"primaryThumbprint": nil, "secondaryThumbprint": nil}, "modelId": "",
		"tags": clone(i.twin.tags), "capabilities": object{"iotEdge": false},
		"properties": object{"desired": i.twin.desired.forService(), "reported": i.twin.reported.forService()},
	}
	if i.module != "" {
		o["moduleId"] = i.module
	}
	return o
}
