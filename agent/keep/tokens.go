package keep

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"perceptd/agent/binding"
	"perceptd/tokencache"
)

const (
	tokensName = "tokens.sealed"
	maxSealed  = maxMemory + 1024

	// What a sealed file begins with, in the clear: sealedMagic, the version in two bytes, and from version 2 on the kind of
	// what it is bound to in one. Version 1 was bound to nothing, and sealed with the key itself.
	sealedMagic = "percept-sealed"
	formerHead  = sealedMagic + "\x00\x01"
	sealedHead  = sealedMagic + "\x00\x02"
)

// Tokens is the cache on the disk: one file, sealed with AES-256-GCM under a key that is kept elsewhere, its
// head authenticated with it.
//
// It is bound to the device: the key that seals it is made of the one that is kept and of what the device is known by, so
// that a copy of both opens on no other. Which kind that is stands in the head, since a device may be known by more or by
// less another day: a file that is bound to anything that it is known by opens, and is bound to the best of it from then on.
//
// Each sealing draws a nonce of 96 random bits. Two of n are the same with a probability of about n²/2⁹⁷:
// after one write a second for a hundred years, under one key, less than one in ten thousand million. At the
// few writes that are made it does not happen.
//
// The seal shows that somebody with the key wrote the file, not when. Who can write to the disk can put an
// older one back: it loads. What that gains is bounded: a token in it is one that this device was given, it
// is dropped when it has certainly expired, and a policy change is kept in a file of its own, so that a
// revocation stands against an older token as it did. What was learnt of rollovers since is forgotten. Only a
// counter that is kept off the disk, as in a TPM, could tell; there is none.
type Tokens struct {
	folder Folder
	head   string // of what is written

	// What seals a file with that head; nil: it is not known here. A function, since fmt shows what other unexported fields
	// hold, whatever they point to: here the key.
	seal func(head string) cipher.AEAD
}

// OpenTokens returns the cache in folder, bound to the first of what the device is known by; to nothing where there is none.
func OpenTokens(folder Folder, key *Key, known ...binding.Binding) (*Tokens, error) {
	former, err := sealWith(key[:])
	if err != nil {
		return nil, err
	}
	seals := map[string]cipher.AEAD{formerHead: former}
	for _, b := range append([]binding.Binding{{}}, known...) {
		bound, err := hkdf.Key(sha256.New, key[:], nil, sealedHead+b.Kind.String()+string(b.ID[:]), len(key))
		if err != nil {
			return nil, err
		}
		if seals[headOf(b.Kind)], err = sealWith(bound); err != nil {
			return nil, err
		}
		clear(bound)
	}
	return &Tokens{folder: folder, head: headOf(binding.Best(known)), seal: func(head string) cipher.AEAD { return seals[head] }}, nil
}

func headOf(kind binding.Kind) string { return sealedHead + string([]byte{byte(kind)}) }

func sealWith(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// Load returns what was kept; nil when there is no file. One that is damaged, or sealed with another key or on another
// device, is moved aside, and the error says so. One that the kernel does not let be read now stays where it is. One that is
// not sealed as Save would do it is sealed anew.
func (t *Tokens) Load() (*tokencache.Memory, error) {
	sealed, err := t.folder.Read(tokensName, othersMayChange, maxSealed)
	var m *tokencache.Memory
	var head string
	if err == nil {
		if m, head, err = t.unseal(sealed); err != nil {
			err = &SpoiltError{Name: tokensName, Why: err}
		}
	}
	_, spoilt := errors.AsType[*SpoiltError](err)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case spoilt:
		return nil, fmt.Errorf("the tokens that were kept are fetched anew: %w", moveAside(t.folder, tokensName, err))
	case err != nil:
		return nil, fmt.Errorf("the tokens that were kept cannot be read now, and are fetched anew: %w", err)
	}
	if head != t.head {
		_ = t.Save(*m) // what cannot be kept now is kept, and told of, with the next newer token
	}
	return m, nil
}

// Save puts m on the disk in the place of what was there. When it returns nil it outlives a power cut; with
// an error, what was there before does.
func (t *Tokens) Save(m tokencache.Memory) error {
	sealed, err := t.sealed(m)
	if err != nil {
		return err
	}
	return t.folder.Replace(tokensName, sealed)
}

// Remove removes what was kept, if anything was.
func (t *Tokens) Remove() error { return t.folder.Remove(tokensName) }

func (t *Tokens) sealed(m tokencache.Memory) ([]byte, error) {
	text, err := encodeMemory(m)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	head := []byte(t.head)
	return append(head, t.seal(t.head).Seal(nil, nil, text, head)...), nil
}

func (t *Tokens) unseal(sealed []byte) (m *tokencache.Memory, head string, err error) {
	head, err = cutHead(sealed)
	if err != nil {
		return nil, "", err
	}
	seal := t.seal(head)
	if seal == nil {
		return nil, "", fmt.Errorf("it is bound to its device's %s, which this one has not, or nobody can read now", binding.Kind(head[len(sealedHead)]).Name())
	}
	text, err := seal.Open(nil, nil, sealed[len(head):], []byte(head))
	if err != nil {
		return nil, "", errors.New("it was sealed with another key or on another device, or changed since")
	}
	defer clear(text)
	m, err = decodeMemory(text)
	return m, head, err
}

// cutHead returns the head of a sealed file: formerHead, or that of a kind.
func cutHead(sealed []byte) (string, error) {
	text := string(sealed[:min(len(sealed), len(sealedHead)+1)])
	switch {
	case len(text) < len(sealedHead) || !strings.HasPrefix(text, sealedMagic):
		return "", errors.New("it is no cache file of perceptd")
	case strings.HasPrefix(text, formerHead):
		return formerHead, nil
	case !strings.HasPrefix(text, sealedHead):
		return "", errors.New("it is not of version 1 or 2: another release of perceptd wrote it")
	case len(text) == len(sealedHead):
		return "", errors.New("it ends in its head")
	}
	if kind := binding.Kind(text[len(sealedHead)]); kind != binding.None && kind.Name() == "" {
		return "", errors.New("it is bound to what this release does not know: another release of perceptd wrote it")
	}
	return text, nil
}
