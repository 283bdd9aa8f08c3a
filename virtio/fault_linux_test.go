package virtio_test

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/virtiotest"
)

// Rings that vanish under a queue's hands fault, wherever it touches them, and
// it can be released all the same.
func TestVanishedRings(t *testing.T) {
	push := func(q *virtio.Queue, c *virtio.DescriptorChain) { q.Push(c) }
	for _, c := range []struct {
		name     string
		features uint64
		usedOnly bool // the rest stays
		touch    func(*virtio.Queue, *virtio.DescriptorChain)
	}{
		{"next", allRing, false, func(q *virtio.Queue, _ *virtio.DescriptorChain) { q.Next() }},
		{"push", allRing, false, push},
		{"push, used ring", allRing, true, push},
		{"notify, event index", allRing, false, func(q *virtio.Queue, _ *virtio.DescriptorChain) { q.Notify() }},
		{"notify, flags", virtio.FeatureVersion1, false, func(q *virtio.Queue, _ *virtio.DescriptorChain) { q.Notify() }},
		{"wait", allRing, false, func(q *virtio.Queue, _ *virtio.DescriptorChain) { q.Wait() }},
		{"wait, used ring", allRing, true, func(q *virtio.Queue, _ *virtio.DescriptorChain) { q.Wait() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem, err := virtiotest.NewSharedMemory(1 << 20)
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			g := virtiotest.NewGuestOn(mem.Bytes)
			r := virtiotest.NewRing(g, 16, c.features)
			addr, _ := g.Alloc(16, 1)
			for range 2 {
				if _, err := r.Add(virtiotest.Buf{Addr: addr, Len: 16, Write: true}); err != nil {
					t.Fatal(err)
				}
				r.Publish()
			}
			kick, err := virtio.NewEvent()
			if err != nil {
				t.Fatal(err)
			}
			defer kick.Close()
			cfg := r.Config()
			cfg.Device, _ = g.Alloc(4096, 4096) // the used ring on a page of its own
			q, err := cfg.Activate(g.Memory, c.features, kick, func() {})
			if err != nil {
				t.Fatal(err)
			}
			var chains [2]*virtio.DescriptorChain
			for i := range chains {
				if chains[i], err = q.Next(); err != nil || chains[i] == nil {
					t.Fatal(chains[i], err)
				}
			}
			q.Push(chains[0]) // Notify has something to say

			keep := int64(0)
			if c.usedOnly {
				keep = int64(cfg.Device - virtiotest.GuestBase)
			}
			if err := unix.Ftruncate(mem.FD, keep); err != nil {
				t.Fatal(err)
			}
			if err := virtio.CatchFault(func() error { c.touch(q, chains[1]); return nil }); !errors.Is(err, virtio.ErrFault) {
				t.Errorf("%v, want ErrFault", err)
			}
			released := make(chan struct{})
			go func() {
				defer close(released)
				q.Release()
				q.Position()
			}()
			select {
			case <-released:
			case <-time.After(time.Minute):
				t.Fatal("it stays locked")
			}
		})
	}
}
