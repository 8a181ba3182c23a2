package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// newSecret writes a secret into a folder that others may look into.
func newSecret(t *testing.T, mode os.FileMode) string {
	t.Helper()
	folder := harness.ShortFolder(t)
	path := filepath.Join(folder, "iothub")
	if err := errors.Join(os.Chmod(folder, 0o755), os.WriteFile(path, []byte(secretInIt), 0o600),
		os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSecrets(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		mode   os.FileMode
		spoil  func(path string) error
		says   string // empty: it is read
		public bool   // others may read it, and it is read
	}{
		"its owner's":            {mode: 0o600},
		"as systemd gives one":   {mode: 0o400},
		"of a group that reads":  {mode: 0o640},
		"others read it":         {mode: 0o644, says: ": mode 0644 lets others read a secret: chmod o= ", public: true},
		"others may execute it":  {mode: 0o601, says: ": mode 0601 lets others read a secret: chmod o= ", public: true},
		"of a group that writes": {mode: 0o660, says: " change how this device is known to IoT Hub: chmod g-w "},
		"others write it": {mode: 0o602, says: ": mode 0602 lets others change how this device is known to " +
			"IoT "},
		"others write its folder": {0o600, func(p string) error { return os.Chmod(filepath.Dir(p), 0o757) },
			": mode 0757 lets others change", false},
		"it is not there": {0o600, os.Remove, ": file does not exist", false},
		"a folder": {0o600, func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) },
			": not a regular file", false},
		"too large": {0o600, func(p string) error { return os.WriteFile(p, make([]byte, maxFile+1), 0o600) },
			": larger than ", false},
	} {
		path := newSecret(t, row.mode)
		if row.spoil != nil {
			if err := row.spoil(path); err != nil {
				t.Fatal(err)
			}
		}
		text, err := processFiles().secret(path)
		if row.says == "" && (err != nil || string(text) != secretInIt) {
			t.Errorf("%s: %v", name, err)
		}
		if row.says != "" && (err == nil || len(text) > 0 || !strings.Contains(err.Error(), row.says) ||
			!strings.Contains(err.Error(), filepath.Dir(path))) {
			t.Errorf("%s: %v\nwant %s", name, err, row.says)
		}
		if text, err := processFiles().public(path); (err == nil && string(text) == secretInIt) != (row.says == "" ||
			row.public) {
			t.Errorf("%s, of what is no secret: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), secretInIt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSecretOfAnotherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		return // only root can give files away
	}
	path := newSecret(t, 0o600)
	if err := os.Chown(path, 4711, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := processFiles().secret(path); err == nil || !strings.Contains(err.Error(),
		"its owner, user 4711 (mode 0600), could change how this device is known to IoT Hub: chown root "+path) {
		t.Errorf("%v", err)
	}
	if _, err := (files{self: 4711}).secret(path); err != nil {
		t.Errorf("of the service's user: %v", err)
	}
}

// What the service's user cannot read is found by root, with what mends it without letting all others read it.
func TestSecretThatTheServiceCannotRead(t *testing.T) {
	t.Parallel()
	path := newSecret(t, 0o600)
	service := &reader{name: "service", uid: 4_000_000_017}
	by := files{self: os.Geteuid(), reader: service}
	_, err := by.secret(path)
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "user service cannot read it (owner ") ||
		!strings.HasSuffix(err.Error(), ", mode 0600): have systemd give it as a credential, or let a group of user "+
			"service read it: chgrp GROUP "+path+" && chmod 640 "+path) {
		t.Errorf("%v", err)
	}
	service.groups = []uint32{uint32(os.Getegid())}
	if _, err := by.secret(path); err == nil || !strings.HasSuffix(err.Error(),
		": chgrp "+groupName(uint32(os.Getegid()))+" "+path+" && chmod 640 "+path) {
		t.Errorf("of a user who has groups: %v", err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := by.secret(path); err != nil {
		t.Errorf("as it says: %v", err)
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		secret      Secret
		credentials string
		want, says  string
	}{
		{Secret{File: "/etc/percept/iothub"}, "", "/etc/percept/iothub", ""},
		{Secret{Credential: "iothub"}, "/run/credentials/perceptd.service",
			"/run/credentials/perceptd.service/iothub", ""},
		{Secret{Credential: "iothub"}, "", "",
			"systemd gave perceptd no credential iothub: LoadCredential=iothub:FILE must stand below [Service] in a " +
				"drop-in"},
	} {
		path, err := row.secret.Path(row.credentials)
		if path != row.want || (err == nil) != (row.says == "") ||
			err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("%v: %q %v", row.secret, path, err)
		}
	}
}
