package keep

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

const (
	rootName    = "loopback-secret"
	onlyForOurs = 0o077 // what a mode may not allow: anything, to anybody else
)

// LoopbackRoot returns the root of the loopback listener's header secrets, which is kept in dir: 32 random bytes, made when
// there are none. A file that cannot be used is moved aside, and another root takes its place: the error then says so,
// beside the new root. With an error and no root there is nowhere to keep one.
func LoopbackRoot(dir string) (*Key, error) {
	if err := prepare(dir, rootName); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, rootName)
	root, err := readRoot(path)
	var kernel *fs.PathError
	switch {
	case err == nil:
		return root, nil
	case errors.Is(err, fs.ErrNotExist):
		return makeRoot(path)
	case errors.As(err, &kernel):
		return nil, err // it may be well
	}
	aside := moveAside(path, err)
	root, err = makeRoot(path)
	if err != nil {
		return nil, errors.Join(aside, err)
	}
	return root, fmt.Errorf("every header secret is another from now on: %w", aside)
}

func readRoot(path string) (*Key, error) {
	text, err := read(path, onlyForOurs, len(Key{}))
	defer clear(text)
	if err != nil {
		return nil, err
	}
	var root Key
	if copy(root[:], text) != len(root) {
		return nil, fmt.Errorf("it has %d bytes, not %d", len(text), len(root))
	}
	if root == (Key{}) {
		return nil, errors.New("it is all zeros") // as some file systems leave a file at a power cut
	}
	return &root, nil
}

func makeRoot(path string) (*Key, error) {
	var root Key
	_, _ = rand.Read(root[:]) // never fails: it would end the program
	if err := replace(path, root[:]); err != nil {
		return nil, err
	}
	return &root, nil
}
