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
	keyLife = time.Minute // from a challenge to its answer
	maxKeys = 64          // at once
)

// keys are the files of the challenges that are open.
type keys struct {
	folder string

	mu   sync.Mutex // protects what follows
	open []key      // the oldest first
}

type key struct {
	path, text string
	ends       time.Time
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
		return nil, fmt.Errorf("the form of Azure Arc needs a folder %s in which this user can write (a tmpfs will do): %w", folder, err)
	}
	k.close()
	return k, nil
}

// issue writes a new key, for this user's eyes, and returns its path.
func (k *keys) issue() (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	for len(k.open) > 0 && (len(k.open) >= maxKeys || !k.open[0].ends.After(now)) {
		k.drop(0)
	}
	one := key{path: filepath.Join(k.folder, randomHex()[:32]+".key"), text: randomHex(), ends: now.Add(keyLife)}
	f, err := os.OpenFile(one.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(one.text)
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(one.path)
		return "", err
	}
	k.open = append(k.open, one)
	return one.path, nil
}

// redeem reports whether text is an open key's. That key is none any more.
func (k *keys) redeem(text string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	found := -1
	for i := range k.open {
		if same(text, k.open[i].text) && k.open[i].ends.After(time.Now()) {
			found = i
		}
	}
	if found < 0 {
		return false
	}
	k.drop(found)
	return true
}

// drop forgets a key. One whose file cannot be removed is of no use all the same.
func (k *keys) drop(i int) {
	_ = os.Remove(k.open[i].path)
	k.open = append(k.open[:i], k.open[i+1:]...)
}

func (k *keys) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.open) > 0 {
		k.drop(0)
	}
}

func randomHex() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails: it would end the program
	return hex.EncodeToString(b[:])
}

// same compares two secrets in a time that tells nothing of them, nor of their lengths.
func same(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}
