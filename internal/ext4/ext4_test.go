package ext4_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/moovm/moovm/internal/ext4"
	"github.com/moovm/moovm/internal/ext4/ext4test"
)

var made = time.Unix(1700000000, 123456789).UTC()

// build makes a file system, checks it and reads it back.
func build(t *testing.T, o ext4.Options, f func(t *testing.T, w *ext4.Writer)) (path string, files map[string]*ext4test.File) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "fs")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close() })
	w, err := ext4.New(out, o)
	if err != nil {
		t.Fatal(err)
	}
	f(t, w)
	size, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	if err := out.Truncate(size); err != nil {
		t.Fatal(err)
	}
	ext4test.Check(t, path)
	files, err = ext4test.Read(out)
	if err != nil {
		t.Fatal(err)
	}
	return path, files
}

func add(t *testing.T, w *ext4.Writer, dir *ext4.Inode, name string, a ext4.Attr, data string) *ext4.Inode {
	t.Helper()
	n, err := w.Add(dir, name, a)
	if err != nil {
		t.Fatalf("%q: %v", name, err)
	}
	if data != "" {
		if err := w.Write(n, strings.NewReader(data)); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
	}
	return n
}

func zoo(t *testing.T, w *ext4.Writer) {
	root := w.Root()
	file := ext4.Attr{Mode: ext4.ModeFile | 0o4755, UID: 70000, GID: 1 << 20, MTime: made}
	n := add(t, w, root, "set-uid", file, "program")
	if err := w.Link(root, "hard", n); err != nil {
		t.Fatal(err)
	}
	dir := add(t, w, root, "dir", ext4.Attr{Mode: ext4.ModeDir | 0o1777, MTime: made}, "")
	add(t, w, dir, strings.Repeat("n", 255), file, "long")
	add(t, w, dir, "\xff\xfe not UTF-8", file, "bytes")
	add(t, w, dir, "short", ext4.Attr{Mode: ext4.ModeSymlink | 0o777, Target: strings.Repeat("t", 59)}, "")
	add(t, w, dir, "longer", ext4.Attr{Mode: ext4.ModeSymlink | 0o777, Target: strings.Repeat("t", 60)}, "")
	add(t, w, dir, "longest", ext4.Attr{Mode: ext4.ModeSymlink | 0o777, Target: strings.Repeat("t", 4095)}, "")
	add(t, w, dir, "null", ext4.Attr{Mode: ext4.ModeChar | 0o666, Major: 1, Minor: 3}, "")
	add(t, w, dir, "big", ext4.Attr{Mode: ext4.ModeBlock | 0o660, Major: 259, Minor: 70000}, "")
	add(t, w, dir, "fifo", ext4.Attr{Mode: ext4.ModeFIFO | 0o600}, "")
	add(t, w, dir, "socket", ext4.Attr{Mode: ext4.ModeSocket | 0o600}, "")
	x := file
	x.Xattrs = map[string][]byte{"security.capability": []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")}
	add(t, w, dir, "capable", x, "c")
	x.Xattrs = map[string][]byte{"user.a": []byte("1"), "user.b": bytes.Repeat([]byte("v"), 300), "trusted.overlay.opaque": []byte("y"), "user.empty": nil,
		"system.posix_acl_access": []byte("\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x04\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff")}
	add(t, w, dir, "attributed", x, "a")
	add(t, w, dir, "old", ext4.Attr{Mode: ext4.ModeFile, MTime: time.Unix(-86400*365*50, 5)}, "")
	add(t, w, dir, "new", ext4.Attr{Mode: ext4.ModeFile, MTime: time.Unix(1<<33, 5)}, "")
	holes := add(t, w, dir, "holes", file, "")
	block := bytes.Repeat([]byte("x"), 4096)
	var parts []io.Reader
	for i := range 3000 {
		parts = append(parts, bytes.NewReader(block), bytes.NewReader(make([]byte, 4096*(1+i%2))))
	}
	if err := w.Write(holes, io.MultiReader(append(parts, strings.NewReader("end"))...)); err != nil {
		t.Fatal(err)
	}
}

func TestZoo(t *testing.T) {
	path, files := build(t, ext4.Options{ID: "x", Time: made, Label: "zoo"}, zoo)
	f := files["/set-uid"]
	if f == nil || f.Mode != 0o104755 || f.UID != 70000 || f.GID != 1<<20 || !f.MTime.Equal(made) || f.Links != 2 || files["/hard"].Inode != f.Inode {
		t.Errorf("set-uid: %+v", f)
	}
	for path, want := range map[string]string{"/set-uid": "program", "/dir/" + strings.Repeat("n", 255): "long", "/dir/\xff\xfe not UTF-8": "bytes"} {
		if got, err := files[path].Contents(); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
	for name, n := range map[string]int{"short": 59, "longer": 60, "longest": 4095} {
		if got := files["/dir/"+name].Target; got != strings.Repeat("t", n) {
			t.Errorf("%s leads to %q", name, got)
		}
	}
	if f := files["/dir/null"]; f.Major != 1 || f.Minor != 3 || f.Mode != 0o020666 {
		t.Errorf("null: %+v", f)
	}
	if f := files["/dir/big"]; f.Major != 259 || f.Minor != 70000 {
		t.Errorf("big: %+v", f)
	}
	if got := files["/dir/capable"].Xattrs["security.capability"]; len(got) != 20 {
		t.Errorf("capability: %q", got)
	}
	x := files["/dir/attributed"].Xattrs
	if _, empty := x["user.empty"]; len(x) != 5 || x["user.a"] != "1" || len(x["user.b"]) != 300 || x["trusted.overlay.opaque"] != "y" || !empty || len(x["system.posix_acl_access"]) != 28 {
		t.Errorf("attributes: %q", x)
	}
	if got := files["/dir/old"].MTime; got.Unix() != -86400*365*50 || got.Nanosecond() != 5 {
		t.Errorf("old: %v", got)
	}
	if got := files["/dir/new"].MTime.Unix(); got != 1<<33 {
		t.Errorf("new: %v", got)
	}
	h := files["/dir/holes"]
	if h.Blocks != 3001 || h.Size != 4096*(3000+4500)+3 {
		t.Errorf("holes: %d blocks of %d bytes", h.Blocks, h.Size)
	}
	got, err := h.Contents()
	if err != nil || string(got[len(got)-3:]) != "end" || got[4095] != 'x' || got[4096] != 0 || got[8192] != 'x' {
		t.Errorf("holes: %v", err)
	}
	again, _ := build(t, ext4.Options{ID: "x", Time: made, Label: "zoo"}, zoo)
	if sum(t, path) != sum(t, again) {
		t.Error("two file systems of the same files differ")
	}
	if other, _ := build(t, ext4.Options{ID: "y", Time: made, Label: "zoo"}, zoo); sum(t, path) == sum(t, other) {
		t.Error("two identities, one file system")
	}
}

func sum(t *testing.T, path string) [32]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

func TestManyNames(t *testing.T) {
	for _, c := range []struct {
		n    int
		name string
	}{{100, "file-%d"}, {20_000, "%d"}, {9_000, "%0200d"}, {100_000, "f%d"}} {
		t.Run(fmt.Sprint(c.n), func(t *testing.T) {
			path, files := build(t, ext4.Options{}, func(t *testing.T, w *ext4.Writer) {
				dir := add(t, w, w.Root(), "d", ext4.Attr{Mode: ext4.ModeDir | 0o755}, "")
				for i := range c.n {
					add(t, w, dir, fmt.Sprintf(c.name, i), ext4.Attr{Mode: ext4.ModeFile | 0o644}, "")
				}
			})
			if got := len(files) - 2; got != c.n {
				t.Errorf("%d files; want %d", got, c.n)
			}
			if got, want := files["/d"].Index, c.n > 200; got != want {
				t.Errorf("index: %v; want %v", got, want)
			}
			ext4test.Check(t, path)
		})
	}
}

func TestManyFolders(t *testing.T) {
	_, files := build(t, ext4.Options{}, func(t *testing.T, w *ext4.Writer) {
		for i := range 66_000 {
			add(t, w, w.Root(), fmt.Sprint(i), ext4.Attr{Mode: ext4.ModeDir | 0o755}, "")
		}
	})
	if n := files["/"].Links; n != 1 {
		t.Errorf("%d links; a folder of so many has 1, which means that nobody counts", n)
	}
}

// TestSizes has sizes around the borders of groups and of what is refused.
func TestSizes(t *testing.T) {
	const group = 128 << 20
	for _, size := range []int64{16 << 20, 100 << 20, group, group + 4096, group + 17<<20, 2 * group, 10 * group, 5<<30 + 12345, 40 << 30, 300 << 30} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			path, files := build(t, ext4.Options{Size: size}, func(t *testing.T, w *ext4.Writer) {
				add(t, w, w.Root(), "f", ext4.Attr{Mode: ext4.ModeFile | 0o644}, "data")
			})
			info, err := os.Stat(path)
			if err != nil || info.Size() > size || info.Size() < size-17<<20 {
				t.Errorf("%d bytes for %d; %v", info.Size(), size, err)
			}
			if got, err := files["/f"].Contents(); string(got) != "data" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	for _, size := range []int64{-1, 1, 16<<20 - 1, 16 << 40} {
		if _, err := ext4.New(nil, ext4.Options{Size: size}); !errors.Is(err, ext4.ErrSize) {
			t.Errorf("%d: %v", size, err)
		}
	}
}

// TestLarge fills several groups, so that contents go around the copies of the
// superblock, and deletes in between.
func TestLarge(t *testing.T) {
	pattern := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	_, files := build(t, ext4.Options{}, func(t *testing.T, w *ext4.Writer) {
		for i := range 7 {
			n := add(t, w, w.Root(), fmt.Sprint(i), ext4.Attr{Mode: ext4.ModeFile | 0o644}, "")
			var parts []io.Reader
			for range 70 {
				parts = append(parts, bytes.NewReader(pattern))
			}
			if err := w.Write(n, io.MultiReader(parts...)); err != nil {
				t.Fatal(err)
			}
			if i%3 == 1 {
				if err := w.Unlink(w.Root(), fmt.Sprint(i)); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	if len(files) != 6 {
		t.Fatalf("%d files", len(files))
	}
	p := make([]byte, len(pattern))
	for path, f := range files {
		if path == "/" {
			continue
		}
		for off := int64(0); off < f.Size; off += int64(len(p)) {
			if _, err := f.Data.ReadAt(p, off); err != nil || !bytes.Equal(p, pattern) {
				t.Fatalf("%s at %d: %v", path, off, err)
			}
		}
	}
}

func TestUnlink(t *testing.T) {
	punched := int64(0)
	o := ext4.Options{Punch: func(_, n int64) error { punched += n; return nil }}
	_, files := build(t, o, func(t *testing.T, w *ext4.Writer) {
		dir := add(t, w, w.Root(), "d", ext4.Attr{Mode: ext4.ModeDir | 0o755}, "")
		sub := add(t, w, dir, "sub", ext4.Attr{Mode: ext4.ModeDir | 0o755}, "")
		kept := add(t, w, sub, "kept", ext4.Attr{Mode: ext4.ModeFile | 0o644}, "kept")
		add(t, w, sub, "gone", ext4.Attr{Mode: ext4.ModeFile | 0o644}, "gone")
		if err := w.Link(w.Root(), "kept", kept); err != nil {
			t.Fatal(err)
		}
		if err := w.Unlink(w.Root(), "d"); err != nil {
			t.Fatal(err)
		}
	})
	if len(files) != 2 || files["/kept"] == nil || files["/kept"].Links != 1 {
		t.Errorf("%v", files)
	}
	if punched != 4096 {
		t.Errorf("%d bytes were given back; want a block", punched)
	}
}

func TestRefused(t *testing.T) {
	out, err := os.Create(filepath.Join(t.TempDir(), "fs"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w, err := ext4.New(out, ext4.Options{Size: 16 << 20, MaxInodes: 70_000})
	if err != nil {
		t.Fatal(err)
	}
	root, file := w.Root(), ext4.Attr{Mode: ext4.ModeFile}
	for _, name := range []string{"", ".", "..", "a/b", "a\x00", strings.Repeat("x", 256)} {
		if _, err := w.Add(root, name, file); !errors.Is(err, ext4.ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, a := range []ext4.Attr{{}, {Mode: ext4.ModeFile | 1<<20}, {Mode: ext4.ModeChar, Major: 1 << 12}, {Mode: ext4.ModeType}} {
		if _, err := w.Add(root, "a", a); !errors.Is(err, ext4.ErrMode) {
			t.Errorf("%+v: %v", a, err)
		}
	}
	for _, target := range []string{"", "a\x00b", strings.Repeat("x", 4096)} {
		if _, err := w.Add(root, "a", ext4.Attr{Mode: ext4.ModeSymlink, Target: target}); !errors.Is(err, ext4.ErrSymlink) {
			t.Errorf("%q: %v", target, err)
		}
	}
	for name, v := range map[string]string{"nothing": "", "user." + strings.Repeat("x", 256): "", "user.x": strings.Repeat("x", 4096), "system.posix_acl_access": "x"} {
		_, err := w.Add(root, "a", ext4.Attr{Mode: ext4.ModeFile, Xattrs: map[string][]byte{name: []byte(v)}})
		if !errors.Is(err, ext4.ErrXattr) {
			t.Errorf("%q: %v", name, err)
		}
	}
	n, err := w.Add(root, "f", file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Add(root, "f", file); !errors.Is(err, ext4.ErrExists) {
		t.Error(err)
	}
	if err := w.Write(n, iotest.TimeoutReader(strings.NewReader(strings.Repeat("x", 10)))); err == nil {
		t.Error("a reader that failed is a good end")
	}
	large := add(t, w, root, "large", file, "")
	if err := w.Write(large, io.LimitReader(endless{}, 17<<20)); !errors.Is(err, ext4.ErrFull) {
		t.Error(err)
	}
	for i := range 65_001 {
		if err = w.Link(root, fmt.Sprint("l", i), n); err != nil {
			break
		}
	}
	if !errors.Is(err, ext4.ErrLinks) {
		t.Error(err)
	}
	for i := range 70_000 {
		if _, err = w.Add(root, fmt.Sprint("n", i), file); err != nil {
			break
		}
	}
	if !errors.Is(err, ext4.ErrInodes) {
		t.Error(err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}
