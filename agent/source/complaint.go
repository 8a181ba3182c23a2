package source

import (
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	"perceptd/tokencache"
)

// complaint is what an endpoint says in its own form beside a status other than 200. It is recognised, never repeated.
type complaint struct {
	code  string // the OAuth error code; App Service has none
	words string // in lower case, of a person's language
}

func (c complaint) says(words string) bool { return strings.Contains(c.words, words) }

// complaintIn reads the body of an answer with a status other than 200. It reports whether the body is of the form that an
// endpoint of this kind uses: nothing else speaks for Azure.
func (at place) complaintIn(status int, body []byte) (_ complaint, own bool) {
	f := parseFields(body)
	code, noCode := f.text("error")
	description, noDescription := f.text("error_description")
	message, noMessage := f.text("message") // App Service
	number, _ := f.digits("statusCode")
	c := complaint{code: code, words: strings.ToLower(description + "\n" + message)}

	_, known := codes[code]
	oauth := noCode == nil && noDescription == nil && (known || description != "" && (code == "" || codeForm.MatchString(code)))
	appService := at.form == AppService && noMessage == nil && message != "" && number == strconv.Itoa(status)
	if !oauth && !appService {
		return complaint{}, false
	}
	return c, true
}

var (
	codeForm   = regexp.MustCompile(`^[a-z0-9_]+$`)
	aadstsForm = regexp.MustCompile(`aadsts([0-9]{4,8})`)
)

// meaning is what an error code stands for. It says which trouble time heals, with the kinds Unreachable and Throttled, and
// which a person has to heal. Without words the status says it.
type meaning struct {
	kind  tokencache.Kind
	words string
}

// codes are the OAuth error codes of endpoints.
var codes = map[string]meaning{
	"temporarily_unavailable": {tokencache.Unreachable, "Entra ID cannot answer for the moment"},
	"server_error":            {tokencache.Unreachable, "Entra ID, or the endpoint, has trouble of its own"},
	"unknown":                 {tokencache.Unreachable, "the endpoint had no token from Entra ID and does not know why"},

	"invalid_resource": {tokencache.Refused, unknownResource},
	"invalid_target":   {tokencache.Refused, unknownResource},
	"invalid_scope":    {tokencache.Refused, unknownResource},

	"invalid_request":           {kind: tokencache.Refused}, // an unknown identity too: see badRequest
	"bad_request_102":           {kind: tokencache.Refused},
	"unknown_source":            {kind: tokencache.Refused},
	"access_denied":             {kind: tokencache.Refused},
	"unauthorized":              {kind: tokencache.Refused},
	"unauthorized_client":       {kind: tokencache.Refused},
	"invalid_client":            {kind: tokencache.Refused},
	"invalid_grant":             {kind: tokencache.Refused},
	"interaction_required":      {kind: tokencache.Refused},
	"unsupported_grant_type":    {kind: tokencache.Refused},
	"unsupported_response_type": {kind: tokencache.Refused},
}

const (
	unknownResource = "the directory knows no such resource: check its App ID URI"
	signInFailed    = "Entra ID does not accept how the endpoint signs in: on an Azure Arc machine, azcmagent check; elsewhere assign the identity anew"
	assertionTime   = "Entra ID finds what the endpoint signs in with outside its time: is the clock right? timedatectl"
)

// aadsts are Entra ID's own error numbers, which stand in descriptions. Entra ID may change them; a number that is not here
// leaves the code and the status to speak.
var aadsts = map[string]meaning{
	"90006":  {tokencache.Unreachable, "Entra ID cannot answer for the moment (AADSTS90006)"},
	"90012":  {tokencache.Unreachable, "Entra ID took too long (AADSTS90012)"},
	"90024":  {tokencache.Unreachable, "Entra ID cannot answer for the moment (AADSTS90024)"},
	"90033":  {tokencache.Unreachable, "Entra ID cannot answer for the moment (AADSTS90033)"},
	"700024": {tokencache.Unreachable, assertionTime},
	"500133": {tokencache.Unreachable, assertionTime},
	"50196":  {tokencache.Throttled, "Entra ID was asked the same too often (AADSTS50196); who else on this device asks?"},
	"90055":  {tokencache.Throttled, "Entra ID takes no more requests of the tenant for now (AADSTS90055)"},

	// An answer about one identity or resource is no reason to pause for all: where time may heal one of these, such as
	// minutes after something was created, the schedule asks again.
	"70021":   {tokencache.Refused, "no federated credential matches (AADSTS70021): create one; a new one takes minutes to count"},
	"700016":  {tokencache.IdentityNotFound, "the directory does not know the identity (AADSTS700016): was it deleted? a new one takes minutes to be known"},
	"50001":   {tokencache.Refused, unknownResource},
	"500011":  {tokencache.Refused, unknownResource},
	"90002":   {tokencache.Refused, "the tenant does not exist (AADSTS90002): was the subscription moved to another one?"},
	"7000112": {tokencache.Refused, "the identity is disabled in the directory (AADSTS7000112)"},
	"700027":  {tokencache.Refused, signInFailed},
	"7000215": {tokencache.Refused, signInFailed},
	"7000222": {tokencache.Refused, signInFailed},
	"50105":   {tokencache.Refused, "the resource wants the identity to be assigned to it (AADSTS50105)"},
	"501051":  {tokencache.Refused, "the resource wants the identity to be assigned to it (AADSTS501051)"},
	"53003":   {tokencache.Refused, "conditional access keeps the identity from a token (AADSTS53003)"},
}

// means returns what c stands for; zero when the status has to say it. A code for trouble that passes counts before any
// other: what is told as permanent by mistake is worse than what is asked once more.
func (c complaint) means() meaning {
	m := codes[c.code]
	if m.words != "" && m.kind == tokencache.Unreachable {
		return m
	}
	if number := aadstsForm.FindStringSubmatch(c.words); number != nil && aadsts[number[1]].words != "" {
		return aadsts[number[1]]
	}
	return m
}

// looksLikePage tells HTML and XML, which no token endpoint sends.
func looksLikePage(body []byte) bool {
	head := strings.TrimPrefix(string(body[:min(len(body), 512)]), "\ufeff")
	return strings.HasPrefix(strings.TrimSpace(head), "<")
}

// describe says what a body is that no token endpoint sends.
func describe(body []byte) string {
	switch {
	case len(body) > maxBodyBytes:
		return "more than 64 KiB"
	case looksLikePage(body):
		return "a web page, or XML"
	case strings.TrimSpace(string(body)) == "":
		return "nothing"
	case parseFields(body) != nil:
		return "JSON of another shape"
	}
	return "what is no JSON object"
}

// onTheWay is the failure that somebody else answered in the endpoint's place. What a stranger says of identities and
// permissions means nothing, so time is what heals it as far as callers are concerned.
func (at place) onTheWay(status int, with string) *tokencache.FetchError {
	endpoint := map[Endpoint]string{Arc: "the Azure Arc agent", AppService: "an App Service endpoint", IMDS: "the metadata service"}[at.form]
	return &tokencache.FetchError{Kind: tokencache.Unreachable, Detail: fmt.Sprintf(
		"%s answered %d with %s, as %s never does: a proxy, a filter or a sign-in page on the way, or another program there, answers in its "+
			"place; ask that address with curl to see which, and let this device's calls past it", at.dial, status, with, endpoint)}
}

// secretRefused reports whether a status says that the endpoint did not accept the secret that it was shown. It says so
// with whatever body, since that is often a framework's.
func (at place) secretRefused(status int) bool {
	return status == http.StatusUnauthorized && (at.form == Arc || at.form == AppService)
}
