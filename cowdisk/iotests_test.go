package cowdisk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// The cases of QEMU's I/O tests that apply to a copy-on-write format.

func TestShortBacking(t *testing.T) { // and growth that must not show the base
	dir := t.TempDir()
	_, base := baseFile(t, dir, 10000)
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img", Size: 8192})
	d := mustOpen(t, img, Options{})
	want := base[:8192:8192]
	wantSame(t, "base is longer", contents(t, d), want)
	d.Close()
	if err := Resize(t.Context(), img, 20480, false, ToolOptions{}); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, img, Options{})
	wantSame(t, "grown over a longer base", contents(t, d), append(want, make([]byte, 20480-8192)...))
	d.Close()
	if err := Resize(t.Context(), img, 4096, false, ToolOptions{}); !errors.Is(err, ErrShrink) {
		t.Fatalf("shrink: %v", err)
	}
	if err := Resize(t.Context(), img, 4096, true, ToolOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := Resize(t.Context(), img, 12288, false, ToolOptions{}); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, img, Options{})
	wantSame(t, "shrunk and grown", contents(t, d), append(base[:4096:4096], make([]byte, 8192)...))
}

func TestShortMiddle(t *testing.T) { // a short layer hides what the longer one below it has
	dir := t.TempDir()
	_, base := baseFile(t, dir, 40960)
	mustCreate(t, filepath.Join(dir, "mid"), CreateOptions{Backing: "base.img", Size: 8192})
	mustCreate(t, filepath.Join(dir, "top"), CreateOptions{Backing: "mid", Size: 40960})
	d := mustOpen(t, filepath.Join(dir, "top"), Options{})
	wantSame(t, "top", contents(t, d), append(base[:8192:8192], make([]byte, 32768)...))
	if n := len(d.Layers()); n != 3 {
		t.Fatalf("%d layers", n)
	}
	for i, want := range []int64{40960, 8192, 40960} {
		l := d.Layers()[i]
		if l.Size() != want {
			t.Errorf("layer %d: %d bytes, want %d", i, l.Size(), want)
		}
		var n int64
		if err := l.Extents(t.Context(), 0, l.Size(), func(e Extent) error { n += e.Length; return nil }); err != nil || n != want {
			t.Errorf("layer %d: extents of %d bytes: %v", i, n, err)
		}
	}
	if i := d.Layers()[2].Info(); i.Format != "raw" || i.FormatSpecific != nil {
		t.Errorf("%+v", i)
	}
}

func TestRelativePaths(t *testing.T) { // each path starts at the folder of the image that names it
	dir := t.TempDir()
	sub := filepath.Join(dir, "sub")
	os.Mkdir(sub, 0o755)
	_, base := baseFile(t, sub, 8192)
	mustCreate(t, filepath.Join(sub, "mid"), CreateOptions{Backing: "base.img"})
	mustCreate(t, filepath.Join(dir, "top"), CreateOptions{Backing: "sub/mid"})
	wd, _ := os.Getwd()
	for _, at := range []string{dir, sub, wd} {
		t.Chdir(at)
		d := mustOpen(t, filepath.Join(dir, "top"), Options{})
		wantSame(t, "top", contents(t, d), base)
		d.Close()
	}
	t.Chdir(dir)
	d := mustOpen(t, "top", Options{})
	wantSame(t, "relative", contents(t, d), base)
	d.Close()
	// A base above the image's folder has to be allowed.
	mustCreate(t, filepath.Join(sub, "up"), CreateOptions{Backing: "../top"})
	if _, err := Open("sub/up", Options{}); !errors.Is(err, ErrBackingOutside) {
		t.Fatalf("%v", err)
	}
	d = mustOpen(t, "sub/up", Options{BackingRoots: []string{"."}})
	wantSame(t, "allowed", contents(t, d), base)
	d.Close()
	// The image by a symlink: its folder is where it really is.
	os.Symlink(filepath.Join(dir, "top"), filepath.Join(sub, "link"))
	d = mustOpen(t, "sub/link", Options{})
	wantSame(t, "by symlink", contents(t, d), base)
}

func TestLoopOverLayers(t *testing.T) {
	dir := t.TempDir()
	baseFile(t, dir, 8192)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	mustCreate(t, a, CreateOptions{Backing: "base.img"})
	mustCreate(t, b, CreateOptions{Backing: "a"})
	if err := Rebase(t.Context(), a, "b", ToolOptions{}); !errors.Is(err, ErrBackingLoop) && !errors.Is(err, ErrLocked) {
		t.Fatalf("rebase into a loop: %v", err)
	}
	if err := RebaseHeader(a, "b", ToolOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{a, b} {
		if _, err := Open(p, Options{}); !errors.Is(err, ErrBackingLoop) {
			t.Errorf("%s: %v", p, err)
		}
	}
	os.Link(a, filepath.Join(dir, "hard"))
	if err := RebaseHeader(a, "hard", ToolOptions{}); err != nil && !errors.Is(err, ErrLocked) && !errors.Is(err, ErrBackingLoop) {
		t.Fatal(err)
	}
	if _, err := Open(a, Options{AllowStaleBacking: true}); !errors.Is(err, ErrBackingLoop) {
		t.Errorf("by hard link: %v", err)
	}
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	_, base := baseFile(t, dir, 8192)
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	before, _ := os.ReadFile(img)
	d := mustOpen(t, img, Options{ReadOnly: true})
	two := mustOpen(t, img, Options{ReadOnly: true}) // readers share
	_, err := d.WriteAt(base, 0)
	_, err2 := d.WritevAt([][]byte{base}, 0)
	for _, err := range []error{err, err2, d.Discard(0, 512), d.WriteZeroes(0, 512, false)} {
		if !errors.Is(err, ErrReadOnly) {
			t.Errorf("%v", err)
		}
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	d.Close()
	two.Close()
	after, _ := os.ReadFile(img)
	wantSame(t, "image", after, before)
}

func TestPastTheEnd(t *testing.T) {
	dir := t.TempDir()
	_, base := baseFile(t, dir, 8192)
	mustCreate(t, filepath.Join(dir, "a"), CreateOptions{Backing: "base.img"})
	d := mustOpen(t, filepath.Join(dir, "a"), Options{})
	p := make([]byte, 1000)
	if n, err := d.ReadAt(p, 8000); n != 192 || err != io.EOF {
		t.Errorf("%d %v", n, err)
	}
	wantSame(t, "the part before the end", p[:192], base[8000:])
	if n, err := d.ReadAt(p, 8192); n != 0 || err != io.EOF {
		t.Errorf("%d %v", n, err)
	}
	if n, err := d.ReadAt(nil, 8192); n != 0 || err != nil {
		t.Errorf("%d %v", n, err)
	}
	for _, off := range []int64{-1, 7193, 8192, 8193, 1 << 62, 1<<63 - 1, -1 << 63} {
		if n, err := d.WriteAt(p, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("write at %d: %d %v", off, n, err)
		}
		if n, err := d.ReadvAt([][]byte{p}, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("readv at %d: %d %v", off, n, err)
		}
		if err := d.Discard(off, 1000); !errors.Is(err, ErrRange) {
			t.Errorf("discard at %d: %v", off, err)
		}
	}
	if err := d.Flush(); err != nil { // a request that was refused is no failed write
		t.Error(err)
	}
	wantSame(t, "contents", contents(t, d), base)
}

func TestDeletedBacking(t *testing.T) {
	dir := t.TempDir()
	base, data := baseFile(t, dir, 8192)
	img := filepath.Join(dir, "a")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	d := mustOpen(t, img, Options{})
	os.Remove(base)
	wantSame(t, "deleted while open", contents(t, d), data)
	d.Close()
	if _, err := Open(img, Options{}); !errors.Is(err, ErrBackingMissing) || !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	moved := filepath.Join(t.TempDir(), "moved")
	writeFile(t, moved, data)
	d = mustOpen(t, img, Options{Backing: moved, AllowStaleBacking: true})
	wantSame(t, "named by the caller", contents(t, d), data)
}

func TestRaw(t *testing.T) {
	dir := t.TempDir()
	base, data := baseFile(t, dir, 8192)
	d, err := OpenRaw(base, Options{})
	if err != nil {
		t.Fatal(err)
	}
	copy(data[100:], "hello")
	if _, err := d.WriteAt([]byte("hello"), 100); err != nil {
		t.Fatal(err)
	}
	clear(data[4096:5000])
	if err := d.Discard(4096, 904); err != nil {
		t.Fatal(err)
	}
	before := d.Stats().Syncs
	if err := d.Flush(); err != nil || d.Stats().Syncs != before+1 {
		t.Fatalf("%v %+v", err, d.Stats())
	}
	if err := d.Flush(); err != nil || d.Stats().Syncs != before+1 {
		t.Fatalf("%v %+v", err, d.Stats())
	}
	wantSame(t, "raw", contents(t, d), data)
	d.Close()
	b, _ := os.ReadFile(base)
	wantSame(t, "file", b, data)
	img := filepath.Join(dir, "a")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	if d, err = OpenAny(img, Options{}); err != nil || d.Info().Format != "cow" {
		t.Fatal(err)
	}
	d.Close()
}

func TestSnapshot(t *testing.T) {
	for _, v := range []Variant{QEMUV2, UMLV3} {
		dir := t.TempDir()
		_, want := baseFile(t, dir, 1<<20)
		mustCreate(t, filepath.Join(dir, "a"), CreateOptions{Backing: "base.img", Variant: v})
		d := mustOpen(t, filepath.Join(dir, "a"), Options{})
		var wg sync.WaitGroup
		stop := make(chan struct{})
		half := len(want) / 2
		wg.Go(func() { // a guest that does not stop
			r := rand.New(rand.NewPCG(1, 1))
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				p := randomBytes(5000, uint64(i))
				off := half + r.IntN(half-5000)
				copy(want[off:], p)
				if _, err := d.WriteAt(p, int64(off)); err != nil {
					t.Error(err)
				}
				q := make([]byte, 5000)
				if _, err := d.ReadAt(q, int64(off)); err != nil || !bytes.Equal(p, q) {
					t.Errorf("what was written is not there: %v", err)
				}
			}
		})
		var frozen [][]byte
		for i := range 3 {
			p := randomBytes(10000, uint64(i)+99)
			copy(want[i*7000:], p)
			if _, err := d.WriteAt(p, int64(i*7000)); err != nil {
				t.Fatal(err)
			}
			frozen = append(frozen, bytes.Clone(want[:half]))
			if err := d.Snapshot(filepath.Join(dir, fmt.Sprint("s", i))); err != nil {
				t.Fatal(err)
			}
			if err := d.Snapshot(filepath.Join(dir, "a")); !errors.Is(err, ErrExists) {
				t.Fatalf("over an image: %v", err)
			}
		}
		close(stop)
		wg.Wait()
		if n := len(d.Layers()); n != 5 {
			t.Errorf("%d layers", n)
		}
		wantSame(t, "live", contents(t, d), want)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = mustOpen(t, filepath.Join(dir, "s2"), Options{})
		wantSame(t, "reopened", contents(t, d), want)
		d.Close()
		for i, name := range []string{"a", "s0", "s1"} {
			b, err := readAll(filepath.Join(dir, name), Options{})
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, name, b[:half], frozen[i])
		}
	}
}

func TestBlockDeviceAsBase(t *testing.T) {
	losetup, err := exec.LookPath("losetup")
	if err != nil {
		t.Skip("losetup is not installed: apt-get install mount")
	}
	dir := t.TempDir()
	base, want := baseFile(t, dir, 1<<20)
	out, err := exec.Command(losetup, "-f", "--show", "-r", base).Output()
	if err != nil {
		t.Skipf("no loop device to be had (root and the loop module are needed): %v", err)
	}
	dev := strings.TrimSpace(string(out))
	defer exec.Command(losetup, "-d", dev).Run()
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: dev})
	if _, err := Open(img, Options{}); !errors.Is(err, ErrBackingOutside) {
		t.Errorf("%v", err)
	}
	d := mustOpen(t, img, Options{BackingRoots: []string{"/dev"}})
	wantSame(t, "device", contents(t, d), want)
	if i := d.Info(); i.FormatSpecific.MTime != 0 {
		t.Errorf("the time of a device means nothing: %+v", i.FormatSpecific)
	}
	d.Close()
}

func TestOddRaw(t *testing.T) {
	dir := t.TempDir()
	base, want := baseFile(t, dir, 1000)
	d, err := OpenRaw(base, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	wantSame(t, "padded", contents(t, d), append(want[:1000:1000], make([]byte, 24)...))
}
