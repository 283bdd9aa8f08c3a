package virtiotest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// names are the top-level tests and fuzz targets of a package, and the names
// that its calls of run, runRO and t.Run give to subtests (their constant
// parts).
func names(t *testing.T, dir string) (tests, subtests map[string]bool) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", "..", dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no Go files in %s (%v)", dir, err)
	}
	tests, subtests = map[string]bool{}, map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Recv == nil && strings.HasSuffix(name, "_test.go") && (strings.HasPrefix(n.Name.Name, "Test") || strings.HasPrefix(n.Name.Name, "Fuzz")) {
					tests[n.Name.Name] = true
				}
			case *ast.CallExpr:
				if id, ok := n.Fun.(*ast.Ident); ok && (id.Name == "run" || id.Name == "runRO") && len(n.Args) > 0 {
					ast.Inspect(n.Args[0], func(n ast.Node) bool {
						if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
							if s, err := strconv.Unquote(lit.Value); err == nil {
								subtests[s] = true
							}
						}
						return true
					})
				}
			}
			return true
		})
	}
	return tests, subtests
}

// docs/CONFORMANCE.md names tests that exist, and every one of this package's.
func TestConformancePage(t *testing.T) {
	page, err := os.ReadFile("../../docs/CONFORMANCE.md")
	if err != nil {
		t.Fatal(err)
	}
	type known struct{ tests, subtests map[string]bool }
	packages := map[string]known{}
	named := map[string]bool{}
	rows := 0
	cell := regexp.MustCompile("`([a-z0-9/]+) ([^`]+)`")
	for _, line := range strings.Split(string(page), "\n") {
		cells := strings.Split(line, " | ")
		if !strings.HasPrefix(line, "| ") || len(cells) != 3 || cells[0] == "| section" {
			continue
		}
		rows++
		tests := cell.FindAllStringSubmatch(cells[2], -1)
		if len(tests) == 0 {
			t.Errorf("no test: %s", line)
		}
		for _, m := range tests {
			dir, name := m[1], m[2]
			k, ok := packages[dir]
			if !ok {
				k.tests, k.subtests = names(t, dir)
				packages[dir] = k
			}
			if s, err := strconv.Unquote(name); err == nil {
				named[s] = true
				if !k.subtests[s] {
					t.Errorf("%s has no subtest %q", dir, s)
				}
			} else if !k.tests[name] {
				t.Errorf("%s has no test %s", dir, name)
			}
		}
	}
	if rows < 50 {
		t.Errorf("only %d lines were understood", rows)
	}
	_, ours := names(t, "virtio/virtiotest")
	if len(ours) < 30 {
		t.Errorf("only %d subtests were found", len(ours))
	}
	for s := range ours {
		if !named[s] {
			t.Errorf("the page does not name %q", s)
		}
	}
}
