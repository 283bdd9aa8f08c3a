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
	mustCreate(t, filepath.Join(dir, "top"), CreateOptions{Backing: "mid", BackingFormat: FormatCOW, Size: 40960})
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
	mustCreate(t, filepath.Join(dir, "top"), CreateOptions{Backing: "sub/mid", BackingFormat: FormatCOW})
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
	mustCreate(t, filepath.Join(sub, "up"), CreateOptions{Backing: "../top", BackingFormat: FormatCOW, BackingRoots: []string{"."}})
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
	mustCreate(t, b, CreateOptions{Backing: "a", BackingFormat: FormatCOW})
	if err := Rebase(t.Context(), a, "b", ToolOptions{OtherFormat: FormatCOW}); !errors.Is(err, ErrBackingLoop) && !errors.Is(err, ErrLocked) {
		t.Fatalf("rebase into a loop: %v", err)
	}
	cow := ToolOptions{OtherFormat: FormatCOW}
	if err := RebaseHeader(a, "b", cow); !errors.Is(err, ErrBackingLoop) {
		t.Fatalf("a loop of two was made: %v", err)
	}
	if d := mustOpen(t, b, Options{}); len(d.Layers()) != 3 {
		t.Error("the refused rebase changed something")
	} else {
		d.Close()
	}
	// A loop that another program made.
	loop := fixture{variant: QEMUV2, backing: "b\x00moovmCOW", size: 8192}
	writeFile(t, a, loop.image(make([]byte, 8192), func(int) bool { return false }))
	for _, p := range []string{a, b} {
		if _, err := Open(p, Options{}); !errors.Is(err, ErrBackingLoop) {
			t.Errorf("%s: %v", p, err)
		}
	}
	os.Link(a, filepath.Join(dir, "hard"))
	if err := RebaseHeader(a, "hard", cow); err != nil && !errors.Is(err, ErrLocked) && !errors.Is(err, ErrBackingLoop) {
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
	if d, err = OpenAny(img, Options{Format: FormatCOW}); err != nil || d.Info().Format != "cow" {
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

func TestZeroesOverBacking(t *testing.T) { // what lies in the base never shows again, whichever part of a unit is zeroed
	for _, v := range []Variant{QEMUV2, UMLV3} {
		dir := t.TempDir()
		base, want := baseFile(t, dir, 1<<20+700)
		before := bytes.Clone(want)
		img := filepath.Join(dir, "a.cow")
		mustCreate(t, img, CreateOptions{Backing: "base.img", Variant: v})
		d := mustOpen(t, img, Options{})
		want = append(want, make([]byte, int(d.Size())-len(want))...)
		off := int64(0)
		for i, n := range []int64{1, 511, 512, 513, 4095, 4096, 4097, 65536, 100001} {
			for _, at := range []int64{0, 1, 512, 4095} {
				from := off + at
				clear(want[from : from+n])
				var err error
				if (i+int(at))%2 == 0 {
					err = d.Discard(from, n)
				} else {
					err = d.WriteZeroes(from, n, at == 0)
				}
				if err != nil {
					t.Fatal(err)
				}
				off = (from + n + 8191) &^ 4095 // leaves a unit of the base in between
			}
		}
		clear(want[1<<20-5000:]) // up to the end, which is no whole unit
		if err := d.WriteZeroes(1<<20-5000, d.Size()-(1<<20-5000), true); err != nil {
			t.Fatal(err)
		}
		wantSame(t, "zeroed", contents(t, d), want)
		n := d.Allocated()
		d.Close()
		d = mustOpen(t, img, Options{})
		wantSame(t, "reopened", contents(t, d), want)
		if d.Allocated() != n {
			t.Errorf("%d sectors, were %d", d.Allocated(), n)
		}
		d.Close()
		after, _ := os.ReadFile(base)
		wantSame(t, "base", after, before)
	}
}

func TestSubPage(t *testing.T) { // writes of any part of a page keep the rest of it, whether it comes from the base, a layer or nowhere
	dir := t.TempDir()
	_, want := baseFile(t, dir, 256<<10)
	mustCreate(t, filepath.Join(dir, "mid"), CreateOptions{Backing: "base.img", Size: 512 << 10})
	want = append(want, make([]byte, 256<<10)...)
	mid := mustOpen(t, filepath.Join(dir, "mid"), Options{})
	for off := int64(8192); off < mid.Size(); off += 3 * 4096 {
		p := randomBytes(4096, uint64(off))
		copy(want[off:], p)
		if _, err := mid.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	mid.Close()
	mustCreate(t, filepath.Join(dir, "top"), CreateOptions{Backing: "mid", BackingFormat: FormatCOW})
	d := mustOpen(t, filepath.Join(dir, "top"), Options{})
	at := 0
	for _, n := range []int{1, 2, 511, 512, 513, 1024, 3584, 4095} {
		for _, in := range []int{0, 1, 511, 512, 1000, 3584, 4095} {
			off := at + in
			p := randomBytes(n, uint64(off))
			copy(want[off:], p)
			if _, err := d.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
			at += 8192
		}
	}
	wantSame(t, "written", contents(t, d), want)
	d.Close()
	d = mustOpen(t, filepath.Join(dir, "top"), Options{})
	wantSame(t, "reopened", contents(t, d), want)
}

func TestUnalignedSizes(t *testing.T) { // a tail that is no whole sector is kept, what pads it reads as zeros
	for _, n := range []int{513, 1023, 4097, 40960 - 1, 1<<20 + 511} {
		for _, v := range []Variant{QEMUV2, UMLV3} {
			dir := t.TempDir()
			_, data := baseFile(t, dir, n)
			size := (n + 511) &^ 511
			want := append(data[:n:n], make([]byte, size-n)...)
			img, out := filepath.Join(dir, "a"), filepath.Join(dir, "out")
			mustCreate(t, img, CreateOptions{Backing: "base.img", Variant: v})
			d := mustOpen(t, img, Options{})
			if d.Size() != int64(size) {
				t.Fatalf("%v over %d bytes: %d, want %d", v, n, d.Size(), size)
			}
			wantSame(t, "fresh", contents(t, d), want)
			want[n-1] ^= 0xff
			if _, err := d.WriteAt(want[n-1:n], int64(n-1)); err != nil {
				t.Fatal(err)
			}
			d.Close()
			if err := Flatten(t.Context(), img, out, VariantUnknown, ToolOptions{Options: Options{Format: FormatCOW}}); err != nil {
				t.Fatal(err)
			}
			b, _ := os.ReadFile(out)
			wantSame(t, "flattened", b, want[:len(b)])
			if len(b) < n {
				t.Errorf("the tail is lost: %d bytes of %d", len(b), n)
			}
			if r, err := Check(t.Context(), img, false, ToolOptions{}); err != nil || !r.Clean() {
				t.Errorf("%+v %v", r, err)
			}
		}
	}
}

func TestFiveTerabytes(t *testing.T) { // on a real file system: nothing is taken for 32 bits, and what is a hole costs nothing
	dir := t.TempDir()
	_, data := baseFile(t, dir, 1<<20)
	const size = 5 << 40
	for _, v := range []Variant{QEMUV2, UMLV3} {
		img := filepath.Join(dir, v.String())
		if err := Create(img, CreateOptions{Backing: "base.img", Size: size, Variant: v}); err != nil {
			t.Skipf("this file system has no files of 5 TiB (ext4 and xfs have): %v", err)
		}
		for round := range 2 {
			d := mustOpen(t, img, Options{})
			for i, off := range []int64{size - 8192, 1<<41 - 4096, 1<<32 - 1, 1 << 42, 300000} {
				p := randomBytes(8192, uint64(i))
				if round == 0 {
					if _, err := d.WriteAt(p, off); err != nil {
						t.Fatal(err)
					}
				}
				q := make([]byte, 8192)
				if _, err := d.ReadAt(q, off); err != nil {
					t.Fatal(err)
				}
				wantSame(t, fmt.Sprint(v, " at ", off), q, p)
			}
			q := make([]byte, 4096)
			if _, err := d.ReadAt(q, 0); err != nil || !bytes.Equal(q, data[:4096]) {
				t.Fatal("the base does not show", err)
			}
			if n := d.Info().ActualSize; n > 1<<20 {
				t.Errorf("%v takes up %d bytes", v, n)
			}
			d.Close()
		}
		if r, err := Check(t.Context(), img, false, ToolOptions{}); err != nil || !r.Clean() {
			t.Errorf("%v: %+v %v", v, r, err)
		}
	}
}
