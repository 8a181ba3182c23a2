package agent

import (
	"crypto/rand"
	"encoding/hex"
)

// newID returns a name for what is put on record, short enough for people to type.
func newID() string {
	var id [4]byte
	_, _ = rand.Read(id[:]) // never fails
	return hex.EncodeToString(id[:])
}
