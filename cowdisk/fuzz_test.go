package cowdisk

import (
	"bytes"
	"context"
	"testing"
)

// fuzzSeeds are an image of each layout and some damaged ones.
func fuzzSeeds(f *testing.F) {
	data := randomBytes(16*4096, 1)
	for _, x := range allFixtures {
		x.size, x.backing = 16*4096, "base"
		img := x.image(data, func(s int) bool { return s%3 == 0 })
		f.Add(img[:min(len(img), 12000)])
		f.Add(x.header())
	}
	f.Add([]byte("OOOM"))
	f.Add([]byte("MOOO\x01\x00\x00\x00"))
	f.Add(fixture{variant: QEMUV2, size: 1<<62 - 1}.header())
	f.Add(fixture{variant: UMLV3, align: 1 << 31, size: 4096}.header())
	f.Add(fixture{variant: QEMUV2, size: 4096, backing: "img"}.header())
}

// FuzzProbe: a header costs an error at worst, and what is accepted makes sense.
func FuzzProbe(f *testing.F) {
	fuzzSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := Probe(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			if err.Error() == "" {
				t.Fatal("an error without words")
			}
			return
		}
		if h.Size < 512 || h.BitmapOffset() <= 0 || h.DataOffset() < h.BitmapOffset()+h.BitmapBytes() || h.DataOffset()+h.DiskSize() < 0 || h.Variant == VariantUnknown {
			t.Fatalf("%+v", h)
		}
		// Writing the same header again changes nothing.
		c := bytes.Clone(b[:layouts[h.Variant].header])
		h.encode(c)
		if !bytes.Equal(c, b[:len(c)]) {
			t.Fatalf("encode changes the header %+v", h)
		}
	})
}

// FuzzOpen: any file as an image, opened, read, written, checked and repaired.
func FuzzOpen(f *testing.F) {
	fuzzSeeds(f)
	base := randomBytes(9000, 2)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := newMemFS()
		m.put("/d/base", base, 50)
		m.put("/d/img", b, 50)
		o := Options{FS: m, AllowStaleBacking: true, AllowMissingBacking: true, BitmapMemory: 1}
		d, err := Open("/d/img", o)
		if err == nil {
			p := make([]byte, 8192)
			n := min(int64(len(p)), d.Size())
			off := (d.Size() - n) / 2
			if _, err := d.ReadAt(p[:n], off); err != nil {
				t.Fatalf("read: %v", err)
			}
			for i := range p {
				p[i] = byte(i)
			}
			if _, err := d.WriteAt(p[:n], off); err == nil {
				q := make([]byte, n)
				if _, err := d.ReadAt(q, off); err != nil || !bytes.Equal(p[:n], q) {
					t.Fatalf("what was written is not there: %v", err)
				}
			}
			d.Info()
			if d.Size() < 1<<30 {
				if err := d.Extents(context.Background(), 0, d.Size(), func(Extent) error { return nil }); err != nil {
					t.Fatal(err)
				}
			}
			d.Close()
		}
		if _, err := Check(context.Background(), "/d/img", true, ToolOptions{Options: o}); err == nil {
			if r, err := Check(context.Background(), "/d/img", true, ToolOptions{Options: o}); err != nil {
				t.Fatalf("%+v %v", r, err)
			}
		}
	})
}

// FuzzBitmap: run agrees with looking at every bit.
func FuzzBitmap(f *testing.F) {
	f.Add([]byte{0xff, 0x00, 0x0f}, uint16(3), uint16(100))
	f.Add(bytes.Repeat([]byte{0xff}, 9000), uint16(0), uint16(65535))
	f.Add(make([]byte, 5000), uint16(40000), uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, start, n uint16) {
		if len(b) == 0 || len(b) > 1<<16 {
			return
		}
		m := newMemFS()
		h := Header{Variant: QEMUV2, Size: int64(len(b)) * 4096, SectorSize: 512}
		m.put("/d/img", append(make([]byte, h.BitmapOffset()), b...), 1)
		file, err := m.Open("/d/img", OpenMode{})
		if err != nil {
			t.Fatal(err)
		}
		bm := newBitmap(file, "img", &h, 1)
		s := int64(start) % h.Sectors()
		k := min(int64(n)+1, h.Sectors()-s)
		bit := func(i int64) bool { return b[i/8]>>(i%8)&1 != 0 }
		want := int64(1)
		for want < k && bit(s+want) == bit(s) {
			want++
		}
		a, got, err := bm.run(s, k)
		if err != nil || a != bit(s) || got != want {
			t.Fatalf("run(%d, %d) = %v %d %v, want %v %d", s, k, a, got, err, bit(s), want)
		}
		for _, n := range []int64{1, min(k, 8), min(k, 64-s%64), k} { // the short way
			mixed := false
			for i := range n {
				mixed = mixed || bit(s+i) != bit(s)
			}
			expect := nonePresent
			switch {
			case s%64+n > 64 || mixed:
				expect = unknown
			case bit(s):
				expect = allPresent
			}
			if found := bm.peek(s*512, n*512); found != expect {
				t.Fatalf("peek(%d, %d) = %d, want %d", s, n, found, expect)
			}
		}
		if err := bm.set(s, k); err != nil {
			t.Fatal(err)
		}
		if all, err := bm.all(s, k); err != nil || !all {
			t.Fatalf("after set: %v %v", all, err)
		}
	})
}
