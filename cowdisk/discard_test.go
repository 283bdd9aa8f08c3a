package cowdisk

import (
	"testing"
)

// Where holes and zero ranges are not to be had, a discard writes nothing and
// takes no space, whether the data is the overlay's or the base's; zeros that
// are asked for are written.
func TestDiscardWithoutHoles(t *testing.T) {
	const size = 1 << 20
	m := newMemFS()
	m.noPunch = true
	base := randomBytes(size, 1)
	m.put("/d/base", base, 50)
	m.put("/d/a.cow", fixture{variant: QEMUV2, size: size, backing: "base"}.image(base, func(s int) bool { return s < 512 }), 60)
	d, err := Open("/d/a.cow", Options{FS: m})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var writes int
	m.fault = func(op string, n int) (int, error) {
		if op == "write" {
			writes += n
		}
		return n, nil
	}
	grown := len(m.contents("/d/a.cow"))
	for _, r := range [][2]int64{{0, size}, {0, 256 << 10}, {256 << 10, 768 << 10}, {600 << 10, 512}, {100<<10 + 512, 4096}} {
		if err := d.Discard(r[0], r[1]); err != nil {
			t.Fatal(err)
		}
	}
	wantSame(t, "after discards", contents(t, d), base)
	if n := len(m.contents("/d/a.cow")); writes != 0 || n != grown {
		t.Errorf("discards wrote %d bytes, the image has %d bytes instead of %d", writes, n, grown)
	}
	for _, unmap := range []bool{false, true} {
		if err := d.WriteZeroes(128<<10, 512<<10, unmap); err != nil {
			t.Fatal(err)
		}
		clear(base[128<<10 : 640<<10])
		wantSame(t, "after zeros", contents(t, d), base)
	}
	if writes < 512<<10 {
		t.Errorf("zeros wrote %d bytes only", writes)
	}
}
