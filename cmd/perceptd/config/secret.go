package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Secret is where a secret is: in a file, or in a credential that systemd gives the service. Zero: there is none.
type Secret struct{ File, Credential string }

// String says where the secret is.
func (s Secret) String() string {
	if s.Credential != "" {
		return "systemd's credential " + s.Credential
	}
	return s.File
}

// Path returns the file that holds the secret, which for a credential is in the folder credentials; empty: systemd gave
// none, and the error is a *NotGivenError.
func (s Secret) Path(credentials string) (string, error) {
	switch {
	case s.Credential == "":
		return s.File, nil
	case credentials == "":
		return "", &NotGivenError{Name: s.Credential}
	}
	return filepath.Join(credentials, s.Credential), nil
}

// NotGivenError is that systemd has not given perceptd a credential, which it does when the service starts.
type NotGivenError struct {
	Name  string // of the credential
	Empty bool   // it gave what the drop-in's SetCredential= says where the credential's file is not there
}

func (e *NotGivenError) Error() string {
	if e.Empty {
		return fmt.Sprintf("systemd's credential %s has nothing in it, since the file that LoadCredential=%s: names "+
			"was not there when the service started: write that file, then systemctl restart perceptd", e.Name, e.Name)
	}
	return fmt.Sprintf("systemd gave perceptd no credential %s: LoadCredential=%s:FILE must stand below [Service] in "+
		"a drop-in (systemctl edit perceptd); then systemctl restart perceptd, since systemd gives credentials when "+
		"the service starts", e.Name, e.Name)
}

// notGiven is what the drop-in that comes with perceptd sets a credential to whose file is not there.
const notGiven = "none"

// given judges what was read of a credential in the folder of systemd's.
func (s Secret) given(text []byte, err error) ([]byte, error) {
	switch {
	case s.Credential == "":
	case errors.Is(err, fs.ErrNotExist):
		return nil, &NotGivenError{Name: s.Credential}
	case err == nil && strings.TrimSpace(string(text)) == notGiven:
		return nil, &NotGivenError{Name: s.Credential, Empty: true}
	}
	return text, err
}

// guardsIoTHub is what these files say.
const guardsIoTHub = "how this device is known to IoT Hub"

// maxSecret bounds a secret's file, in bytes.
const maxSecret = 64 << 10

// files reads the files that [iothub] names, for this process or for another user who is to read them.
type files struct {
	self   int     // beside root, who may own them
	reader *reader // nil: nobody but this process reads them
}

// processFiles reads them for this process.
func processFiles() files { return files{self: os.Geteuid()} }

// secret returns what is in a file that nobody but root, this process's user and its group can read, and nobody but
// the two users could have written. The error says what is wrong with it, and nothing of what is in it.
func (f files) secret(path string) ([]byte, error) {
	return f.read(path, maxSecret, &trust{self: f.self, reader: f.reader, guards: guardsIoTHub, secret: true})
}

// public is secret of what others may read, such as a certificate.
func (f files) public(path string) ([]byte, error) {
	return f.read(path, maxFile, &trust{self: f.self, reader: f.reader, guards: guardsIoTHub})
}

func (f files) read(path string, most int, by *trust) ([]byte, error) {
	text, mode, err := readTrusted(path, most, by)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
	case err != nil:
		return nil, err
	case len(by.shared) > 0:
		open := by.shared[0]
		return nil, fmt.Errorf("%s: mode %04o lets group %s change %s: chmod g-w %s",
			open.path, open.mode, groupName(open.gid), by.guards, open.path)
	case by.secret && mode.Perm()&0o007 != 0:
		return nil, fmt.Errorf("%s: mode %04o lets others read a secret: chmod o= %s", path, mode.Perm(), path)
	}
	return text, nil
}
