package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// The disk behind a real device, with the module's own driver instead of a
// guest; the guest is in the end-to-end tests.
func TestNumbers(t *testing.T) {
	dev, err := virtioblk.New(virtioblk.Config{Backend: &numbers{sectors: 1 << 31}})
	if err != nil {
		t.Fatal(err)
	}
	g := virtiotest.NewGuest(4 << 20)
	p, err := virtiotest.NewPCI(dev, g, pci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.F.Close()
	b := virtiotest.NewBlock(virtiotest.Start(t, p, g, virtiotest.BlockFeatures, 16))
	in := make([]byte, 1024)
	if st, _ := b.Request(0, virtiotest.BlkIn, 1<<31-2, nil, in); st != 0 ||
		!strings.HasPrefix(string(in), "sector 2147483646 ") || !strings.HasPrefix(string(in[512:]), "sector 2147483647 ") {
		t.Errorf("status %d, %q", st, in[:32])
	}
	out := bytes.Repeat([]byte("w"), 512)
	if st, _ := b.Request(0, virtiotest.BlkOut, 7, out, nil); st != 0 {
		t.Errorf("status %d", st)
	}
	if b.Request(0, virtiotest.BlkIn, 6, nil, in); !strings.HasPrefix(string(in), "sector 6 ") || !bytes.Equal(in[512:], out) {
		t.Errorf("%q", in)
	}
}
