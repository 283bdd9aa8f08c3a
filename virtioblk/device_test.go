package virtioblk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// machine is a device with a driver that has it up and running.
type machine struct {
	*virtiotest.Block
	pci *virtiotest.PCI
	dev *virtioblk.Device
}

func start(t testing.TB, c virtioblk.Config, features uint64) *machine {
	t.Helper()
	return startSize(t, c, features, 64)
}

func startSize(t testing.TB, c virtioblk.Config, features uint64, queueSize uint16) *machine {
	t.Helper()
	d, err := virtioblk.New(c)
	if err != nil {
		t.Fatal(err)
	}
	g := virtiotest.NewGuest(4 << 20)
	p, err := virtiotest.NewPCI(d, g, pci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.F.Close(); err != nil {
			t.Error(err)
		}
	})
	return &machine{virtiotest.NewBlock(virtiotest.Start(t, p, g, features, queueSize)), p, d}
}

// submit sends a request of one sector without waiting for it and returns a
// function that reads its status byte.
func (m *machine) submit(t testing.TB, queue int, typ uint32, sector uint64) (head uint16, status func() byte) {
	t.Helper()
	addr, b := m.Guest.Alloc(4096, 4096)
	binary.LittleEndian.PutUint32(b, typ)
	binary.LittleEndian.PutUint64(b[8:], sector)
	b[16] = 0xff
	bufs := []virtiotest.Buf{{Addr: addr, Len: 16}}
	if typ == virtiotest.BlkIn || typ == virtiotest.BlkOut {
		bufs = append(bufs, virtiotest.Buf{Addr: addr + 512, Len: 512, Write: typ == virtiotest.BlkIn})
	}
	head, err := m.Rings[queue].Add(append(bufs, virtiotest.Buf{Addr: addr + 16, Len: 1, Write: true})...)
	if err != nil {
		t.Fatal(err)
	}
	m.Kick(queue)
	return head, func() byte { return b[16] }
}

func TestNewChecksConfig(t *testing.T) {
	ram := virtioblk.NewRAM(1 << 20)
	for name, c := range map[string]virtioblk.Config{
		"no backend":     {},
		"negative size":  {Backend: virtioblk.Null(-1)},
		"queues":         {Backend: ram, Queues: -1},
		"many queues":    {Backend: ram, Queues: 257},
		"queue size 5":   {Backend: ram, QueueSize: 5},
		"queue size 2":   {Backend: ram, QueueSize: 2},
		"workers":        {Backend: ram, Workers: -1},
		"serial":         {Backend: ram, Serial: strings.Repeat("x", 21)},
		"negative limit": {Backend: ram, Limit: virtioblk.Limit{Ops: -1}},
		"NaN limit":      {Backend: ram, Limit: virtioblk.Limit{Bytes: math.NaN()}},
	} {
		if _, err := virtioblk.New(c); err == nil || !strings.HasPrefix(err.Error(), "virtioblk: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The requests of one queue run at the same time and complete out of order,
// also when the first one gets stuck while the backend was fast so far.
func TestRequestsRunConcurrently(t *testing.T) {
	gate := make(chan struct{})
	var stuck atomic.Int32
	f := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(op virtioblk.Op, off, n int64) error {
		if op == virtioblk.OpRead && off/512 >= 100 {
			stuck.Add(1)
			<-gate
		}
		return nil
	}}
	m := start(t, virtioblk.Config{Backend: f, Workers: 8}, virtiotest.BlockFeatures)
	for range 100 { // the device learns that reads are fast
		if st, _ := m.Request(0, virtiotest.BlkIn, 1, nil, make([]byte, 512)); st != 0 {
			t.Fatal(st)
		}
	}
	late := map[uint16]func() byte{}
	for i := range uint64(6) {
		head, st := m.submit(t, 0, virtiotest.BlkIn, 100+i)
		late[head] = st
	}
	virtiotest.Eventually(t, "six requests in the backend", func() bool { return stuck.Load() == 6 })
	if n := m.dev.Stats().InFlight; n != 6 {
		t.Errorf("%d in flight", n)
	}
	for range 10 {
		head, st := m.submit(t, 0, virtiotest.BlkIn, 2)
		if got, _ := m.Wait(0); got != head || st() != 0 {
			t.Fatalf("head %d came back, status %d; sent %d", got, st(), head)
		}
	}
	close(gate)
	for range 6 {
		head, n := m.Wait(0)
		if st := late[head]; st == nil || st() != 0 || n != 513 {
			t.Errorf("head %d: length %d", head, n)
		}
		delete(late, head)
	}
	if n := m.dev.Stats().InFlight; n != 0 {
		t.Errorf("%d in flight", n)
	}
}

// Workers is a bound.
func TestWorkersAreBounded(t *testing.T) {
	gate := make(chan struct{})
	var now, most atomic.Int32
	f := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(virtioblk.Op, int64, int64) error {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-gate
		now.Add(-1)
		return nil
	}}
	m := start(t, virtioblk.Config{Backend: f, Workers: 3}, virtiotest.BlockFeatures)
	for i := range uint64(10) {
		m.submit(t, 0, virtiotest.BlkIn, i)
	}
	virtiotest.Eventually(t, "three requests in the backend", func() bool { return now.Load() == 3 })
	time.Sleep(10 * time.Millisecond)
	close(gate)
	for range 10 {
		m.Wait(0)
	}
	if n := most.Load(); n != 3 {
		t.Errorf("%d at the same time, want 3", n)
	}
}

// Queues do not wait for each other.
func TestQueuesAreIndependent(t *testing.T) {
	gate := make(chan struct{})
	f := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(op virtioblk.Op, off, n int64) error {
		if off == 0 {
			<-gate
		}
		return nil
	}}
	m := start(t, virtioblk.Config{Backend: f, Queues: 2, Workers: 1}, virtiotest.BlockFeatures)
	m.submit(t, 0, virtiotest.BlkIn, 0)
	for range 5 {
		m.submit(t, 1, virtiotest.BlkIn, 1)
		m.Wait(1)
	}
	close(gate)
	m.Wait(0)
}

// gated is a backend whose requests say that they have entered, and wait until
// gate is closed.
func gated() (f *virtioblk.Faulty, entered, gate chan struct{}) {
	entered, gate = make(chan struct{}, 1), make(chan struct{})
	return &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(virtioblk.Op, int64, int64) error {
		entered <- struct{}{}
		<-gate
		return nil
	}}, entered, gate
}

// Reset drains first: a driver that sees status 0 knows that nothing will be
// written to its memory any more.
func TestResetDrains(t *testing.T) {
	f, entered, gate := gated()
	m := start(t, virtioblk.Config{Backend: f}, virtiotest.BlockFeatures)
	_, st := m.submit(t, 0, virtiotest.BlkIn, 0)
	<-entered
	done := make(chan struct{})
	go func() { defer close(done); m.SetStatus(0) }()
	time.Sleep(5 * time.Millisecond)
	if m.Status() == 0 {
		t.Error("status 0 while a request is in flight")
	}
	close(gate)
	<-done
	virtiotest.Eventually(t, "status 0", func() bool { return m.Status() == 0 })
	if st() != 0 || m.Rings[0].UsedIdx() != 1 {
		t.Error("the request was dropped")
	}
}

// Queue reset drains, too.
func TestQueueResetDrains(t *testing.T) {
	f, entered, gate := gated()
	m := start(t, virtioblk.Config{Backend: f}, virtiotest.BlockFeatures)
	m.submit(t, 0, virtiotest.BlkIn, 0)
	<-entered
	// Not through m: the call blocks while other registers are read.
	core := m.pci.F.Core()
	go core.ResetQueue(0)
	virtiotest.Eventually(t, "the reset to begin", func() bool { return core.QueueResetting(0) })
	if !m.QueueEnabled(0) {
		t.Error("the queue is disabled while a request is in flight")
	}
	close(gate)
	virtiotest.Eventually(t, "the reset to end", func() bool { return !m.QueueResetting(0) })
	if m.QueueEnabled(0) || m.Rings[0].UsedIdx() != 1 {
		t.Error("not drained, or still enabled")
	}
}

// A backend that hangs does not hang the machine's shutdown.
func TestShutdownWithHangingBackend(t *testing.T) {
	f, entered, gate := gated()
	d, err := virtioblk.New(virtioblk.Config{Backend: f})
	if err != nil {
		t.Fatal(err)
	}
	g := virtiotest.NewGuest(4 << 20)
	p, err := virtiotest.NewPCI(d, g, pci.Options{CloseWait: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{virtiotest.NewBlock(virtiotest.Start(t, p, g, virtiotest.BlockFeatures, 64)), p, d}
	m.submit(t, 0, virtiotest.BlkIn, 0)
	<-entered
	if err := p.F.Close(); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Close = %v", err)
	}
	irqs := p.QueueInterrupts(0)
	close(gate)
	virtiotest.Eventually(t, "the end of the request", func() bool { return d.Stats().InFlight == 0 })
	if err := p.F.Close(); err != nil {
		t.Errorf("Close = %v after the backend came back", err)
	}
	if m.Rings[0].UsedIdx() != 0 || p.QueueInterrupts(0) != irqs {
		t.Error("a device that was closed touched the ring or interrupted")
	}
}

func TestBackendErrorsAreIOErr(t *testing.T) {
	boom := errors.New("boom")
	var fail atomic.Bool
	f := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(virtioblk.Op, int64, int64) error {
		if fail.Load() {
			return boom
		}
		return nil
	}}
	m := start(t, virtioblk.Config{Backend: f}, virtiotest.BlockFeatures)
	fail.Store(true)
	in := bytes.Repeat([]byte{7}, 1024)
	if st, used := m.Request(0, virtiotest.BlkIn, 0, nil, in); st != virtiotest.BlkIOErr || used != 0 {
		t.Errorf("read: status %d, used length %d", st, used)
	}
	for _, r := range []struct {
		typ uint32
		out []byte
	}{{virtiotest.BlkOut, make([]byte, 512)}, {virtiotest.BlkFlush, nil},
		{virtiotest.BlkDiscard, virtiotest.Segment(0, 8, 0)}, {virtiotest.BlkWriteZeroes, virtiotest.Segment(0, 8, 0)}} {
		if st, _ := m.Request(0, r.typ, 0, r.out, nil); st != virtiotest.BlkIOErr {
			t.Errorf("type %d: status %d", r.typ, st)
		}
	}
	fail.Store(false)
	if st, _ := m.Request(0, virtiotest.BlkOut, 0, make([]byte, 512), nil); st != 0 {
		t.Errorf("afterwards: status %d", st)
	}
	if s := m.dev.Stats(); s.Errors != 5 || s.Writes != 1 || s.Reads != 0 {
		t.Errorf("%+v", s)
	}
}

// FLUSH offered but not negotiated, and no CONFIG_WCE: write-through. With
// CONFIG_WCE the driver chooses.
func TestWriteThrough(t *testing.T) {
	const flush, wce = virtioblk.FeatureFlush, virtioblk.FeatureConfigWCE
	for _, c := range []struct {
		name     string
		features uint64
		config   int // written to the config field; -1: nothing
		flushes  bool
	}{
		{"neither", virtiotest.BlockFeatures &^ (flush | wce), -1, true},
		{"neither, config ignored", virtiotest.BlockFeatures &^ (flush | wce), 1, true},
		{"FLUSH", virtiotest.BlockFeatures &^ wce, -1, false},
		{"FLUSH, config ignored", virtiotest.BlockFeatures &^ wce, 0, false},
		{"WCE", virtiotest.BlockFeatures, -1, false},
		{"WCE off", virtiotest.BlockFeatures, 0, true},
		{"WCE on", virtiotest.BlockFeatures, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var flushes atomic.Int32
			f := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(op virtioblk.Op, _, _ int64) error {
				if op == virtioblk.OpFlush {
					flushes.Add(1)
				}
				return nil
			}}
			m := start(t, virtioblk.Config{Backend: f}, c.features)
			if c.config >= 0 {
				m.WriteConfig(32, []byte{byte(c.config)})
			}
			flushes.Store(0)
			m.Request(0, virtiotest.BlkOut, 0, make([]byte, 512), nil)
			m.Request(0, virtiotest.BlkWriteZeroes, 0, virtiotest.Segment(0, 1, 0), nil)
			want := int32(0)
			if c.flushes {
				want = 2
			}
			if n := flushes.Load(); n != want {
				t.Errorf("%d flushes, want %d", n, want)
			}
		})
	}
}

// Data moves between guest memory and the backend without a copy: the backend
// gets the guest's own buffers, all at once if it can.
func TestNoCopy(t *testing.T) {
	v := &vectored{RAM: virtioblk.NewRAM(1 << 20)}
	m := start(t, virtioblk.Config{Backend: v}, virtiotest.BlockFeatures)
	addr, mem := m.Guest.Alloc(8192, 4096)
	binary.LittleEndian.PutUint32(mem, virtiotest.BlkIn)
	mem[16] = 0xff
	m.Do(0, virtiotest.Buf{Addr: addr, Len: 16}, virtiotest.Buf{Addr: addr + 1024, Len: 1024, Write: true},
		virtiotest.Buf{Addr: addr + 4096, Len: 512, Write: true}, virtiotest.Buf{Addr: addr + 16, Len: 1, Write: true})
	if mem[16] != 0 || len(v.got) != 2 || &v.got[0][0] != &mem[1024] || len(v.got[0]) != 1024 || &v.got[1][0] != &mem[4096] {
		t.Errorf("status %d, %d buffers", mem[16], len(v.got))
	}
	v.got = nil
	binary.LittleEndian.PutUint32(mem, virtiotest.BlkOut)
	m.Do(0, virtiotest.Buf{Addr: addr, Len: 16}, virtiotest.Buf{Addr: addr + 1024, Len: 1024},
		virtiotest.Buf{Addr: addr + 4096, Len: 512}, virtiotest.Buf{Addr: addr + 16, Len: 1, Write: true})
	if mem[16] != 0 || len(v.got) != 2 || &v.got[0][0] != &mem[1024] || &v.got[1][0] != &mem[4096] {
		t.Errorf("status %d, %d buffers", mem[16], len(v.got))
	}
}

// vectored is a RAM disk that remembers the buffers it was given.
type vectored struct {
	*virtioblk.RAM
	mu  sync.Mutex
	got [][]byte
}

func (v *vectored) each(bufs [][]byte, off int64, f func([]byte, int64) (int, error)) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.got = append(v.got, bufs...)
	total := 0
	for _, b := range bufs {
		n, err := f(b, off+int64(total))
		if total += n; err != nil {
			return total, err
		}
	}
	return total, nil
}

func (v *vectored) ReadvAt(bufs [][]byte, off int64) (int, error) {
	return v.each(bufs, off, v.RAM.ReadAt)
}

func (v *vectored) WritevAt(bufs [][]byte, off int64) (int, error) {
	return v.each(bufs, off, v.RAM.WriteAt)
}

// A new capacity comes with a new generation and a configuration interrupt.
func TestResize(t *testing.T) {
	for name, open := range map[string]func(d *virtioblk.Device, g *virtiotest.Guest) (virtiotest.Transport, func() error){
		"pci": func(d *virtioblk.Device, g *virtiotest.Guest) (virtiotest.Transport, func() error) {
			p, err := virtiotest.NewPCI(d, g, pci.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return p, p.F.Close
		},
		"mmio": func(d *virtioblk.Device, g *virtiotest.Guest) (virtiotest.Transport, func() error) {
			m, err := virtiotest.NewMMIO(d, g, mmio.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return m, m.Close
		},
	} {
		t.Run(name, func(t *testing.T) {
			ram := virtioblk.NewRAM(1 << 20)
			d, err := virtioblk.New(virtioblk.Config{Backend: ram})
			if err != nil {
				t.Fatal(err)
			}
			g := virtiotest.NewGuest(4 << 20)
			tr, closeIt := open(d, g)
			defer closeIt()
			resize := func(n int64) {
				ram.Resize(n)
				if err := d.Resized(); err != nil {
					t.Fatal(err)
				}
			}
			resize(2 << 20) // before there is a driver: no interrupt
			if tr.ConfigInterrupts() != 0 {
				t.Error("an interrupt before DRIVER_OK")
			}
			b := virtiotest.NewBlock(virtiotest.Start(t, tr, g, virtiotest.BlockFeatures, 16))
			gen, irqs := tr.Generation(), tr.ConfigInterrupts()
			resize(2 << 20) // no change
			if tr.Generation() != gen {
				t.Error("a new generation without a change")
			}
			resize(3 << 20)
			var c [8]byte
			tr.ReadConfig(0, c[:4])
			if got := binary.LittleEndian.Uint64(c[:]); got != 3<<20/512 {
				t.Errorf("capacity %d", got)
			}
			if tr.Generation() == gen {
				t.Error("the generation did not change")
			}
			virtiotest.Eventually(t, "a configuration interrupt", func() bool { return tr.ConfigInterrupts() > irqs })
			if st, _ := b.Request(0, virtiotest.BlkIn, 3<<20/512-1, nil, make([]byte, 512)); st != 0 {
				t.Errorf("the new last sector: status %d", st)
			}
			resize(1 << 20)
			if st, _ := b.Request(0, virtiotest.BlkIn, 1<<20/512, nil, make([]byte, 512)); st != virtiotest.BlkIOErr {
				t.Errorf("beyond the smaller size: status %d", st)
			}
		})
	}
}

// A driver that reads the capacity in halves, as section 2.5.1 says, never
// gets halves of different sizes.
func TestResizeIsAtomic(t *testing.T) {
	ram := &sized{}
	ram.n.Store(0x1_0000_0001 * 512)
	m := start(t, virtioblk.Config{Backend: ram}, virtiotest.BlockFeatures)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for i := int64(2); ; i = 3 - i + 2 {
			select {
			case <-stop:
				return
			default:
			}
			ram.n.Store((i<<32 | i) * 512)
			m.dev.Resized()
		}
	}()
	for range 2000 {
		var lo, hi [4]byte
		gen := m.Generation()
		m.ReadConfig(0, lo[:])
		m.ReadConfig(4, hi[:])
		if m.Generation() == gen && lo != hi {
			t.Errorf("halves %x and %x in generation %d", hi, lo, gen)
			break
		}
	}
	close(stop)
	wg.Wait()
}

// sized is a null disk with a changing size.
type sized struct {
	virtioblk.Null
	n atomic.Int64
}

func (s *sized) Size() int64 { return s.n.Load() }

func TestStats(t *testing.T) {
	m := start(t, virtioblk.Config{Backend: virtioblk.NewRAM(1 << 20), Queues: 2}, virtiotest.BlockFeatures)
	m.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 1024))
	m.Request(1, virtiotest.BlkIn, 0, nil, make([]byte, 512))
	m.Request(0, virtiotest.BlkOut, 0, make([]byte, 2048), nil)
	m.Request(1, virtiotest.BlkFlush, 0, nil, nil)
	m.Request(0, virtiotest.BlkDiscard, 0, append(virtiotest.Segment(0, 8, 0), virtiotest.Segment(8, 8, 0)...), nil)
	m.Request(0, virtiotest.BlkWriteZeroes, 0, virtiotest.Segment(0, 1, 0), nil)
	m.Request(0, 99, 0, nil, nil)
	m.Request(0, virtiotest.BlkIn, math.MaxUint64, nil, make([]byte, 512))
	s := m.dev.Stats()
	var n uint64
	for i := range s.Latency {
		n += s.Latency[i]
	}
	if n != 8 {
		t.Errorf("the histogram counts %d requests, want 8", n)
	}
	s.Latency = [virtioblk.LatencyBuckets]uint64{}
	want := virtioblk.Stats{Reads: 2, ReadBytes: 1536, Writes: 1, WriteBytes: 2048, Flushes: 1,
		Discards: 1, DiscardBytes: 8192, WriteZeroes: 1, WriteZeroesBytes: 512, Errors: 2}
	if s != want {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
}

// The limit slows requests down, does not refuse any, and a throttled queue
// can still be reset.
func TestLimit(t *testing.T) {
	m := start(t, virtioblk.Config{Backend: virtioblk.NewRAM(1 << 20),
		Limit: virtioblk.Limit{Ops: 100, Burst: 10 * time.Millisecond}}, virtiotest.BlockFeatures)
	begin := time.Now()
	for range 6 {
		if st, _ := m.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
			t.Fatal(st)
		}
	}
	if d := time.Since(begin); d < 40*time.Millisecond {
		t.Errorf("6 requests at 100/s and a burst of 1 took %v, want at least 50 ms", d)
	}
	if err := m.dev.SetLimit(virtioblk.Limit{Bytes: 512, Burst: time.Nanosecond}); err != nil {
		t.Fatal(err)
	}
	m.submit(t, 0, virtiotest.BlkIn, 0)
	m.submit(t, 0, virtiotest.BlkIn, 0) // would take seconds
	m.SetStatus(0)
	virtiotest.Eventually(t, "status 0", func() bool { return m.Status() == 0 })
	if n := m.dev.Stats().InFlight; n != 0 {
		t.Errorf("%d requests taken from the ring did not come back", n)
	}
	if err := m.dev.SetLimit(virtioblk.Limit{Ops: math.Inf(-1)}); err == nil {
		t.Error("a negative limit is accepted")
	}
}

func TestFileBackend(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := virtioblk.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// More buffers than one preadv takes.
	var bufs [][]byte
	want := make([]byte, 0, 2000*512)
	for i := range 2000 {
		bufs = append(bufs, bytes.Repeat([]byte{byte(i)}, 512))
		want = append(want, bufs[i]...)
	}
	if n, err := f.WritevAt(bufs, 512); n != len(want) || err != nil {
		t.Fatalf("WritevAt = %d, %v", n, err)
	}
	got := make([][]byte, 2000)
	for i := range got {
		got[i] = make([]byte, 512)
	}
	if n, err := f.ReadvAt(got, 512); n != len(want) || err != nil || !bytes.Equal(bytes.Join(got, nil), want) {
		t.Fatalf("ReadvAt = %d, %v", n, err)
	}
	// Reading across the end says how much there was.
	if n, err := f.ReadvAt([][]byte{make([]byte, 512), make([]byte, 512)}, 2<<20-512); n != 512 || err == nil {
		t.Errorf("ReadvAt across the end = %d, %v", n, err)
	}
	if err := f.WriteZeroes(512, 1024, true); err != nil {
		t.Error(err)
	}
	if err := f.WriteZeroes(1536, 512, false); err != nil {
		t.Error(err)
	}
	if err := f.Discard(1<<20, 4096); err != nil {
		t.Error(err)
	}
	p := make([]byte, 2048)
	if _, err := f.ReadAt(p, 512); err != nil || !bytes.Equal(p[:1536], make([]byte, 1536)) || p[1536] != 3 {
		t.Errorf("after WriteZeroes: %v, %x", err, p[1536])
	}
	if err := f.Flush(); err != nil {
		t.Error(err)
	}
	if err := os.Truncate(path, 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.UpdateSize(); err != nil || f.Size() != 3<<20 {
		t.Errorf("size %d, %v", f.Size(), err)
	}
	if _, err := virtioblk.OpenFile(path+"x", true); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestSerial(t *testing.T) {
	for _, s := range []string{"", "short", strings.Repeat("20", 10)} {
		m := start(t, virtioblk.Config{Backend: virtioblk.NewRAM(512), Serial: s}, virtiotest.BlockFeatures)
		id := make([]byte, 20)
		if st, _ := m.Request(0, virtiotest.BlkGetID, 0, nil, id); st != 0 || strings.TrimRight(string(id), "\x00") != s {
			t.Errorf("%q: status %d, %q", s, st, id)
		}
	}
	m := start(t, virtioblk.Config{Backend: named{virtioblk.NewRAM(512)}}, virtiotest.BlockFeatures)
	id := make([]byte, 20)
	if m.Request(0, virtiotest.BlkGetID, 0, nil, id); string(id[:6]) != "a disk" {
		t.Errorf("%q", id)
	}
}

type named struct{ *virtioblk.RAM }

func (named) Serial() string { return "a disk" }
