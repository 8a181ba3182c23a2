package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Key is the secret that the tokens' file is sealed with. It prints as "[key]" under every fmt verb, in JSON and as
// text, but not in an unexported field of a struct that is printed whole: keep it in none.
type Key [32]byte

const redacted = "[key]"

func (Key) String() string                 { return redacted }
func (Key) GoString() string               { return redacted }
func (Key) Format(f fmt.State, _ rune)     { _, _ = f.Write([]byte(redacted)) }
func (Key) MarshalText() ([]byte, error)   { return []byte(redacted), nil }
func (Key) MarshalBinary() ([]byte, error) { return []byte(redacted), nil }

const (
	// keyCredential is the systemd credential that is the key of the tokens' file.
	keyCredential = "percept-cache-key"
	// openedKey is that key where perceptd-cache-key.service has opened it.
	openedKey = "/run/percept-cache-key/key"
	// waitingFile is why that service has not opened it yet, in a line, while it tries it again.
	waitingFile = "/run/percept-cache-key/waiting"
	// longestWhy bounds that line.
	longestWhy = 300
)

// UnopenedKeyError says that a key was made that is sealed, and is not open. It may be opened later.
type UnopenedKeyError struct {
	path    string // of the sealed key
	waiting string // why it is tried again; empty: it is not
}

func (e *UnopenedKeyError) Error() string {
	if e.waiting != "" {
		return fmt.Sprintf("the key to seal them with, %s, is not open yet: %s", e.path, e.waiting)
	}
	return fmt.Sprintf("the key to seal them with, %s, was not opened: systemctl status perceptd-cache-key tells why",
		e.path)
}

// Remedy says what a person does about it.
func (e *UnopenedKeyError) Remedy() string {
	if e.waiting != "" {
		return "wait: perceptd-cache-key tries it again"
	}
	return "as root: perceptctl cache-key show says what to do"
}

// FindKey returns the key of the tokens' file. It takes the first that is there: systemd's credential in the folder
// credentials, the one that perceptd-cache-key.service has opened, or the file at path, whose folder check has to
// accept. An empty credentials means no folder. A nil key without an error says that no key was made; an
// *UnopenedKeyError, that one was made and may be here later.
func FindKey(path, credentials string, check func(folder string) error) (*Key, error) {
	places := []string{openedKey, path}
	if credentials != "" {
		places = append([]string{filepath.Join(credentials, keyCredential)}, places...)
	}
	key, place, err := firstKey(places)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, unopenedKey(path, waitingFile)
	case err != nil:
		return nil, err
	case place == path: // others could put theirs into an open folder; what systemd opens is in folders of its own
		if err := check(filepath.Dir(path)); err != nil {
			return nil, err
		}
	}
	return key, nil
}

// firstKey returns the first key in these places, and its place.
func firstKey(places []string) (key *Key, place string, err error) {
	for _, place = range places {
		if key, err = ReadKey(place); !errors.Is(err, fs.ErrNotExist) {
			return key, place, err
		}
	}
	return nil, "", err
}

// unopenedKey returns an error where a key was made that is sealed beside path and is not open; nil: none was made.
func unopenedKey(path, waitingFile string) error {
	sealed := path + ".cred"
	if _, err := os.Stat(sealed); err != nil {
		return nil
	}
	return &UnopenedKeyError{path: sealed, waiting: whyWaiting(waitingFile)}
}

// whyWaiting returns why the key is tried again: the first line of a file that root writes; empty: it is not.
func whyWaiting(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(strings.ToValidUTF8(string(text[:min(len(text), longestWhy)]), ""), "\n")
	return strings.TrimSpace(line)
}

// ReadKey reads a key's file: 32 bytes that only root and this process's user can change, and only they and the file's
// group can read. Without a file the error is an fs.ErrNotExist.
func ReadKey(path string) (*Key, error) {
	text, err := read(path, othersMayChange|othersMayRead, len(Key{}))
	defer clear(text)
	if spoilt, known := errors.AsType[*SpoiltError](err); known {
		err = spoilt.Why
	} else if loose, known := errors.AsType[*LooseError](err); known {
		err = loose.Why
	} else if refused, kernel := errors.AsType[*fs.PathError](err); kernel {
		err = refused.Err
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the key of the cache file, %s: %w", path, err)
		}
	}
	var key *Key
	if err == nil {
		key, err = KeyOf(text)
	}
	if err != nil {
		return nil, fmt.Errorf("the key of the cache file, %s: %w: perceptctl cache-key make --replace makes another; "+
			"a file of one's own is root's or perceptd's user's, mode 0400, of %d random bytes", path, err, len(Key{}))
	}
	return key, nil
}

// KeyOf returns text as a key. The error says why it is not one.
func KeyOf(text []byte) (*Key, error) {
	var key Key
	switch {
	case len(text) != len(key):
		return nil, fmt.Errorf("it has %d bytes and should have %d", len(text), len(key))
	case bytes.Count(text, []byte{0x00}) == len(text), bytes.Count(text, []byte{0xff}) == len(text):
		return nil, errors.New("it was never filled: it is as empty storage reads, which everybody can guess")
	}
	copy(key[:], text)
	return &key, nil
}
