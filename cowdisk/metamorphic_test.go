package cowdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// TestMetamorphic replays random operations, the maintenance tools among them, on a disk of any layout and depth and on a plain slice of
// bytes. rapid shrinks what fails.
func TestMetamorphic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMemFS()
		m.noPunch = rapid.Bool().Draw(t, "noPunch")
		o := Options{FS: m, BitmapMemory: 1}
		tool := ToolOptions{Options: o}
		whole := tool
		whole.Format = FormatCOW
		size := rapid.SampledFrom([]int{4096, 8 * 4096, 40 * 4096, 37*4096 + 512}).Draw(t, "size")
		baseSize := rapid.SampledFrom([]int{size, size / 2, size + 12288, 777}).Draw(t, "base size")
		base := randomBytes(baseSize, 1)
		m.put("/d/base", base, 50)
		model := make([]byte, size)
		copy(model, base)
		backing := "base"
		layers := rapid.IntRange(1, 4).Draw(t, "layers")
		for i := range layers {
			f := rapid.SampledFrom(allFixtures).Draw(t, "layout")
			if readOnly := layouts[f.variant].readOnly; size%4096 != 0 && f.align == 0 && f.variant != QEMUV2 && f.variant != QEMUV2i386 || readOnly && i == layers-1 {
				f = fixture{variant: QEMUV2}
			}
			if i > 0 {
				backing += "\x00moovmCOW" // behind the NUL: that it is an image
			}
			f.size, f.backing = uint64(size), backing
			one := rapid.IntRange(1, 6).Draw(t, "one in")
			r := rand.New(rand.NewPCG(uint64(i), uint64(one)))
			data := randomBytes(size, uint64(i)+10)
			backing = fmt.Sprintf("layer%d", i)
			m.put("/d/"+backing, f.image(data, func(s int) bool {
				if r.IntN(one) != 0 || one == 6 {
					return false
				}
				copy(model[s*512:s*512+512], data[s*512:])
				return true
			}), 60)
		}
		img := "/d/" + backing
		var d *Disk
		var mem []byte
		open := func() {
			var err error
			if d, err = Open(img, o); err != nil {
				t.Fatal(err)
			}
			if mem == nil {
				mem = make([]byte, d.PendingLen())
			}
			if err := d.SharePending(mem); err != nil {
				t.Fatal(err)
			}
			if d.Size() != int64(len(model)) {
				t.Fatalf("size %d, want %d", d.Size(), len(model))
			}
		}
		shut := func() {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			mem = nil
		}
		tools := func(name string, err error) {
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			open()
		}
		open()
		span := func() (int, int) {
			off := rapid.IntRange(0, len(model)-1).Draw(t, "offset")
			n := rapid.IntRange(1, min(20000, len(model)-off)).Draw(t, "length")
			if rapid.Bool().Draw(t, "aligned") {
				off &^= 511
				n = min((n+511)&^511, len(model)-off)
			}
			return off, n
		}
		seed := uint64(100)
		write := func() (int, []byte) {
			off, n := span()
			seed++
			p := randomBytes(n, seed)
			copy(model[off:], p)
			return off, p
		}
		must := func(n int, err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(*rapid.T) { off, p := write(); must(d.WriteAt(p, int64(off))) },
			"writev": func(*rapid.T) {
				off, p := write()
				a := rapid.IntRange(0, len(p)).Draw(t, "split")
				must(d.WritevAt([][]byte{p[:a/2], p[a/2 : a], {}, p[a:]}, int64(off)))
			},
			"discard": func(*rapid.T) {
				off, n := span()
				must(0, d.Discard(int64(off), int64(n)))
				if !m.noPunch {
					clear(model[off : off+n])
					return
				}
				p := make([]byte, n) // zeros, or what was there
				must(d.ReadAt(p, int64(off)))
				for i, v := range p {
					if v != 0 && v != model[off+i] {
						t.Fatalf("after a discard without holes byte %d is %#x, was %#x", off+i, v, model[off+i])
					}
				}
				copy(model[off:], p)
			},
			"zeroes": func(*rapid.T) {
				off, n := span()
				clear(model[off : off+n])
				must(0, d.WriteZeroes(int64(off), int64(n), false))
			},
			"flush":  func(*rapid.T) { must(0, d.Flush()) },
			"reopen": func(*rapid.T) { shut(); open() },
			"die":    func(*rapid.T) { m.unlock(); open() }, // and be succeeded by another process with the same memory
			"readv": func(*rapid.T) {
				off, n := span()
				p := make([]byte, n)
				must(d.ReadvAt([][]byte{p[:n/3], p[n/3:]}, int64(off)))
				if !bytes.Equal(p, model[off:off+n]) {
					t.Fatalf("readv of %d bytes at %d differs", n, off)
				}
			},
			"past the end": func(*rapid.T) {
				off, n := span()
				off += len(model) - n + 1
				if _, err := d.WriteAt(make([]byte, n), int64(off)); !errors.Is(err, ErrRange) {
					t.Fatalf("write past the end: %v", err)
				}
				if _, err := d.ReadvAt([][]byte{make([]byte, n)}, int64(off)); !errors.Is(err, ErrRange) {
					t.Fatalf("read past the end: %v", err)
				}
			},
			"commit": func(t *rapid.T) {
				if layouts[d.chain.layers[1].hdr.Variant].readOnly || d.chain.layers[1].bm == nil && isCOW(model) {
					t.Skip("base is read-only")
				}
				shut()
				err := Commit(t.Context(), img, tool)
				if errors.Is(err, ErrNoBit) || errors.Is(err, ErrVariant) {
					open()
					t.Skip("layout without bits")
				}
				tools("commit", err)
				if n := d.Allocated(); n != 0 {
					t.Fatalf("%d sectors left after commit", n)
				}
			},
			"rebase": func(t *rapid.T) {
				seed++
				name := fmt.Sprintf("base%d", seed)
				b := bytes.Clone(model[:rapid.IntRange(1, len(model)).Draw(t, "new base")])
				copy(b[rapid.IntRange(0, len(b)-1).Draw(t, "from"):], randomBytes(3000, seed))
				m.put("/d/"+name, b, 500)
				shut()
				err := Rebase(t.Context(), img, name, tool)
				if errors.Is(err, ErrNoBit) {
					open()
					t.Skip("layout without bits")
				}
				tools("rebase", err)
			},
			"resize": func(t *rapid.T) {
				n := rapid.IntRange(1, 60*8).Draw(t, "sectors") * 512
				if v := d.chain.layers[0].hdr.Variant; v == UMLV1 || v == UMLV2 {
					n = (n + 4095) &^ 4095 // or the tail has no bits
				}
				shut()
				err := Resize(t.Context(), img, int64(n), true, tool)
				if errors.Is(err, ErrNoBit) {
					open()
					t.Skip("layout without bits")
				}
				if err == nil {
					model = append(model[:min(n, len(model))], make([]byte, max(0, n-len(model)))...)
				}
				tools("resize", err)
			},
			"flatten": func(t *rapid.T) {
				v := rapid.SampledFrom([]Variant{VariantUnknown, QEMUV2, UMLV3}).Draw(t, "to")
				shut()
				delete(m.nodes, "/d/out")
				err := Flatten(t.Context(), img, "/d/out", v, whole)
				if err == nil && v != VariantUnknown && rapid.Bool().Draw(t, "go on with it") {
					img = "/d/out"
					m.nodes["/d/img2"] = m.nodes["/d/out"]
					delete(m.nodes, "/d/out")
					img = "/d/img2"
					if err = RebaseHeader(img, "", tool); err == nil {
						m.put("/d/zero", nil, 9)
						err = RebaseHeader(img, "zero", ToolOptions{Options: o})
					}
				} else if err == nil {
					other := whole
					other.OtherFormat = FormatRaw
					if v != VariantUnknown {
						other.OtherFormat = FormatCOW
					}
					c, e := Compare(t.Context(), img, "/d/out", other)
					if e != nil || !c.Equal {
						t.Fatalf("compare: %+v %v", c, e)
					}
				}
				tools("flatten", err)
			},
			"": func(t *rapid.T) {
				got := make([]byte, len(model))
				must(d.ReadAt(got, 0))
				for s := 0; s < len(model); s += 512 {
					if !bytes.Equal(got[s:min(s+512, len(model))], model[s:min(s+512, len(model))]) {
						t.Fatalf("sector %d differs", s/512)
					}
				}
				var next int64
				must(0, d.Extents(context.Background(), 0, d.Size(), func(e Extent) error {
					if e.Start != next || e.Length <= 0 {
						return fmt.Errorf("extent %+v after %d", e, next)
					}
					next += e.Length
					if e.Zero && !isZero(model[e.Start:min(next, int64(len(model)))]) {
						return fmt.Errorf("extent %+v is not zero", e)
					}
					if e.Data != (e.Offset != nil && !e.Zero) {
						return fmt.Errorf("extent %+v", e)
					}
					return nil
				}))
				if next != d.Size() {
					t.Fatalf("extents end at %d", next)
				}
			},
		})
		shut()
		res, err := Check(context.Background(), img, false, tool)
		if err != nil || !res.Clean() {
			t.Fatalf("check: %+v %v", res, err)
		}
	})
}
