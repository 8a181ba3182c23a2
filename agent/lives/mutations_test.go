//go:build mutations

package lives

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// livesOfMutant is how many lives are lived at most with a mutant: one that outlives them is not noticed. They are
// those of the seeds from 1 on, as no seed is chosen for a mutant. What a mutant's lives are about is chosen, and few
// lives notice each then.
const livesOfMutant = 60

// mutant is one place of the daemon that can be made wrong.
type mutant struct {
	what string // is wrong with it
	file string // from the repository's root
	from string // stands in the file once. An expression in it is marked: «right»
	to   string // the expression that is wrong
	by   subject
}

// mutantVariable has the number of the mutant that is alive, from 1, in the environment of what is built with all of
// them.
const mutantVariable = "LIVES_MUTANT"

// TestMutations looks that the lives notice what is wrong in the judgement of tokens, in the hold, in the record and in
// the rules of clocks. All mutants are built into one program, each to be woken by the environment. The tree is left as
// it is: the compiler reads the files that have them from elsewhere.
//
// The lives that notice one show something only if nothing goes wrong in them without it. So the same program lives
// these at last, with no mutant awake.
func TestMutations(t *testing.T) {
	m := mutated{program: build(t, mutants), lived: make(map[subject]int)}
	for i, mutant := range mutants {
		t.Run(strings.ReplaceAll(mutant.what, " ", "-"), func(t *testing.T) {
			told, n := m.outlived(t, i+1, mutant.by, livesOfMutant)
			if n == 0 {
				t.Errorf("%s: none of %d lives about %s notices that %s.\nDoes the oracle still look for it "+
					"(oracle_test.go)? Else the lives no longer draw what shows it: have plan_test.go draw that more "+
					"often, or the mutant name a subject whose lives do (subjects_test.go). Do not raise "+
					"livesOfMutant for it.",
					mutant.file, livesOfMutant, mutant.by, mutant.what)
				return
			}
			m.lived[mutant.by] = max(m.lived[mutant.by], n)
			t.Logf("%s: life %s", mutant.what, told)
		})
	}
	t.Run("no-mutant", func(t *testing.T) {
		for by, n := range m.lived {
			t.Logf("about %s: what %d lives from seed 1 on notice", by, n)
			if told, _ := m.outlived(t, 0, by, n); told != "" {
				t.Errorf("what the %d lives about %s say of the mutants is void, since in one of them something goes "+
					"wrong in the daemon as it is (LIVES_ABOUT=%q LIVES_COUNT=%d make lives LIVES_SECONDS=0 "+
					"LIVES_SEED=1): life %s", n, by, by, n, told)
			}
		}
	})
}

// mutated is a program with all mutants, and how many lives about each subject it has lived until it noticed those.
type mutated struct {
	program string
	lived   map[subject]int
}

// outlived lives so many lives with that mutant, and returns what the first says in which something goes wrong, and
// which it is; 0: none does.
func (m mutated) outlived(t *testing.T, mutant int, by subject, count int) (told string, n int) {
	lives := exec.CommandContext(t.Context(), m.program, "-test.run", "^TestLives$", "-test.timeout", "0")
	lives.Env = append(os.Environ(), fmt.Sprintf("%s=%d", mutantVariable, mutant),
		fmt.Sprintf("%s=%d", countVariable, count), seedVariable+"=1",
		aboutVariable+"="+string(by), shortenVariable+"=0", secondsVariable+"=", commitVariable+"=", allVariable+"=")
	out, err := lives.CombinedOutput()
	if err == nil {
		return "", 0
	}
	for line := range strings.Lines(string(out)) {
		if of := ofSeed.FindStringSubmatch(line); of != nil {
			n, err = strconv.Atoi(of[1])
			if err != nil {
				t.Fatal(err)
			}
			return strings.TrimSpace(line[strings.Index(line, of[0])+len("life "):]), n
		}
	}
	t.Fatalf("%v\n%s", err, out)
	return "", 0
}

var ofSeed = regexp.MustCompile(`life of seed (\d+)`)

// build builds the test of this package with the mutants, and returns the program's path.
func build(t *testing.T, mutants []mutant) string {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	replace := make(map[string]string)
	put := func(path string, text []byte) {
		made := filepath.Join(dir, fmt.Sprintf("%d.go", len(replace)))
		if err := os.WriteFile(made, text, 0o600); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(root, path)] = made
	}
	of := make(map[string][]edit)
	for i, m := range mutants {
		of[m.file] = append(of[m.file], m.edit(t, root, i+1))
	}
	for path, edits := range of {
		text, file := parse(t, filepath.Join(root, path))
		put(path, edited(text, edits))
		if waking := filepath.Join(filepath.Dir(path), "mutated.go"); replace[filepath.Join(root, waking)] == "" {
			put(waking, fmt.Appendf(nil, wakes, file.Name, mutantVariable))
		}
	}
	overlay := filepath.Join(dir, "overlay.json")
	all, err := json.Marshal(map[string]map[string]string{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, all, 0o600); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "lives")
	compile := exec.CommandContext(t.Context(), "go", "test", "-c", "-overlay", overlay, "-vet", "off", "-o",
		program, "./agent/lives")
	compile.Dir = root
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// wakes is the file of a package that has mutants which chooses between the right and the wrong.
const wakes = `package %s

import "os"

var awake = os.Getenv(%q)

func mutated[T any](mutant string, right, wrong T) T {
	if mutant == awake {
		return wrong
	}
	return right
}
`

// edit is a piece of a file's text, and what is to be there.
type edit struct {
	from, to int
	text     string
}

// edit returns what has the file be right or wrong as the environment says.
func (m mutant) edit(t *testing.T, root string, number int) edit {
	text, file := parse(t, filepath.Join(root, m.file))
	before, rest, marked := strings.Cut(m.from, "«")
	right, after, closed := strings.Cut(rest, "»")
	if n := bytes.Count(text, []byte(before+right+after)); !marked || !closed || n != 1 {
		t.Fatalf("%s has what is to be mutated %d times, so that %s: %q. If the code is another now, say in "+
			"mutants_test.go where it is wrong then.", m.file, n, m.what, m.from)
	}
	at := bytes.Index(text, []byte(before+right+after)) + len(before)
	e := edit{at, at + len(right), fmt.Sprintf("mutated(%q, %s, %s)", strconv.Itoa(number), right, m.to)}
	whole := false
	ast.Inspect(file, func(n ast.Node) bool {
		x, is := n.(ast.Expr)
		whole = whole || is && int(x.Pos()-file.FileStart) == e.from && int(x.End()-file.FileStart) == e.to
		return !whole
	})
	if !whole {
		t.Fatalf("%s: what is to be mutated is no whole expression: %q", m.file, right)
	}
	return e
}

func parse(t *testing.T, path string) ([]byte, *ast.File) {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	return text, file
}

// edited returns the text with the edits, no two of which are of the same place.
func edited(text []byte, edits []edit) []byte {
	slices.SortFunc(edits, func(a, b edit) int { return cmp.Compare(b.from, a.from) }) // the last first
	for _, e := range edits {
		text = slices.Concat(text[:e.from], []byte(e.text), text[e.to:])
	}
	return text
}
