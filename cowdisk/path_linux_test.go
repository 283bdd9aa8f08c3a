package cowdisk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pathTree is a folder in which the text of a path and the kernel disagree: here leads to real/deep, so here/.. is real. In both places
// lies an o.cow of its own size, on a base.img of its own.
func pathTree(t *testing.T) (dir string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir+"/real/deep", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real/deep", dir+"/here"); err != nil {
		t.Fatal(err)
	}
	for at, size := range map[string]int{dir: 1 << 20, dir + "/real": 2 << 20} {
		if err := os.WriteFile(at+"/base.img", make([]byte, size), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := Create(at+"/o.cow", CreateOptions{Backing: "base.img"}); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// What is opened is what the kernel opens, whatever the text of the path looks like.
func TestPathsAreTheKernels(t *testing.T) {
	dir := pathTree(t)
	t.Chdir(dir + "/here") // sets $PWD to the symlink's name
	link := func(target, name string) {
		t.Helper()
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("here/../o.cow", "up")              // real/o.cow
	link("here/../new.cow", "d1")            // dangles: real/new.cow
	link("d1", "d2")                         // dangles twice
	link("here/../../real/deep/../d3", "d4") // to a link that dangles
	if err := os.Symlink("deep/../new.cow", dir+"/real/d3"); err != nil {
		t.Fatal(err)
	}
	link("loop2", "loop1")
	link("loop1", "loop2")
	for path, want := range map[string]string{
		"../o.cow":             "real/o.cow",
		"./../o.cow":           "real/o.cow",
		dir + "/here/../o.cow": "real/o.cow",
		"../../here/../o.cow":  "real/o.cow",
		"../../o.cow":          "o.cow",
		"../../up":             "real/o.cow",
		"../../d1":             "real/new.cow",
		"../../d2":             "real/new.cow",
		dir + "/d4":            "real/new.cow",
		"../absent":            "real/absent",
	} {
		got, err := HostFS{}.Resolve(path)
		if err != nil || got != filepath.Join(dir, want) {
			t.Errorf("%s: %s, %v; want %s", path, got, err, want)
			continue
		}
		if a, err := os.Stat(path); err == nil { // the kernel's word
			if b, err := os.Stat(got); err != nil || !os.SameFile(a, b) {
				t.Errorf("%s: the kernel opens another file than %s", path, got)
			}
		}
	}
	for _, path := range []string{"", "../../loop1", "../gone/x", "../gone/..", "../o.cow/../o.cow"} {
		if got, err := (HostFS{}).Resolve(path); err == nil {
			t.Errorf("%q: %s, want an error as the kernel gives", path, got)
		}
	}
}

// Every tool looks at, and writes, the image that the kernel means.
func TestToolsTakeTheKernelsPath(t *testing.T) {
	dir := pathTree(t)
	t.Chdir(dir + "/here")
	const size = 2 << 20
	d, err := Open("../o.cow", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if d.Size() != size {
		t.Fatalf("opened the disk of %d bytes", d.Size())
	}
	if _, err := d.WriteAt([]byte("mine"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	d.Close()
	if r, err := Check(t.Context(), "../o.cow", false, ToolOptions{}); err != nil || r.AllocatedSectors == 0 {
		t.Error("check:", r, err)
	}
	if c, err := Compare(t.Context(), "../o.cow", dir+"/here/../base.img", ToolOptions{Options: Options{Format: FormatCOW}}); err != nil || c.SizeA != size || c.SizeB != size {
		t.Error("compare:", c, err)
	}
	if err := Flatten(t.Context(), "../o.cow", "../flat.img", VariantUnknown, ToolOptions{Options: Options{Format: FormatCOW}}); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(dir + "/real/flat.img"); err != nil || st.Size() != size {
		t.Error("flatten:", err)
	}
	if err := Commit(t.Context(), "../o.cow", ToolOptions{}); err != nil {
		t.Error(err)
	}
	for at, want := range map[string]string{"/real/base.img": "mine", "/base.img": "\x00\x00\x00\x00"} {
		if b, err := os.ReadFile(dir + at); err != nil || string(b[:4]) != want {
			t.Errorf("%s after the commit begins with %q", at, b[:4])
		}
	}
	if err := Resize(t.Context(), "../o.cow", 4<<20, false, ToolOptions{}); err != nil {
		t.Error(err)
	}
	if err := RebaseHeader("../o.cow", dir+"/here/../flat.img", ToolOptions{}); err != nil {
		t.Error(err)
	}
	if h := headerOf(t, dir+"/real/o.cow"); h.Size != 4<<20 || h.Backing != dir+"/real/flat.img" {
		t.Errorf("%+v", h)
	}
	if h := headerOf(t, dir+"/o.cow"); h.Size != 1<<20 || h.Backing != "base.img" {
		t.Errorf("the other image was changed: %+v", h)
	}
}

// What a header keeps is made from what was opened.
func TestStoredPathIsWhatWasOpened(t *testing.T) {
	dir := pathTree(t)
	for i, c := range []struct {
		backing string
		v       Variant
		want    string
	}{
		{"base.img", QEMUV2, "base.img"},
		{"./base.img", QEMUV2, "./base.img"},
		{"real/base.img", QEMUV2, "real/base.img"},
		{"here/../base.img", QEMUV2, "real/base.img"},
		{"here/../base.img", UMLV3, dir + "/real/base.img"},
		{dir + "/here/../base.img", QEMUV2, dir + "/real/base.img"},
		{dir + "/here/../base.img", UMLV3, dir + "/real/base.img"},
	} {
		path := dir + "/" + strings.Repeat("n", i+1)
		if err := Create(path, CreateOptions{Backing: c.backing, Variant: c.v}); err != nil {
			t.Error(err)
			continue
		}
		if h := headerOf(t, path); h.Backing != c.want {
			t.Errorf("%s (%v): stored %s, want %s", c.backing, c.v, h.Backing, c.want)
		}
	}
	// The path of an image through a symlink: the folder is the one the image is in.
	if err := Create(dir+"/here/../via.cow", CreateOptions{Backing: "base.img"}); err != nil {
		t.Fatal(err)
	}
	if h := headerOf(t, dir+"/real/via.cow"); h.Size != 2<<20 {
		t.Errorf("took the base of another folder: %d bytes", h.Size)
	}
}

// A header's path with ".." behind a symlink leads where the kernel goes, and the rule about folders is applied to that place.
func TestHeaderPathBehindSymlink(t *testing.T) {
	dir := pathTree(t)
	fs := HostFS{}
	put := func(path, backing string) {
		t.Helper()
		f, err := fs.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := newImage(f, path, path, Header{Variant: QEMUV2, Size: 2 << 20, SectorSize: 512, Backing: backing}, nil, 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Publish(false, false); err != nil {
			t.Fatal(err)
		}
	}
	put(dir+"/h1.cow", "here/../base.img")
	d, err := Open(dir+"/h1.cow", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := d.Layers()[1].Info().Filename; !strings.HasSuffix(got, "base.img") || d.Info().FullBackingFilename != dir+"/real/base.img" {
		t.Errorf("%s, %s", got, d.Info().FullBackingFilename)
	}
	d.Close()
	// By its text this is dir/real/base.img; the kernel gets to dir/base.img, which real/deep may not name.
	put(dir+"/real/deep/h2.cow", "../../base.img")
	if _, err := Open(dir+"/real/deep/h2.cow", Options{}); !errors.Is(err, ErrBackingOutside) {
		t.Error(err)
	}
	if _, err := Open(dir+"/here/h2.cow", Options{BackingRoots: []string{dir + "/here/.."}}); !errors.Is(err, ErrBackingOutside) {
		t.Error("a root through a symlink is its parent by text:", err)
	}
}
