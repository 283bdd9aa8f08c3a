package mmio_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t testing.TB, g *virtiotest.Guest, c virtioblk.Config, o mmio.Options) (*virtiotest.MMIO, *virtioblk.Device) {
	t.Helper()
	if c.Backend == nil {
		c.Backend = virtioblk.NewRAM(4 << 20)
	}
	d, err := virtioblk.New(c)
	if err != nil {
		t.Fatal(err)
	}
	m, err := virtiotest.NewMMIO(d, g, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, d
}

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport {
		m, _ := open(t, g, virtioblk.Config{Queues: 3}, mmio.Options{})
		return m
	})
}

func TestConformanceAccessPlatform(t *testing.T) {
	virtiotest.Conformance(t, func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport {
		m, _ := open(t, g, virtioblk.Config{}, mmio.Options{AccessPlatform: true})
		return m
	})
}

func TestBlockConformance(t *testing.T) {
	virtiotest.BlockConformance(t, func(t *testing.T, g *virtiotest.Guest, ro bool) virtiotest.Transport {
		m, _ := open(t, g, virtioblk.Config{Queues: 3, ReadOnly: ro}, mmio.Options{})
		return m
	})
}

func TestIdentity(t *testing.T) {
	m, _ := open(t, virtiotest.NewGuest(1<<16), virtioblk.Config{}, mmio.Options{})
	for off, want := range map[uint64]uint32{0: 0x74726976, 4: 2, 8: 2, 0xb0: 0xffffffff, 0xb4: 0xffffffff, 0xfc: 0} {
		if v := m.Reg(off); v != want {
			t.Errorf("register %#x is %#x, want %#x", off, v, want)
		}
	}
	// Any access anywhere is harmless; registers answer 32-bit ones only.
	var b [8]byte
	for off := range uint64(mmio.Size + 16) {
		for n := range len(b) + 1 {
			m.D.Read(off, b[:n])
			m.D.Write(off, b[:n])
		}
	}
	b = [8]byte{1, 1, 1, 1}
	m.D.Read(0, b[:2])
	if b[0] != 0 || b[1] != 0 {
		t.Errorf("a 16-bit read of a register gives %x", b[:2])
	}
	m.SetReg(0x70, 0x100) // not a reset, not a status
	if s := m.Status(); s != 0 {
		t.Errorf("status %#x", s)
	}
}

// InterruptStatus bits hold until acknowledged, each on its own, and the line
// with them; reset clears them and every QueueReady.
func TestInterruptStatusHolds(t *testing.T) {
	g := virtiotest.NewGuest(4 << 20)
	ram := virtioblk.NewRAM(4 << 20)
	m, dev := open(t, g, virtioblk.Config{Backend: ram, Queues: 2}, mmio.Options{})
	b := virtiotest.NewBlock(virtiotest.Start(t, m, g, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
	m.Manual()
	b.Request(0, virtiotest.BlkFlush, 0, nil, nil)
	ram.Resize(8 << 20)
	if err := dev.Resized(); err != nil {
		t.Fatal(err)
	}
	virtiotest.Eventually(t, "both bits", func() bool { return m.Reg(0x60) == 3 })
	if !m.Level() || m.Reg(0x60) != 3 {
		t.Error("reading changes something")
	}
	m.SetReg(0x64, 1)
	if m.Reg(0x60) != 2 || !m.Level() {
		t.Errorf("status %#x, line %v after the acknowledgement of 1", m.Reg(0x60), m.Level())
	}
	m.SetReg(0x64, 2)
	if m.Reg(0x60) != 0 || m.Level() {
		t.Errorf("status %#x, line %v after the acknowledgement of both", m.Reg(0x60), m.Level())
	}
	b.Request(0, virtiotest.BlkFlush, 0, nil, nil)
	virtiotest.Eventually(t, "the line", m.Level)
	m.SetStatus(0)
	if m.Reg(0x60) != 0 || m.Level() || m.QueueEnabled(0) || m.QueueEnabled(1) {
		t.Error("reset leaves something behind")
	}
}

// Writing 0 to QueueReady stops a running queue (section 4.2.2.2).
func TestQueueReadyStops(t *testing.T) {
	g := virtiotest.NewGuest(4 << 20)
	m, _ := open(t, g, virtioblk.Config{}, mmio.Options{})
	virtiotest.Start(t, m, g, virtiotest.BlockFeatures, 16)
	m.SetReg(0x30, 0)
	m.SetReg(0x44, 0)
	virtiotest.Eventually(t, "QueueReady to read 0", func() bool { return m.Reg(0x44) == 0 })
}
