package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"perceptd/agent"
)

// These pages promise what tests show: each that they name is there.
func TestPromises(t *testing.T) {
	t.Parallel()
	there := make(map[string]bool)
	function := regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)\w+)\(`)
	err := filepath.WalkDir("../..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, found := range function.FindAllSubmatch(source, -1) {
			there[string(found[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{"security.md", "reliability.md"} {
		text, err := os.ReadFile(filepath.Join("../../docs", page))
		if err != nil {
			t.Fatal(err)
		}
		named := regexp.MustCompile("`((?:Test|Benchmark|Fuzz)[A-Z]\\w+)`").FindAllSubmatch(text, -1)
		if len(named) < 10 {
			t.Errorf("%s: only %d tests are named", page, len(named))
		}
		for _, name := range named {
			if !there[string(name[1])] {
				t.Errorf("%s: %s is named, and not there", page, name[1])
			}
		}
	}
}

// The IDs of the journal's messages are told.
func TestMessagesAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{agent.MessageGranted, agent.MessageChanged, agent.MessageDenied, agent.MessageUnattested, agent.MessageSecretIssued, agent.MessageLostRecord, agent.MessageUnreadRecord, agent.MessageRecordRead} {
		if !strings.Contains(string(text), "`"+id+"`") {
			t.Errorf("message %s is not told", id)
		}
	}
}
