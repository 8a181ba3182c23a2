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

// LoopbackRoot returns the root of the loopback listener's header secrets, which is kept in folder: 32 random bytes,
// made when there are none. A file that cannot be used is moved aside, and another root takes its place: the error then
// says so, beside the new root. With an error and no root there is nowhere to keep one, or the one that is kept cannot
// be read now.
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
