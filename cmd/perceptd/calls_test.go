package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// upward is a call from a lower file to a higher one, by its functions: Name or Type.Name.
type upward struct{ caller, callee, reason string }

// callsBackUp are the exceptions by package: the fewest calls without which its files stand in an order.
var callsBackUp = map[string][]upward{
	"agent/attest": {
		{"connection.Close", "Attestation.release",
			"an attestation ends with its connection, which http.Server closes"},
	},
	"agent/clock": {
		{"timer", "wall", "the wall clock without its monotonic reading, for the whole package"},
		{"askSocket", "wall", "the same"},
	},
}

// TestFilesCallDownwards shows that the files of a package stand in an order in which each calls only files below it.
// Such a package can be read from top to bottom, and each of its files understood with the files below it.
//
// A call is a use of a function or method of the package in a function's body in another file. A function that is
// handed on as a value counts, since the reader has to go there too. Types, constants and variables do not count:
// they are the nouns that all files of a package share. Tests do not count.
func TestFilesCallDownwards(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for _, p := range packagesWithCalls(t) {
		seen[p.name] = true
		for _, problem := range p.problems(callsBackUp[p.name]) {
			t.Errorf("%s: %s", p.name, problem)
		}
	}
	for name := range callsBackUp {
		if !seen[name] {
			t.Errorf("%s has exceptions and does not exist", name)
		}
	}
}

// call is a use of a function in the body of another file's function.
type call struct {
	from, to       string // files
	caller, callee string // functions: Name or Type.Name
	line           int
}

func (c call) String() string {
	return fmt.Sprintf("%s -> %s: %s calls %s at line %d", c.from, c.to, c.caller, c.callee, c.line)
}

type calls []call

type callPackage struct {
	name  string
	calls calls
}

// problems describes the cycles that p's exceptions leave, or the exceptions that are not needed.
func (p callPackage) problems(exceptions []upward) []string {
	without := func(exceptions []upward) calls {
		return slices.DeleteFunc(slices.Clone(p.calls), func(c call) bool {
			return slices.ContainsFunc(exceptions, func(e upward) bool {
				return e.caller == c.caller && e.callee == c.callee
			})
		})
	}
	var problems []string
	left := without(exceptions)
	for _, up := range left.backUp() {
		text := up.String() + "; that closes a cycle:"
		for _, down := range left.path(up.to, up.from) {
			text += "\n\t" + down.String()
		}
		problems = append(problems, text+fmt.Sprintf("\n\tas an exception: {%q, %q, \"\"},", up.caller, up.callee))
	}
	if len(problems) > 0 {
		return problems
	}
	for i, e := range exceptions {
		if others := slices.Delete(slices.Clone(exceptions), i, i+1); len(without(others).cycles()) == 0 {
			problems = append(problems, fmt.Sprintf("the exception {%q, %q} is no longer needed", e.caller, e.callee))
		}
	}
	return problems
}

// backUp returns the fewest calls without which cs has no cycle.
func (cs calls) backUp() calls {
	var found calls
	for _, files := range cs.cycles() {
		rank := cs.order(files)
		for _, c := range cs {
			from, in := rank[c.from]
			to, both := rank[c.to]
			if in && both && from > to {
				found = append(found, c)
			}
		}
	}
	return found
}

// cycles returns the largest sets of files that all reach each other by calls.
func (cs calls) cycles() [][]string {
	reach := make(map[string]map[string]bool)
	for _, c := range cs {
		if reach[c.from] == nil {
			reach[c.from] = make(map[string]bool)
		}
		reach[c.from][c.to] = true
	}
	for _, by := range slices.Sorted(maps.Keys(reach)) {
		for _, from := range reach {
			if from[by] {
				maps.Copy(from, reach[by])
			}
		}
	}
	var cycles [][]string
	for _, file := range slices.Sorted(maps.Keys(reach)) {
		known := slices.ContainsFunc(cycles, func(c []string) bool { return slices.Contains(c, file) })
		if known || !reach[file][file] {
			continue
		}
		var cycle []string
		for _, other := range slices.Sorted(maps.Keys(reach[file])) {
			if reach[other][file] {
				cycle = append(cycle, other)
			}
		}
		cycles = append(cycles, cycle)
	}
	return cycles
}

// order ranks files from top to bottom so that the fewest calls run back up. It starts from random orders, moves one
// file at a time until no move helps, and takes the best result: with as few files as a package has, the minimum.
func (cs calls) order(files []string) map[string]int {
	n := len(files)
	between := make([][]int, n) // between[i][j]: the calls from file i to file j
	for i := range between {
		between[i] = make([]int, n)
	}
	for _, c := range cs {
		if i, j := slices.Index(files, c.from), slices.Index(files, c.to); i >= 0 && j >= 0 {
			between[i][j]++
		}
	}
	random := rand.New(rand.NewPCG(1, 1))
	var best []int
	fewest := math.MaxInt
	for range 200 {
		order := random.Perm(n)
		for better := true; better; {
			better = false
			for at := 0; at < n; at++ {
				to, gain := bestMove(between, order, at)
				if gain > 0 {
					file := order[at]
					order = slices.Insert(slices.Delete(order, at, at+1), to, file)
					better = true
				}
			}
		}
		up := 0
		for i := range order {
			for j := range i {
				up += between[order[i]][order[j]]
			}
		}
		if up < fewest {
			fewest, best = up, order
		}
	}
	rank := make(map[string]int)
	for at, file := range best {
		rank[files[file]] = at
	}
	return rank
}

// bestMove returns the best place in an order for the file that is at at, and how many fewer calls then run back up.
func bestMove(between [][]int, order []int, at int) (to, gain int) {
	to = at
	for _, step := range []int{-1, 1} {
		change := 0
		for i := at + step; i >= 0 && i < len(order); i += step {
			upper, lower := order[i], order[at]
			if step > 0 {
				upper, lower = lower, upper
			}
			if change += between[lower][upper] - between[upper][lower]; change > gain {
				to, gain = i, change
			}
		}
	}
	return to, gain
}

// path returns the shortest way of calls from a file to another.
func (cs calls) path(from, to string) calls {
	way := map[string]calls{from: nil}
	for next := []string{from}; len(next) > 0; next = next[1:] {
		for _, c := range cs {
			if _, been := way[c.to]; c.from == next[0] && !been {
				way[c.to] = append(slices.Clone(way[c.from]), c)
				next = append(next, c.to)
			}
		}
	}
	return way[to]
}

// packagesWithCalls returns our packages with the calls between their files, by the types of the build.
func packagesWithCalls(t *testing.T) []callPackage {
	t.Helper()
	fields := "-json=ImportPath,Dir,GoFiles,Export"
	out, err := exec.Command("go", "list", "-export", "-deps", fields, "perceptd/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	files := token.NewFileSet()
	exports := make(map[string]string)
	imports := importer.ForCompiler(files, "gc", func(path string) (io.ReadCloser, error) {
		return os.Open(exports[path])
	})
	var packages []callPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; { // imported packages come first
		var p struct {
			ImportPath, Dir, Export string
			GoFiles                 []string
		}
		if err := d.Decode(&p); err == io.EOF {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		exports[p.ImportPath] = p.Export
		name, ours := strings.CutPrefix(p.ImportPath, "perceptd/")
		if !ours {
			continue
		}
		var parsed []*ast.File
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(files, filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			parsed = append(parsed, f)
		}
		info := &types.Info{Defs: make(map[*ast.Ident]types.Object), Uses: make(map[*ast.Ident]types.Object)}
		config := types.Config{Importer: imports}
		if _, err := config.Check(p.ImportPath, files, parsed, info); err != nil {
			t.Fatal(err)
		}
		packages = append(packages, callPackage{name, callsOf(files, parsed, info)})
	}
}

// callsOf returns the calls between files of a package, each pair of functions once.
func callsOf(files *token.FileSet, parsed []*ast.File, info *types.Info) calls {
	var found calls
	for _, f := range parsed {
		for _, d := range f.Decls {
			declared, ok := d.(*ast.FuncDecl)
			if !ok || declared.Body == nil {
				continue
			}
			caller := info.Defs[declared.Name].(*types.Func)
			seen := make(map[*types.Func]bool)
			ast.Inspect(declared.Body, func(n ast.Node) bool {
				id, _ := n.(*ast.Ident)
				callee, ok := info.Uses[id].(*types.Func)
				if !ok || callee.Pkg() != caller.Pkg() || seen[callee.Origin()] {
					return true
				}
				callee = callee.Origin()
				seen[callee] = true
				at, there := files.Position(id.Pos()), files.Position(callee.Pos())
				if at.Filename != there.Filename {
					found = append(found, call{
						filepath.Base(at.Filename), filepath.Base(there.Filename),
						functionName(caller), functionName(callee), at.Line,
					})
				}
				return true
			})
		}
	}
	return found
}

// functionName returns Name or Type.Name.
func functionName(f *types.Func) string {
	if receiver := f.Signature().Recv(); receiver != nil {
		of := receiver.Type()
		if pointer, ok := of.(*types.Pointer); ok {
			of = pointer.Elem()
		}
		return of.(*types.Named).Obj().Name() + "." + f.Name()
	}
	return f.Name()
}
