package store

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
)

const (
	loopbackSecretName = "loopback-secret"
	onlyForOurs        = 0o077 // what a mode may not allow: anything, to anybody else
)

// LoopbackSecret returns the secret from which the loopback listener's header secrets are derived: 32 random bytes in a
// file of folder, made if there is none. A file that cannot be used is moved aside, and a new secret takes its place:
// the error then says so, beside the new one. An error without a secret says that none can be kept, or that the one on
// the disk cannot be read now.
func LoopbackSecret(folder Folder) (*Key, error) {
	root, err := readLoopbackSecret(folder)
	_, spoilt := errors.AsType[*SpoiltError](err)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return makeLoopbackSecret(folder)
	case !spoilt:
		return root, err
	}
	aside := moveAside(folder, loopbackSecretName, err)
	if aside.Stays != nil { // it is not written over
		return nil, aside
	}
	root, err = makeLoopbackSecret(folder)
	if err != nil {
		return nil, errors.Join(aside, err)
	}
	return root, fmt.Errorf("every header secret is another from now on: %w", aside)
}

func readLoopbackSecret(folder Folder) (*Key, error) {
	text, err := folder.Read(loopbackSecretName, onlyForOurs, len(Key{}))
	defer clear(text)
	if loose, ok := errors.AsType[*LooseError](err); ok { // who has read it can make every secret
		return nil, &SpoiltError{Name: loopbackSecretName, Why: loose.Why}
	}
	if err != nil {
		return nil, err
	}
	var root Key
	if copy(root[:], text) != len(root) {
		why := fmt.Errorf("it has %d bytes, not %d", len(text), len(root))
		return nil, &SpoiltError{Name: loopbackSecretName, Why: why}
	}
	if root == (Key{}) { // as some file systems leave a file at a power cut
		return nil, &SpoiltError{Name: loopbackSecretName, Why: errors.New("it is all zeros")}
	}
	return &root, nil
}

func makeLoopbackSecret(folder Folder) (*Key, error) {
	var root Key
	_, _ = rand.Read(root[:]) // never fails: it would end the program
	if err := folder.Replace(loopbackSecretName, root[:]); err != nil {
		return nil, err
	}
	return &root, nil
}
