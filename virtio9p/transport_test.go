package virtio9p_test

import (
	"bytes"
	"testing"

	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

var transports = map[string]virtiotest.Opener{
	"pci": func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport {
		p, err := virtiotest.NewPCI(device(t, static(t)), g, pci.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.F.Close() })
		return p
	},
	"mmio": func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport {
		m, err := virtiotest.NewMMIO(device(t, static(t)), g, mmio.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	},
}

// A driver finds the device, its tag and its queue on both transports, talks
// 9P to it, resets it with requests under way, and finds a new session.
func TestTransports(t *testing.T) {
	for name, open := range transports {
		t.Run(name, func(t *testing.T) {
			g := virtiotest.NewGuest(4 << 20)
			tr := open(t, g)
			if tr.DeviceID() != 9 || tr.QueueMax(0) != 128 || tr.QueueMax(1) != 0 {
				t.Fatalf("device %d, queues of %d and %d", tr.DeviceID(), tr.QueueMax(0), tr.QueueMax(1))
			}
			tag := make([]byte, 7)
			for i := range tag { // byte by byte, as Linux does
				tr.ReadConfig(uint32(i), tag[i:i+1])
			}
			if string(tag) != "\x05\x00moovm" {
				t.Errorf("configuration space %q", tag)
			}
			for range 3 {
				d := virtiotest.Start(t, tr, g, virtiotest.RingFeatures|1, 128)
				if d.Features&1 == 0 {
					t.Error("MOUNT_TAG is not offered")
				}
				msg := func(b []byte, room int) ([]virtiotest.Buf, []byte) {
					out, m := g.Alloc(uint64(len(b)), 1)
					copy(m, b)
					in, reply := g.Alloc(uint64(room), 1)
					return []virtiotest.Buf{{Addr: out, Len: uint32(len(b))}, {Addr: in, Len: 11, Write: true},
						{Addr: in + 11, Len: uint32(room) - 11, Write: true}}, reply
				}
				do := func(b []byte, room int) wire.Reply {
					t.Helper()
					bufs, reply := msg(b, room)
					r, err := wire.Parse(reply[:d.Do(0, bufs...)])
					if err != nil {
						t.Fatal(err)
					}
					return r
				}
				if r := do(wire.Getattr(1, 0), 200); r.Errno() == 0 {
					t.Error("the session of an earlier life goes on")
				}
				do(wire.Version(65536), 100)
				do(wire.Attach(1, 0), 100)
				do(wire.Walk(1, 0, 1, "hello"), 100)
				do(wire.Open(1, 1, 0), 100)
				if r := do(wire.Read(1, 1, 0, 100), 200); !bytes.Equal(r.Data(), []byte("Hello, guest.\n")) {
					t.Errorf("read %q", r.Data())
				}
				do(wire.Walk(1, 0, 2, "long"), 100)
				do(wire.Open(1, 2, 0), 100)
				for tag := range uint16(30) {
					bufs, _ := msg(wire.Read(tag, 2, 0, 10_000), 10_100)
					if _, err := d.Rings[0].Add(bufs...); err != nil {
						t.Fatal(err)
					}
				}
				d.Kick(0)
				tr.SetStatus(0)
				virtiotest.Eventually(t, "the reset", func() bool { return tr.Status() == 0 })
				used, interrupts := d.Rings[0].UsedIdx(), tr.QueueInterrupts(0)
				for range 100 {
					if d.Rings[0].UsedIdx() != used || tr.QueueInterrupts(0) != interrupts {
						t.Fatal("the device goes on after its reset")
					}
				}
			}
		})
	}
}

// The rules of the specification that hold for every device.
func TestConformance(t *testing.T) {
	for name, open := range transports {
		t.Run(name, func(t *testing.T) { virtiotest.Conformance(t, open) })
	}
}
