package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
// none.
func (s Secret) Path(credentials string) (string, error) {
	switch {
	case s.Credential == "":
		return s.File, nil
	case credentials == "":
		return "", fmt.Errorf("systemd gave perceptd no credential %s: write LoadCredential=%s:FILE below [Service] in a "+
			"drop-in (systemctl edit perceptd), and restart perceptd", s.Credential, s.Credential)
	}
	return filepath.Join(credentials, s.Credential), nil
}

// guardsIoTHub is what these files say.
const guardsIoTHub = "how this device is known to IoT Hub"

// maxSecret bounds a secret's file, in bytes.
const maxSecret = 64 << 10

// ReadSecret returns what is in a file that nobody but root, this process's user and its group can read, and nobody but
// the two users could have written. The error says what is wrong with it, and nothing of what is in it.
func ReadSecret(path string) ([]byte, error) {
	return readGuarded(path, &trust{self: os.Geteuid(), guards: guardsIoTHub, secret: true})
}

// ReadPublic is ReadSecret of what others may read, such as a certificate.
func ReadPublic(path string) ([]byte, error) {
	return readGuarded(path, &trust{self: os.Geteuid(), guards: guardsIoTHub})
}

// readGuarded is both, with what files are trusted.
func readGuarded(path string, by *trust) ([]byte, error) {
	most := maxFile
	if by.secret {
		most = maxSecret
	}
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
