package simulator

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// DefaultArcKeyDir is where Arc's key files are and the only place where Azure's clients accept
	// one. Only root can make it.
	DefaultArcKeyDir = "/var/opt/azcmagent/tokens"

	arcKeyLife     = 5 * time.Minute // in real time, in which clients live
	maxArcKey      = 4096            // bytes that a client accepts
	maxPendingKeys = 256             // files at once
)

// keyStore makes the files by which a caller proves to Arc's agent that it may read their directory.
type keyStore struct {
	dir  string
	made []string // directories that did not exist before, outermost first
	root *os.Root

	mu     sync.Mutex // protects what follows
	keys   []*key     // oldest first
	closed bool
}

// key is a file that has not been used yet.
type key struct {
	text   string // the file's content
	remove func() // takes the file away
	expiry *time.Timer
}

// openKeyStore makes the directory where it is missing.
func openKeyStore(dir string) (*keyStore, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(dir, "=\"\r\n") {
		return nil, fmt.Errorf("the key directory %q cannot be written in a challenge", dir)
	}
	k := &keyStore{dir: dir}
	if err := k.makeDir(dir); err != nil {
		k.removeDirs()
		return nil, err
	}
	if k.root, err = os.OpenRoot(dir); err != nil {
		k.removeDirs()
		return nil, err
	}
	return k, nil
}

func (k *keyStore) makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := k.makeDir(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o750); err != nil {
		return err
	}
	k.made = append(k.made, dir)
	return os.Chmod(dir, 0o750) // a daemon's umask is often 077, and callers are of the directory's group
}

// removeDirs removes the directories that makeDir made, unless there is something in them by now.
func (k *keyStore) removeDirs() {
	for _, dir := range slices.Backward(k.made) {
		_ = os.Remove(dir)
	}
}

// issue makes a key file and returns its path, in the manner that a fault of that kind asks for.
func (k *keyStore) issue(kind FaultKind) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return "", fs.ErrClosed
	}
	if len(k.keys) == maxPendingKeys {
		k.dropLocked(0)
	}
	name := newGUID() + ".key"
	text := rand.Text() + rand.Text()
	path := filepath.Join(k.dir, name)
	remove := func() { _ = k.root.Remove(name) }
	var err error
	switch kind {
	case FaultKeyOutside:
		path, remove, err = writeOutside(name, text)
	case FaultKeySymlink:
		target, removeTarget, failure := writeOutside(name, text)
		remove = func() { _ = k.root.Remove(name); removeTarget() }
		if err = failure; err == nil {
			err = k.root.Symlink(target, name)
		}
	case FaultKeyDirectory:
		err = k.root.Mkdir(name, 0o750)
	case FaultKeyFIFO:
		err = syscall.Mkfifo(path, 0o640)
		remove = func() { defer releaseReaders(path)(); _ = k.root.Remove(name) }
	case FaultKeyTooBig:
		text += strings.Repeat("A", maxArcKey)
		err = k.write(name, text)
	default:
		err = k.write(name, text)
	}
	if err != nil {
		remove()
		return "", err
	}
	added := &key{text: text, remove: remove}
	added.expiry = time.AfterFunc(arcKeyLife, func() { k.redeem(text) })
	k.keys = append(k.keys, added)
	return path, nil
}

// write makes a key file, without a newline at its end since clients send the content as it is.
func (k *keyStore) write(name, text string) error {
	f, err := k.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Chmod(0o640), f.Close())
}

// writeOutside makes a key file in a new directory of its own.
func writeOutside(name, text string) (path string, remove func(), err error) {
	dir, err := os.MkdirTemp("", "simulated-arc-")
	if err != nil {
		return "", func() {}, err
	}
	path = filepath.Join(dir, name)
	return path, func() { _ = os.RemoveAll(dir) }, os.WriteFile(path, []byte(text), 0o640)
}

// releaseReaders gives processes that read a named pipe, or are blocked opening it, an end of file once the function
// that it returns is called. Until then the pipe has a writer, so that no process that opens it blocks before its name
// is gone.
func releaseReaders(path string) (free func()) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return func() {}
	}
	return func() { _ = f.Close() }
}

// redeem reports whether text is the content of a key file, and removes that file.
func (k *keyStore) redeem(text string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := slices.IndexFunc(k.keys, func(o *key) bool { return sameText(o.text, text) })
	if i < 0 {
		return false
	}
	k.dropLocked(i)
	return true
}

func (k *keyStore) dropLocked(i int) {
	k.keys[i].expiry.Stop()
	k.keys[i].remove()
	k.keys = slices.Delete(k.keys, i, i+1)
}

// close removes every file and directory that the store made.
func (k *keyStore) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.keys) > 0 {
		k.dropLocked(0)
	}
	if !k.closed {
		k.closed = true
		_ = k.root.Close()
		k.removeDirs()
	}
}
