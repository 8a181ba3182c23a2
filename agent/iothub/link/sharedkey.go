package link

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
)

// SharedKeyFile is credentials in a file that holds the connection string of a device or module, as the Azure portal
// shows it: HostName=…;DeviceId=…;[ModuleId=…;]SharedAccessKey=…[;GatewayHostName=…].
type SharedKeyFile struct {
	Path string
	Read func(path string) ([]byte, error) // nil: os.ReadFile
}

// Login reads the file.
func (f SharedKeyFile) Login(context.Context) (Login, error) {
	text, err := readSecret(f.Read, f.Path)
	if err != nil {
		return Login{}, err
	}
	defer clear(text)
	l, err := parseConnectionString(string(text))
	if err != nil {
		return Login{}, badCredentials("%s is no connection string of a device: %w", f.Path, err)
	}
	return l, nil
}

// The fields of a connection string.
const (
	fieldHub     = "HostName"
	fieldDevice  = "DeviceId"
	fieldModule  = "ModuleId"
	fieldKey     = "SharedAccessKey"
	fieldGateway = "GatewayHostName"
	fieldX509    = "x509"
	fieldPolicy  = "SharedAccessKeyName"
)

// parseConnectionString returns an error that has no part of text but the names of its fields.
func parseConnectionString(text string) (Login, error) {
	fields, err := splitFields(strings.TrimSpace(text))
	if err != nil {
		return Login{}, err
	}
	l := Login{Identity: Identity{
		Hub: fields[fieldHub], Gateway: fields[fieldGateway], Device: fields[fieldDevice], Module: fields[fieldModule],
	}}
	switch {
	case fields[fieldPolicy] != "":
		return Login{}, fmt.Errorf("it has %s, and so is one of the hub's own: take the device's", fieldPolicy)
	case strings.EqualFold(fields[fieldX509], "true"):
		return Login{}, fmt.Errorf("it says %s=true: name the certificate and its key in the place of it", fieldX509)
	case l.Hub == "" || l.Device == "" || fields[fieldKey] == "":
		return Login{}, fmt.Errorf("it lacks %s", cmp.Or(
			missing(fields, fieldHub), missing(fields, fieldDevice), missing(fields, fieldKey)))
	}
	if err := l.Validate(); err != nil {
		return Login{}, err
	}
	key, err := base64.StdEncoding.DecodeString(fields[fieldKey])
	if err != nil || len(key) == 0 {
		return Login{}, fmt.Errorf("its %s is not base64: copy it anew", fieldKey)
	}
	l.secret = sha256.Sum256(key)
	l.Sign = func(_ context.Context, data []byte) ([]byte, error) {
		mac := hmac.New(sha256.New, key)
		mac.Write(data)
		return mac.Sum(nil), nil
	}
	return l, nil
}

func splitFields(text string) (map[string]string, error) {
	known := []string{fieldHub, fieldDevice, fieldModule, fieldKey, fieldGateway, fieldX509, fieldPolicy}
	fields := make(map[string]string)
	for n, field := range strings.Split(strings.TrimSuffix(text, ";"), ";") {
		written, value, found := strings.Cut(field, "=")
		at := slices.IndexFunc(known, func(name string) bool { return strings.EqualFold(name, written) })
		switch {
		case (!found || at < 0) && n == 0 && strings.Contains(strings.ToLower(field), strings.ToLower(fieldHub)+"="):
			return nil, fmt.Errorf("something stands before %s=: take it away, with quotes at both ends", fieldHub)
		case !found || at < 0:
			return nil, fmt.Errorf("field %d is none of %s", n+1, strings.Join(known, ", "))
		case fields[known[at]] != "":
			return nil, fmt.Errorf("%s is there twice", known[at])
		}
		fields[known[at]] = value
	}
	return fields, nil
}

// missing returns name where fields lacks it.
func missing(fields map[string]string, name string) string {
	if fields[name] == "" {
		return name
	}
	return ""
}
