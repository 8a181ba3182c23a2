package keep

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"perceptd/tokencache"
)

const (
	tokensName    = "tokens.sealed"
	sealedMagic   = "percept-sealed" // then sealedVersion in two bytes; both stand in the clear
	sealedVersion = 1

	headSize  = len(sealedMagic) + 2
	maxSealed = maxMemory + 1024
)

// Tokens is the cache on the disk: one file, sealed with AES-256-GCM under a key that is kept elsewhere, its
// head authenticated with it.
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

	// A function, since fmt shows what other unexported fields hold, whatever they point to: here the key.
	seal func() cipher.AEAD
}

// OpenTokens returns the cache in folder.
func OpenTokens(folder Folder, key *Key) (*Tokens, error) {
	seal, err := sealWith(key)
	if err != nil {
		return nil, err
	}
	return &Tokens{folder: folder, seal: func() cipher.AEAD { return seal }}, nil
}

func sealWith(key *Key) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// Load returns what was kept; nil when there is no file. One that is damaged, or sealed with another key, is
// moved aside, and the error says so. One that the kernel does not let be read now stays where it is.
func (t *Tokens) Load() (*tokencache.Memory, error) {
	sealed, err := t.folder.Read(tokensName, othersMayChange, maxSealed)
	var m *tokencache.Memory
	if err == nil {
		if m, err = t.unseal(sealed); err != nil {
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

func sealedHead() []byte { return binary.BigEndian.AppendUint16([]byte(sealedMagic), sealedVersion) }

func (t *Tokens) sealed(m tokencache.Memory) ([]byte, error) {
	text, err := encodeMemory(m)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	head := sealedHead()
	return append(head, t.seal().Seal(nil, nil, text, head)...), nil
}

func (t *Tokens) unseal(sealed []byte) (*tokencache.Memory, error) {
	switch {
	case len(sealed) < headSize || string(sealed[:len(sealedMagic)]) != sealedMagic:
		return nil, errors.New("it is no cache file of perceptd")
	case binary.BigEndian.Uint16(sealed[len(sealedMagic):]) != sealedVersion:
		return nil, fmt.Errorf("it is not of version %d: another release of perceptd wrote it", sealedVersion)
	}
	text, err := t.seal().Open(nil, nil, sealed[headSize:], sealed[:headSize])
	if err != nil {
		return nil, errors.New("it was sealed with another key, or changed since")
	}
	defer clear(text)
	return decodeMemory(text)
}
