package cowdisk

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// baseFile makes a raw file of n random bytes.
func baseFile(t testing.TB, dir string, n int) (string, []byte) {
	t.Helper()
	p := filepath.Join(dir, "base.img")
	b := randomBytes(n, 1)
	writeFile(t, p, b)
	return p, b
}

func randomBytes(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	r.Read(b)
	return b
}

func writeFile(t testing.TB, p string, b []byte) {
	t.Helper()
	if err := os.WriteFile(p, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func mustCreate(t testing.TB, p string, o CreateOptions) {
	t.Helper()
	if err := Create(p, o); err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, p string, o Options) *Disk {
	t.Helper()
	d, err := Open(p, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func contents(t testing.TB, d *Disk) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func wantSame(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: first difference at byte %d (sector %d): %#x, want %#x", what, i, i/512, got[i], want[i])
		}
	}
}

func TestReadWriteReopen(t *testing.T) {
	for _, v := range []Variant{QEMUV2, UMLV3} {
		t.Run(v.String(), func(t *testing.T) {
			dir := t.TempDir()
			base, model := baseFile(t, dir, 1<<20)
			img := filepath.Join(dir, "a.cow")
			mustCreate(t, img, CreateOptions{Backing: "base.img", Variant: v})
			d := mustOpen(t, img, Options{})
			wantSame(t, "fresh", contents(t, d), model)
			r := rand.New(rand.NewPCG(1, 2))
			for i := range 300 {
				off := r.Int64N(int64(len(model)))
				n := min(r.IntN(20000)+1, len(model)-int(off))
				switch r.IntN(4) {
				case 0:
					clear(model[off : off+int64(n)])
					if err := d.WriteZeroes(off, int64(n), r.IntN(2) == 0); err != nil {
						t.Fatal(err)
					}
				case 1:
					p := randomBytes(n, uint64(i))
					copy(model[off:], p)
					if _, err := d.WritevAt([][]byte{p[:n/3], nil, p[n/3 : n/2], p[n/2:]}, off); err != nil {
						t.Fatal(err)
					}
				default:
					p := randomBytes(n, uint64(i))
					copy(model[off:], p)
					if _, err := d.WriteAt(p, off); err != nil {
						t.Fatal(err)
					}
				}
				if i%50 == 0 {
					if err := d.Flush(); err != nil {
						t.Fatal(err)
					}
				}
			}
			wantSame(t, "live", contents(t, d), model)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatalf("second Close: %v", err)
			}
			if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrClosed) {
				t.Fatalf("ReadAt after Close: %v", err)
			}
			d = mustOpen(t, img, Options{ReadOnly: true})
			wantSame(t, "reopened", contents(t, d), model)
			got := make([]byte, len(model))
			if _, err := d.ReadvAt([][]byte{got[:100], got[100:5000], nil, got[5000:]}, 0); err != nil {
				t.Fatal(err)
			}
			wantSame(t, "vectored", got, model)
			b, _ := os.ReadFile(base)
			wantSame(t, "base", b, randomBytes(1<<20, 1))
			var covered int64
			err := d.Extents(context.Background(), 0, d.Size(), func(e Extent) error {
				if e.Start != covered {
					t.Fatalf("extent starts at %d, want %d", e.Start, covered)
				}
				covered += e.Length
				if e.Zero && !bytes.Equal(model[e.Start:covered], make([]byte, e.Length)) {
					t.Fatalf("extent %+v is said to be zero", e)
				}
				return nil
			})
			if err != nil || covered != d.Size() {
				t.Fatalf("extents cover %d: %v", covered, err)
			}
		})
	}
}

func TestFreshLayout(t *testing.T) {
	dir := t.TempDir()
	base, _ := baseFile(t, dir, 3<<20)
	mtime := time.Unix(0x12345678, 0)
	os.Chtimes(base, mtime, mtime)
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	b, _ := os.ReadFile(img)
	want := make([]byte, 1056+768)
	copy(want, "OOOM\x00\x00\x00\x02base.img\x00moovmRAW")
	copy(want[1032:], "\x12\x34\x56\x78")
	copy(want[1040:], "\x00\x00\x00\x00\x00\x30\x00\x00\x00\x00\x02\x00")
	wantSame(t, "file", b, want)
	d := mustOpen(t, img, Options{})
	i := d.Info()
	if i.VirtualSize != 3<<20 || i.FormatSpecific.DataOffset != 2048 || i.FormatSpecific.BitmapOffset != 1056 || i.FormatSpecific.Variant != QEMUV2 || i.FormatSpecific.MTime != 0x12345678 {
		t.Fatalf("%+v %+v", i, i.FormatSpecific)
	}
	if i.FullBackingFilename != base || i.BackingFilename != "base.img" {
		t.Fatalf("%+v", i)
	}
}

func TestAllocationUnit(t *testing.T) {
	dir := t.TempDir()
	baseFile(t, dir, 64<<10)
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	d := mustOpen(t, img, Options{})
	if _, err := d.WriteAt([]byte{1}, 4096+513); err != nil {
		t.Fatal(err)
	}
	if n := d.Allocated(); n != 8 {
		t.Fatalf("one byte allocates %d sectors, want 8", n)
	}
	if _, err := d.WriteAt(make([]byte, 512), 3*4096-256); err != nil {
		t.Fatal(err)
	}
	var bm [16]byte
	d.BitmapAt(bm[:], 0)
	if want := [16]byte{1: 0xff, 2: 0xff, 3: 0xff}; bm != want {
		t.Fatalf("bitmap %x, want %x", bm, want)
	}
	raw, _ := os.ReadFile(img)
	if !bytes.Equal(raw[1056:1056+16], make([]byte, 16)) {
		t.Fatalf("bits are on disk before a flush: %x", raw[1056:1072])
	}
	d.Flush()
	raw, _ = os.ReadFile(img)
	if !bytes.Equal(raw[1056:1056+16], bm[:]) {
		t.Fatalf("bits on disk %x, want %x", raw[1056:1072], bm)
	}
}

func TestFlushCost(t *testing.T) {
	dir := t.TempDir()
	baseFile(t, dir, 64<<10)
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	d := mustOpen(t, img, Options{})
	step := func(what string, want uint64, f func() error) {
		t.Helper()
		before := d.Stats().Syncs
		if err := f(); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := d.Stats().Syncs - before; got != want {
			t.Errorf("%s: %d syncs, want %d", what, got, want)
		}
	}
	p := make([]byte, 8192)
	step("nothing", 0, func() error { return nil })
	step("new sectors", 2, func() error { _, err := d.WriteAt(p, 0); return err })
	step("overwrite", 1, func() error { _, err := d.WriteAt(p, 0); return err })
	step("nothing again", 0, func() error { return nil })
	step("discard of new", 2, func() error { return d.Discard(32768, 4096) })
	step("discard of old", 1, func() error { return d.Discard(0, 4096) })
	step("read", 0, func() error { _, err := d.ReadAt(p, 0); return err })
}

func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	base, _ := baseFile(t, dir, 64<<10)
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	good, _ := os.ReadFile(img)
	edit := func(f func(b []byte) []byte) string {
		p := filepath.Join(dir, "bad.cow")
		writeFile(t, p, f(bytes.Clone(good)))
		return p
	}
	put := func(off int, s string) func(b []byte) []byte {
		return func(b []byte) []byte { copy(b[off:], s); return b }
	}
	open := func(p string) error {
		d, err := Open(p, Options{})
		if err == nil {
			d.Close()
		}
		return err
	}
	outside := filepath.Join(t.TempDir(), "out.img")
	writeFile(t, outside, make([]byte, 64<<10))
	os.Symlink(outside, filepath.Join(dir, "link.img"))
	absent := filepath.Join(dir, "absent", "x.cow")
	for _, c := range []struct {
		name string
		err  error
		want error
	}{
		{"raw file", open(base), ErrNotCOW},
		{"empty file", open(edit(func(b []byte) []byte { return nil })), ErrNotCOW},
		{"only magic", open(edit(func(b []byte) []byte { return b[:4] })), ErrTruncated},
		{"truncated header", open(edit(func(b []byte) []byte { return b[:700] })), ErrTruncated},
		{"truncated bitmap", open(edit(func(b []byte) []byte { return b[:len(b)-1] })), ErrTruncated},
		{"version", open(edit(put(4, "\x00\x00\x00\x09"))), ErrVersion},
		{"size 0", open(edit(put(1040, "\x00\x00\x00\x00\x00\x00\x00\x00"))), ErrSize},
		{"size 511", open(edit(put(1040, "\x00\x00\x00\x00\x00\x00\x01\xff"))), ErrSize},
		{"size 2^63", open(edit(put(1040, "\x80\x00\x00\x00\x00\x00\x00\x00"))), ErrSize},
		{"sector size", open(edit(put(1048, "\x00\x00\x10\x00"))), ErrHeader},
		{"missing base", open(edit(put(8, "gone.img"))), ErrBackingMissing},
		{"base outside", open(edit(put(8, "/etc/passwd\x00"))), ErrBackingOutside},
		{"base by ..", open(edit(put(8, "../../../../../../../etc/passwd\x00"))), ErrBackingOutside},
		{"base by symlink", open(edit(put(8, "link.img"))), ErrBackingOutside},
		{"loop", open(edit(put(8, "bad.cow\x00"))), ErrBackingLoop},
		{"newer base", open(edit(put(1032, "\x00\x00\x00\x01"))), ErrStaleBacking},
		{"directory", open(dir), ErrIsDirectory},
		{"directory as base", open(edit(put(8, ".\x00"))), ErrIsDirectory},
		{"create over", Create(img, CreateOptions{Size: 512}), ErrExists},
		{"create nothing", Create(filepath.Join(dir, "n"), CreateOptions{}), ErrSize},
		{"create 511", Create(filepath.Join(dir, "n"), CreateOptions{Size: 511}), ErrSize},
		{"create -1", Create(filepath.Join(dir, "n"), CreateOptions{Size: -1 << 63}), ErrSize},
		{"create on nothing", Create(filepath.Join(dir, "n"), CreateOptions{Backing: "gone"}), ErrBackingMissing},
		{"create on itself", Create(filepath.Join(dir, "n"), CreateOptions{Backing: "n"}), ErrBackingLoop},
		{"create on a folder", Create(filepath.Join(dir, "n"), CreateOptions{Backing: "."}), ErrIsDirectory},
		{"create nowhere", Create(absent, CreateOptions{Size: 512}), fs.ErrNotExist},
		{"create with long path", Create(filepath.Join(dir, "n"), CreateOptions{Backing: strings.Repeat("./", 600) + "base.img"}), ErrPathTooLong},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, c.err, c.want)
		} else {
			t.Logf("%s: %v", c.name, c.err)
		}
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*n*"))
	for _, p := range left {
		if filepath.Base(p) == "n" || strings.Contains(p, "moovm-new") {
			t.Errorf("left behind: %s", p)
		}
	}
	if d, err := Open(edit(put(1032, "\x00\x00\x00\x01")), Options{AllowStaleBacking: true}); err != nil {
		t.Error(err)
	} else {
		d.Close()
	}
	if d, err := Open(edit(put(8, "gone.img")), Options{AllowMissingBacking: true}); err != nil {
		t.Error(err)
	} else {
		wantSame(t, "without base", contents(t, d), make([]byte, 64<<10))
		d.Close()
	}
	st, _ := os.Stat(outside)
	mt := st.ModTime().Unix()
	p := edit(func(b []byte) []byte {
		copy(b[8:], "link.img")
		copy(b[1032:], []byte{byte(mt >> 24), byte(mt >> 16), byte(mt >> 8), byte(mt)})
		return b
	})
	if d, err := Open(p, Options{BackingRoots: []string{filepath.Dir(outside)}}); err != nil {
		t.Error(err)
	} else {
		d.Close()
	}
	os.Truncate(base, 32<<10)
	os.Chtimes(base, time.Now(), time.Unix(mt, 0))
	st2, _ := os.Stat(base)
	mt = st2.ModTime().Unix()
	p = edit(put(1032, string([]byte{byte(mt >> 24), byte(mt >> 16), byte(mt >> 8), byte(mt)})))
	if err := open(p); !errors.Is(err, ErrStaleBacking) {
		t.Errorf("shrunken base: %v", err)
	}
}

func TestLocks(t *testing.T) {
	dir := t.TempDir()
	base, _ := baseFile(t, dir, 64<<10)
	img, other := filepath.Join(dir, "a.cow"), filepath.Join(dir, "b.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	mustCreate(t, other, CreateOptions{Backing: "base.img"})
	d := mustOpen(t, img, Options{})
	mustOpen(t, other, Options{}) // two overlays of one base
	for _, c := range []struct {
		what string
		open func() (*Disk, error)
	}{
		{"second writer", func() (*Disk, error) { return Open(img, Options{}) }},
		{"reader", func() (*Disk, error) { return Open(img, Options{ReadOnly: true}) }},
		{"writer of the base", func() (*Disk, error) { return OpenRaw(base, Options{}) }},
	} {
		if _, err := c.open(); !errors.Is(err, ErrLocked) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	l := mustOpen(t, img, Options{ReadOnly: true, NoLock: true})
	l.Close()
	d.Close()
	mustOpen(t, img, Options{})
}

func TestBaseLengths(t *testing.T) {
	for _, n := range []int{1, 511, 1000, 4095, 5000, 100000} {
		for _, size := range []int64{512, 4096, 10240, 131072} {
			for _, v := range []Variant{QEMUV2, UMLV3} {
				dir := t.TempDir()
				_, model := baseFile(t, dir, n)
				img := filepath.Join(dir, "a.cow")
				mustCreate(t, img, CreateOptions{Backing: "base.img", Size: size, Variant: v})
				d := mustOpen(t, img, Options{})
				want := make([]byte, size)
				copy(want, model)
				wantSame(t, "fresh", contents(t, d), want)
				if _, err := d.WriteAt([]byte{7}, size-1); err != nil {
					t.Fatal(err)
				}
				want[size-1] = 7
				wantSame(t, "written", contents(t, d), want)
				d.Discard(0, size)
				wantSame(t, "discarded", contents(t, d), make([]byte, size))
				d.Close()
				d = mustOpen(t, img, Options{})
				wantSame(t, "reopened", contents(t, d), make([]byte, size))
				d.Close()
			}
		}
	}
}
