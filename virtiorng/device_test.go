package virtiorng

import (
	"bytes"
	"testing"

	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
)

func TestEntropy(t *testing.T) {
	g := virtiotest.NewGuest(1 << 20)
	f, err := virtiotest.NewPCI(Device{}, g, pci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.F.Close()
	d := virtiotest.Start(t, f, g, ^uint64(0), queueSize)
	seen := map[string]bool{}
	for _, size := range []uint32{16, 64, maxRequest, 3 * maxRequest} {
		addr, b := g.Alloc(uint64(size), 16)
		want := min(size, maxRequest)
		if n := d.Do(0, virtiotest.Buf{Addr: addr, Len: size, Write: true}); n != want {
			t.Errorf("%d bytes asked for, %d came, want %d", size, n, want)
		}
		if seen[string(b[:16])] || bytes.Equal(b[want-16:want], make([]byte, 16)) {
			t.Errorf("not random: % x … % x", b[:16], b[want-16:want])
		}
		seen[string(b[:16])] = true
		if !bytes.Equal(b[want:], make([]byte, size-want)) {
			t.Error("written beyond the length it reports")
		}
	}
	// Several buffers, and one that the device may only read.
	a1, b1 := g.Alloc(8, 8)
	a2, b2 := g.Alloc(8, 8)
	if n := d.Do(0, virtiotest.Buf{Addr: a1, Len: 8, Write: true}, virtiotest.Buf{Addr: a2, Len: 8, Write: true}); n != 16 {
		t.Errorf("two buffers: %d bytes", n)
	}
	if bytes.Equal(b1, make([]byte, 8)) || bytes.Equal(b2, make([]byte, 8)) {
		t.Error("a buffer was left empty")
	}
	if n := d.Do(0, virtiotest.Buf{Addr: a1, Len: 8}); n != 0 {
		t.Errorf("a read-only buffer was filled with %d bytes", n)
	}
}
