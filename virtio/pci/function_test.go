package pci_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"go.uber.org/goleak"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t testing.TB, g *virtiotest.Guest, c virtioblk.Config, o pci.Options) (*virtiotest.PCI, *virtioblk.Device) {
	t.Helper()
	if c.Backend == nil {
		c.Backend = virtioblk.NewRAM(4 << 20)
	}
	d, err := virtioblk.New(c)
	if err != nil {
		t.Fatal(err)
	}
	p, err := virtiotest.NewPCI(d, g, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.F.Close(); err != nil {
			t.Error(err)
		}
		if n := p.Host.OpenMSIs(); n != 0 {
			t.Errorf("%d MSIs are still open", n)
		}
		if l := p.Host.Doorbells(); len(l) != 0 {
			t.Errorf("doorbells %#x are still bound", l)
		}
	})
	return p, d
}

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport {
		p, _ := open(t, g, virtioblk.Config{Queues: 3}, pci.Options{})
		return p
	})
}

func TestConformanceAccessPlatform(t *testing.T) {
	virtiotest.Conformance(t, func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport {
		p, _ := open(t, g, virtioblk.Config{}, pci.Options{AccessPlatform: true})
		return p
	})
}

func TestBlockConformance(t *testing.T) {
	virtiotest.BlockConformance(t, func(t *testing.T, g *virtiotest.Guest, ro bool) virtiotest.Transport {
		p, _ := open(t, g, virtioblk.Config{Queues: 3, ReadOnly: ro, Serial: "moovm"}, pci.Options{})
		return p
	})
}

func TestHeader(t *testing.T) {
	p, _ := open(t, virtiotest.NewGuest(1<<16), virtioblk.Config{}, pci.Options{InterruptPin: 2})
	for _, c := range []struct {
		name string
		off  uint16
		n    int
		want uint32
	}{
		{"vendor and device", 0, 4, 0x10421af4}, {"revision and class", 8, 4, 0x01000001},
		{"header type", 0x0e, 1, 0}, {"subsystem", 0x2c, 4, 0x00421af4}, {"interrupt pin", 0x3d, 1, 2},
		{"status: capabilities", 6, 2, 0x10}, {"reserved", 0x28, 4, 0}, {"beyond", 0x100, 4, 0}, {"far beyond", 0xffc, 4, 0},
	} {
		if v := p.Cfg(c.off, c.n); v != c.want {
			t.Errorf("%s: %#x, want %#x", c.name, v, c.want)
		}
	}
	before := make([]byte, 256)
	p.F.ReadConfig(0, before)
	for off := uint16(0); off < 256; off++ { // nothing that is not meant to be can be written
		if off >= 4 && off < 6 || off >= 0x0c && off < 0x18 || off == 0x3c {
			continue
		}
		if off >= p.Caps[0]+2 && off < p.Caps[0]+4 || off >= p.Caps[5] {
			continue
		}
		p.SetCfg(off, 1, ^p.Cfg(off, 1))
	}
	after := make([]byte, 256)
	p.F.ReadConfig(0, after)
	if !slices.Equal(before, after) {
		t.Errorf("written:\n%x\n%x", before, after)
	}
	for off := range uint16(0x1000) { // any offset and size is harmless
		var b [8]byte
		for n := range len(b) + 1 {
			p.F.ReadConfig(off, b[:n])
			p.F.WriteConfig(off, b[:n])
		}
	}
	p.F.ReadConfig(0xffff, before[:4])
}

func TestCapabilities(t *testing.T) {
	p, _ := open(t, virtiotest.NewGuest(1<<16), virtioblk.Config{Queues: 5}, pci.Options{})
	for typ := byte(0); typ <= 5; typ++ {
		at, ok := p.Caps[typ]
		if !ok {
			t.Errorf("4.1.4: capability %d is missing", typ)
		}
		if at%4 != 0 {
			t.Errorf("capability %d is at %#x", typ, at)
		}
	}
	// The structures do not overlap and are inside the BAR.
	bar := p.F.BARs()[0]
	type span struct{ at, n uint64 }
	spans := []span{{p.Table, 16 * 6}, {p.PBA, 8}}
	for typ := byte(1); typ <= 4; typ++ {
		spans = append(spans, span{uint64(p.Cfg(p.Caps[typ]+8, 4)), uint64(p.Cfg(p.Caps[typ]+12, 4))})
	}
	slices.SortFunc(spans, func(a, b span) int { return int(a.at) - int(b.at) })
	for i, s := range spans {
		if s.at+s.n > bar.Size || i > 0 && spans[i-1].at+spans[i-1].n > s.at {
			t.Errorf("%#x: overlap, or outside %#x", spans, bar.Size)
		}
	}
	if n := p.Cfg(p.Caps[0]+2, 2) & 0x7ff; n != 5 {
		t.Errorf("MSI-X table size field %d, want 5", n)
	}
	if p.Cfg(p.Caps[2]+16, 4) != 4 {
		t.Error("notify_off_multiplier is not 4")
	}
	seen := map[uint64]bool{}
	for i := range 5 {
		seen[p.Doorbell(i)] = true
	}
	if len(seen) != 5 {
		t.Error("queues share doorbells")
	}
}

func TestBARSizing(t *testing.T) {
	p, _ := open(t, virtiotest.NewGuest(1<<16), virtioblk.Config{}, pci.Options{})
	bar := p.F.BARs()[0]
	if bar.Index != 0 || !bar.Is64 || bar.Size&(bar.Size-1) != 0 {
		t.Fatalf("%+v", bar)
	}
	p.SetCfg(4, 2, 0)
	p.SetCfg(0x10, 4, 0xffffffff)
	p.SetCfg(0x14, 4, 0xffffffff)
	mask := uint64(p.Cfg(0x10, 4)) | uint64(p.Cfg(0x14, 4))<<32
	if mask&0xf != 4 || ^(mask&^0xf)+1 != bar.Size {
		t.Errorf("sizing reads %#x for %#x bytes", mask, bar.Size)
	}
	for off := uint16(0x18); off < 0x28; off += 4 {
		p.SetCfg(off, 4, 0xffffffff)
		if v := p.Cfg(off, 4); v != 0 {
			t.Errorf("absent BAR at %#x reads %#x", off, v)
		}
	}
}

// The command register's memory enable, a 64-bit address, and doorbells that
// move along.
func TestBARMoves(t *testing.T) {
	p, _ := open(t, virtiotest.NewGuest(1<<16), virtioblk.Config{Queues: 2}, pci.Options{})
	bells := func(base uint64) []uint64 { return []uint64{base + p.NotifyBase, base + p.NotifyBase + 4} }
	check := func(what string, want []uint64) {
		t.Helper()
		got := p.Host.Doorbells()
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: doorbells %#x, want %#x", what, got, want)
		}
	}
	check("at first", bells(p.Base))
	var b [4]byte
	p.SetCfg(4, 2, 0)
	check("memory disabled", nil)
	if p.F.ReadMem(p.Base, b[:]) || p.F.WriteMem(p.Base, b[:]) {
		t.Error("a disabled BAR answers")
	}
	p.SetCfg(0x14, 4, 0x12)
	p.SetCfg(4, 2, 2)
	old := p.Base
	p.Base |= 0x12 << 32
	check("above 4 GiB", bells(p.Base))
	if p.F.ReadMem(old, b[:]) || !p.F.ReadMem(p.Base, b[:]) {
		t.Error("the BAR did not move")
	}
	size := p.F.BARs()[0].Size
	if p.F.ReadMem(p.Base+size, b[:]) || p.F.ReadMem(p.Base-1, b[:]) || p.F.ReadMem(p.Base+size-2, b[:]) ||
		p.F.ReadMem(0, b[:]) || p.F.ReadMem(^uint64(0), b[:]) {
		t.Error("answers outside the BAR")
	}
	p.SetCfg(0x10, 4, 0xd0000000) // moved while enabled
	p.Base = 0x12_d0000000
	check("moved", bells(p.Base))
	p.F.Reset()
	check("reset", nil)
	if v := p.Cfg(0x10, 4); v != 4 || p.Cfg(4, 2) != 0 {
		t.Errorf("BAR %#x, command %#x after reset", v, p.Cfg(4, 2))
	}
	p.BringUp()
	check("again", bells(p.Base))
}

// A machine without ioeventfd delivers doorbell writes itself, at any width.
func TestDoorbellByExit(t *testing.T) {
	g := virtiotest.NewGuest(4 << 20)
	p, _ := open(t, g, virtioblk.Config{}, pci.Options{})
	p.SetCfg(4, 2, 0)
	p.Host.NoDoorbells = true
	p.SetCfg(4, 2, 2|4)
	d := virtiotest.NewBlock(virtiotest.Start(t, p, g, virtiotest.BlockFeatures, 16))
	for range 3 {
		if st, _ := d.Request(0, virtiotest.BlkFlush, 0, nil, nil); st != 0 {
			t.Errorf("status %d", st)
		}
	}
	p.SetMem(p.Doorbell(0), 4, 0)
	p.SetMem(p.Doorbell(0), 1, 0)
	p.SetMem(p.Doorbell(0)+4*7, 2, 7) // no such queue
}

func TestMSIX(t *testing.T) {
	g := virtiotest.NewGuest(4 << 20)
	p, _ := open(t, g, virtioblk.Config{}, pci.Options{})
	b := virtiotest.NewBlock(virtiotest.Start(t, p, g, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
	entry := p.Table + 16 // of vector 1, queue 0
	flush := func() {
		t.Helper()
		if st, _ := b.Request(0, virtiotest.BlkFlush, 0, nil, nil); st != 0 {
			t.Fatalf("status %d", st)
		}
	}
	irqs := func() uint64 { return p.QueueInterrupts(0) }
	pending := func() uint64 { return p.Mem(p.PBA, 8) }
	eventually := func(what string, ok func() bool) { t.Helper(); virtiotest.Eventually(t, what, ok) }

	before := irqs()
	flush()
	eventually("an interrupt", func() bool { return irqs() == before+1 })

	// A masked vector keeps the message pending; unmasking sends it once.
	p.SetMem(entry+12, 4, 1)
	flush()
	flush()
	eventually("the pending bit", func() bool { return pending() == 1<<1 })
	if irqs() != before+1 {
		t.Error("a masked vector interrupts")
	}
	p.SetMem(entry+12, 4, 0)
	if irqs() != before+2 || pending() != 0 {
		t.Errorf("unmasked: %d interrupts, pending %#x", irqs()-before-1, pending())
	}

	// The function mask does the same for all.
	p.SetCfg(p.Caps[0]+2, 2, 1<<15|1<<14)
	flush()
	eventually("the pending bit", func() bool { return pending() == 1<<1 })
	p.SetCfg(p.Caps[0]+2, 2, 1<<15)
	if irqs() != before+3 || pending() != 0 {
		t.Errorf("function unmasked: %d interrupts, pending %#x", irqs()-before-2, pending())
	}

	// A changed message is sent to the new address.
	p.SetMem(entry+12, 4, 1)
	p.SetMem(entry, 8, 0xfee01000|0xabc<<32)
	p.SetMem(entry+8, 4, 0x77)
	p.SetMem(entry+12, 4, 0)
	flush()
	eventually("the new message", func() bool { return p.Host.Messages(0xfee01000|0xabc<<32, 0x77) == 1 })
	if v := p.Mem(entry, 8); v != 0xfee01000|0xabc<<32 {
		t.Errorf("the table reads %#x", v)
	}
	p.SetMem(p.PBA, 8, ^uint64(0)) // read-only
	if pending() != 0 {
		t.Error("pending bits can be written")
	}

	// Beyond the table: nothing.
	p.SetMem(p.Table+16*2, 4, 0xffffffff)
	if v := p.Mem(p.Table+16*2, 4); v != 0 {
		t.Errorf("beyond the table reads %#x", v)
	}
}

// An invalid vector reads back NO_VECTOR, which means no interrupt.
func TestNoVector(t *testing.T) {
	g := virtiotest.NewGuest(4 << 20)
	p, d := open(t, g, virtioblk.Config{Queues: 2}, pci.Options{})
	b := virtiotest.NewBlock(virtiotest.Start(t, p, g, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
	for _, v := range []uint64{3, 4, 0x7ff, 0xfffe, 0xffff} {
		p.SetMem(p.Common+16, 2, v)
		if got := p.Mem(p.Common+16, 2); got != 0xffff {
			t.Errorf("config vector %#x reads back %#x", v, got)
		}
		p.Mem(p.Common+22, 2)
		p.SetMem(p.Common+22, 2, 0)
		p.SetMem(p.Common+26, 2, v)
		if got := p.Mem(p.Common+26, 2); got != 0xffff {
			t.Errorf("queue vector %#x reads back %#x", v, got)
		}
	}
	before := fmt.Sprint(p.QueueInterrupts(0), p.QueueInterrupts(1), p.ConfigInterrupts())
	if st, _ := b.Request(0, virtiotest.BlkFlush, 0, nil, nil); st != 0 {
		t.Fatal(st)
	}
	_ = d
	b.SetStatus(0) // drains
	if after := fmt.Sprint(p.QueueInterrupts(0), p.QueueInterrupts(1), p.ConfigInterrupts()); after != before {
		t.Errorf("interrupts %s, were %s", after, before)
	}
}

// Without MSI-X the line follows ISR, which reading clears.
func TestINTx(t *testing.T) {
	g := virtiotest.NewGuest(4 << 20)
	ram := virtioblk.NewRAM(4 << 20)
	p, dev := open(t, g, virtioblk.Config{Backend: ram}, pci.Options{})
	p.SetCfg(p.Caps[0]+2, 2, 0)
	b := virtiotest.NewBlock(virtiotest.Start(t, p, g, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
	if p.Host.INTx() {
		t.Error("the line is high at first")
	}
	b.Request(0, virtiotest.BlkFlush, 0, nil, nil)
	virtiotest.Eventually(t, "the line", p.Host.INTx)
	if p.Cfg(6, 2)&8 == 0 {
		t.Error("the status register does not show the interrupt")
	}
	if v := p.Mem(p.ISR, 1); v != 1 {
		t.Errorf("ISR %#x, want 1", v)
	}
	if p.Host.INTx() || p.Mem(p.ISR, 1) != 0 || p.Cfg(6, 2)&8 != 0 {
		t.Error("reading ISR does not clear it")
	}
	ram.Resize(8 << 20)
	if err := dev.Resized(); err != nil {
		t.Fatal(err)
	}
	if !p.Host.INTx() {
		t.Error("no interrupt about the configuration")
	}
	p.SetCfg(4, 2, 2|4|1<<10) // INTx disable
	if p.Host.INTx() {
		t.Error("INTx disable does not")
	}
	p.SetCfg(4, 2, 2|4)
	if !p.Host.INTx() {
		t.Error("INTx does not come back")
	}
	if v := p.Mem(p.ISR, 1); v != 2 {
		t.Errorf("ISR %#x, want 2", v)
	}
	b.Request(0, virtiotest.BlkFlush, 0, nil, nil)
	virtiotest.Eventually(t, "the line", p.Host.INTx)
	b.SetStatus(0)
	if p.Host.INTx() || p.Mem(p.ISR, 1) != 0 {
		t.Error("a reset does not clear the interrupt")
	}
}

// The PCI_CFG capability is a window into the BAR and honours its length.
func TestPCICfgWindow(t *testing.T) {
	p, _ := open(t, virtiotest.NewGuest(1<<16), virtioblk.Config{}, pci.Options{})
	p.SetCfg(4, 2, 0) // works without memory decoding
	at := p.Caps[5]
	window := func(off uint64, n uint32) {
		p.SetCfg(at+4, 1, 0)
		p.SetCfg(at+8, 4, uint32(off))
		p.SetCfg(at+12, 4, n)
	}
	window(p.Common+20, 1)
	p.SetCfg(at+16, 1, 1)
	p.SetCfg(at+16, 4, 0xffffff03) // one byte of it
	if v := p.Cfg(at+16, 1); v != 3 {
		t.Errorf("status %#x through the window, want 3", v)
	}
	window(p.Common+18, 2)
	if v := p.Cfg(at+16, 2); v != 1 {
		t.Errorf("%d queues through the window", v)
	}
	window(p.Device, 4)
	if v := p.Cfg(at+16, 4); v != 4<<20/512 {
		t.Errorf("capacity %d through the window", v)
	}
	for _, c := range [][2]uint32{{0, 0}, {0, 3}, {0, 8}, {1, 4}, {uint32(p.F.BARs()[0].Size), 4}, {0xfffffffc, 4}, {0xffffffff, 1}} {
		window(uint64(c[0]), c[1])
		p.SetCfg(at+16, 4, 0xffffffff)
		if v := p.Cfg(at+16, 4); v != 0xffffffff {
			t.Errorf("offset %#x length %d reads %#x: an access happened", c[0], c[1], v)
		}
	}
	p.SetCfg(4, 2, 2)
	if p.Status() != 3 {
		t.Errorf("status %#x", p.Status())
	}
}

// Both 32-bit halves of 64-bit fields can be accessed, and all fields at any
// width when reading.
func TestCommonConfigAccess(t *testing.T) {
	p, _ := open(t, virtiotest.NewGuest(1<<16), virtioblk.Config{}, pci.Options{})
	virtiotest.Negotiate(t, p, virtiotest.RingFeatures)
	p.SetQueue(0, 16, 0x1122334455667780, 0x99aabbccddeeff00, 0x0102030405060708)
	for i, want := range []uint64{0x1122334455667780, 0x99aabbccddeeff00, 0x0102030405060708} {
		off := p.Common + 32 + 8*uint64(i)
		if lo, hi := p.Mem(off, 4), p.Mem(off+4, 4); lo|hi<<32 != want {
			t.Errorf("field %d: halves %#x %#x", i, lo, hi)
		}
		if v := p.Mem(off, 8); v != want {
			t.Errorf("field %d: %#x", i, v)
		}
	}
	p.SetMem(p.Common+32, 8, 0x5000)
	if v := p.Mem(p.Common+32, 8); v != 0x5000 {
		t.Errorf("written as 64 bits: %#x", v)
	}
	if v := p.Mem(p.Common+24, 2); v != 16 {
		t.Errorf("queue_size %d", v)
	}
	p.SetMem(p.Common+24, 4, 8) // wrong width
	if v := p.Mem(p.Common+24, 2); v != 16 {
		t.Errorf("queue_size %d after a write of the wrong width", v)
	}
	for off := range uint64(0x1000) {
		for _, n := range []int{1, 2, 4, 8} {
			p.Mem(p.Common+off, n)
		}
	}
	if v := p.Mem(p.Common+60, 4); v != 0 {
		t.Errorf("beyond the structure: %#x", v)
	}
}

func TestNewErrors(t *testing.T) {
	g := virtiotest.NewGuest(1 << 16)
	d, err := virtioblk.New(virtioblk.Config{Backend: virtioblk.NewRAM(512), Queues: 256})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pci.New(d, g.Memory, &virtiotest.PCIHost{}, pci.Options{InterruptPin: 5}); err == nil {
		t.Error("interrupt pin 5 is accepted")
	}
	p, err := virtiotest.NewPCI(d, g, pci.Options{}) // as many queues as there can be
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.F.Close(), p.F.Close()); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if err := func() error {
		_, err := pci.New(d, g.Memory, noMSI{}, pci.Options{})
		return err
	}(); err == nil {
		t.Error("a machine without interrupts is accepted")
	}
}

type noMSI struct{ *virtiotest.PCIHost }

func (noMSI) NewMSI() (pci.MSI, error) { return nil, errors.New("none left") }
