package source

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"perceptd/tokencache"
)

const (
	arcKeyDir   = "/var/opt/azcmagent/tokens" // azidentity accepts no other
	arcKeyBytes = 4096
)

// readChallenge reads the key file that the Arc agent's challenge names: a process that can read it may ask
// for tokens. A server that poses as the agent could name any file, so the file must be a plain one
// directly in dir. azidentity opens it again by name; the transport compares what it then sends with
// what was read here.
func readChallenge(headers []string, dir string) (tokencache.Secret, *tokencache.FetchError) {
	path, ok := keyPath(headers, dir)
	if !ok {
		return tokencache.Secret{}, malformed(
			"the challenge does not name a .key file in %s: what answers is not the Azure Arc agent", dir)
	}
	key, err := readKey(path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return tokencache.Secret{}, &tokencache.FetchError{Kind: tokencache.Refused,
			Detail: "the Arc key file " + path +
				" may not be read: add the user that perceptd runs as to the group himds"}
	case errors.Is(err, fs.ErrNotExist):
		return tokencache.Secret{}, malformed(
			"the Arc key file %s does not exist: does perceptd see the agent's files?", path)
	case err != nil:
		return tokencache.Secret{}, malformed("the Arc key file %s %v", path, err)
	}
	return tokencache.NewSecret(key), nil
}

// keyPath takes a challenge apart as strictly as the strictest client does.
func keyPath(headers []string, dir string) (string, bool) {
	if len(headers) != 1 {
		return "", false
	}
	path, ok := strings.CutPrefix(headers[0], "Basic realm=")
	if !ok || len(path) > 255 || filepath.Dir(path) != dir || filepath.Clean(path) != path {
		return "", false
	}
	name, ok := strings.CutSuffix(filepath.Base(path), ".key")
	if !ok || name == "" {
		return "", false
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`"'=,;\`, c) >= 0 {
			return "", false
		}
	}
	return path, true
}

// readKey reads a small plain file, whatever stands in its place: a link, a pipe or a device is
// neither followed nor waited for. The error completes "the key file …", unless it wraps a fs one.
func readKey(path string) (string, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", errors.New("is not a regular file")
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	if now, err := f.Stat(); err != nil || !os.SameFile(info, now) {
		return "", errors.New("was replaced while it was opened")
	}
	key, err := io.ReadAll(io.LimitReader(f, arcKeyBytes+1))
	switch {
	case err != nil:
		return "", err
	case len(key) > arcKeyBytes:
		return "", errors.New("is larger than 4096 bytes")
	case len(key) == 0:
		return "", errors.New("is empty")
	case !headerSafe(string(key)) || strings.TrimSpace(string(key)) != string(key):
		return "", errors.New("holds a line end, or what else no HTTP header can carry")
	}
	return string(key), nil
}
