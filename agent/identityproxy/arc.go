package identityproxy

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// ArcKeyFolder is where clients of Azure Arc's form look for the key of a challenge, and nowhere else.
const ArcKeyFolder = "/var/opt/azcmagent/tokens"

const (
	keyLifetime = time.Minute // from a challenge to its answer
	maxKeys     = 64          // at once
)

// keys are the key files of the challenges that are open.
type keys struct {
	folder string

	mu   sync.Mutex // protects what follows
	open []key      // the oldest first
}

type key struct {
	path, secret string
	expires      time.Time
}

// newKeys returns keys in a folder, which it makes where it is missing, once it has written and removed one.
func newKeys(folder string) (*keys, error) {
	if folder == "" {
		folder = ArcKeyFolder
	}
	k := &keys{folder: folder}
	err := os.MkdirAll(folder, 0o755)
	if err == nil {
		_, err = k.issue()
	}
	if err != nil {
		return nil, fmt.Errorf(
			"the form of Azure Arc needs a folder %s in which this user can write (a tmpfs will do): %w", folder, err)
	}
	k.close()
	return k, nil
}

// issue writes a new key, for this user's eyes, and returns its path.
func (k *keys) issue() (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	for len(k.open) > 0 && (len(k.open) >= maxKeys || !k.open[0].expires.After(now)) {
		k.removeLocked(0)
	}
	added := key{path: filepath.Join(k.folder, newSecret()[:32]+".key"), secret: newSecret(),
		expires: now.Add(keyLifetime)}
	f, err := os.OpenFile(added.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(added.secret)
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(added.path)
		return "", err
	}
	k.open = append(k.open, added)
	return added.path, nil
}

// redeem reports whether text is an open key's, and removes that key.
func (k *keys) redeem(text string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	found := -1
	for i := range k.open {
		if sameSecret(text, k.open[i].secret) && k.open[i].expires.After(time.Now()) {
			found = i
		}
	}
	if found < 0 {
		return false
	}
	k.removeLocked(found)
	return true
}

// removeLocked removes a key. One whose file cannot be removed can still not be used again.
func (k *keys) removeLocked(i int) {
	_ = os.Remove(k.open[i].path)
	k.open = append(k.open[:i], k.open[i+1:]...)
}

func (k *keys) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.open) > 0 {
		k.removeLocked(0)
	}
}

func newSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails: it would end the program
	return hex.EncodeToString(b[:])
}

// sameSecret compares two secrets in a time that depends neither on them nor on their lengths.
func sameSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}
