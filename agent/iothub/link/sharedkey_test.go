package link

import (
	"errors"
	"strings"
	"testing"
)

const testKey = "c2VjcmV0LWNhbmFyeS1vZi1hLXRlc3Q="

func TestConnectionStrings(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Identity{
		"HostName=h.azure-devices.net;DeviceId=cam;SharedAccessKey=" +
			testKey: {Hub: "h.azure-devices.net", Device: "cam"},
		" hostname=h;deviceid=cam;MODULEID=percept;sharedaccesskey=" + testKey + ";\n": {
			Hub: "h", Device: "cam", Module: "percept",
		},
		"HostName=h;DeviceId=cam;SharedAccessKey=" + testKey + ";GatewayHostName=127.0.0.1:18883": {
			Hub: "h", Device: "cam", Gateway: "127.0.0.1:18883",
		},
	} {
		l, err := parseConnectionString(text)
		if err != nil || l.Identity != want || l.Sign == nil {
			t.Errorf("%q: %+v, %v", text, l.Identity, err)
		}
	}
	for text, want := range map[string]string{
		"": "field 1", "HostName=h;DeviceId=cam": "it lacks SharedAccessKey", "DeviceId=cam;SharedAccessKey=" +
			testKey: "it lacks HostName",
		"HostName=h;SharedAccessKey=" + testKey: "it lacks DeviceId",
		`"HostName=h;DeviceId=cam;SharedAccessKey=` + testKey +
			`"`: "something stands before HostName=: ",
		"\ufeffHostName=h;DeviceId=cam;SharedAccessKey=" + testKey: "something stands before " +
			"HostName=: ",
		"export CANARY=HostName=h;DeviceId=cam;SharedAccessKey=" +
			testKey: "something stands before HostName=: ",
		"HostName=h;DeviceId=cam;SharedAccessKey=canary!":                          "not base64",
		"HostName=h;DeviceId=cam;x509=true":                                        "x509=true",
		"HostName=h;SharedAccessKeyName=iothubowner;SharedAccessKey=" + testKey:    "SharedAccessKeyName",
		"HostName=h;DeviceId=a;DeviceId=b;SharedAccessKey=" + testKey:              "twice",
		"HostName=h;DeviceId=cam;Canary=1;SharedAccessKey=" + testKey:              "field 3",
		"HostName=h/x;DeviceId=cam;SharedAccessKey=" + testKey:                     "no host name",
		"HostName=h;DeviceId=a b;SharedAccessKey=" + testKey:                       "device's ID",
		"HostName=h;DeviceId=a;GatewayHostName=g:99999;SharedAccessKey=" + testKey: "port",
	} {
		_, err := parseConnectionString(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
		if err != nil && (strings.Contains(err.Error(), testKey) || strings.Contains(err.Error(), "anary")) {
			t.Errorf("%q: a secret is in %v", text, err)
		}
	}
}

func TestSharedKeyFile(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"": "is empty", strings.Repeat("x", maxCredentials+1): "it is no credential", "canary": "no connection string",
	} {
		_, err := SharedKeyFile{Path: "/etc/percept/iothub", Read: func(string) ([]byte, error) {
			return []byte(text), nil
		}}.Login(t.Context())
		var bad *CredentialsError
		if !errors.As(err, &bad) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	_, err := SharedKeyFile{Path: "/nowhere/iothub"}.Login(t.Context())
	if err == nil || !strings.Contains(err.Error(), "/nowhere/iothub") {
		t.Error(err)
	}
}

func FuzzConnectionString(f *testing.F) {
	f.Add("HostName=h;DeviceId=cam;SharedAccessKey=" + testKey)
	f.Fuzz(func(t *testing.T, text string) {
		l, err := parseConnectionString(text)
		if err == nil && (l.Validate() != nil || l.Sign == nil) {
			t.Errorf("%q is taken", text)
		}
	})
}

// Where fields are mixed up the key stands in the place of another, and no error repeats it.
func TestMixedUpConnectionStrings(t *testing.T) {
	t.Parallel()
	const canary = "c2VjcmV0Y2FuYXJ5/c2VjcmV0Y2FuYXJ5"
	for _, text := range []string{
		"HostName=hub.test;DeviceId=" + canary + ";SharedAccessKey=cam1",
		"HostName=" + canary + ";DeviceId=cam;SharedAccessKey=aaaa",
		"HostName=hub.test;DeviceId=cam SharedAccessKey=" + canary + ";SharedAccessKey=aaaa",
		"HostName=hub.test,SharedAccessKey=" + canary + ";DeviceId=cam;SharedAccessKey=aaaa",
		"HostName=hub.test;DeviceId=cam;SharedAccessKey=aaaa;GatewayHostName=gw\nHostName=hub.test,SharedAccessKey=" +
			canary,
		"HostName=hub.test;DeviceId=cam;SharedAccessKey=aaaa;GatewayHostName=gw:" + canary,
		"HostName=hub.test;DeviceId=cam;SharedAccessKey=aaaa;ModuleId=m\r\nSharedAccessKey=" + canary,
		"HostName=hub.test;DeviceId=cam;SharedAccessKey=" + canary + "!",
		canary + "=x;HostName=hub.test;DeviceId=cam;SharedAccessKey=aaaa",
		"HostName=hub.test;DeviceId=cam;SharedAccessKeyName=" + canary + ";SharedAccessKey=aaaa",
		"HostName=hub.test;DeviceId=cam;x509=" + canary + ";SharedAccessKey=!",
	} {
		if _, err := parseConnectionString(text); err == nil || strings.Contains(err.Error(), "c2VjcmV0") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
