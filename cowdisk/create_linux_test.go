package cowdisk

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// Where files cannot be made without a name, the one under construction is its owner's alone, and a leftover, or what others put in its
// place, is not written to.
func TestCreateNamed(t *testing.T) {
	dir := t.TempDir()
	h := HostFS{named: true}
	img := filepath.Join(dir, "img")
	temp := img + tempSuffix
	mode := func(p string) fs.FileMode {
		t.Helper()
		fi, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Mode()
	}
	victim := filepath.Join(dir, "victim")
	writeFile(t, victim, []byte("precious"))
	if err := os.Link(victim, temp); err != nil { // what others put there
		t.Fatal(err)
	}
	f, err := h.Create(img)
	if err != nil {
		t.Fatal(err)
	}
	if m := mode(temp); m != 0o600 {
		t.Errorf("mode %v while it is made", m)
	}
	if _, err := h.Create(img); !errors.Is(err, ErrLocked) {
		t.Errorf("two at a time: %v", err)
	}
	if _, err := f.WriteAt([]byte("image"), 0); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(victim); string(b) != "precious" {
		t.Errorf("another file was written to: %q", b)
	}
	if err := f.Publish(false, true); err != nil {
		t.Fatal(err)
	}
	f.Close()
	plain, err := os.OpenFile(filepath.Join(dir, "plain"), os.O_CREATE|os.O_WRONLY, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	plain.Close()
	if m := mode(img); m != mode(plain.Name()) {
		t.Errorf("mode %v, of other files %v", m, mode(plain.Name()))
	}

	// A symlink is not followed.
	if err := os.Symlink(victim, temp); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Create(img); err == nil {
		t.Error("a symlink was followed")
	}
	os.Remove(temp)
}

// A tool that replaces a private image makes no copy that others can read, at no moment.
func TestReplacePrivately(t *testing.T) {
	dir := t.TempDir()
	img := filepath.Join(dir, "img")
	mustCreate(t, img, CreateOptions{Size: 1 << 20})
	if err := os.Chmod(img, 0o600); err != nil {
		t.Fatal(err)
	}
	seen := 0
	b := newBetweenFS(func() {
		left, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, p := range left {
			if fi, err := os.Lstat(p); err != nil || fi.Mode() != 0o600 {
				t.Errorf("%s: %v %v", p, fi.Mode(), err)
			}
		}
		seen = max(seen, len(left))
	})
	b.HostFS.named = true
	if err := Resize(context.Background(), img, 2<<20, false, ToolOptions{Options: Options{FS: b}}); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(img); err != nil || fi.Mode() != 0o600 || seen != 2 {
		t.Errorf("mode %v, %v, %d files seen", fi.Mode(), err, seen)
	}
}
