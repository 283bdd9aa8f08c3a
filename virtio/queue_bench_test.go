package virtio_test

import (
	"fmt"
	"testing"
)

// BenchmarkQueue is the cost of a chain through the ring alone: three
// descriptors are published, taken, read, written, pushed and reaped.
func BenchmarkQueue(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			g := newRig(b, 128, allRing)
			hdr, data, st := g.buf(16, false), g.buf(4096, true), g.buf(1, true)
			var p [16]byte
			var bufs [][]byte
			b.ReportAllocs()
			for i := 0; i < b.N; i += depth {
				for range depth {
					if _, err := g.r.Add(hdr, data, st); err != nil {
						b.Fatal(err)
					}
				}
				g.r.Publish()
				if !g.q.Wait() {
					b.Fatal("stopped")
				}
				for {
					c, err := g.q.Next()
					if err != nil {
						b.Fatal(err)
					}
					if c == nil {
						break
					}
					w := c.Writer()
					s, _ := w.SplitLast(1)
					c.Reader().Read(p[:])
					bufs, _ = w.Buffers(w.Len(), bufs[:0])
					s.Write(p[:1])
					g.q.Push(c)
				}
				g.q.Notify()
				for {
					if _, _, ok := g.r.Used(); !ok {
						break
					}
				}
			}
		})
	}
}

// The whole path of a chain through the queue allocates nothing.
func TestQueueAllocatesNothing(t *testing.T) {
	g := newRig(t, 8, allRing)
	hdr, data := g.buf(16, false), g.buf(512, true)
	var p [16]byte
	round := func() {
		g.r.Add(hdr, data)
		g.r.Publish()
		g.q.Wait()
		c, _ := g.q.Next()
		c.Reader().Read(p[:])
		c.Writer().Write(p[:])
		g.q.Push(c)
		g.q.Notify()
		g.r.Used()
	}
	for range 8 {
		round() // the chains' buffer lists are allocated at first use
	}
	if n := testing.AllocsPerRun(100, round); n != 0 {
		t.Errorf("%v allocations per chain", n)
	}
}
