package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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
	for page, least := range map[string]int{
		"security.md": 10, "reliability.md": 10, "policy-changes.md": 1, "performance.md": 0, "staleness.md": 0,
	} {
		text, err := os.ReadFile(filepath.Join("../../docs", page))
		if err != nil {
			t.Fatal(err)
		}
		named := regexp.MustCompile("`((?:Test|Benchmark|Fuzz)[A-Z]\\w+)`").FindAllSubmatch(text, -1)
		if len(named) < least {
			t.Errorf("%s: only %d tests are named", page, len(named))
		}
		for _, name := range named {
			if !there[string(name[1])] {
				t.Errorf("%s: %s is named, and not there", page, name[1])
			}
		}
	}
}

// The pages on modules show the files of their samples as they are.
func TestPagesShowTheirSamples(t *testing.T) {
	t.Parallel()
	const docs = "../../docs/modules"
	shown := 0
	for _, pattern := range []string{"Containerfile", "create-options.json", "app.*", "main.go"} {
		files, err := filepath.Glob(filepath.Join(docs, "*", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			page, err := os.ReadFile(filepath.Dir(file) + ".md")
			if err != nil {
				t.Fatal(err)
			}
			if shown++; !strings.Contains(string(page), string(text)) {
				t.Errorf("%s.md shows another %s", filepath.Dir(file), filepath.Base(file))
			}
		}
	}
	if shown < 8 {
		t.Errorf("only %d files of samples were found", shown)
	}
}

// The IDs of all messages that have one are in docs/security.md.
func TestMessagesAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{
		agent.MessageGranted, agent.MessageChanged, agent.MessageDenied, agent.MessageUnattested,
		agent.MessageSecretIssued, agent.MessagePrincipal, agent.MessageForgotten, agent.MessageSimulated,
		agent.MessageLostRecord, agent.MessageUnreadRecord, agent.MessageRecordRead,
	} {
		if !strings.Contains(string(text), "`"+id+"`") {
			t.Errorf("message %s is not in docs/security.md", id)
		}
	}
}

// Whoever looks for something by docs/architecture.md finds it: each file, folder, test and declaration that is named
// there in code's type exists.
func TestArchitectureNames(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	declared := declarations(t)
	var (
		path = regexp.MustCompile(`^(?:agent|cmd|tokencache|systemd|deploy|docs|\.ci)(?:/[\w.…-]+)*$`)
		name = regexp.MustCompile(`^(\w+)\.([A-Za-z]\w*)$`)
		test = regexp.MustCompile(`^Test[A-Z]\w*$`)
		file = []string{"sock", "sealed", "json"} // what follows the dot in names of files on a device
	)
	checked := 0
	for _, span := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(string(text), -1) {
		said := span[1]
		switch parts := name.FindStringSubmatch(said); {
		case path.MatchString(said):
			if _, err := os.Stat(filepath.Join("../..", strings.TrimSuffix(said, "/…"))); err != nil {
				t.Errorf("%s is named, and not there", said)
			}
		case test.MatchString(said), parts != nil && declared[parts[1]] && !slices.Contains(file, parts[2]):
			if !declared[said] {
				t.Errorf("%s is named, and not declared", said)
			}
		case strings.HasSuffix(said, ".go"):
			t.Errorf("%s is named without its folder", said)
		default:
			continue
		}
		checked++
	}
	if checked < 200 {
		t.Errorf("only %d names are checked", checked)
	}
}

// declarations has what our packages declare, tests included: package, package.Name, Type, Type.Method, Type.field, and
// TestName.
func declarations(t *testing.T) map[string]bool {
	t.Helper()
	declared := make(map[string]bool)
	err := filepath.WalkDir("../..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		of := file.Name.Name
		declared[of] = true
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil {
					declared[receiver(d)+"."+d.Name.Name] = true
					continue
				}
				declared[of+"."+d.Name.Name] = true
				if strings.HasSuffix(path, "_test.go") {
					declared[d.Name.Name] = true
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					declare(declared, of, s)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return declared
}

// declare adds what a type, constant or variable of package of declares.
func declare(declared map[string]bool, of string, s ast.Spec) {
	switch s := s.(type) {
	case *ast.ValueSpec:
		for _, name := range s.Names {
			declared[of+"."+name.Name] = true
		}
	case *ast.TypeSpec:
		declared[s.Name.Name], declared[of+"."+s.Name.Name] = true, true
		if body, ok := s.Type.(*ast.StructType); ok {
			for _, field := range body.Fields.List {
				for _, name := range field.Names {
					declared[s.Name.Name+"."+name.Name] = true
				}
			}
		}
	}
}

// receiver returns the name of a method's type.
func receiver(d *ast.FuncDecl) string {
	kind := d.Recv.List[0].Type
	if pointer, ok := kind.(*ast.StarExpr); ok {
		kind = pointer.X
	}
	if generic, ok := kind.(*ast.IndexExpr); ok {
		kind = generic.X
	}
	if generic, ok := kind.(*ast.IndexListExpr); ok {
		kind = generic.X
	}
	name, _ := kind.(*ast.Ident)
	return name.Name
}
