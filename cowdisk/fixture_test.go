package cowdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

// fixture makes images without any of the package's code: offsets as numbers, as the format's description has them.
type fixture struct {
	variant Variant
	little  bool
	backing string
	mtime   uint32
	size    uint64
	align   uint32
}

func (f fixture) header() []byte {
	be := binary.BigEndian
	b := make([]byte, 8192)
	copy(b, "OOOM")
	switch f.variant {
	case QEMUV2:
		b[7] = 2
		copy(b[8:], f.backing)
		be.PutUint32(b[1032:], f.mtime)
		be.PutUint64(b[1040:], f.size)
		be.PutUint32(b[1048:], 512)
		return b[:1056]
	case QEMUV2i386:
		b[7] = 2
		copy(b[8:], f.backing)
		be.PutUint32(b[1032:], f.mtime)
		be.PutUint64(b[1036:], f.size)
		be.PutUint32(b[1044:], 512)
		return b[:1048]
	case UMLV1, UMLV1Unpacked:
		var o binary.ByteOrder = be
		if f.little {
			o = binary.LittleEndian
			copy(b, "MOOO")
		}
		o.PutUint32(b[4:], 1)
		copy(b[8:], f.backing)
		o.PutUint32(b[264:], f.mtime)
		if f.variant == UMLV1 {
			o.PutUint64(b[268:], f.size)
			o.PutUint32(b[276:], 512)
			return b[:280]
		}
		o.PutUint64(b[272:], f.size)
		o.PutUint32(b[280:], 512)
		return b[:288]
	case UMLV2:
		b[7] = 2
		copy(b[8:], f.backing)
		be.PutUint32(b[4104:], f.mtime)
		be.PutUint64(b[4108:], f.size)
		be.PutUint32(b[4116:], 512)
		return b[:4120]
	case UMLV2Unpacked:
		b[7] = 2
		copy(b[8:], f.backing)
		be.PutUint32(b[4104:], f.mtime)
		be.PutUint64(b[4112:], f.size)
		be.PutUint32(b[4120:], 512)
		return b[:4128]
	case UMLV3:
		b[7] = 3
		be.PutUint32(b[8:], f.mtime)
		be.PutUint64(b[12:], f.size)
		be.PutUint32(b[20:], 512)
		be.PutUint32(b[24:], f.align)
		copy(b[32:], f.backing)
		return b[:4128]
	case UMLV3Broken:
		b[7] = 3
		be.PutUint32(b[8:], f.mtime)
		be.PutUint64(b[16:], f.size)
		be.PutUint32(b[24:], 512)
		be.PutUint32(b[28:], f.align)
		copy(b[36:], f.backing)
		return b[:4136]
	}
	panic("no such variant")
}

func up(n, to uint64) uint64 {
	for n%to != 0 {
		n++
	}
	return n
}

// geometry is where bitmap and data lie, and the bitmap's length.
func (f fixture) geometry() (bitmap, length, data uint64) {
	switch f.variant {
	case QEMUV2:
		bitmap, length = 1056, (f.size/512+7)/8
		return bitmap, length, (bitmap + length + 511) &^ 511
	case QEMUV2i386:
		bitmap, length = 1048, (f.size/512+7)/8
		return bitmap, length, (bitmap + length + 511) &^ 511
	case UMLV1, UMLV1Unpacked, UMLV2, UMLV2Unpacked:
		bitmap = map[Variant]uint64{UMLV1: 280, UMLV1Unpacked: 288, UMLV2: 4120, UMLV2Unpacked: 4128}[f.variant]
		length = (f.size + 511) / (8 * 512)
		return bitmap, length, up(bitmap+length, 512)
	case UMLV3, UMLV3Broken:
		bitmap = up(map[Variant]uint64{UMLV3: 4128, UMLV3Broken: 4136}[f.variant], uint64(f.align))
		length = ((f.size+511)/512 + 7) / 8
		return bitmap, length, up(bitmap+length, uint64(f.align))
	}
	panic("no such variant")
}

// image makes a file in which the sectors for which has says so are allocated, with data from disk. It ends after the last of them.
func (f fixture) image(disk []byte, has func(sector int) bool) []byte {
	bitmap, length, data := f.geometry()
	b := make([]byte, bitmap+length)
	copy(b, f.header())
	for s := 0; s*512 < len(disk); s++ {
		if !has(s) {
			continue
		}
		b[bitmap+uint64(s)/8] |= 1 << (s % 8)
		end := int(data) + s*512 + 512
		if len(b) < end {
			b = append(b, make([]byte, end-len(b))...)
		}
		copy(b[int(data)+s*512:], disk[s*512:min(s*512+512, len(disk))])
	}
	return b
}

var allFixtures = []fixture{
	{variant: QEMUV2}, {variant: QEMUV2i386}, {variant: UMLV1}, {variant: UMLV1, little: true}, {variant: UMLV2},
	{variant: UMLV3, align: 4096}, {variant: UMLV3, align: 512}, {variant: UMLV3, align: 65536}, {variant: UMLV3Broken, align: 4096}, {variant: UMLV3Broken, align: 512},
	{variant: UMLV1Unpacked}, {variant: UMLV1Unpacked, little: true}, {variant: UMLV2Unpacked},
}

func (f fixture) String() string { return fmt.Sprintf("%v-le%v-align%d", f.variant, f.little, f.align) }

// Every layout, with any mixture of allocated and other sectors, reads as the description says; writable ones are written so that a
// reader made from the description sees it.
func TestLayouts(t *testing.T) {
	for _, f := range allFixtures {
		t.Run(f.String(), func(t *testing.T) {
			for _, size := range []int{512, 4096, 5 * 4096, 200 << 10, 3<<20 + 4096} {
				r := rand.New(rand.NewPCG(uint64(size), 1))
				f := f
				f.size, f.mtime, f.backing = uint64(size), 77, "/d/base"
				over, base := randomBytes(size, 3), randomBytes(size, 4)
				if size < 4096 && f.variant != QEMUV2 && f.variant != QEMUV2i386 && f.align == 0 {
					continue // no sector has a bit
				}
				m := newMemFS()
				m.put("/d/base", base, 77)
				bits := make([]bool, size/512)
				for i := range bits {
					bits[i] = r.IntN(3) == 0
				}
				m.put("/d/img", f.image(over, func(s int) bool { return bits[s] }), 1)
				want := bytes.Clone(base)
				for i, b := range bits {
					if b {
						copy(want[i*512:i*512+512], over[i*512:])
					}
				}
				h, err := Probe(bytes.NewReader(m.contents("/d/img")), int64(len(m.contents("/d/img"))))
				if err != nil || h.Variant != f.variant || h.Backing != "/d/base" || h.MTime != 77 || h.Size != int64(size) || h.LittleEndian != f.little {
					t.Fatalf("size %d: Probe: %+v %v", size, h, err)
				}
				readOnly := f.variant == UMLV1Unpacked || f.variant == UMLV2Unpacked
				if readOnly {
					if _, err := Open("/d/img", Options{FS: m}); !errors.Is(err, ErrVariant) {
						t.Fatalf("open for writing: %v", err)
					}
				}
				d := mustOpen(t, "/d/img", Options{FS: m, ReadOnly: readOnly})
				wantSame(t, "contents", contents(t, d), want)
				bitmap, length, data := f.geometry()
				if got := d.Info().FormatSpecific; uint64(got.BitmapOffset) != bitmap || uint64(got.DataOffset) != data || uint64(d.BitmapLen()) != length {
					t.Fatalf("size %d: %+v, want %d %d %d", size, got, bitmap, length, data)
				}
				wantSame(t, "header", d.HeaderBytes(), f.header())
				if readOnly {
					d.Close()
					continue
				}
				for range 40 {
					off := r.IntN(size)
					p := randomBytes(min(r.IntN(9000)+1, size-off), r.Uint64())
					copy(want[off:], p)
					if _, err := d.WriteAt(p, int64(off)); err != nil {
						t.Fatal(err)
					}
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				// Read it back without the package.
				img := m.contents("/d/img")
				wantSame(t, "header after writing", img[:len(f.header())], f.header())
				got := bytes.Clone(base)
				for s := range size / 512 {
					if img[int(bitmap)+s/8]>>(s%8)&1 != 0 {
						copy(got[s*512:s*512+512], img[int(data)+s*512:])
					}
				}
				wantSame(t, "written", got, want)
				res, err := Check(t.Context(), "/d/img", false, ToolOptions{Options: Options{FS: m}})
				if err != nil || !res.Clean() {
					t.Fatalf("check: %+v %v", res, err)
				}
			}
		})
	}
}

// Bytes after the path and bits after the last sector belong to nobody: they change nothing and stay as they are.
func TestGarbage(t *testing.T) {
	for _, f := range allFixtures {
		if f.variant == UMLV1Unpacked || f.variant == UMLV2Unpacked {
			continue
		}
		f.size, f.mtime, f.backing = 20*512, 5, "/d/base"
		if f.variant == UMLV1 || f.variant == UMLV2 {
			f.size = 24 * 512 // whole bytes, or there are no bits for the rest
		}
		m := newMemFS()
		base := randomBytes(int(f.size), 9)
		m.put("/d/base", base, 5)
		img := f.image(base, func(int) bool { return false })
		at := bytes.Index(img, []byte("/d/base")) + 8
		copy(img[at:], "garbage")
		bitmap, length, _ := f.geometry()
		garbage := byte(0)
		if f.size == 20*512 {
			garbage = 0xa0
		}
		img[bitmap+length-1] |= garbage
		m.put("/d/img", img, 1)
		d := mustOpen(t, "/d/img", Options{FS: m})
		wantSame(t, f.String(), contents(t, d), base)
		if n := d.Allocated(); n != 0 {
			t.Errorf("%v: %d sectors allocated", f, n)
		}
		d.WriteAt([]byte{1}, 16*512)
		d.Close()
		after := m.contents("/d/img")
		if !bytes.Equal(after[at:at+7], []byte("garbage")) || after[bitmap+length-1]&0xf0 != garbage|map[bool]byte{true: 0xf0, false: 0}[garbage == 0] {
			t.Errorf("%v: garbage was not preserved: %q %x", f, after[at:at+7], after[bitmap+length-1])
		}
	}
}

// The layouts are told apart also where fields of one make sense as fields of another; what stays ambiguous is refused.
func TestAmbiguity(t *testing.T) {
	// A QEMU i386 image whose bitmap begins like the size and sector size of an x86-64 one.
	f := fixture{variant: QEMUV2i386, backing: "/d/base", mtime: 7, size: 1 << 20}
	base := randomBytes(1<<20, 1)
	img := f.image(base, func(s int) bool { return s == 17 }) // byte 2 of the bitmap = 0x02: big-endian 512 at 1048
	m := newMemFS()
	m.put("/d/base", base, 7)
	m.put("/d/img", img, 1)
	d := mustOpen(t, "/d/img", Options{FS: m})
	if v := d.Info().FormatSpecific.Variant; v != QEMUV2i386 {
		t.Errorf("found %v", v)
	}
	d.Close()

	// A UML v2 image with a whole QEMU header's fields in the garbage after its path.
	u := fixture{variant: UMLV2, backing: "/d/base", mtime: 7, size: 1 << 20}
	img = u.image(base, func(s int) bool { return s == 0 })
	binary.BigEndian.PutUint64(img[1040:], 2<<20)
	binary.BigEndian.PutUint32(img[1048:], 512)
	img = append(img, make([]byte, 1<<20)...)
	m.put("/d/img", img, 1)
	_, err := Probe(bytes.NewReader(img), int64(len(img)))
	if !errors.Is(err, ErrAmbiguous) {
		t.Fatalf("Probe: %v", err)
	}
	t.Log(err)
	d = mustOpen(t, "/d/img", Options{FS: m}) // the base tells
	if v := d.Info().FormatSpecific.Variant; v != UMLV2 {
		t.Errorf("found %v", v)
	}
	d.Close()
	delete(m.nodes, "/d/base")
	if _, err := Open("/d/img", Options{FS: m}); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("without base: %v", err)
	}
}

// UML's old layouts have no bits for up to 7 last sectors: they are read from the base, and cannot be written.
func TestSectorsWithoutBit(t *testing.T) {
	f := fixture{variant: UMLV2, backing: "/d/base", mtime: 7, size: 19 * 512}
	base := randomBytes(19*512, 1)
	m := newMemFS()
	m.put("/d/base", base, 7)
	m.put("/d/img", f.image(base, func(int) bool { return false }), 1)
	d := mustOpen(t, "/d/img", Options{FS: m})
	if _, err := d.WriteAt(make([]byte, 512), 15*512); err != nil {
		t.Fatal(err)
	}
	clear(base[15*512 : 16*512])
	for _, err := range []error{
		func() error { _, err := d.WriteAt(make([]byte, 512), 16*512); return err }(),
		d.Discard(18*512, 512),
	} {
		if !errors.Is(err, ErrNoBit) {
			t.Errorf("%v", err)
		}
	}
	wantSame(t, "contents", contents(t, d), base)
	if err := d.Flush(); err != nil {
		t.Errorf("Flush: %v", err)
	}
}

// The sizes for which the documentation promises an aligned data area, and no others.
func TestDataAlignment(t *testing.T) {
	for mib := int64(1); mib < 9000; mib++ {
		h := Header{Variant: QEMUV2, Size: mib << 20}
		page, large := mib%16 == 10 || mib%16 == 11, mib%4096 == 4090 || mib%4096 == 4091
		if got := h.DataOffset(); (got%4096 == 0) != page || (got%(1<<20) == 0) != large {
			t.Fatalf("%d MiB: data at %d", mib, got)
		}
		h = Header{Variant: UMLV3, Size: mib << 20, Alignment: defaultAlign}
		if got := h.DataOffset(); got%4096 != 0 {
			t.Fatalf("v3, %d MiB: data at %d", mib, got)
		}
	}
}
