package layers

import (
	"errors"
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// docs/features.md says of every feature which test proves it. What is checked
// here is that each of those tests exists; that they prove it is for the reader.

const (
	featuresHead = "| what it promises | the test that proves it |"
	// Below this heading stands what nobody promises, without tests.
	featuresEnd = "## Not there yet, not promised"
	// How a test is marked that runs in an emulated machine only (build tag vm).
	emulatedMark = " (emulated Pi)"
)

var (
	// testList is a cell of tests: names in backticks, with commas between them.
	testList = regexp.MustCompile("^`[^`]+`(?: \\(emulated Pi\\))?(?:, `[^`]+`(?: \\(emulated Pi\\))?)*$")
	testItem = regexp.MustCompile("`([^`]+)`( \\(emulated Pi\\))?")
	// testPath is folder.Function/subtest; a benchmark proves nothing.
	testPath = regexp.MustCompile(`^([a-z0-9]+(?:/[a-z0-9]+)*)\.((?:Test|Fuzz)\w+)(?:/(.+))?$`)
)

// A feature is one row of the table.
type feature struct {
	line    int
	promise string
	tests   []provingTest
}

type provingTest struct {
	folder, function, sub string
	emulated              bool // marked so
}

// parseFeatures reads the tables above the last section.
func parseFeatures(text string) ([]feature, error) {
	var all []feature
	seen := map[string]int{}
	inTable, ended := false, false
	line := 0
	for l := range strings.Lines(text) {
		line++
		l = strings.TrimSpace(l)
		if l == featuresEnd {
			ended = true
			break
		}
		if !strings.HasPrefix(l, "|") {
			inTable = false
			continue
		}
		if !inTable {
			if l != featuresHead {
				return nil, fmt.Errorf("line %d: a table begins with %q, not %q", line, featuresHead, l)
			}
			inTable = true
			continue
		}
		if strings.Trim(l, "|- ") == "" {
			continue
		}
		cells := strings.Split(strings.TrimSuffix(strings.TrimPrefix(l, "|"), "|"), "|")
		if len(cells) != 2 {
			return nil, fmt.Errorf("line %d: %d cells, not 2", line, len(cells))
		}
		f := feature{line: line, promise: strings.TrimSpace(cells[0])}
		if f.promise == "" {
			return nil, fmt.Errorf("line %d: nothing is promised", line)
		}
		if first, twice := seen[f.promise]; twice {
			return nil, fmt.Errorf("line %d: %q stands in line %d already", line, f.promise, first)
		}
		seen[f.promise] = line
		tests := strings.TrimSpace(cells[1])
		if !testList.MatchString(tests) {
			return nil, fmt.Errorf("line %d: %q is no list of tests", line, tests)
		}
		for _, item := range testItem.FindAllStringSubmatch(tests, -1) {
			name := testPath.FindStringSubmatch(item[1])
			if name == nil {
				return nil, fmt.Errorf("line %d: %q is not the name of a test", line, item[1])
			}
			f.tests = append(f.tests, provingTest{name[1], name[2], name[3], item[2] == emulatedMark})
		}
		all = append(all, f)
	}
	if !ended {
		return nil, fmt.Errorf("there is no section %q", featuresEnd)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no feature in it")
	}
	return all, nil
}

// A testFile is what a _test.go file holds.
type testFile struct {
	functions []string
	literals  map[string]bool // its strings; the names of subtests are among them
	emulated  bool            // compiled with the tag vm only
}

// readTests reads the test files of a folder, whatever their build tags.
func readTests(tree fs.FS, folder string) ([]testFile, error) {
	names, err := fs.Glob(tree, path.Join(folder, "*_test.go"))
	if err != nil {
		return nil, err
	}
	var all []testFile
	for _, name := range names {
		source, err := fs.ReadFile(tree, name)
		if err != nil {
			return nil, err
		}
		syntax, err := parser.ParseFile(token.NewFileSet(), name, source, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		f := testFile{literals: map[string]bool{}}
		for _, group := range syntax.Comments {
			for _, c := range group.List {
				if c.Pos() > syntax.Package || !constraint.IsGoBuild(c.Text) {
					continue
				}
				tags, err := constraint.Parse(c.Text)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", name, err)
				}
				here := func(vm bool) bool {
					return tags.Eval(func(tag string) bool {
						return slices.Contains([]string{"linux", "unix", runtime.GOARCH}, tag) || vm && tag == "vm"
					})
				}
				f.emulated = here(true) && !here(false)
			}
		}
		ast.Inspect(syntax, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if takesTest(n) {
					f.functions = append(f.functions, n.Name.Name)
				}
			case *ast.BasicLit:
				if s, err := strconv.Unquote(n.Value); n.Kind == token.STRING && err == nil {
					f.literals[s] = true
				}
			}
			return true
		})
		all = append(all, f)
	}
	return all, nil
}

// takesTest says whether go test runs it: func TestX(t *testing.T), or FuzzX with
// *testing.F.
func takesTest(f *ast.FuncDecl) bool {
	if f.Recv != nil || f.Type.TypeParams != nil || f.Type.Results != nil || len(f.Type.Params.List) != 1 || len(f.Type.Params.List[0].Names) > 1 {
		return false
	}
	pointer, ok := f.Type.Params.List[0].Type.(*ast.StarExpr)
	if !ok {
		return false
	}
	of, ok := pointer.X.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := of.X.(*ast.Ident)
	want := map[bool]string{true: "F", false: "T"}[strings.HasPrefix(f.Name.Name, "Fuzz")]
	return ok && pkg.Name == "testing" && of.Sel.Name == want
}

// hasSubtest says whether a subtest of that name can be in f: each of its parts
// is a string of the file, or a script in the folder's testdata.
func hasSubtest(tree fs.FS, folder string, f testFile, sub string) bool {
	if f.literals[sub] {
		return true
	}
	parts := strings.Split(sub, "/")
	if len(parts) > 1 && !slices.ContainsFunc(parts, func(part string) bool { return !f.literals[part] }) {
		return true
	}
	found := false
	// An error here is a folder that is not there.
	_ = fs.WalkDir(tree, path.Join(folder, "testdata"), func(name string, _ fs.DirEntry, err error) error {
		found = found || err == nil && path.Base(name) == sub+".txtar"
		return err
	})
	return found
}

// checkFeatures returns what is wrong with the table in text.
func checkFeatures(tree fs.FS, text string) (problems []string) {
	all, err := parseFeatures(text)
	if err != nil {
		return []string{err.Error()}
	}
	files := map[string][]testFile{}
	for _, f := range all {
		for _, test := range f.tests {
			problem := func(format string, args ...any) {
				problems = append(problems, fmt.Sprintf("line %d: %s.%s: ", f.line, test.folder, test.function)+fmt.Sprintf(format, args...))
			}
			if _, read := files[test.folder]; !read {
				if files[test.folder], err = readTests(tree, test.folder); err != nil {
					problem("%v", err)
					continue
				}
			}
			i := slices.IndexFunc(files[test.folder], func(f testFile) bool { return slices.Contains(f.functions, test.function) })
			if i < 0 {
				problem("there is no such test")
				continue
			}
			file := files[test.folder][i]
			if file.emulated != test.emulated {
				problem("needs the emulated Pi: %v, marked so: %v", file.emulated, test.emulated)
			}
			if test.sub != "" && !hasSubtest(tree, test.folder, file, test.sub) {
				problem("there is no subtest %q", test.sub)
			}
		}
	}
	return problems
}

func TestFeatures(t *testing.T) {
	text, err := os.ReadFile("../../docs/features.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range checkFeatures(os.DirFS("../.."), string(text)) {
		t.Error("docs/features.md: ", p)
	}
}

// A check that cannot fail proves nothing: each of these tables must be found out.
func TestFeaturesCheckFails(t *testing.T) {
	tree := fstest.MapFS{
		"disk/disk_test.go": {Data: []byte("package disk\n\nimport \"testing\"\n\nfunc TestOpen(t *testing.T) {\n\tt.Run(\"wrong key\", nil)\n\tt.Run(`deep`, nil)\n}\n\n" +
			"func TestMain(m *testing.M) {}\n\nfunc FuzzHeader(f *testing.F) {}\n\nfunc BenchmarkOpen(b *testing.B) {}\n\ntype s struct{}\n\nfunc (s) TestMethod(t *testing.T) {}\n\n// TestGone(t *testing.T)\n")},
		"disk/vm_test.go":              {Data: []byte("//go:build vm\n\npackage disk\n\nimport \"testing\"\n\nfunc TestRelay(t *testing.T) {}\n")},
		"disk/arm_test.go":             {Data: []byte("//go:build linux && !js\n\npackage disk\n\nimport \"testing\"\n\nfunc TestArm(*testing.T) {}\n")},
		"disk/testdata/cli/show.txtar": {Data: []byte("")},
		"disk/disk.go":                 {Data: []byte("package disk\n\nimport \"testing\"\n\nfunc TestInCode(t *testing.T) {}\n")},
		"broken/x_test.go":             {Data: []byte("package\n")},
	}
	table := func(rows ...string) string {
		return "# Features\n\n" + featuresHead + "\n|---|---|\n" + strings.Join(rows, "\n") + "\n\n" + featuresEnd + "\n\n| what | when |\n"
	}
	for _, tt := range []struct{ name, text, want string }{
		{"good", table("| opens | `disk.TestOpen`, `disk.TestRelay` (emulated Pi), `disk.FuzzHeader` |"), ""},
		{"good subtests", table("| a | `disk.TestOpen/wrong key` |", "| b | `disk.TestOpen/deep/wrong key` |", "| c | `disk.TestOpen/show` |", "| d | `disk.TestArm` |"), ""},
		{"no such test", table("| opens | `disk.TestShut` |"), "line 5: disk.TestShut: there is no such test"},
		{"only in a comment", table("| opens | `disk.TestGone` |"), "no such test"},
		{"a method", table("| opens | `disk.TestMethod` |"), "no such test"},
		{"in no test file", table("| opens | `disk.TestInCode` |"), "no such test"},
		{"no test but TestMain", table("| opens | `disk.TestMain` |"), "no such test"},
		{"no such folder", table("| opens | `relay.TestOpen` |"), "relay.TestOpen: there is no such test"},
		{"does not parse", table("| opens | `broken.TestX` |"), "broken/x_test.go"},
		{"no such subtest", table("| opens | `disk.TestOpen/right key` |"), `there is no subtest "right key"`},
		{"half a subtest", table("| opens | `disk.TestOpen/deep/right key` |"), `there is no subtest`},
		{"the second is wrong", table("| opens | `disk.TestOpen`, `disk.TestShut` |"), "disk.TestShut"},
		{"not marked", table("| opens | `disk.TestRelay` |"), "needs the emulated Pi: true, marked so: false"},
		{"marked wrongly", table("| opens | `disk.TestOpen` (emulated Pi) |"), "needs the emulated Pi: false, marked so: true"},
		{"a benchmark", table("| opens | `disk.BenchmarkOpen` |"), "not the name of a test"},
		{"no function", table("| opens | `disk` |"), "not the name of a test"},
		{"no test", table("| opens |  |"), `"" is no list of tests`},
		{"words in place of a test", table("| opens | the demonstration |"), "is no list of tests"},
		{"words beside a test", table("| opens | `disk.TestOpen` and by hand |"), "is no list of tests"},
		{"no promise", table("| | `disk.TestOpen` |"), "nothing is promised"},
		{"promised twice", table("| opens | `disk.TestOpen` |", "| opens | `disk.TestOpen` |"), "line 6: \"opens\" stands in line 5 already"},
		{"three cells", table("| opens | `disk.TestOpen` | today |"), "3 cells"},
		{"another head", strings.Replace(table("| opens | `disk.TestOpen` |"), "the test that proves it", "since", 1), "a table begins with"},
		{"empty table", table(), "no feature"},
		{"empty file", "", "there is no section"},
		{"no end", featuresHead + "\n|---|---|\n| opens | `disk.TestOpen` |\n", "there is no section"},
		{"only below the end", featuresEnd + "\n" + table("| opens | `disk.TestOpen` |"), "no feature"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := strings.Join(checkFeatures(tree, tt.text), "\n")
			if (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
				t.Errorf("got %q; want %q", got, tt.want)
			}
		})
	}
}
