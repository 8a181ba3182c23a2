package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// cacheKeyName is the systemd credential's name, which is sealed with the key: no other credential can take its place.
const cacheKeyName = "percept-cache-key"

// cacheKey is where the key is that perceptd's kept tokens are sealed with: in the clear, or beside it as a credential.
type cacheKey struct{ file string }

func (k cacheKey) credential() string { return k.file + ".cred" }

// seal makes a credential of a key, and sees that it can be opened again.
func (a *app) seal(ctx context.Context, secret []byte, with string) ([]byte, error) {
	sealed, err := a.pipeProgram(ctx, secret, "systemd-creds", "encrypt", "--name="+cacheKeyName, "--with-key="+with,
		"-", "-")
	if err != nil {
		return nil, err
	}
	opened, err := a.unseal(ctx, sealed)
	if err == nil && !bytes.Equal(opened, secret) {
		err = errors.New("systemd-creds opened another key than it had sealed")
	}
	return sealed, err
}

func (a *app) unseal(ctx context.Context, sealed []byte) ([]byte, error) {
	return a.pipeProgram(ctx, sealed, "systemd-creds", "decrypt", "--name="+cacheKeyName, "-", "-")
}

// needsRoot adds a hint to an error for want of permission.
func needsRoot(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return &hintedError{err, "the cache's key is root's business: run it with sudo"}
	}
	return err
}

// writeAtomically writes a file that is there whole or not at all, also after a loss of power. A gid of -1 leaves the
// group.
func writeAtomically(path string, data []byte, mode fs.FileMode, gid int) error {
	folder := filepath.Dir(path)
	if err := makeFolder(folder); err != nil {
		return err
	}
	file, err := os.CreateTemp(folder, ".cache-key-*")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name()) // which after the rename is nothing
	_, err = file.Write(data)
	if gid >= 0 { // in the unit's sandbox no owner can be changed
		err = errors.Join(err, file.Chown(-1, gid))
	}
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return err
	}
	return syncFolder(folder)
}

// makeFolder makes a folder, and those above it, where they are not there, open to be looked into whatever the umask
// is: perceptd has to reach its configuration, which is in the same folder.
func makeFolder(path string) error {
	switch _, err := os.Stat(path); {
	case err == nil:
		return nil // or a file, on which the next step fails
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := makeFolder(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); errors.Is(err, fs.ErrExist) {
		return nil // another process was faster
	} else if err != nil {
		return err
	}
	return os.Chmod(path, 0o755)
}

func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}
