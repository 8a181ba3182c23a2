package simulator

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	metadataPath   = "/metadata/identity/oauth2/token" // of IMDS and Arc
	appServicePath = "/msi/token"                      // by default
	maxResource    = 2048                              // bytes; an audience that long is a mistake
)

// Form is which of Azure's services a Server answers as.
type Form uint8

const (
	FormIMDS       Form = iota // the instance metadata service of a virtual machine
	FormArc                    // the agent of an Arc-enabled server
	FormAppService             // nothing but the App Service form, which stands beside the others too
)

var forms = [...]string{FormIMDS: "imds", FormArc: "arc", FormAppService: "app-service"}

func (f Form) String() string {
	if int(f) < len(forms) {
		return forms[f]
	}
	return "unknown form"
}

// ParseForm is String's inverse; its error lists the choices.
func ParseForm(s string) (Form, error) {
	for f, name := range forms {
		if s == name {
			return Form(f), nil
		}
	}
	return 0, fmt.Errorf("unknown form %q: choose one of %s", s, strings.Join(forms[:], ", "))
}

// tokenRequest is a token request as it was understood.
type tokenRequest struct {
	resource string
	sel      Selection
	param    string // the parameter that chose the identity; empty for none
}

// selector is a query parameter that chooses an identity.
type selector struct {
	param string
	by    SelectBy
}

// refusal is an answer that is not a token, before it is put in a form's own words.
type refusal struct {
	status int
	code   string
	text   string
}

func invalid(format string, args ...any) *refusal {
	return &refusal{http.StatusBadRequest, "invalid_request", fmt.Sprintf(format, args...)}
}

// field is a member of a token answer. Real back ends write numbers as strings too.
type field struct{ name, value string }

// protocol is what differs between the forms.
type protocol struct {
	versions  []string
	selectors []selector // their parameters exclude each other
	none      SelectBy   // what a request without them means
	arc       bool       // a key file has to be shown first

	// admit refuses a request that lacks the form's header; nil when it may pass.
	admit func(*http.Request) *refusal
	// failure is a refusal's body.
	failure func(refusal) []byte
	// fields is a token's body.
	fields func(tokenRequest, Token, time.Time) []field
}

func imds() protocol {
	return protocol{
		versions:  []string{"2018-02-01"},
		selectors: []selector{{"client_id", ByClientID}, {"object_id", ByObjectID}, {"msi_res_id", ByResourceID}},
		none:      ByDefault,
		admit:     admitMetadata,
		failure:   oauthFailure,
		fields: func(q tokenRequest, m Token, now time.Time) []field {
			return append([]field{{"access_token", m.Text}, {"refresh_token", ""}, {"client_id", m.Identity.ClientID}},
				lifeFields(q, m, now)...)
		},
	}
}

func arc() protocol {
	p := imds()
	p.versions = []string{"2020-06-01", "2019-11-01"}
	p.none = SystemAssigned
	p.arc = true
	p.fields = func(q tokenRequest, m Token, now time.Time) []field {
		all := append([]field{{"access_token", m.Text}, {"refresh_token", ""}}, lifeFields(q, m, now)...)
		switch q.sel.By { // clients take a token only when the answer names the identity they chose
		case ByClientID:
			all = append(all, field{q.param, m.Identity.ClientID})
		case ByObjectID:
			all = append(all, field{q.param, m.Identity.ObjectID})
		case ByResourceID:
			all = append(all, field{q.param, m.Identity.ResourceID})
		}
		return all
	}
	return p
}

// legacyArc is an agent from before user-assigned identities: it does not look at the selectors.
func legacyArc() protocol {
	p := arc()
	p.selectors = nil
	return p
}

func appService(secret string) protocol {
	return protocol{
		versions: []string{"2019-08-01"},
		selectors: []selector{{"client_id", ByClientID}, {"object_id", ByObjectID},
			{"principal_id", ByObjectID}, {"mi_res_id", ByResourceID}},
		none: SystemAssigned,
		admit: func(r *http.Request) *refusal {
			if !sameText(r.Header.Get("X-IDENTITY-HEADER"), secret) {
				return &refusal{http.StatusUnauthorized, "unauthorized", "X-IDENTITY-HEADER is missing or wrong"}
			}
			return nil
		},
		failure: func(f refusal) []byte {
			return encodeJSON(struct {
				StatusCode    int    `json:"statusCode"`
				Message       string `json:"message"`
				CorrelationID string `json:"correlationId"`
			}{f.status, f.text, newGUID()})
		},
		fields: func(q tokenRequest, m Token, _ time.Time) []field {
			return []field{
				{"access_token", m.Text}, {"client_id", m.Identity.ClientID},
				{"expires_on", unix(m.ExpiresOn)}, {"not_before", unix(m.NotBefore)},
				{"resource", q.resource}, {"token_type", "Bearer"},
			}
		},
	}
}

// admitMetadata keeps out what can be made to send a request but no header, as the real services do.
func admitMetadata(r *http.Request) *refusal {
	switch {
	case r.Header.Get("Metadata") != "true":
		return &refusal{http.StatusBadRequest, "bad_request_102", "Required metadata header not specified"}
	case r.Header.Get("X-Forwarded-For") != "":
		return invalid("X-Forwarded-For is not allowed")
	}
	return nil
}

func oauthFailure(f refusal) []byte {
	return encodeJSON(struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}{f.code, f.text})
}

// lifeFields are what IMDS and Arc say after the token.
func lifeFields(q tokenRequest, m Token, now time.Time) []field {
	in := strconv.FormatInt(int64(m.ExpiresOn.Sub(now)/time.Second), 10)
	return []field{
		{"expires_in", in}, {"expires_on", unix(m.ExpiresOn)}, {"ext_expires_in", in},
		{"not_before", unix(m.NotBefore)}, {"resource", q.resource}, {"token_type", "Bearer"},
	}
}

func unix(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }

// parse reads a query string, or says why the form refuses it.
func (p protocol) parse(query string) (tokenRequest, *refusal) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return tokenRequest{}, invalid("The query string is malformed")
	}
	q := tokenRequest{sel: Selection{By: p.none}}
	for _, s := range p.selectors {
		id := values.Get(s.param)
		switch {
		case !values.Has(s.param):
		case id == "":
			return q, invalid("Query variable '%s' is empty", s.param)
		case q.param != "":
			return q, invalid("Query variables '%s' and '%s' exclude each other", q.param, s.param)
		default:
			q.sel, q.param = Selection{s.by, id}, s.param
		}
	}
	for name, all := range values {
		if len(all) > 1 {
			return q, invalid("Query variable '%s' is repeated", name)
		}
	}
	version := values.Get("api-version")
	q.resource = values.Get("resource")
	switch {
	case version == "":
		return q, invalid("Required query variable 'api-version' is missing")
	case !slices.Contains(p.versions, version):
		return q, invalid("api-version '%s' is not supported", version)
	case q.resource == "":
		return q, invalid("Required query variable 'resource' is missing")
	case len(q.resource) > maxResource:
		return q, &refusal{http.StatusBadRequest, "invalid_resource", "The resource is too long"}
	}
	return q, nil
}

// refusalFor puts an error of the Backend in the words of the real services.
func refusalFor(err error) *refusal {
	if _, ok := errors.AsType[*AmbiguousIdentityError](err); ok {
		return invalid("Multiple user assigned identities exist, please specify the clientId / resourceId of the " +
			"identity in the token request")
	}
	return invalid("Identity not found")
}

// encodeFields is a JSON object with its members in order: clients exist that heed the last of
// expires_in and expires_on.
func encodeFields(fields []field) []byte {
	out := []byte{'{'}
	for i, f := range fields {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(append(append(out, encodeJSON(f.name)...), ':'), encodeJSON(f.value)...)
	}
	return append(out, '}')
}

func encodeJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("simulator: an answer did not marshal: " + err.Error())
	}
	return b
}

func sameText(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// newGUID returns a random GUID.
func newGUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// writeJSON sends a body; whether the peer got it is the peer's affair.
func writeJSON(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
