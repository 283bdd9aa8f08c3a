package virtionet_test

import (
	"fmt"
	"testing"

	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtionet"
)

// load keeps depth chains of one buffer in flight on a queue.
type load struct {
	n     *virtiotest.Net
	queue int
	bufs  []virtiotest.Buf
	heads []int // buffer by head
	irq   chan struct{}
}

func newLoad(b testing.TB, link virtionet.Link, queue, depth int) (*load, *virtionet.Device) {
	d := newDevice(b, virtionet.Config{Link: link})
	g := virtiotest.NewGuest(4 << 20)
	p := openPCI(b, d, g)
	l := &load{queue: queue, heads: make([]int, 256), irq: make(chan struct{}, 1)}
	p.Host.OnMessage = func() {
		select {
		case l.irq <- struct{}{}:
		default:
		}
	}
	l.n = virtiotest.NewNet(virtiotest.Start(b, p, g, virtiotest.NetFeatures, 256))
	for range depth {
		addr, mem := g.Alloc(2048, 64)
		n := copy(mem, virtiotest.Packet(1500, 1))
		buf := virtiotest.Buf{Addr: addr, Len: uint32(n)}
		if queue == 0 {
			buf = virtiotest.Buf{Addr: addr, Len: 2048, Write: true}
		}
		l.bufs = append(l.bufs, buf)
	}
	return l, d
}

func (l *load) add(b testing.TB, i int) {
	head, err := l.n.Rings[l.queue].Add(l.bufs[i])
	if err != nil {
		b.Fatal(err)
	}
	l.heads[head] = i
}

// run has n packets pass; fill, if set, is asked to keep them coming.
func (l *load) run(b testing.TB, n int, fill func()) {
	r := l.n.Rings[l.queue]
	sent := 0
	for ; sent < len(l.bufs) && sent < n; sent++ {
		l.add(b, sent)
	}
	l.n.Kick(l.queue)
	for got := 0; got < n; {
		head, _, ok := r.Used()
		if !ok {
			l.n.Kick(l.queue)
			fill()
			if !r.WantInterrupt() {
				<-l.irq
			}
			continue
		}
		got++
		if sent < n {
			l.add(b, l.heads[head])
			sent++
		}
	}
}

// traffic starts n packets of 1500 bytes, from the guest to a link that does
// nothing or the other way, with depth of them in flight. Everything has been
// used once when it returns.
func traffic(b testing.TB, transmit bool, depth int) (run func(n int)) {
	if transmit {
		l, _ := newLoad(b, virtionet.Null{}, 1, depth)
		run = func(n int) { l.run(b, n, func() {}) }
	} else {
		l, d := newLoad(b, virtionet.Null{}, 0, depth)
		packet := virtiotest.Packet(1500, 1)
		run = func(n int) {
			left := n
			l.run(b, n, func() {
				for range min(depth, left) {
					if !d.Receive(packet) {
						break
					}
					left--
				}
			})
		}
	}
	run(2 * depth)
	return run
}

var depths = []int{1, 32, 256}

func benchmark(b *testing.B, transmit bool) {
	for _, depth := range depths {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			run := traffic(b, transmit, depth)
			b.ReportAllocs()
			b.ResetTimer()
			run(b.N)
		})
	}
}

// BenchmarkTransmit is what a packet costs on its way to the link, by queue
// depth: ring, doorbell, wake-up, interrupt, and one copy.
func BenchmarkTransmit(b *testing.B) { benchmark(b, true) }

// BenchmarkReceive is the other way, with two copies.
func BenchmarkReceive(b *testing.B) { benchmark(b, false) }

// A packet costs no allocation, at any depth.
func TestNoAllocations(t *testing.T) {
	for _, transmit := range []bool{true, false} {
		for _, depth := range depths {
			run := traffic(t, transmit, depth)
			if n := testing.AllocsPerRun(10, func() { run(1000) }); n > 2 { // the runtime's own
				t.Errorf("transmit %v, depth %d: %v allocations for 1000 packets", transmit, depth, n)
			}
		}
	}
}
