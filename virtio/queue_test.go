package virtio_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/virtiotest"
)

const allRing = virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx

// rig is a queue with a driver on the other side.
type rig struct {
	*virtiotest.Guest
	r    *virtiotest.Ring
	q    *virtio.Queue
	kick *virtio.Event
	irqs atomic.Uint64
}

func newRig(t testing.TB, size uint16, features uint64) *rig {
	t.Helper()
	g := &rig{Guest: virtiotest.NewGuest(1 << 20)}
	g.r = virtiotest.NewRing(g.Guest, size, features)
	var err error
	if g.kick, err = virtio.NewEvent(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.kick.Close() })
	g.q, err = g.r.Config().Activate(g.Memory, features, g.kick, func() { g.irqs.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *rig) buf(n uint32, write bool) virtiotest.Buf {
	addr, _ := g.Alloc(uint64(n), 1)
	return virtiotest.Buf{Addr: addr, Len: n, Write: write}
}

// next fetches a chain that must be there.
func (g *rig) next(t *testing.T) *virtio.DescriptorChain {
	t.Helper()
	c, err := g.q.Next()
	if err != nil || c == nil {
		t.Fatalf("Next = %v, %v, want a chain", c, err)
	}
	return c
}

// wantRefused says that the chains published are returned with length 0.
func (g *rig) wantRefused(t *testing.T, heads ...uint16) {
	t.Helper()
	if c, err := g.q.Next(); c != nil || err != nil {
		t.Fatalf("Next = %v, %v, want nothing", c, err)
	}
	for _, want := range heads {
		if head, n, ok := g.r.Used(); !ok || head != want || n != 0 {
			t.Fatalf("used element %d, length %d, %v; want %d with length 0", head, n, ok, want)
		}
	}
	if _, _, ok := g.r.Used(); ok {
		t.Fatal("more used elements than chains")
	}
	if got := g.q.BrokenChains(); got != uint64(len(heads)) {
		t.Errorf("%d broken chains counted, want %d", got, len(heads))
	}
}

func TestActivateValidates(t *testing.T) {
	g := virtiotest.NewGuest(1 << 16)
	end := uint64(virtiotest.GuestBase + 1<<16)
	good := virtiotest.NewRing(g, 8, allRing).Config()
	kick, err := virtio.NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	defer kick.Close()
	for name, change := range map[string]func(*virtio.QueueConfig){
		"not ready":           func(c *virtio.QueueConfig) { c.Ready = false },
		"size 0":              func(c *virtio.QueueConfig) { c.Size = 0 },
		"size 7":              func(c *virtio.QueueConfig) { c.Size = 7 },
		"size 65535":          func(c *virtio.QueueConfig) { c.Size, c.MaxSize = 65535, 65535 },
		"above maximum":       func(c *virtio.QueueConfig) { c.Size = 16 },
		"desc unaligned":      func(c *virtio.QueueConfig) { c.Desc += 8 },
		"avail unaligned":     func(c *virtio.QueueConfig) { c.Driver++ },
		"used unaligned":      func(c *virtio.QueueConfig) { c.Device += 2 },
		"desc outside":        func(c *virtio.QueueConfig) { c.Desc = end },
		"desc across the end": func(c *virtio.QueueConfig) { c.Desc = end - 64 },
		"desc wraps":          func(c *virtio.QueueConfig) { c.Desc = math.MaxUint64 - 15 },
		"avail below":         func(c *virtio.QueueConfig) { c.Driver = 0 },
		"avail at the end":    func(c *virtio.QueueConfig) { c.Driver = end - 2 },
		"used across the end": func(c *virtio.QueueConfig) { c.Device = end - 8 },
		"resubmit outside":    func(c *virtio.QueueConfig) { c.Resubmit = []uint16{8} },
		"resubmit twice":      func(c *virtio.QueueConfig) { c.Resubmit = []uint16{1, 1} },
	} {
		c := good
		change(&c)
		if _, err := c.Activate(g.Memory, allRing, kick, func() {}); !errors.Is(err, virtio.ErrQueueConfig) {
			t.Errorf("%s: %v, want ErrQueueConfig", name, err)
		}
	}
	if _, err := good.Activate(g.Memory, allRing, kick, func() {}); err != nil {
		t.Error(err)
	}
}

// The available ring needs only 2-byte alignment (section 2.7).
func TestAvailableRingTwoByteAligned(t *testing.T) {
	g := newRig(t, 8, allRing)
	c := g.r.Config()
	addr, b := g.Alloc(64, 4)
	c.Driver = addr + 2
	q, err := c.Activate(g.Memory, allRing, g.kick, func() {})
	if err != nil {
		t.Fatal(err)
	}
	buf := g.buf(5, false)
	g.r.SetDesc(3, buf.Addr, 5, 0, 0)
	binary.LittleEndian.PutUint16(b[2+4:], 3) // ring[0]
	binary.LittleEndian.PutUint16(b[2+2:], 1) // idx
	ch, err := q.Next()
	if err != nil || ch == nil || ch.Head() != 3 || ch.Reader().Len() != 5 {
		t.Fatalf("Next = %+v, %v", ch, err)
	}
}

// No framing assumptions: whatever the split, the streams are the same.
func TestChainIsTwoByteStreams(t *testing.T) {
	for _, indirect := range []bool{false, true} {
		for _, split := range [][]uint32{{20}, {1, 19}, {19, 1}, {7, 6, 7}, {1, 1, 1, 1, 16}} {
			t.Run(fmt.Sprint(split, indirect), func(t *testing.T) {
				g := newRig(t, 16, allRing)
				var bufs []virtiotest.Buf
				in := []byte("abcdefghijklmnopqrst")
				for pos, i := 0, 0; i < len(split); i++ {
					b := g.buf(split[i], false)
					g.Memory.Write(b.Addr, in[pos:pos+int(split[i])])
					pos += int(split[i])
					bufs = append(bufs, b)
				}
				for _, n := range split {
					bufs = append(bufs, g.buf(n, true))
				}
				var head uint16
				if indirect {
					table, _ := g.Alloc(16*uint64(len(bufs)), 16)
					head, _ = g.r.AddIndirect(g.Guest, table, bufs...)
				} else {
					head, _ = g.r.Add(bufs...)
				}
				g.r.Publish()
				c := g.next(t)
				if c.Head() != head {
					t.Errorf("head %d, want %d", c.Head(), head)
				}
				r, w := c.Reader(), c.Writer()
				if r.Len() != 20 || w.Len() != 20 {
					t.Fatalf("lengths %d and %d", r.Len(), w.Len())
				}
				got := make([]byte, 6)
				if n, err := r.Read(got); n != 6 || err != nil || string(got) != "abcdef" {
					t.Fatalf("Read = %q, %v", got[:n], err)
				}
				slices, err := r.Buffers(10, nil)
				if err != nil || string(bytes.Join(slices, nil)) != "ghijklmnop" {
					t.Fatalf("Buffers = %q, %v", slices, err)
				}
				if _, err := r.Buffers(5, nil); !errors.Is(err, virtio.ErrShort) || r.Len() != 4 {
					t.Errorf("Buffers beyond the end: %v, %d left", err, r.Len())
				}
				rest, err := io.ReadAll(r)
				if err != nil || string(rest) != "qrst" {
					t.Fatalf("ReadAll = %q, %v", rest, err)
				}
				status, err := w.SplitLast(3)
				if err != nil || status.Len() != 3 || w.Len() != 17 {
					t.Fatalf("SplitLast: %v", err)
				}
				status.Write([]byte("xyz"))
				if c.Written() != 0 {
					t.Errorf("Written = %d after the tail only", c.Written())
				}
				w.Write([]byte("0123"))
				if c.Written() != 4 {
					t.Errorf("Written = %d with a gap before the tail", c.Written())
				}
				if n, err := w.Write(bytes.Repeat([]byte("."), 14)); n != 13 || err != io.ErrShortWrite {
					t.Errorf("Write beyond the end = %d, %v", n, err)
				}
				if c.Written() != 20 {
					t.Errorf("Written = %d, want 20", c.Written())
				}
				g.q.Push(c)
				if h, n, ok := g.r.Used(); !ok || h != head || n != 20 {
					t.Errorf("used %d, %d, %v", h, n, ok)
				}
				out := make([]byte, 0, 20)
				for _, b := range bufs[len(split):] {
					p := make([]byte, b.Len)
					g.Memory.Read(b.Addr, p)
					out = append(out, p...)
				}
				if string(out) != "0123.............xyz" {
					t.Errorf("the guest reads %q", out)
				}
			})
		}
	}
}

// A buffer may cross from one memory region into the adjacent one.
func TestBufferAcrossRegions(t *testing.T) {
	a, b := make([]byte, 8192), make([]byte, 4096)
	m, err := virtio.NewMemory(virtio.Region{Addr: virtiotest.GuestBase, Bytes: a},
		virtio.Region{Addr: virtiotest.GuestBase + 8192, Bytes: b})
	if err != nil {
		t.Fatal(err)
	}
	g := &virtiotest.Guest{Memory: m}
	*g = *virtiotest.NewGuestOn(a)
	g.Memory = m
	r := virtiotest.NewRing(g, 4, 0)
	kick, err := virtio.NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	defer kick.Close()
	q, err := r.Config().Activate(m, 0, kick, func() {})
	if err != nil {
		t.Fatal(err)
	}
	r.Add(virtiotest.Buf{Addr: virtiotest.GuestBase + 8190, Len: 5, Write: true})
	r.Publish()
	c, err := q.Next()
	if err != nil || c == nil {
		t.Fatal(c, err)
	}
	c.Writer().Write([]byte("hello"))
	if string(a[8190:]) != "he" || string(b[:3]) != "llo" {
		t.Errorf("got %q and %q", a[8190:], b[:3])
	}
}

// used.len counts what was written, not what could be or what was read.
func TestUsedLenIsWhatWasWritten(t *testing.T) {
	g := newRig(t, 8, allRing)
	g.r.Add(g.buf(100, false), g.buf(50, true), g.buf(1, true))
	g.r.Publish()
	c := g.next(t)
	w := c.Writer()
	st, err := w.SplitLast(1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Buffers(50, nil); err != nil {
		t.Fatal(err)
	}
	w.Unwrite(50) // the backend failed
	st.Write([]byte{1})
	g.q.Push(c)
	if _, n, ok := g.r.Used(); !ok || n != 0 {
		t.Errorf("used.len %d, %v; nothing was written from the start on", n, ok)
	}
}

// Chains that break the rules come back with length 0, and the ones after
// them are served.
func TestBrokenChains(t *testing.T) {
	const end = virtiotest.GuestBase + 1<<20
	const W, N, I = virtiotest.Write, virtiotest.Next, virtiotest.Indirect
	type d struct {
		addr  uint64
		n     uint32
		flags uint16
		next  uint16
	}
	const ok = virtiotest.GuestBase + 0x8000 // a good buffer
	const tab = virtiotest.GuestBase + 0x9000
	for name, tc := range map[string]struct {
		features uint64
		descs    []d // from descriptor 0 on; 0 is the head
		table    []d // at tab
	}{
		"loop to itself":                         {allRing, []d{{ok, 8, N, 0}}, nil},
		"loop of two":                            {allRing, []d{{ok, 8, N, 1}, {ok, 8, N, 0}}, nil},
		"next equals size":                       {allRing, []d{{ok, 8, N, 8}}, nil},
		"next 65535":                             {allRing, []d{{ok, 8, N, 0xffff}}, nil},
		"readable after writable":                {allRing, []d{{ok, 8, N | W, 1}, {ok, 8, 0, 0}}, nil},
		"zero length":                            {allRing, []d{{ok, 0, 0, 0}}, nil},
		"zero length in the middle":              {allRing, []d{{ok, 8, N, 1}, {ok, 0, N, 2}, {ok, 8, W, 0}}, nil},
		"address outside":                        {allRing, []d{{end, 8, 0, 0}}, nil},
		"address below":                          {allRing, []d{{0, 8, 0, 0}}, nil},
		"length across the end":                  {allRing, []d{{end - 4, 8, W, 0}}, nil},
		"address + length overflows":             {allRing, []d{{math.MaxUint64 - 3, 8, W, 0}}, nil},
		"length 4 GiB - 1":                       {allRing, []d{{ok, math.MaxUint32, W, 0}}, nil},
		"indirect not negotiated":                {0, []d{{tab, 16, I, 0}}, []d{{ok, 8, 0, 0}}},
		"indirect with next":                     {allRing, []d{{tab, 16, I | N, 1}, {ok, 8, 0, 0}}, []d{{ok, 8, 0, 0}}},
		"indirect table empty":                   {allRing, []d{{tab, 0, I, 0}}, nil},
		"indirect table size 24":                 {allRing, []d{{tab, 24, I, 0}}, []d{{ok, 8, 0, 0}}},
		"indirect table size 8":                  {allRing, []d{{tab, 8, I, 0}}, []d{{ok, 8, 0, 0}}},
		"indirect table outside":                 {allRing, []d{{end, 16, I, 0}}, nil},
		"indirect table across the end":          {allRing, []d{{end - 16, 32, I, 0}}, nil},
		"indirect table 4 GiB":                   {allRing, []d{{tab, 0xfffffff0, I, 0}}, nil},
		"nested":                                 {allRing, []d{{tab, 32, I, 0}}, []d{{ok, 8, N, 1}, {tab, 32, I, 0}}},
		"indirect next outside":                  {allRing, []d{{tab, 32, I, 0}}, []d{{ok, 8, N, 2}}},
		"indirect loop":                          {allRing, []d{{tab, 32, I, 0}}, []d{{ok, 8, N, 1}, {ok, 8, N, 0}}},
		"indirect readable after a direct write": {allRing, []d{{ok, 8, N | W, 1}, {tab, 16, I, 0}}, []d{{ok, 8, 0, 0}}},
		"indirect longer than the queue": {allRing, []d{{tab, 9 * 16, I, 0}}, []d{{ok, 1, N, 1}, {ok, 1, N, 2}, {ok, 1, N, 3},
			{ok, 1, N, 4}, {ok, 1, N, 5}, {ok, 1, N, 6}, {ok, 1, N, 7}, {ok, 1, N, 8}, {ok, 1, 0, 0}}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t, 8, tc.features)
			for i, e := range tc.descs {
				g.r.SetDesc(uint16(i), e.addr, e.n, e.flags, e.next)
			}
			b, _ := g.Memory.Slice(tab, 16*9)
			for i, e := range tc.table {
				virtiotest.PutDesc(b[16*i:], e.addr, e.n, e.flags, e.next)
			}
			g.r.Offer(0)
			g.r.Publish()
			g.wantRefused(t, 0)
			if tc.features == 0 && g.irqs.Load() != 1 {
				t.Errorf("%d interrupts about the returned chain, want 1", g.irqs.Load())
			}
			g.r.SetDesc(7, ok, 8, 0, 0)
			g.r.Offer(7)
			g.r.Publish()
			if c := g.next(t); c.Head() != 7 || c.Reader().Len() != 8 {
				t.Errorf("the chain behind: head %d, %d bytes", c.Head(), c.Reader().Len())
			}
		})
	}
}

// A chain may hold any number of bytes below 4 GiB in total, by using the
// same buffer again and again; above, it is refused rather than truncated.
func TestChainTotalOver4GiB(t *testing.T) {
	g := &rig{Guest: virtiotest.NewGuest(64 << 20)}
	g.r = virtiotest.NewRing(g.Guest, 128, allRing)
	kick, err := virtio.NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	defer kick.Close()
	if g.q, err = g.r.Config().Activate(g.Memory, allRing, kick, func() {}); err != nil {
		t.Fatal(err)
	}
	const big = 48 << 20
	addr, _ := g.Alloc(big, 16)
	chain := func(n int) []virtiotest.Buf {
		var b []virtiotest.Buf
		for range n {
			b = append(b, virtiotest.Buf{Addr: addr, Len: big, Write: true})
		}
		return b
	}
	head, err := g.r.Add(chain(86)...) // 86 * 48 MiB > 4 GiB
	if err != nil {
		t.Fatal(err)
	}
	g.r.Publish()
	g.wantRefused(t, head)
	g.r.Add(chain(85)...)
	g.r.Publish()
	if c := g.next(t); c.Writer().Len() != 85*big {
		t.Errorf("%d writable bytes, want %d", c.Writer().Len(), 85*big)
	}
}

// INDIRECT: direct descriptors may come first, and WRITE on the descriptor
// that refers to the table means nothing.
func TestIndirectAfterDirectIgnoresWrite(t *testing.T) {
	g := newRig(t, 8, allRing)
	in, out := g.buf(3, false), g.buf(4, true)
	tab, b := g.Alloc(32, 16)
	virtiotest.PutDesc(b, in.Addr, 3, virtiotest.Next, 1)
	virtiotest.PutDesc(b[16:], out.Addr, 4, virtiotest.Write, 0)
	g.r.SetDesc(2, in.Addr, 3, virtiotest.Next, 5)
	g.r.SetDesc(5, tab, 32, virtiotest.Indirect|virtiotest.Write, 0)
	g.r.Offer(2)
	g.r.Publish()
	if c := g.next(t); c.Reader().Len() != 6 || c.Writer().Len() != 4 {
		t.Errorf("%d readable, %d writable, want 6 and 4", c.Reader().Len(), c.Writer().Len())
	}
}

func TestBrokenRings(t *testing.T) {
	for name, breakIt := range map[string]func(g *rig){
		"avail.idx too far ahead": func(g *rig) { g.r.SetAvailIdx(9) },
		"avail.idx behind":        func(g *rig) { g.r.SetAvailIdx(0xffff) },
		"head equals size":        func(g *rig) { g.r.Offer(8); g.r.Publish() },
		"head 65535":              func(g *rig) { g.r.Offer(0xffff); g.r.Publish() },
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t, 8, allRing)
			breakIt(g)
			if c, err := g.q.Next(); c != nil || !errors.Is(err, virtio.ErrRing) {
				t.Errorf("Next = %v, %v, want ErrRing", c, err)
			}
			if g.r.UsedIdx() != 0 {
				t.Error("something was returned")
			}
		})
	}
}

func TestHeadInFlightOfferedAgain(t *testing.T) {
	g := newRig(t, 8, allRing)
	head, _ := g.r.Add(g.buf(8, true))
	g.r.Publish()
	c := g.next(t)
	g.r.Offer(head)
	g.r.Publish()
	if d, err := g.q.Next(); d != nil || !errors.Is(err, virtio.ErrRing) {
		t.Fatalf("Next = %v, %v, want ErrRing", d, err)
	}
	// The one in flight still completes, once.
	c.Writer().Write(make([]byte, 8))
	g.q.Push(c)
	g.q.Push(c)
	if g.r.UsedIdx() != 1 {
		t.Errorf("used.idx %d, want 1", g.r.UsedIdx())
	}
}

// EVENT_IDX: notify if any element of the batch crosses used_event, with
// 16-bit wrap arithmetic, and ignore avail.flags.
func TestEventIdxInterrupts(t *testing.T) {
	for _, start := range []uint16{0, 0xfffc} {
		for batch := uint16(1); batch <= 4; batch++ {
			for event := -2; event <= 6; event++ {
				g := newRig(t, 8, allRing)
				cfg := g.r.Config()
				cfg.AvailIndex, cfg.UsedIndex = start, start
				irqs := 0
				q, err := cfg.Activate(g.Memory, allRing, g.kick, func() { irqs++ })
				if err != nil {
					t.Fatal(err)
				}
				g.r.NoInterrupt() // to be ignored
				g.r.SetAvailIdx(start)
				for range batch {
					g.r.Add(g.buf(1, true))
				}
				g.r.Publish()
				g.r.SetUsedEvent(start + uint16(event))
				for range batch {
					c, err := q.Next()
					if err != nil || c == nil {
						t.Fatal(c, err)
					}
					q.Push(c)
				}
				q.Notify()
				want := 0
				if event >= 0 && event < int(batch) {
					want = 1
				}
				if irqs != want {
					t.Errorf("start %#x, batch %d, used_event +%d: %d interrupts, want %d", start, batch, event, irqs, want)
				}
				q.Notify() // nothing new
				if irqs != want {
					t.Error("an interrupt about nothing")
				}
			}
		}
	}
}

func TestNoInterruptFlagWithoutEventIdx(t *testing.T) {
	g := newRig(t, 8, 0)
	for i, quiet := range []bool{true, false, true} {
		g.r.WantInterrupt()
		if quiet {
			g.r.NoInterrupt()
		}
		g.r.Add(g.buf(1, true))
		g.r.Publish()
		g.q.Push(g.next(t))
		before := g.irqs.Load()
		g.q.Notify()
		if got := g.irqs.Load() != before; got == quiet {
			t.Errorf("step %d: interrupt %v with NO_INTERRUPT %v", i, got, quiet)
		}
	}
}

// After re-arming, the queue looks at avail.idx again: whatever the timing, no
// chain is left lying while the driver was told not to notify.
func TestNoLostNotification(t *testing.T) {
	for _, features := range []uint64{allRing, 0} {
		g := newRig(t, 4, features)
		const total = 3000
		done := make(chan error, 1)
		go func() {
			for n := 0; g.q.Wait(); {
				for {
					c, err := g.q.Next()
					if err != nil {
						done <- err
						return
					}
					if c == nil {
						break
					}
					g.q.Push(c)
					if n++; n == total {
						g.q.Notify()
						done <- nil
						return
					}
				}
				g.q.Notify()
			}
		}()
		b := g.buf(1, true)
		got := 0
		for sent := 0; got < total; {
			for sent < total {
				if _, err := g.r.Add(b); err != nil {
					break
				}
				sent++
			}
			if g.r.Publish() {
				g.kick.Signal()
			}
			deadline := time.Now().Add(20 * time.Second)
			for n := 0; ; n++ {
				if _, _, ok := g.r.Used(); ok {
					got++
					break
				}
				if n%1000 == 999 && time.Now().After(deadline) {
					t.Fatalf("stuck at %d of %d", got, total)
				}
				time.Sleep(0)
			}
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

// With EVENT_IDX the device asks to be woken at the chain it waits for.
func TestWaitArmsAvailEvent(t *testing.T) {
	g := newRig(t, 8, allRing)
	go g.q.Wait()
	g.r.Add(g.buf(1, true))
	if g.r.Publish(); g.r.AvailEvent() != 0 {
		t.Errorf("avail_event %d at the start", g.r.AvailEvent())
	}
	g.kick.Signal()
	g2 := newRig(t, 8, allRing)
	g2.r.Add(g2.buf(1, true))
	g2.r.Publish()
	if !g2.q.Wait() {
		t.Fatal("Wait says stopped")
	}
	g2.q.Push(g2.next(t))
	res := make(chan bool)
	go func() { res <- g2.q.Wait() }()
	for g2.r.AvailEvent() != 1 {
		time.Sleep(time.Millisecond)
	}
	g2.q.Stop()
	if <-res {
		t.Error("Wait after Stop says true")
	}
}

// A refilling driver must not hold a worker forever: one drain is bounded by
// the queue size.
func TestDrainIsBounded(t *testing.T) {
	g := newRig(t, 4, allRing)
	refill := func() {
		for {
			if _, err := g.r.Add(virtiotest.Buf{Addr: virtiotest.GuestBase, Len: 1, Write: true}); err != nil {
				break
			}
		}
		g.r.Publish()
	}
	for round := range 3 {
		refill()
		if !g.q.Wait() {
			t.Fatal("stopped")
		}
		n := 0
		for ; n < 100; n++ {
			c, err := g.q.Next()
			if err != nil {
				t.Fatal(err)
			}
			if c == nil {
				break
			}
			g.q.Push(c)
			g.r.Used()
			refill()
		}
		if n != 4 {
			t.Errorf("round %d: %d chains in one drain, want 4", round, n)
		}
	}
	// Also when all of them are broken.
	g = newRig(t, 4, allRing)
	for i := range uint16(4) {
		g.r.SetDesc(i, 0, 1, 0, 0)
		g.r.Offer(i)
	}
	g.r.Publish()
	g.wantRefused(t, 0, 1, 2, 3)
}

func TestSpuriousKicksAreHarmless(t *testing.T) {
	g := newRig(t, 4, allRing)
	for range 10 {
		g.kick.Signal()
	}
	res := make(chan bool, 1)
	go func() { res <- g.q.Wait() }()
	select {
	case v := <-res:
		t.Fatalf("Wait = %v on an empty ring", v)
	case <-time.After(20 * time.Millisecond):
	}
	g.q.Stop()
	if <-res {
		t.Error("Wait = true after Stop")
	}
	if c, err := g.q.Next(); c != nil || err != nil {
		t.Errorf("Next after Stop = %v, %v", c, err)
	}
	if !g.q.Stopped() {
		t.Error("Stopped is false")
	}
}

// After Release the rings are not touched and nobody is interrupted.
func TestReleaseEndsRingAccess(t *testing.T) {
	g := newRig(t, 4, 0)
	g.r.Add(g.buf(1, true))
	g.r.Publish()
	c := g.next(t)
	g.q.Release()
	before := bytes.Clone(g.Bytes)
	g.q.Push(c)
	g.q.Notify()
	g.q.Wait()
	if !bytes.Equal(before, g.Bytes) || g.irqs.Load() != 0 {
		t.Error("a released queue touched guest memory or interrupted")
	}
}

// Push is safe from many goroutines, and used elements appear whole.
func TestConcurrentPush(t *testing.T) {
	g := newRig(t, 64, allRing)
	var bufs []virtiotest.Buf
	for range 64 {
		bufs = append(bufs, g.buf(8, true))
	}
	for round := range 20 {
		for _, b := range bufs {
			if _, err := g.r.Add(b); err != nil {
				t.Fatal(err)
			}
		}
		g.r.Publish()
		if !g.q.Wait() {
			t.Fatal("stopped")
		}
		var wg sync.WaitGroup
		for {
			c, err := g.q.Next()
			if err != nil {
				t.Fatal(err)
			}
			if c == nil {
				break
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				c.Writer().Write(make([]byte, c.Head()%8))
				g.q.Push(c)
				g.q.Notify()
			}()
		}
		wg.Wait()
		seen := map[uint16]bool{}
		for {
			head, n, ok := g.r.Used()
			if !ok {
				break
			}
			if seen[head] || n != uint32(head%8) {
				t.Fatalf("round %d: head %d again (%v) or length %d", round, head, seen[head], n)
			}
			seen[head] = true
		}
		if len(seen) != 64 {
			t.Fatalf("round %d: %d of 64 came back", round, len(seen))
		}
	}
}

// tracker records what the queue tells.
type tracker struct{ log []string }

func (l *tracker) Taken(h uint16)       { l.log = append(l.log, fmt.Sprint("taken ", h)) }
func (l *tracker) Returning(h uint16)   { l.log = append(l.log, fmt.Sprint("returning ", h)) }
func (l *tracker) Returned(h, i uint16) { l.log = append(l.log, fmt.Sprint("returned ", h, " ", i)) }

// A queue resumes where another left off, with what was in flight there.
func TestResume(t *testing.T) {
	g := newRig(t, 8, allRing)
	b := g.buf(4, true)
	var heads []uint16
	for range 3 {
		h, _ := g.r.Add(b)
		heads = append(heads, h)
	}
	g.r.Publish()
	g.next(t)
	c1 := g.next(t)
	g.q.Push(c1)
	g.q.Release() // it dies with heads[0] in flight and heads[2] not taken
	cfg := g.r.Config()
	cfg.AvailIndex, cfg.UsedIndex = g.q.Position()
	cfg.Resubmit = heads[:1]
	var tr tracker
	cfg.Tracker = &tr
	q, err := cfg.Activate(g.Memory, allRing, g.kick, func() {})
	if err != nil {
		t.Fatal(err)
	}
	if !q.Wait() {
		t.Fatal("stopped")
	}
	for _, want := range []uint16{heads[0], heads[2]} {
		c, err := q.Next()
		if err != nil || c == nil || c.Head() != want {
			t.Fatalf("Next = %v, %v, want head %d", c, err, want)
		}
		q.Push(c)
	}
	var got []uint16
	for {
		h, _, ok := g.r.Used()
		if !ok {
			break
		}
		got = append(got, h)
	}
	if fmt.Sprint(got) != fmt.Sprint([]uint16{heads[1], heads[0], heads[2]}) {
		t.Errorf("returned %v", got)
	}
	want := fmt.Sprintf("[taken %[1]d returning %[1]d returned %[1]d 2 taken %[2]d returning %[2]d returned %[2]d 3]", heads[0], heads[2])
	if fmt.Sprint(tr.log) != want {
		t.Errorf("tracked %v, want %v", tr.log, want)
	}
}

// Buffers that lie one behind the other are one piece, but what may be read
// and what may be written stay apart.
func TestAdjacentBuffers(t *testing.T) {
	g := newRig(t, 16, allRing)
	addr, mem := g.Alloc(4096, 4096)
	for i := range mem {
		mem[i] = byte(i / 100)
	}
	at := func(off, n int, write bool) virtiotest.Buf {
		return virtiotest.Buf{Addr: addr + uint64(off), Len: uint32(n), Write: write}
	}
	if _, err := g.r.Add(at(0, 100, false), at(100, 100, false), at(300, 50, false), at(350, 50, true), at(400, 100, true), at(600, 1, true), at(601, 99, true)); err != nil {
		t.Fatal(err)
	}
	g.r.Publish()
	c := g.next(t)
	r, w := c.Reader(), c.Writer()
	sizes := func(bufs [][]byte, err error) (n []int) {
		if err != nil {
			t.Error(err)
		}
		for _, b := range bufs {
			n = append(n, len(b))
			if cap(b) != len(b) {
				t.Errorf("a piece of %d bytes has %d more behind it", len(b), cap(b)-len(b))
			}
		}
		return n
	}
	b := make([]byte, 10)
	if n, err := r.Read(b); n != 10 || err != nil || !bytes.Equal(b, mem[:10]) {
		t.Errorf("%d bytes, %v, %v", n, b, err)
	}
	if got := fmt.Sprint(sizes(r.Buffers(240, nil))); got != "[190 50]" {
		t.Errorf("readable: %v", got)
	}
	status, err := w.SplitLast(1)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(sizes(w.Buffers(249, nil))); got != "[150 99]" {
		t.Errorf("writable: %v", got)
	}
	if _, err := status.Write([]byte{0xee}); err != nil || mem[699] != 0xee || mem[698] == 0xee || mem[700] == 0xee {
		t.Errorf("status: %v, %v", err, mem[698:701])
	}
	g.q.Push(c)
	if _, n, ok := g.r.Used(); !ok || n != 250 {
		t.Errorf("%d bytes written, %v", n, ok)
	}
}

// What was put into its place through a copy of the writer is counted by the
// writer itself.
func TestWrote(t *testing.T) {
	g := newRig(t, 16, allRing)
	if _, err := g.r.Add(g.buf(10, true), g.buf(100, true), g.buf(7, true)); err != nil {
		t.Fatal(err)
	}
	g.r.Publish()
	c := g.next(t)
	w := c.Writer()
	ahead := *w
	if err := ahead.Wrote(12); err != nil {
		t.Fatal(err)
	}
	bufs, err := ahead.Buffers(100, nil)
	if err != nil || len(bufs) == 0 || w.Len() != 117 || w.Written() != 0 {
		t.Fatalf("%d pieces, %v; %d left, %d written", len(bufs), err, w.Len(), w.Written())
	}
	for _, n := range []int{-1, 118} {
		if err := w.Wrote(n); !errors.Is(err, virtio.ErrShort) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if err := errors.Join(w.Wrote(12), w.Wrote(100)); err != nil || w.Len() != 5 {
		t.Errorf("%v, %d left", err, w.Len())
	}
	g.q.Push(c)
	if _, n, _ := g.r.Used(); n != 112 {
		t.Errorf("%d bytes written", n)
	}
}

// Chains that were taken and not used are put back, in their order, and are
// not part of what a resumed queue has lost.
func TestPutBack(t *testing.T) {
	g := newRig(t, 8, allRing)
	var heads []uint16
	for range 3 {
		h, err := g.r.Add(g.buf(16, true))
		if err != nil {
			t.Fatal(err)
		}
		heads = append(heads, h)
	}
	g.r.Publish()
	for range 3 {
		a, b := g.next(t), g.next(t)
		if a.Head() != heads[0] || b.Head() != heads[1] {
			t.Fatalf("heads %d, %d", a.Head(), b.Head())
		}
		if g.q.PutBack(a) {
			t.Fatal("the first one is put back before the second one")
		}
		if !g.q.PutBack(b) || !g.q.PutBack(a) || g.q.PutBack(a) {
			t.Fatal("not put back, or twice")
		}
		if avail, used := g.q.Position(); avail != 0 || used != 0 {
			t.Errorf("position %d, %d", avail, used)
		}
	}
	// One that makes no sense was returned in between: its place is taken.
	a := g.next(t)
	g.next(t)
	g.next(t)
	g.r.SetDesc(5, 1<<52, 8, 0, 0)
	g.r.Offer(5)
	g.r.Publish()
	if c, err := g.q.Next(); c != nil || err != nil {
		t.Fatal(c, err)
	}
	if g.q.PutBack(a) {
		t.Error("put back in the place of another")
	}
}

// The chains of PushAll become visible at the same time.
func TestPushAll(t *testing.T) {
	g := newRig(t, 8, allRing)
	var cs []*virtio.DescriptorChain
	for i := range 3 {
		if _, err := g.r.Add(g.buf(16, true)); err != nil {
			t.Fatal(err)
		}
		g.r.Publish()
		c := g.next(t)
		c.Writer().Write(make([]byte, i+1))
		cs = append(cs, c)
	}
	g.q.PushAll(cs)
	g.q.PushAll(cs) // they are not in flight any more
	if n := g.r.UsedIdx(); n != 3 {
		t.Errorf("used.idx %d", n)
	}
	for i, c := range cs {
		if head, n, ok := g.r.Used(); !ok || head != c.Head() || n != uint32(i+1) {
			t.Errorf("used element %d: head %d, length %d, %v", i, head, n, ok)
		}
	}
	g.q.Notify()
	if n := g.irqs.Load(); n != 1 {
		t.Errorf("%d interrupts", n)
	}
	g.q.Release()
	g.q.PushAll(cs)
}

func TestWakeAndDone(t *testing.T) {
	g := newRig(t, 8, allRing)
	g.q.Wake()
	if !g.q.Wait() {
		t.Error("stopped")
	}
	woken := make(chan bool)
	go func() { woken <- g.q.Wait() }()
	select {
	case <-woken:
		t.Fatal("one Wake ends two Waits")
	case <-g.q.Done():
		t.Fatal("done before Stop")
	case <-time.After(5 * time.Millisecond):
	}
	g.q.Wake()
	if !<-woken {
		t.Error("stopped")
	}
	g.q.Stop()
	g.q.Stop()
	<-g.q.Done()
	if g.q.Wait() {
		t.Error("not stopped")
	}
}
