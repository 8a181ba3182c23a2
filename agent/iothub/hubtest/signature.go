package hubtest

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// sharedAccessSignature is a token as devices and services send it: "SharedAccessSignature sr=…&sig=…&se=…[&skn=…]".
type sharedAccessSignature struct {
	signed    string // what sig signs: the resource as it was sent, a line end, and the expiry
	resource  string
	signature []byte
	expires   time.Time
	policy    string // empty: it is signed with an identity's own key
}

func parseSignature(text string) (s sharedAccessSignature, err error) {
	fields, ok := strings.CutPrefix(text, "SharedAccessSignature ")
	if !ok {
		return s, errors.New("it does not begin with SharedAccessSignature")
	}
	var sr, se string
	for _, field := range strings.Split(fields, "&") {
		name, value, _ := strings.Cut(field, "=")
		plain, err := url.QueryUnescape(value)
		if err != nil {
			return s, fmt.Errorf("its %s: %w", name, err)
		}
		switch name {
		case "sr":
			sr, s.resource = value, plain
		case "sig":
			if s.signature, err = base64.StdEncoding.DecodeString(plain); err != nil {
				return s, fmt.Errorf("its sig: %w", err)
			}
		case "se":
			seconds, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return s, fmt.Errorf("its se: %w", err)
			}
			se, s.expires = value, time.Unix(seconds, 0)
		case "skn":
			s.policy = plain
		default:
			return s, fmt.Errorf("it has a field %q", name)
		}
	}
	if sr == "" || se == "" || len(s.signature) == 0 {
		return s, errors.New("it lacks sr, se or sig")
	}
	s.signed = sr + "\n" + se
	return s, nil
}

// isBy reports whether s was signed with key.
func (s *sharedAccessSignature) isBy(key []byte) bool {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(s.signed))
	return len(key) > 0 && hmac.Equal(mac.Sum(nil), s.signature)
}

// covers reports whether s is for resource, or for what is above it. Case does not count.
func (s *sharedAccessSignature) covers(resource string) bool {
	of, resource := strings.ToLower(s.resource), strings.ToLower(resource)
	return of == resource || strings.HasPrefix(resource, of+"/")
}

func newKey() []byte {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	return key
}

func encodeKey(key []byte) string { return base64.StdEncoding.EncodeToString(key) }
