package source

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
)

// Endpoint is a form in which a host serves managed-identity tokens.
type Endpoint string

const (
	// Auto leaves the choice to what azidentity finds in the environment. It is the zero Endpoint's meaning too.
	Auto       Endpoint = "auto"
	Arc        Endpoint = "arc"         // the Azure Arc agent, himds
	AppService Endpoint = "app-service" // protocol 2019-08-01
	IMDS       Endpoint = "imds"        // an Azure VM's instance metadata service
)

// What azidentity reads to choose a form, and the one variable that it alone among the SDKs ignores.
const (
	envEndpoint      = "IDENTITY_ENDPOINT"
	envHeader        = "IDENTITY_HEADER"
	envThumbprint    = "IDENTITY_SERVER_THUMBPRINT"
	envIMDS          = "IMDS_ENDPOINT"
	envMSI           = "MSI_ENDPOINT"
	envMSISecret     = "MSI_SECRET"
	envAuthorityHost = "AZURE_POD_IDENTITY_AUTHORITY_HOST"
	himdsFile        = "/opt/azcmagent/bin/himds"

	defaultArcURL = "http://127.0.0.1:40342/metadata/identity/oauth2/token"
	imdsURL       = "http://169.254.169.254/metadata/identity/oauth2/token"
)

// environment is what azidentity chooses by, read once.
type environment struct {
	getenv func(string) string
	himds  bool // himdsFile exists
}

// processEnvironment is this process's. Its variables stay as they are; the agent may be installed, or removed.
func processEnvironment() environment {
	_, err := os.Stat(himdsFile)
	return environment{getenv: os.Getenv, himds: err == nil}
}

// target is the one endpoint that a source talks to.
type target struct {
	form   Endpoint
	scheme string // of the URL that azidentity asks
	host   string // its host, with the port if the URL has one
	dial   string // host:port that is connected to instead of whatever the URL says
	note   string // what in the environment may surprise a technician; empty for nothing
}

// findTarget finds the endpoint of the form wanted, or says what keeps azidentity from using it.
func findTarget(want Endpoint, env environment) (target, error) {
	switch want {
	case Auto, "", Arc, AppService, IMDS:
	default:
		return target{}, fmt.Errorf("endpoint %q is none of auto, arc, app-service, imds", string(want))
	}
	form, err := env.detect()
	if err != nil {
		return target{}, err
	}
	if want != Auto && want != "" && want != form {
		return target{}, env.mismatch(want, form)
	}
	return env.target(form)
}

// expected is the target that is wanted, where azidentity would use another. Of what cannot be told it has the form
// alone.
func (env environment) expected(want Endpoint) target {
	at, err := env.target(want)
	if err != nil {
		return target{form: want}
	}
	return at
}

// target returns the target of a form.
func (env environment) target(form Endpoint) (target, error) {
	switch form {
	case AppService:
		if !headerSafe(env.getenv(envHeader)) {
			return target{}, errors.New(envHeader +
				" holds characters that no HTTP header can carry: is there a line end in it?")
		}
		return parseTarget(form, envEndpoint, env.getenv(envEndpoint))
	case Arc:
		if u := env.getenv(envEndpoint); u != "" {
			return parseTarget(form, envEndpoint, u)
		}
		return parseTarget(form, "the Arc agent's address", defaultArcURL)
	case IMDS:
		return env.imdsTarget()
	}
	return target{}, fmt.Errorf("endpoint %s is of no form", form)
}

// detect chooses as azidentity does, and refuses what this package does not speak.
func (env environment) detect() (Endpoint, error) {
	set := func(name string) bool { return env.getenv(name) != "" }
	switch {
	case set(envEndpoint) && set(envHeader) && set(envThumbprint):
		return "", unsupported("Service Fabric", envThumbprint)
	case set(envEndpoint) && set(envHeader):
		return AppService, nil
	case set(envMSI) && set(envMSISecret):
		return "", unsupported("Azure Machine Learning", envMSI+" and "+envMSISecret)
	case set(envMSI):
		return "", unsupported("Cloud Shell", envMSI)
	case set(envEndpoint) && set(envIMDS), env.himds:
		return Arc, nil
	}
	return IMDS, nil
}

func unsupported(platform, variables string) error {
	return fmt.Errorf("%s in the environment makes azidentity choose %s, which is not supported: unset it",
		variables, platform)
}

// mismatch says why azidentity uses the form found and what makes it use the one wanted.
func (env environment) mismatch(want, found Endpoint) error {
	byFile := found == Arc && (env.getenv(envEndpoint) == "" || env.getenv(envIMDS) == "")
	var because string
	switch {
	case found == AppService:
		because = envEndpoint + " and " + envHeader + " are set"
	case byFile:
		because = "the Azure Arc agent is installed (" + himdsFile + ")"
	case found == Arc:
		because = envEndpoint + " and " + envIMDS + " are set"
	default:
		because = "the environment names no other"
	}
	var remedy string
	switch {
	case want == AppService:
		remedy = "set both " + envEndpoint + " and " + envHeader
	case want == Arc && found == AppService:
		remedy = "unset " + envHeader + " and set " + envIMDS
	case want == Arc:
		remedy = "set both " + envEndpoint + " (" + defaultArcURL + ") and " + envIMDS + ", or install the agent"
	case byFile:
		remedy = "azidentity cannot be told to pass over the agent, so choose endpoint arc or remove the agent"
	case found == AppService:
		remedy = "unset " + envEndpoint + " and " + envHeader
	default:
		remedy = "unset " + envEndpoint + " and " + envIMDS
	}
	return fmt.Errorf("endpoint %s cannot be used, azidentity chooses %s since %s: %s", want, found, because, remedy)
}

// imdsTarget is the metadata service, whose address azidentity has built in: another one is dialled in its stead.
func (env environment) imdsTarget() (target, error) {
	at, err := parseTarget(IMDS, "the metadata service's address", imdsURL)
	if err != nil {
		return target{}, err
	}
	if env.getenv(envEndpoint) != "" {
		at.note = envEndpoint + " is set without " + envHeader + " or " + envIMDS + ", so azidentity ignores it"
	}
	host := env.getenv(envAuthorityHost)
	if host == "" {
		return at, nil
	}
	other, err := parseTarget(IMDS, envAuthorityHost, host)
	if err != nil {
		return target{}, err
	}
	u, err := url.Parse(host)
	if err != nil || u.Scheme != "http" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.ForceQuery {
		return target{}, errors.New(envAuthorityHost + " is not of the form http://HOST:PORT")
	}
	at.dial = other.dial
	return at, nil
}

// parseTarget checks a URL before azidentity sends a secret to it. Its errors name where the URL came
// from and do not repeat it: a query in it may be secret.
func parseTarget(form Endpoint, name, text string) (target, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil, u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", u.Opaque != "":
		return target{}, fmt.Errorf("%s is not an absolute http or https URL", name)
	case u.User != nil, u.Fragment != "":
		return target{}, fmt.Errorf("%s carries a user name or a fragment, which has no place there", name)
	}
	port := u.Port()
	if port == "" {
		if strings.HasSuffix(u.Host, ":") {
			return target{}, fmt.Errorf("%s has a colon and no port after it", name)
		}
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return target{}, fmt.Errorf("%s has a port outside 1 to 65535", name)
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && ip.IsUnspecified() {
		return target{}, fmt.Errorf("%s is an address to listen on, not one to connect to", name)
	}
	return target{form: form, scheme: u.Scheme, host: u.Host, dial: net.JoinHostPort(u.Hostname(), port)}, nil
}

// serves reports whether u is at this place.
func (at target) serves(u *url.URL) bool { return u.Scheme == at.scheme && u.Host == at.host }

// advice is the next step for a technician when the endpoint does not answer.
func (at target) advice() string {
	var next string
	switch at.form {
	case Arc:
		next = "is himds running? systemctl status himdsd"
	case AppService:
		next = "does " + envEndpoint + " name the right host, and is its server running?"
	default:
		next = "is this an Azure VM? elsewhere install Azure Arc or set " + envEndpoint + " and " + envHeader
	}
	if at.note != "" {
		next += "; " + at.note
	}
	return next
}

// headerSafe reports whether a header's value may hold s.
func headerSafe(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' && s[i] != '\t' || s[i] == 0x7f {
			return false
		}
	}
	return true
}
