//go:build mutations

package lives

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// livesOfMutant is how many lives are lived at most with a mutant, where the one that noticed it last does not: one that outlives them
// is not noticed.
const livesOfMutant = 300

// mutant is one place of the daemon that is made wrong.
type mutant struct {
	what     string // is wrong with it
	file     string // from the repository's root
	from, to string // from stands in the file once
	seed     uint64 // of a life that has noticed it
}

// TestMutations looks that the lives notice what is wrong in the judgement of tokens, in the hold, in the record and in the rules
// of clocks. The tree is left as it is: the compiler reads the file that is made wrong from elsewhere.
func TestMutations(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants {
		t.Run(strings.ReplaceAll(m.what, " ", "-"), func(t *testing.T) {
			overlay := m.overlay(t, root)
			told, noticed := outlived(t, root, overlay, m.seed, 1)
			if !noticed {
				told, noticed = outlived(t, root, overlay, 1, livesOfMutant)
			}
			if !noticed {
				t.Errorf("%s: %d lives do not notice that %s", m.file, livesOfMutant, m.what)
				return
			}
			t.Logf("%s: %s", m.what, told)
		})
	}
}

// overlay makes the file that has the compiler read m in the place of what is in the tree, and returns its path.
func (m mutant) overlay(t *testing.T, root string) string {
	path := filepath.Join(root, m.file)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), m.from); n != 1 {
		t.Fatalf("%s has what is to be mutated %d times: %q", m.file, n, m.from)
	}
	dir := t.TempDir()
	mutated, overlay := filepath.Join(dir, "mutated.go"), filepath.Join(dir, "overlay.json")
	replaced, err := json.Marshal(map[string]map[string]string{"Replace": {path: mutated}})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{mutated: []byte(strings.Replace(string(text), m.from, m.to, 1)), overlay: replaced} {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return overlay
}

// outlived lives so many lives with the overlay, and returns what the first says that goes wrong, if one does.
func outlived(t *testing.T, root, overlay string, seed uint64, count int) (told string, noticed bool) {
	test := exec.CommandContext(t.Context(), "go", "test", "-overlay", overlay, "-count=1", "-timeout", "0", "-run", "^TestLives$", "./agent/lives")
	test.Dir = root
	test.Env = append(os.Environ(), fmt.Sprintf("%s=%d", countVariable, count), fmt.Sprintf("%s=%d", seedVariable, seed),
		secondsVariable+"=", commitVariable+"=", allVariable+"=")
	out, err := test.CombinedOutput()
	switch {
	case err == nil:
		return "", false
	case !strings.Contains(string(out), "--- FAIL: TestLives"):
		t.Fatalf("%v\n%s", err, out)
	}
	return firstFault(string(out)), true
}

// firstFault is the line that tells how a life went wrong.
func firstFault(out string) string {
	for line := range strings.Lines(out) {
		if strings.Contains(line, ", of seed ") {
			return strings.TrimSpace(line)
		}
	}
	return strings.TrimSpace(out)
}
