package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"perceptd/cmd/perceptd/e2e/harness"
)

// What is in config.d and is not read is named, with why.
func TestUnreadFiles(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{
		"config.toml": harness.GoodConfig, "config.d/10.toml": "# read\n", "config.d/20.conf": "[x]\n",
		"config.d/30.TOML": "[x]\n", "config.d/40.toml~": "[x]\n", "config.d/50.toml.bak": "[x]\n",
		"config.d/60/x.toml": "[x]\n", "config.d/.70.toml": "[x]\n", "config.d/README": "x\n",
	})
	dir := filepath.Join(filepath.Dir(path), "config.d")
	if err := os.Symlink("user@host.4711:1", filepath.Join(dir, ".#10.toml")); err != nil { // of an editor that is open
		t.Fatal(err)
	}
	const copied = "not read, since its name does not end in .toml, as that of a copy that an editor or a " +
		"package leaves"
	want := []string{
		".#10.toml: a name that begins with a dot is an editor's or a hidden file's, and is not read",
		".70.toml: a name that begins with a dot is an editor's or a hidden file's, and is not read",
		"20.conf: not read, since its name does not end in .toml: rename it if it is to count",
		"30.TOML: not read, since its name does not end in .toml in lower case: rename it to 30.toml",
		"40.toml~: " + copied,
		"50.toml.bak: " + copied,
		"60: a folder is not read: put the files into config.d itself",
		"README: not read, since its name does not end in .toml: rename it if it is to count",
	}
	for i := range want {
		want[i] = dir + "/" + want[i]
	}
	r := Read(path)
	if !slices.Equal(r.Unread, want) || len(r.Faults) > 0 || len(r.Files) != 2 {
		t.Errorf("%v, %d files, unread\n%s", r.Faults, len(r.Files), strings.Join(r.Unread, "\n"))
	}
}

// A main file that is not there is no fault, and hides none in config.d; a link that leads nowhere is one.
func TestMissingMainFile(t *testing.T) {
	t.Parallel()
	path := harness.WriteConfig(t, map[string]string{"config.d/a.toml": harness.GoodConfig, "config.d/b.toml": "[x\n"})
	r := Read(path)
	if !r.Missing || len(r.Faults) != 1 || len(r.Files) != 1 || len(r.Config().Rules.Grants) != 1 {
		t.Errorf("%+v", r)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), path+": not there: write one") {
		t.Errorf("loaded: %v", err)
	}
	if err := os.Symlink("/nonexistent", path); err != nil {
		t.Fatal(err)
	}
	if r := Read(path); r.Missing || len(r.Faults) != 2 {
		t.Errorf("a link to nothing: %+v", r)
	}
}

// A main file with nothing in it, as a power cut leaves it, is a fault, and so is one of comments where nothing else is
// said, and a file of config.d that has lost what it said in the last configuration.
func TestEmptiedFiles(t *testing.T) {
	t.Parallel()
	const main, extra = "config.toml", "config.d/10.toml"
	for name, row := range map[string]struct {
		files map[string]string
		last  string // what extra said
		fault string // the file with it; empty: there is none
	}{
		"nothing":           {map[string]string{main: ""}, "", main},
		"blank":             {map[string]string{main: " \r\n\n", extra: harness.GoodConfig}, harness.GoodConfig, main},
		"comments":          {map[string]string{main: "# x\n", extra: "# y\n"}, "# y\n", main},
		"comments and more": {map[string]string{main: "# x\n", extra: harness.GoodConfig}, harness.GoodConfig, ""},
		"lost":              {map[string]string{main: harness.GoodConfig, extra: "\n"}, "# y\n", extra},
		"empty before":      {map[string]string{main: harness.GoodConfig, extra: ""}, "", ""},
		"not there before":  {map[string]string{main: harness.GoodConfig, extra: ""}, "-", ""},
	} {
		path := harness.WriteConfig(t, row.files)
		folder := filepath.Dir(path)
		last := Reading{Files: []File{{filepath.Join(folder, extra), []byte(row.last)}}}
		if row.last == "-" {
			last.Files = nil
		}
		r := Read(path).After(last)
		if row.fault == "" {
			if len(r.Faults) > 0 || len(r.Files) != len(row.files) {
				t.Errorf("%s: %+v", name, r)
			}
			continue
		}
		want := filepath.Join(folder, row.fault) + ": nothing is in it"
		if len(r.Faults) != 1 || !strings.HasPrefix(r.Faults[0].Error(), want) || len(r.Files) != len(row.files)-1 {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
