package config

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The example is what an installation starts with: it is sound, grants nothing, and asks the back end for nothing.
func TestExampleStartsSafely(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../../deploy/config.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Rules.Grants) > 0 || len(c.Modules()) > 0 || c.Loopback.Address.IsValid() || len(c.Warnings) > 0 ||
		c.Source.Kind != ManagedIdentity {
		t.Errorf("%+v", c)
	}
}

// No example has tokens fetched that nobody has asked for, and each that names the key says why not.
func TestExamplesDoNotPrefetch(t *testing.T) {
	t.Parallel()
	files := []string{"../../../README.md", "../../../deploy/config.example.toml"}
	documents, err := filepath.Glob("../../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	on := regexp.MustCompile(`(?m)^\s*prefetch\s*=\s*true`)
	for _, file := range append(files, documents...) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if on.Match(text) {
			t.Errorf("%s prefetches before anybody has assigned a role", file)
		}
		_, after, found := strings.Cut(string(text), "prefetch = true")
		if !found {
			continue
		}
		named++
		why, _, _ := strings.Cut(after, "\n\n")
		if !strings.Contains(why, "roles are") || !strings.Contains(why, "24 hours") {
			t.Errorf("%s does not say why it is off", file)
		}
	}
	if named != 2 {
		t.Errorf("%d examples name it", named)
	}
}
