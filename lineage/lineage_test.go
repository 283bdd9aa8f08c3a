package lineage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/moovm/moovm/cowdisk"
)

// folder is an empty folder without links in its name.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func raw(t testing.TB, path string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, make([]byte, 64<<10), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func overlay(t testing.TB, path, backing string) {
	t.Helper()
	real := backing
	if !filepath.IsAbs(real) {
		real = filepath.Join(filepath.Dir(path), backing)
	}
	format := cowdisk.FormatRaw
	if filepath.Ext(backing) == ".cow" {
		format = cowdisk.FormatCOW
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700),
		cowdisk.Create(path, cowdisk.CreateOptions{Backing: backing, BackingFormat: format, BackingRoots: []string{filepath.Dir(real), "/"}})); err != nil {
		t.Fatal(err)
	}
}

// draw writes a forest as text: a line an image, indented below what it stands
// on.
func draw(dir string, trees []*Image) string {
	var b strings.Builder
	var line func(i *Image, depth int, above []*Image)
	line = func(i *Image, depth int, above []*Image) {
		if slices.Contains(above, i) {
			return
		}
		name, err := filepath.Rel(dir, i.Path)
		if err != nil || !filepath.IsLocal(name) {
			name = i.Path
		}
		fmt.Fprintf(&b, "%s%s %s", strings.Repeat("  ", depth), name, i.Format)
		for _, p := range []error{ErrMissing, ErrOutside, ErrLoop} {
			if errors.Is(i.Problem, p) {
				fmt.Fprintf(&b, " (%v)", p)
			}
		}
		b.WriteByte('\n')
		for _, o := range i.Overlays {
			line(o, depth+1, append(above, i))
		}
	}
	for _, i := range trees {
		line(i, 0, nil)
	}
	return b.String()
}

func TestScan(t *testing.T) {
	dir := folder(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	raw(t, at("base.img"))
	raw(t, at("unused.img"))
	raw(t, at("in/other.img"))
	overlay(t, at("a.cow"), "base.img")
	overlay(t, at("b.cow"), "base.img")
	overlay(t, at("a1.cow"), "a.cow")
	overlay(t, at("in/c.cow"), "../base.img")
	overlay(t, at("in/d.cow"), at("in/other.img"))
	raw(t, at("gone.img"))
	overlay(t, at("e.cow"), "gone.img")
	elsewhere := folder(t)
	raw(t, filepath.Join(elsewhere, "far.img"))
	overlay(t, at("f.cow"), filepath.Join(elsewhere, "far.img"))
	if err := cowdisk.Create(at("alone.cow"), cowdisk.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(at("gone.img")), os.Symlink("base.img", at("link.img")), os.Symlink(dir, at("in/circle")),
		os.Link(at("base.img"), at("in/same.img"))); err != nil {
		t.Fatal(err)
	}
	overlay(t, at("g.cow"), "link.img")
	overlay(t, at("in/h.cow"), "same.img")

	f, err := Scan(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`%s/far.img  (%v)
  f.cow cow
alone.cow cow
base.img raw
  a.cow cow
    a1.cow cow
  b.cow cow
  g.cow cow
  in/c.cow cow
  in/h.cow cow
gone.img  (%v)
  e.cow cow
in/other.img raw
  in/d.cow cow
`, elsewhere, ErrOutside, ErrMissing)
	trees := f.Trees()
	slices.SortStableFunc(trees, func(a, b *Image) int { // what lies outside first, whatever the test's folders are called
		if out := func(i *Image) bool { return !strings.HasPrefix(i.Path, dir) }; out(a) != out(b) {
			return map[bool]int{true: -1, false: 1}[out(a)]
		}
		return strings.Compare(a.Path, b.Path)
	})
	if got := draw(dir, trees); got != want {
		t.Errorf("the forest is\n%swant\n%s", got, want)
	}
	if i := f.Image(at("a1.cow")); i == nil || i.Root().Path != at("base.img") || i.Size != 64<<10 || i.ActualSize <= 0 {
		t.Errorf("a1.cow is %+v", i)
	}
}

// Images that stand on each other are there once, and say so.
func TestLoop(t *testing.T) {
	dir := folder(t)
	a, b := filepath.Join(dir, "a.cow"), filepath.Join(dir, "b.cow")
	raw(t, filepath.Join(dir, "base.img"))
	overlay(t, a, "base.img")
	overlay(t, b, "a.cow")
	if err := cowdisk.RebaseHeader(a, "b.cow", cowdisk.ToolOptions{}); err != nil {
		// The tool sees it coming; somebody else's program may not.
		image, rerr := os.ReadFile(a)
		if rerr != nil {
			t.Fatal(rerr)
		}
		image = []byte(strings.Replace(string(image), "base.img", "b.cow\x00\x00\x00", 1))
		if err := os.WriteFile(a, image, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f, err := Scan(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("a.cow cow (%v)\n  b.cow cow (%v)\n", ErrLoop, ErrLoop)
	if got := draw(dir, f.Trees()); got != want {
		t.Errorf("the forest is\n%swant\n%s", got, want)
	}
}

// A plain list of what stands on what, whatever the shape.
func TestScanModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir := folder(t)
		n := rapid.IntRange(1, 12).Draw(rt, "images")
		names, on := []string{"base.img"}, map[string]string{}
		raw(t, filepath.Join(dir, "base.img"))
		for i := range n {
			name := fmt.Sprintf("%s%d.cow", rapid.SampledFrom([]string{"", "x/", "y/z/"}).Draw(rt, "folder"), i)
			base := rapid.SampledFrom(names).Draw(rt, "base")
			backing := filepath.Join(dir, base)
			if rapid.Bool().Draw(rt, "relative") {
				var err error
				if backing, err = filepath.Rel(filepath.Join(dir, filepath.Dir(name)), backing); err != nil {
					t.Fatal(err)
				}
			}
			overlay(t, filepath.Join(dir, name), backing)
			names, on[name] = append(names, name), base
		}
		f, err := Scan(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			var want, got []string
			for o, base := range on {
				if base == name {
					want = append(want, filepath.Join(dir, o))
				}
			}
			for _, o := range f.StandingOn(filepath.Join(dir, name)) {
				got = append(got, o.Path)
			}
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Fatalf("on %s stand %v, want %v", name, got, want)
			}
		}
		if trees := f.Trees(); len(trees) != 1 || trees[0].Path != filepath.Join(dir, "base.img") {
			t.Fatalf("%d trees", len(trees))
		}
	})
}

func TestRemove(t *testing.T) {
	dir := folder(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	elsewhere := folder(t)
	raw(t, at("base.img"))
	overlay(t, at("a.cow"), "base.img")
	overlay(t, at("b.cow"), "a.cow")
	overlay(t, filepath.Join(elsewhere, "c.cow"), at("b.cow"))
	if err := os.Symlink("b.cow", at("link.cow")); err != nil {
		t.Fatal(err)
	}
	remove := func(name string, raw bool, folders ...string) error {
		return Remove(t.Context(), at(name), raw, folders...)
	}
	for name, err := range map[string]error{"a.cow": remove("a.cow", false), "base.img": remove("base.img", true)} {
		var e *StoodOnError
		if !errors.As(err, &e) || !errors.Is(err, ErrStoodOn) || len(e.By) != 1 || !strings.Contains(err.Error(), e.By[0].Path) {
			t.Errorf("%s, on which others stand: %v", name, err)
		}
	}
	if err := remove("b.cow", false, elsewhere); !errors.Is(err, ErrStoodOn) {
		t.Errorf("one that an image in another folder stands on: %v", err)
	}
	if err := remove("base.img", false); err == nil || !strings.Contains(err.Error(), "format=raw") {
		t.Errorf("what is no image: %v", err)
	}
	for _, name := range []string{"link.cow", "", "none.cow"} {
		if err := remove(name, false); err == nil {
			t.Errorf("%q was removed", name)
		}
	}
	// In use.
	d, err := cowdisk.Open(at("b.cow"), cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := remove("b.cow", false); !errors.Is(err, cowdisk.ErrLocked) {
		t.Errorf("one in use: %v", err)
	}
	if runtime.GOOS == "linux" {
		f, err := Scan(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"b.cow", "a.cow", "base.img"} {
			if !f.Image(at(name)).InUse {
				t.Errorf("%s is not said to be in use", name)
			}
		}
	}
	d.Close()
	for _, name := range []string{"a.cow", "b.cow", "base.img"} {
		if _, err := os.Stat(at(name)); err != nil {
			t.Errorf("after all that was refused: %v", err)
		}
	}
	for _, name := range []string{"b.cow", "a.cow"} {
		if err := remove(name, false); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(at(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there: %v", name, err)
		}
	}
	if err := remove("base.img", true); err != nil {
		t.Error(err)
	}
}

// What cannot be read may stand on anything.
func TestUnreadable(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root reads everything; run this test as another user")
	}
	dir := folder(t)
	raw(t, filepath.Join(dir, "base.img"))
	overlay(t, filepath.Join(dir, "secret.cow"), "base.img")
	overlay(t, filepath.Join(dir, "a.cow"), "base.img")
	if err := os.Chmod(filepath.Join(dir, "secret.cow"), 0); err != nil {
		t.Fatal(err)
	}
	if err := Remove(t.Context(), filepath.Join(dir, "a.cow"), false); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "secret.cow") {
		t.Errorf("removed: %v", err)
	}
}

// Folders are full of other things.
func TestOtherFiles(t *testing.T) {
	dir := folder(t)
	if err := errors.Join(syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600), os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600),
		os.WriteFile(filepath.Join(dir, "short"), []byte("OOOM"), 0o600)); err != nil {
		t.Fatal(err)
	}
	f, err := Scan(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range f.Trees() {
		if filepath.Base(i.Path) != "short" || i.Problem == nil {
			t.Errorf("%+v", i)
		}
	}
	if _, err := Scan(t.Context(), filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}
