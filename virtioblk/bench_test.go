package virtioblk_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// load keeps depth requests of 4 KiB in flight on a queue.
type load struct {
	d     *virtiotest.Driver
	bufs  [][3]virtiotest.Buf
	heads []int // request by head
	irq   chan struct{}
}

func newLoad(m *machine, depth int, typ uint32, sectors uint64) *load {
	d := m.Driver
	l := &load{d: d, heads: make([]int, d.Rings[0].Size), irq: make(chan struct{}, 1)}
	m.pci.Host.OnMessage = func() {
		select {
		case l.irq <- struct{}{}:
		default:
		}
	}
	for i := range depth {
		hdr, b := d.Guest.Alloc(64, 64)
		data, _ := d.Guest.Alloc(4096, 4096)
		binary.LittleEndian.PutUint32(b, typ)
		binary.LittleEndian.PutUint64(b[8:], uint64(i*8)%sectors)
		l.bufs = append(l.bufs, [3]virtiotest.Buf{{Addr: hdr, Len: 16},
			{Addr: data, Len: 4096, Write: typ == virtiotest.BlkIn}, {Addr: hdr + 32, Len: 1, Write: true}})
	}
	return l
}

func (l *load) add(i int) error {
	head, err := l.d.Rings[0].Add(l.bufs[i][:]...)
	l.heads[head] = i
	return err
}

// run sends n requests: those that came back are sent again at once, and when
// none has, the driver asks for an interrupt and sleeps, as Linux does.
func (l *load) run(n int) error {
	r := l.d.Rings[0]
	sent := 0
	for ; sent < len(l.bufs) && sent < n; sent++ {
		if err := l.add(sent); err != nil {
			return err
		}
	}
	l.d.Kick(0)
	for got := 0; got < n; {
		head, _, ok := r.Used()
		if !ok {
			l.d.Kick(0)
			if !r.WantInterrupt() {
				<-l.irq
			}
			continue
		}
		got++
		if sent < n {
			if err := l.add(l.heads[head]); err != nil {
				return err
			}
			sent++
		}
	}
	return nil
}

// BenchmarkNull is what a request costs beside the backend, by queue depth:
// ring, doorbell, wake-up, interrupt. With GOMAXPROCS=1 driver and device take
// turns on one core.
func BenchmarkNull(b *testing.B) {
	for _, depth := range []int{1, 32, 128} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			benchmark(b, virtioblk.Null(1<<30), depth, virtiotest.BlkIn)
		})
	}
}

// BenchmarkFile is the same against a file in the page cache.
func BenchmarkFile(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 16<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	f, err := virtioblk.OpenFile(path, false)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("read/depth=%d", depth), func(b *testing.B) { benchmark(b, f, depth, virtiotest.BlkIn) })
		b.Run(fmt.Sprintf("write/depth=%d", depth), func(b *testing.B) { benchmark(b, f, depth, virtiotest.BlkOut) })
	}
}

func benchmark(b *testing.B, backend virtioblk.Backend, depth int, typ uint32) {
	m := startSize(b, virtioblk.Config{Backend: backend, QueueSize: 1024}, virtiotest.BlockFeatures, 512)
	l := newLoad(m, depth, typ, uint64(backend.Size()/512))
	if err := l.run(1000); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.ResetTimer()
	if err := l.run(b.N); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
}

// A request allocates nothing on its way through the device.
func TestRequestsAllocateNothing(t *testing.T) {
	m := startSize(t, virtioblk.Config{Backend: virtioblk.Null(1 << 30)}, virtiotest.BlockFeatures, 256)
	l := newLoad(m, 16, virtiotest.BlkIn, 1<<20)
	if err := l.run(5000); err != nil {
		t.Fatal(err)
	}
	const n = 20000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := l.run(n); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	// Timers and the like of the rest of the process may allocate a little.
	if got := after.Mallocs - before.Mallocs; got > n/100 {
		t.Errorf("%d allocations in %d requests", got, n)
	}
}
