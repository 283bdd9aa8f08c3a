package cowdisk

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"testing"

	"pgregory.net/rapid"
)

// damagedFS is a base, an overlay that damage was done to, and one on top of that.
func damagedFS(variant Variant, damage func(b []byte) []byte) *memFS {
	m := newMemFS()
	m.put("/d/base", randomBytes(19*512, 1), 50)
	f := fixture{variant: variant, backing: "/d/base", size: 19 * 512, mtime: 50, align: 512}
	m.put("/d/img", damage(f.image(randomBytes(19*512, 2), func(s int) bool { return s < 16 })), 60)
	f.backing, f.mtime = "/d/img\x00moovmCOW", 60 // behind the NUL: that it is an image
	m.put("/d/top", f.image(randomBytes(19*512, 3), func(s int) bool { return s == 3 }), 70)
	m.put("/d/other", randomBytes(19*512, 4), 80)
	return m
}

// What check finds in an image no tool spreads to another one, and opening it for a guest refuses what lost its end; unless told to.
func TestDamageStopsTools(t *testing.T) {
	for _, damage := range []struct {
		name  string
		opens bool // for a guest
		do    func(b []byte) []byte
	}{
		{"truncated data", false, func(b []byte) []byte { return b[:len(b)-512*4] }},
		{"one sector short", false, func(b []byte) []byte { return b[:len(b)-512] }},
		{"one byte short", false, func(b []byte) []byte { return b[:len(b)-1] }},
		{"no data", false, func(b []byte) []byte { return b[:1200] }},
		{"bits beyond the end", true, func(b []byte) []byte { b[1058] |= 0x80; return b }},
	} {
		for _, tool := range []struct {
			name string
			run  func(image string, o ToolOptions) error
		}{
			{"commit", func(p string, o ToolOptions) error { return Commit(t.Context(), p, o) }},
			{"flatten", func(p string, o ToolOptions) error { return Flatten(t.Context(), p, "/d/out", VariantUnknown, o) }},
			{"rebase", func(p string, o ToolOptions) error { return Rebase(t.Context(), p, "other", o) }},
			{"resize", func(p string, o ToolOptions) error { return Resize(t.Context(), p, 40*512, false, o) }},
			{"open", func(p string, o ToolOptions) error {
				d, err := Open(p, o.Options)
				if err == nil {
					d.Close()
				}
				return err
			}},
		} {
			for _, image := range []string{"/d/img", "/d/top"} {
				refused := (tool.name != "open" || !damage.opens) && (tool.name != "resize" || !damage.opens || image == "/d/img")
				m := damagedFS(QEMUV2, damage.do)
				before := map[string][]byte{}
				for name := range m.nodes {
					before[name] = m.contents(name)
				}
				err := tool.run(image, ToolOptions{Options: Options{FS: m, Format: FormatCOW}})
				what := fmt.Sprintf("%s: %s %s", damage.name, tool.name, image)
				if !refused {
					if err != nil {
						t.Errorf("%s: %v", what, err)
					}
					continue
				}
				if !errors.Is(err, ErrDamaged) {
					t.Errorf("%s: %v", what, err)
				}
				after := map[string][]byte{}
				for name := range m.nodes {
					after[name] = m.contents(name)
				}
				if !maps.EqualFunc(before, after, bytes.Equal) {
					t.Errorf("%s was refused and changed something", what)
				}
				if err := tool.run(image, ToolOptions{Options: Options{FS: m, Format: FormatCOW, AllowDamage: true, AllowStaleBacking: true}}); err != nil {
					t.Errorf("%s, forced: %v", what, err)
				}
			}
		}
	}
}

// One can look at a damaged image: what is missing reads as zeros.
func TestDamageIsShown(t *testing.T) {
	m := damagedFS(QEMUV2, func(b []byte) []byte { return b[:len(b)-512*4] })
	d := mustOpen(t, "/d/img", Options{FS: m, ReadOnly: true, NoLock: true})
	defer d.Close()
	b := contents(t, d)
	if !isZero(b[12*512:16*512]) || isZero(b[11*512:12*512]) {
		t.Error("contents differ")
	}
}

// What is counted as lost, by the bits one by one.
func TestLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sectors := rapid.IntRange(8, 200).Draw(t, "sectors")
		has := rapid.SliceOfN(rapid.Bool(), sectors, sectors).Draw(t, "allocated")
		f := allFixtures[rapid.IntRange(0, len(allFixtures)-1).Draw(t, "layout")]
		f.size = uint64(sectors * 512)
		bitmap, length, data := f.geometry()
		b := f.image(make([]byte, f.size), func(s int) bool { return has[s] && s/8 < int(length) })
		size := rapid.IntRange(int(bitmap+length), int(data)+sectors*512).Draw(t, "size")
		if size < len(b) {
			b = b[:size]
		} else {
			b = append(b, make([]byte, size-len(b))...)
		}
		m := newMemFS()
		m.put("/img", b, 1)
		d, err := Open("/img", Options{FS: m, ReadOnly: true, NoLock: true})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		want := int64(0)
		for s := range sectors {
			if has[s] && s/8 < int(length) && int(data)+s*512+512 > size {
				want++
			}
		}
		l := d.chain.top
		if got, err := l.lost(neverDone, int64(size)); got != want || err != nil {
			t.Fatalf("%d sectors lost, %v, want %d", got, err, want)
		}
	})
}

// A program that minds no locks writes to a base while flatten or rebase reads it: nothing comes of it.
func TestBaseChangesMeanwhile(t *testing.T) {
	for name, tool := range map[string]func(o ToolOptions) error{
		"flatten": func(o ToolOptions) error { return Flatten(t.Context(), "/d/img", "/d/out", VariantUnknown, o) },
		"rebase":  func(o ToolOptions) error { return Rebase(t.Context(), "/d/img", "other", o) },
	} {
		m := damagedFS(QEMUV2, func(b []byte) []byte { return b })
		o := ToolOptions{Options: Options{FS: m, Format: FormatCOW}, Progress: func(done, total int64) { m.nodes["/d/base"].mtime = 99 }}
		if err := tool(o); !errors.Is(err, ErrStaleBacking) {
			t.Errorf("%s: %v", name, err)
		}
		if m.nodes["/d/out"] != nil {
			t.Errorf("%s made a file", name)
		}
	}
}
