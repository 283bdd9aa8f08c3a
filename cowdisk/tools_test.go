package cowdisk

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestCommitTools(t *testing.T) {
	dir := t.TempDir()
	base, want := baseFile(t, dir, 100000)
	img, alone := filepath.Join(dir, "a"), filepath.Join(dir, "alone")
	mustCreate(t, img, CreateOptions{Backing: "base.img", Size: 200704})
	mustCreate(t, alone, CreateOptions{Size: 4096})
	want = append(want, make([]byte, 200704-len(want))...)
	d := mustOpen(t, img, Options{})
	copy(want[99000:], randomBytes(50000, 2))
	d.WriteAt(want[99000:149000], 99000)
	clear(want[8192:20480])
	d.Discard(8192, 12288)
	d.Close()
	other := filepath.Join(dir, "b")
	mustCreate(t, other, CreateOptions{Backing: "base.img"})
	user := mustOpen(t, other, Options{})
	if err := Commit(t.Context(), img, ToolOptions{}); !errors.Is(err, ErrLocked) {
		t.Fatalf("base in use: %v", err)
	}
	user.Close()
	if err := Commit(t.Context(), alone, ToolOptions{}); !errors.Is(err, ErrNoBacking) {
		t.Fatalf("no base: %v", err)
	}
	os.Chtimes(base, time.Now(), time.Now().Add(-time.Hour))
	if err := Commit(t.Context(), img, ToolOptions{}); !errors.Is(err, ErrStaleBacking) {
		t.Fatalf("stale: %v", err)
	}
	os.Chtimes(base, time.Now(), time.Now())
	for _, p := range []string{img, other} {
		if err := RebaseHeader(p, "base.img", ToolOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := Commit(t.Context(), img, ToolOptions{}); err != nil {
		t.Fatal(err)
	}
	got, _ := os.ReadFile(base)
	wantSame(t, "base", got, want)
	d = mustOpen(t, img, Options{})
	wantSame(t, "overlay", contents(t, d), want)
	if n := d.Allocated(); n != 0 {
		t.Errorf("%d sectors left", n)
	}
	d.Close()
	if _, err := Open(other, Options{}); !errors.Is(err, ErrStaleBacking) {
		t.Errorf("another overlay of a base that was committed to: %v", err)
	}
}

func TestCommitIntoShorterImage(t *testing.T) { // the base is an image, and grows
	dir := t.TempDir()
	_, want := baseFile(t, dir, 40960)
	mid, top := filepath.Join(dir, "mid"), filepath.Join(dir, "top")
	mustCreate(t, mid, CreateOptions{Backing: "base.img", Size: 8192})
	mustCreate(t, top, CreateOptions{Backing: "mid", BackingFormat: FormatCOW, Size: 40960})
	clear(want[8192:])
	d := mustOpen(t, top, Options{})
	copy(want[30000:], "here")
	d.WriteAt([]byte("here"), 30000)
	d.Close()
	if err := Commit(t.Context(), top, ToolOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{top, mid} {
		b, err := readAll(p, Options{})
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, p, b, want)
	}
}

func TestRebaseTools(t *testing.T) {
	for _, v := range []Variant{QEMUV2, UMLV3} {
		dir := t.TempDir()
		base, want := baseFile(t, dir, 65536)
		img := filepath.Join(dir, "a")
		mustCreate(t, img, CreateOptions{Backing: "base.img", Variant: v})
		d := mustOpen(t, img, Options{})
		copy(want[5000:], "hello")
		d.WriteAt([]byte("hello"), 5000)
		d.Close()
		near := bytes.Clone(want)
		copy(near[40000:], "different")
		writeFile(t, filepath.Join(dir, "near"), near)
		same := func(when string) int64 {
			t.Helper()
			d := mustOpen(t, img, Options{})
			defer d.Close()
			wantSame(t, when, contents(t, d), want)
			return d.Allocated()
		}
		if err := Rebase(t.Context(), img, "near", ToolOptions{}); err != nil {
			t.Fatal(err)
		}
		if n := same("rebased"); n != 16 { // the unit that was there and the one that differs
			t.Errorf("%d sectors allocated", n)
		}
		if err := Rebase(t.Context(), img, "gone", ToolOptions{}); !errors.Is(err, ErrBackingMissing) {
			t.Errorf("%v", err)
		}
		if err := Rebase(t.Context(), img, "a", ToolOptions{}); !errors.Is(err, ErrBackingLoop) {
			t.Errorf("%v", err)
		}
		if err := Rebase(t.Context(), img, "", ToolOptions{}); err != nil {
			t.Fatal(err)
		}
		os.Remove(base)
		os.Remove(filepath.Join(dir, "near"))
		if n := same("standalone"); n != 128 {
			t.Errorf("%d sectors allocated", n)
		}
		d = mustOpen(t, img, Options{})
		if i := d.Info(); i.BackingFilename != "" || i.FullBackingFilename != "" || len(d.Layers()) != 1 {
			t.Errorf("%+v", i)
		}
		d.Close()
	}
}

func TestFlattenCompare(t *testing.T) {
	dir := t.TempDir()
	_, want := baseFile(t, dir, 1<<20)
	img := filepath.Join(dir, "a")
	mustCreate(t, img, CreateOptions{Backing: "base.img", Size: 3 << 20})
	d := mustOpen(t, img, Options{})
	d.WriteAt([]byte("x"), 2<<20)
	d.Discard(0, 1<<19)
	clear(want[:1<<19])
	want = append(want, make([]byte, 2<<20)...)
	want[2<<20] = 'x'
	d.Close()
	for name, v := range map[string]Variant{"raw": VariantUnknown, "v2": QEMUV2, "v3": UMLV3} {
		out := filepath.Join(dir, name)
		if err := Flatten(t.Context(), img, out, v, ToolOptions{Options: Options{Format: FormatCOW}}); err != nil {
			t.Fatal(err)
		}
		if err := Flatten(t.Context(), img, out, v, ToolOptions{Options: Options{Format: FormatCOW}}); !errors.Is(err, ErrExists) {
			t.Errorf("%v", err)
		}
		format := FormatCOW
		if v == VariantUnknown {
			format = FormatRaw
		}
		b, err := readAll(out, Options{Format: format})
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, name, b, want)
		if c, err := Compare(t.Context(), img, out, ToolOptions{Options: Options{Format: FormatCOW}, OtherFormat: format}); err != nil || !c.Equal || c.SizeA != 3<<20 {
			t.Errorf("%+v %v", c, err)
		}
		d, err := OpenAny(out, Options{Format: format})
		if err != nil {
			t.Fatal(err)
		}
		if n := d.Info().ActualSize; n > 700<<10 {
			t.Errorf("%s takes up %d bytes", name, n)
		}
		if v != VariantUnknown && d.Allocated() != (1<<19)/512+8 {
			t.Errorf("%s: %d sectors", name, d.Allocated())
		}
		if _, err := d.WriteAt([]byte("y"), 700001); err != nil {
			t.Fatal(err)
		}
		d.Close()
		if c, err := Compare(t.Context(), img, out, ToolOptions{Options: Options{Format: FormatCOW}, OtherFormat: format}); err != nil || c.Equal || c.Offset != 700001 {
			t.Errorf("%+v %v", c, err)
		}
	}
	short := filepath.Join(dir, "short")
	writeFile(t, short, want[:2<<20+512])
	if c, err := Compare(t.Context(), short, img, ToolOptions{OtherFormat: FormatCOW}); err != nil || !c.Equal || c.SizeA == c.SizeB {
		t.Errorf("a longer one with zeros: %+v %v", c, err)
	}
}

func TestResizeKeepsMode(t *testing.T) {
	dir := t.TempDir()
	img, link := filepath.Join(dir, "a"), filepath.Join(dir, "link")
	mustCreate(t, img, CreateOptions{Size: 4096})
	os.Chmod(img, 0o640)
	os.Symlink("a", link)
	if err := Resize(t.Context(), link, 1<<20, false, ToolOptions{}); err != nil {
		t.Fatal(err)
	}
	st, err := os.Lstat(img)
	if err != nil || st.Mode() != 0o640 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if st, _ := os.Lstat(link); st.Mode()&os.ModeSymlink == 0 {
		t.Error("the symlink was replaced")
	}
	if d := mustOpen(t, img, Options{}); d.Size() != 1<<20 {
		t.Errorf("%d bytes", d.Size())
	}
}

func TestSVG(t *testing.T) {
	dir := t.TempDir()
	baseFile(t, dir, 1<<20)
	img := filepath.Join(dir, "a<b&c")
	mustCreate(t, img, CreateOptions{Backing: "base.img", Size: 2 << 20})
	d := mustOpen(t, img, Options{})
	d.WriteAt(make([]byte, 300000), 100000)
	var b bytes.Buffer
	if err := d.WriteSVG(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	rects := 0
	for dec := xml.NewDecoder(strings.NewReader(b.String())); ; {
		tok, err := dec.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("not well-formed: %v\n%s", err, &b)
		}
		if s, ok := tok.(xml.StartElement); ok && s.Name.Local == "rect" {
			rects++
		}
	}
	if rects < 6 || !strings.Contains(b.String(), "zeros: 1048576 bytes") || !strings.Contains(b.String(), "a&lt;b&amp;c: 303104 bytes") {
		t.Errorf("%d rectangles\n%s", rects, &b)
	}
}
