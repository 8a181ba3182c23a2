package source

import (
	"strings"
	"testing"

	msal "github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
)

const arcURL = "http://127.0.0.1:40342/metadata/identity/oauth2/token"

func variables(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i+1 < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

func TestLocate(t *testing.T) {
	t.Parallel()
	var (
		none = environment{getenv: variables()}
		app  = environment{getenv: variables(envEndpoint, "http://localhost:42356/msi/token", envHeader, canary,
			envIMDS, "x")}
		arc     = environment{getenv: variables(envEndpoint, arcURL, envIMDS, "http://127.0.0.1:40342")}
		himds   = environment{getenv: variables(), himds: true}
		moved   = environment{getenv: variables(envEndpoint, "http://127.0.0.1:5/t"), himds: true}
		secure  = environment{getenv: variables(envEndpoint, "https://[::1]/t", envHeader, "h")}
		half    = environment{getenv: variables(envEndpoint, arcURL)}
		podHost = environment{getenv: variables(envAuthorityHost, "http://127.0.0.1:8080/")}
		podName = environment{getenv: variables(envAuthorityHost, "http://pod")}
	)
	for _, test := range []struct {
		name string
		want Endpoint
		env  environment
		at   target
	}{
		{"nothing set", Auto, none, target{IMDS, "http", "169.254.169.254", "169.254.169.254:80", ""}},
		{"nothing set or asked for", "", none, target{IMDS, "http", "169.254.169.254", "169.254.169.254:80", ""}},
		{"imds", IMDS, none, target{IMDS, "http", "169.254.169.254", "169.254.169.254:80", ""}},
		{"imds redirected", IMDS, podHost, target{IMDS, "http", "169.254.169.254", "127.0.0.1:8080", ""}},
		{"imds redirected to a name", Auto, podName, target{IMDS, "http", "169.254.169.254", "pod:80", ""}},
		{"app service", Auto, app, target{AppService, "http", "localhost:42356", "localhost:42356", ""}},
		{"app service named", AppService, app, target{AppService, "http", "localhost:42356", "localhost:42356", ""}},
		{"app service over TLS", Auto, secure, target{AppService, "https", "[::1]", "[::1]:443", ""}},
		{"arc by variables", Auto, arc, target{Arc, "http", "127.0.0.1:40342", "127.0.0.1:40342", ""}},
		{"arc named", Arc, arc, target{Arc, "http", "127.0.0.1:40342", "127.0.0.1:40342", ""}},
		{"arc by its agent", Auto, himds, target{Arc, "http", "127.0.0.1:40342", "127.0.0.1:40342", ""}},
		{"arc by its agent, elsewhere", Arc, moved, target{Arc, "http", "127.0.0.1:5", "127.0.0.1:5", ""}},
		{"half set", Auto, half, target{IMDS, "http", "169.254.169.254", "169.254.169.254:80",
			"IDENTITY_ENDPOINT is set without IDENTITY_HEADER or IMDS_ENDPOINT, so azidentity ignores it"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			at, err := findTarget(test.want, test.env)
			if err != nil || at != test.at {
				t.Errorf("got %+v, %v\nwant %+v", at, err, test.at)
			}
			if !strings.Contains(at.advice(), at.note) {
				t.Errorf("advice %q leaves out the note", at.advice())
			}
		})
	}
}

func TestLocateRefuses(t *testing.T) {
	t.Parallel()
	app := func(endpoint string) environment {
		return environment{getenv: variables(envEndpoint, endpoint, envHeader, canary)}
	}
	pod := func(host string) environment { return environment{getenv: variables(envAuthorityHost, host)} }
	arc := environment{getenv: variables(envEndpoint, arcURL, envIMDS, "x")}
	for _, test := range []struct {
		name  string
		want  Endpoint
		env   environment
		words []string
	}{
		{"no such form", "azure", pod(""), []string{`"azure"`, "app-service"}},
		{"Service Fabric", Auto, environment{getenv: variables(envEndpoint, arcURL, envHeader, canary, envThumbprint,
			canary)}, []string{"Service Fabric", envThumbprint}},
		{"Cloud Shell",
			Auto, environment{getenv: variables(envMSI, canary), himds: true}, []string{"Cloud Shell", envMSI}},
		{"Cloud Shell, another form named",
			IMDS, environment{getenv: variables(envMSI, canary)}, []string{"Cloud Shell", envMSI}},
		{"Azure ML", Auto, environment{getenv: variables(envMSI, canary, envMSISecret, canary)},
			[]string{"Machine Learning", envMSISecret}},
		{"app-service without variables", AppService, pod(""),
			[]string{"set both IDENTITY_ENDPOINT and IDENTITY_HEADER"}},
		{"app-service on Arc", AppService, arc,
			[]string{"chooses arc since IDENTITY_ENDPOINT and IMDS_ENDPOINT are set", "set both"}},
		{"arc without variables", Arc, pod(""),
			[]string{"set both IDENTITY_ENDPOINT (" + arcURL + ") and IMDS_ENDPOINT, or install the agent"}},
		{"arc on App Service", Arc, app(arcURL),
			[]string{"chooses app-service", "unset IDENTITY_HEADER and set IMDS_ENDPOINT"}},
		{"imds with the agent", IMDS, environment{getenv: variables(), himds: true},
			[]string{himdsFile, "choose endpoint arc"}},
		{"imds with Arc's variables", IMDS, arc, []string{"unset IDENTITY_ENDPOINT and IMDS_ENDPOINT"}},
		{"imds on App Service", IMDS, app(arcURL), []string{"unset IDENTITY_ENDPOINT and IDENTITY_HEADER"}},
		{"a path for a URL", Auto, app("/" + canary), []string{envEndpoint + " is not an absolute http or https URL"}},
		{"no URL", Auto, app("http://%zz" + canary), []string{"not an absolute"}},
		{"another scheme", Auto, app("unix:///run/" + canary), []string{"not an absolute"}},
		{"no host", Auto, app("http://:80/"), []string{"not an absolute"}},
		{"a user name", Auto, app("http://" + canary + "@host/"), []string{"user name"}},
		{"a fragment", Auto, app("http://host/#" + canary), []string{"fragment"}},
		{"an empty port", Auto, app("http://host:/"), []string{"no port after it"}},
		{"port 0", Auto, app("http://host:0/"), []string{"1 to 65535"}},
		{"port 65536", Auto, app("http://host:65536/"), []string{"1 to 65535"}},
		{"any address", Auto, app("http://0.0.0.0:80/"), []string{"listen"}},
		{"a header of two lines", Auto, environment{getenv: variables(envEndpoint, arcURL, envHeader, canary+"\n")},
			[]string{envHeader, "line end"}},
		{"authority host over TLS", Auto, pod("https://host"), []string{envAuthorityHost, "http://HOST:PORT"}},
		{"authority host with a path", Auto, pod("http://host/metadata"),
			[]string{envAuthorityHost, "http://HOST:PORT"}},
		{"authority host with a query", Auto, pod("http://host?" + canary),
			[]string{envAuthorityHost, "http://HOST:PORT"}},
		{"authority host without a scheme", Auto, pod("host:80"), []string{envAuthorityHost, "not an absolute"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			at, err := findTarget(test.want, test.env)
			if err == nil {
				t.Fatalf("got %+v, want an error", at)
			}
			noCanary(t, err)
			for _, words := range test.words {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("error %q lacks %q", err, words)
				}
			}
		})
	}
}

// detect must choose as azidentity does, or New's promises about the endpoint are void.
func TestDetectAgreesWithAzidentity(t *testing.T) {
	names := []string{envEndpoint, envHeader, envThumbprint, envIMDS, envMSI, envMSISecret}
	ours := map[msal.Source]Endpoint{msal.DefaultToIMDS: IMDS, msal.AzureArc: Arc, msal.AppService: AppService}
	for bits := range 1 << len(names) {
		var set []string
		for i, name := range names {
			t.Setenv(name, "")
			if bits&(1<<i) != 0 {
				set = append(set, name, "x")
				t.Setenv(name, "x")
			}
		}
		theirs, err := msal.GetSource()
		if err != nil {
			t.Fatal(err)
		}
		want, supported := ours[theirs]
		got, err := environment{getenv: variables(set...), himds: fileExists(himdsFile)}.detect()
		if got != want || supported != (err == nil) {
			t.Errorf("with %v: %q, %v; azidentity chooses %s", set, got, err, theirs)
		}
	}
}

func TestNewNamesItself(t *testing.T) {
	t.Parallel()
	if _, err := New(Options{Endpoint: "no"}); err == nil ||
		!strings.HasPrefix(err.Error(), "source managed-identity: ") {
		t.Errorf("got %v", err)
	}
}
