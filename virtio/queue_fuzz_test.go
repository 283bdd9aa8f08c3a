package virtio_test

import (
	"bytes"
	"testing"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/virtiotest"
)

// FuzzQueue lets the driver put anything into guest memory: whatever it is,
// the queue ends its drain, yields only chains inside guest memory, and returns
// each head at most once for each time it was offered.
func FuzzQueue(f *testing.F) {
	const size = 8
	g := virtiotest.NewGuest(4096)
	layout := virtiotest.NewRing(g, size, allRing)
	seed := func(fill func(r *virtiotest.Ring)) []byte {
		g := virtiotest.NewGuest(4096)
		r := virtiotest.NewRing(g, size, allRing)
		fill(r)
		return bytes.Clone(g.Bytes)
	}
	const data = virtiotest.GuestBase + 2048
	f.Add(seed(func(r *virtiotest.Ring) {
		r.Add(virtiotest.Buf{Addr: data, Len: 16}, virtiotest.Buf{Addr: data + 512, Len: 512, Write: true}, virtiotest.Buf{Addr: data, Len: 1, Write: true})
		r.Publish()
	}), true)
	f.Add(seed(func(r *virtiotest.Ring) {
		r.SetDesc(0, data, 32, virtiotest.Indirect, 0)
		r.Offer(0)
		r.SetDesc(1, data, 32, virtiotest.Next, 1)
		r.Offer(1)
		r.Offer(1)
		r.Publish()
	}), false)
	f.Fuzz(func(t *testing.T, mem []byte, eventIdx bool) {
		g := virtiotest.NewGuest(4096)
		copy(g.Bytes, mem)
		features := allRing
		if !eventIdx {
			features &^= virtio.FeatureEventIdx
		}
		kick, err := virtio.NewEvent()
		if err != nil {
			t.Fatal(err)
		}
		defer kick.Close()
		q, err := layout.Config().Activate(g.Memory, features, kick, func() {})
		if err != nil {
			t.Fatal(err)
		}
		var held []*virtio.DescriptorChain
		var bufs [][]byte
		n := 0
		for round := 0; round < 4 && n <= 4*size; round++ {
			q.Stop() // Wait must not block; it still starts a new drain
			q.Wait()
			q2, err := layout.Config().Activate(g.Memory, features, kick, func() {})
			if err != nil {
				t.Fatal(err)
			}
			q, held = q2, held[:0]
			for {
				c, err := q.Next()
				if err != nil || c == nil {
					break
				}
				if n++; n > 4*size {
					t.Fatal("a drain without end")
				}
				r, w := c.Reader(), c.Writer()
				st, err := w.SplitLast(1)
				if err == nil {
					st.Write([]byte{1})
				}
				total := r.Len() + w.Len()
				bufs, _ = r.Buffers(r.Len(), bufs[:0])
				bufs, _ = w.Buffers(w.Len(), bufs)
				for _, b := range bufs {
					total -= len(b)
					b[0] ^= 1 // faults if it is not the guest's
					b[len(b)-1] ^= 1
				}
				if total != 0 {
					t.Fatalf("%d bytes missing", total)
				}
				if round%2 == 0 {
					q.Push(c)
					q.Notify()
				} else {
					held = append(held, c)
				}
			}
			for _, c := range held {
				q.Push(c)
			}
			q.Notify()
		}
	})
}
