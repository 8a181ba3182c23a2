package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perceptd/agent/iothub/link"
	"perceptd/cmd/perceptd/e2e/harness"
)

// newCertificate returns a certificate that its own key has signed, and the key, in PEM.
func newCertificate(t *testing.T) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "percept-7"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	made, err := x509.CreateCertificate(rand.Reader, &about, &about, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: made}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kept})
}

// newFile writes a file into a folder of its own.
func newFile(t *testing.T, text []byte, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(harness.ShortFolder(t), "file")
	if err := errors.Join(os.WriteFile(path, text, 0o600), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProxyWithAPassword(t *testing.T) {
	t.Parallel()
	const open = "http://user@proxy.example:3128"
	for _, row := range []struct {
		name, proxy, password string
		mode                  os.FileMode
		want                  *url.URL
		says                  string
	}{
		{name: "none"},
		{name: "of nobody", proxy: "http://p:1", want: &url.URL{Scheme: "http", Host: "p:1"}},
		{"with a password", open, secretInIt + "\n", 0o600,
			&url.URL{Scheme: "http", Host: "proxy.example:3128", User: url.UserPassword("user", secretInIt)}, ""},
		{"others read it", open, secretInIt, 0o644, nil, "the proxy's password: /tmp/"},
		{"nothing in it", open, "\n", 0o600, nil, "is empty"},
	} {
		h := IoTHub{Proxy: row.proxy}
		if row.password != "" {
			h.ProxyPassword.File = newFile(t, []byte(row.password), row.mode)
		}
		got, err := h.ProxyURL()
		if (err == nil) != (row.says == "") || err != nil && !strings.Contains(err.Error(), row.says) ||
			(got == nil) != (row.want == nil) || got != nil && got.String() != row.want.String() {
			t.Errorf("%s: %v", row.name, err)
		}
		if err != nil && strings.Contains(err.Error(), secretInIt) || strings.Contains(h.String(), secretInIt) {
			t.Errorf("%s: the password is told: %v, %v", row.name, err, h)
		}
	}
}

func TestCertificatesToTrust(t *testing.T) {
	t.Parallel()
	certificate, key := newCertificate(t)
	if pool, err := (IoTHub{}).Roots(); pool != nil || err != nil {
		t.Errorf("of the system: %v %v", pool, err)
	}
	pool, err := IoTHub{CAFile: newFile(t, certificate, 0o644)}.Roots()
	want := x509.NewCertPool()
	want.AppendCertsFromPEM(certificate)
	if err != nil || !pool.Equal(want) {
		t.Errorf("of a file: %v", err)
	}
	for name, row := range map[string]struct{ path, says string }{
		"a key":           {newFile(t, key, 0o600), "no certificate is in it: it must be PEM"},
		"others write it": {newFile(t, certificate, 0o646), "lets others change how this device is known to IoT Hub"},
		"not there":       {"/nothing/ca.pem", "file does not exist"},
	} {
		if _, err := (IoTHub{CAFile: row.path}).Roots(); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What systemd has not given is named, with the restart that mends it, whichever secret it is.
func TestCredentialsThatSystemdHasNotGiven(t *testing.T) {
	certificate, _ := newCertificate(t)
	folder := harness.ShortFolder(t)
	if err := os.WriteFile(filepath.Join(folder, "set"), []byte(notGiven+"\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct{ name, folder, credential, says string }{
		{"no drop-in", "", "iothub", "systemd gave perceptd no credential iothub: LoadCredential=iothub:FILE must " +
			"stand"},
		{"a drop-in for another", folder, "iothub", "systemd gave perceptd no credential iothub: "},
		{"its file is not there", folder, "set", "systemd's credential set has nothing in it, since the file that " +
			"LoadCredential=set: names was not there when the service started"},
	} {
		t.Setenv(credentialsVariable, row.folder)
		of := Secret{Credential: row.credential}
		isSaid := func(what string, err error) {
			t.Helper()
			missing := (*NotGivenError)(nil)
			if !errors.As(err, &missing) || missing.Name != row.credential ||
				!strings.Contains(err.Error(), row.says) ||
				!strings.Contains(err.Error(), "systemctl restart perceptd") {
				t.Errorf("%s, %s: %v", row.name, what, err)
			}
		}
		isLoginOf := func(what string, h IoTHub) {
			t.Helper()
			_, err := h.Credentials().Login(t.Context())
			isSaid(what, err)
			if bad := (*link.CredentialsError)(nil); !errors.As(err, &bad) {
				t.Errorf("%s, %s: %T is no failure of credentials", row.name, what, err)
			}
			if h.OfSystemd() != row.credential {
				t.Errorf("%s, %s: it is of %q", row.name, what, h.OfSystemd())
			}
		}
		isLoginOf("connection string", IoTHub{ConnectionString: of})
		isLoginOf("key", IoTHub{Certificate: Certificate{
			File: newFile(t, certificate, 0o644), Key: of, Hub: "h.example", Device: "percept-7",
		}})
		_, err := IoTHub{Proxy: "http://user@proxy.example:3128", ProxyPassword: of}.ProxyURL()
		isSaid("proxy's password", err)
	}
}
