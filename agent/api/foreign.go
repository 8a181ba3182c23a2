package api

import "strings"

// Why a request with one of the headers below is refused.
const (
	forPages   = "tokens are not for pages in a browser"
	forProxies = "tokens are not handed through a proxy"
)

// foreign are the headers that browsers and proxies add, and no SDK sends, by canonical name. Node's own fetch sends
// Sec-Fetch-Mode, which is therefore not among them.
var foreign = map[string]string{
	"Origin":         forPages,
	"Referer":        forPages,
	"Sec-Fetch-Site": forPages,
	"Cookie":         forPages,

	"Forwarded":                forProxies,
	"Via":                      forProxies,
	"X-Real-Ip":                forProxies,
	"X-Client-Ip":              forProxies,
	"X-Cluster-Client-Ip":      forProxies,
	"X-Original-Forwarded-For": forProxies,
	"True-Client-Ip":           forProxies,
	"Cf-Connecting-Ip":         forProxies,
	"Cdn-Loop":                 forProxies,
}

// forwardedPrefix begins the names of a family of headers, which proxies add to.
const forwardedPrefix = "X-Forwarded-"

// ForeignHeader returns the header, by its canonical name, that shows that no local program sends a request for itself:
// a page in a browser does, or a proxy for others. why says what tokens are not for. Empty: there is none. An empty
// header counts too.
func ForeignHeader(header map[string][]string) (name, why string) {
	for has := range header {
		reason := foreign[has]
		if reason == "" && strings.HasPrefix(has, forwardedPrefix) {
			reason = forProxies
		}
		if reason != "" && (name == "" || has < name) { // of several the same one each time
			name, why = has, reason
		}
	}
	return name, why
}
