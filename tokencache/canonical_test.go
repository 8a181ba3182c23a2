package tokencache_test

import (
	"testing"

	"perceptd/tokencache"
)

func TestSpelling(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		a, b string
		same bool
	}{
		{"https://storage.azure.com", "https://storage.azure.com/", true},
		{"https://storage.azure.com", "https://storage.azure.com//", true},
		{"https://storage.azure.com", "HTTPS://Storage.Azure.COM", true},
		{"https://storage.azure.com", "https://storage.azure.com:443/", true},
		{"http://storage.azure.com", "http://storage.azure.com:80", true},
		{"https://a/path", "https://A/path/", true},
		{"api://AB/", "api://ab", true},
		{"urn:a", "urn:a/", true},
		{"6DAE42F8-4368-4678-94FF-3960E28E3630", "6dae42f8-4368-4678-94ff-3960e28e3630/", true},
		{"api://6DAE42F8-4368-4678-94FF-3960E28E3630", "api://6dae42f8-4368-4678-94ff-3960e28e3630", true},
		// another audience
		{"6dae42f8-4368-4678-94ff-3960e28e3630", "api://6dae42f8-4368-4678-94ff-3960e28e3630", false},
		{"6DAE42F8-4368-4678-94FF-3960E28E3630x", "6dae42f8-4368-4678-94ff-3960e28e3630x", false},
		{"https://storage.azure.com", "https://storage.azure.com:444", false},
		{"https://storage.azure.com", "http://storage.azure.com", false},
		{"http://storage.azure.com", "http://storage.azure.com:443", false},
		{"https://a/path", "https://a/Path", false},
		{"https://a/path", "https://a/", false},
		{"https://a", "https://b", false},
		{"urn:a", "urn:A", false},
		{"https://a?x=Y", "https://a?x=y", false},
	} {
		if same := tokencache.Canonical(row.a) == tokencache.Canonical(row.b); same != row.same {
			t.Errorf("%s and %s: %v (%s, %s)", row.a, row.b, same, tokencache.Canonical(row.a),
				tokencache.Canonical(row.b))
		}
	}
	if got := tokencache.Canonical(""); got != "" {
		t.Errorf("none: %q", got)
	}
}
