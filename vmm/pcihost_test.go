package vmm

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"testing"

	"github.com/moovm/moovm/internal/kvm"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/pci"
)

// fakeFunction is a PCI function with one BAR that remembers what it is told.
type fakeFunction struct {
	config [4096]byte
	size   uint64
	mem    map[uint64]byte
}

func newFakeFunction(size uint64) *fakeFunction {
	f := &fakeFunction{size: size, mem: map[uint64]byte{}}
	binary.LittleEndian.PutUint32(f.config[:], 0x1042_1af4)
	return f
}

func (f *fakeFunction) ReadConfig(off uint16, p []byte)  { copy(p, f.config[off:]) }
func (f *fakeFunction) WriteConfig(off uint16, p []byte) { copy(f.config[off:], p) }
func (f *fakeFunction) bar() uint64 {
	return uint64(binary.LittleEndian.Uint32(f.config[0x10:]))
}

func (f *fakeFunction) ReadMem(addr uint64, p []byte) bool {
	if addr < f.bar() || addr-f.bar() >= f.size {
		return false
	}
	for i := range p {
		p[i] = f.mem[addr-f.bar()+uint64(i)]
	}
	return true
}

func (f *fakeFunction) WriteMem(addr uint64, p []byte) bool {
	if addr < f.bar() || addr-f.bar() >= f.size {
		return false
	}
	for i := range p {
		f.mem[addr-f.bar()+uint64(i)] = p[i]
	}
	return true
}

func testBus(t *testing.T, sizes ...uint64) (*pciBus, []*fakeFunction) {
	b := newPCIBus()
	var fs []*fakeFunction
	for _, size := range sizes {
		f := newFakeFunction(size)
		slot, err := b.freeSlot()
		if err != nil {
			t.Fatal(err)
		}
		if err := b.plug(slot, f, []pci.BAR{{Index: 0, Size: size, Is64: true}}); err != nil {
			t.Fatal(err)
		}
		fs = append(fs, f)
	}
	return b, fs
}

func TestPCIConfigMechanisms(t *testing.T) {
	b, fs := testBus(t, 0x4000, 0x1000)
	le := binary.LittleEndian
	word := func(v uint32) []byte { return le.AppendUint32(nil, v) }
	read := func(devfn uint8, off uint16, n int) uint32 {
		b.port(portPCIAddr, word(1<<31|uint32(devfn)<<8|uint32(off&^3)), true)
		p := make([]byte, 4)
		b.port(portPCIData+off&3, p[:n], false)
		return le.Uint32(p)
	}
	if v := read(0, 0, 4); v != 0x0008_1b36 {
		t.Errorf("host bridge id %#x", v)
	}
	if v := read(0, 0x0a, 2); v != 0x0600 {
		t.Errorf("host bridge class %#x", v)
	}
	if v := read(1<<3, 0, 4); v != 0x1042_1af4 {
		t.Errorf("device 1 id %#x", v)
	}
	if v := read(1<<3, 2, 2); v != 0x1042 {
		t.Errorf("device 1 id, upper half: %#x", v)
	}
	if v := read(1<<3, 0x3c, 1); v != intxGSI(1) {
		t.Errorf("interrupt line %d", v)
	}
	if v := read(1<<3, 4, 2); v&6 != 6 {
		t.Errorf("command %#x: memory and bus master should be on", v)
	}
	for _, devfn := range []uint8{1<<3 | 1, 3 << 3, 31<<3 | 7} {
		if v := read(devfn, 0, 4); v != 0xffff_ffff {
			t.Errorf("absent function %#x reads %#x", devfn, v)
		}
	}
	b.port(portPCIAddr, word(1<<31|1<<16), true) // bus 1
	p := make([]byte, 4)
	if b.port(portPCIData, p, false); le.Uint32(p) != 0xffff_ffff {
		t.Error("bus 1 exists")
	}
	b.port(portPCIAddr, word(0), true) // not enabled
	if b.port(portPCIData, p, false); le.Uint32(p) != 0xffff_ffff {
		t.Error("a disabled mechanism answers")
	}
	b.port(portPCIAddr, word(1<<31|1<<11|0x40), true)
	if b.port(portPCIAddr, p, false); le.Uint32(p) != 1<<31|1<<11|0x40 {
		t.Errorf("the address register reads % x", p)
	}
	b.port(portPCIData, word(0x11223344), true)
	if le.Uint32(fs[0].config[0x40:]) != 0x11223344 {
		t.Error("a configuration write was lost")
	}
	// The same by memory, with the extended space.
	b.mem(addrECAM+1<<15+0x40, p, false)
	if le.Uint32(p) != 0x11223344 {
		t.Errorf("ECAM reads % x", p)
	}
	b.mem(addrECAM+1<<15+0xffc, word(7), true)
	if fs[0].config[0xffc] != 7 {
		t.Error("an ECAM write to the extended space was lost")
	}
	q := make([]byte, 8)
	if b.mem(addrECAM+1<<15+0xffc, q, false); q[0] != 7 || q[7] != 0xff {
		t.Errorf("an 8-byte read at the end reads % x", q)
	}
}

func TestBARPlacement(t *testing.T) {
	b, fs := testBus(t, 0x1000, 0x10_0000, 0x4000, 0x20)
	for i, f := range fs {
		at := f.bar()
		if at%f.size != 0 || at < addrPCIWindow || at+f.size > addrPCIWindow+sizePCIWindow {
			t.Errorf("BAR of device %d at %#x", i+1, at)
		}
		for j, g := range fs[:i] {
			if at < g.bar()+g.size && g.bar() < at+f.size {
				t.Errorf("BARs of devices %d and %d overlap", i+1, j+1)
			}
		}
		b.mem(at+8, []byte{byte(i + 1)}, true)
		p := []byte{0}
		if b.mem(at+8, p, false); p[0] != byte(i+1) {
			t.Errorf("device %d reads %d", i+1, p[0])
		}
	}
	p := []byte{0, 0}
	if b.mem(addrPCIWindow+sizePCIWindow-8, p, false); p[0] != 0xff || p[1] != 0xff {
		t.Errorf("nobody's address reads % x", p)
	}
	if err := b.plug(10, newFakeFunction(1<<30), []pci.BAR{{Size: 1 << 30}}); err == nil {
		t.Error("a BAR larger than the window was placed")
	}
	if err := b.plug(10, newFakeFunction(0), []pci.BAR{{Size: 0x3000}}); err == nil {
		t.Error("a BAR whose size is no power of two was placed")
	}
}

// busMachine is a machine's buses with a real virtio disk on each, but no KVM.
func busMachine(t testing.TB) *Machine {
	m := &Machine{done: make(chan struct{}), bus: newPCIBus(), rtc: newCMOS(fixedNow), log: slog.New(slog.DiscardHandler)}
	m.changed.L = &m.mu
	for i := range m.com {
		m.com[i] = newUART(func(bool) {})
		m.com[i].start(Serial{Out: io.Discard})
	}
	mem, err := virtio.NewMemory(virtio.Region{Bytes: make([]byte, 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	m.ram = &ram{fd: -1, mem: mem}
	m.host = func(int) pci.Host { return nullHost{} }
	m.window = func(int) (windowHost, error) { return nullWindow{}, nil }
	for _, m.cfg.Transport = range []Transport{TransportPCI, TransportMMIO} {
		m.cfg.Devices = []virtio.Device{newDisk(t, zeroDisk(1<<20), 1)}
		if err := m.createDevices(); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func closeBusMachine(m *Machine) {
	m.closeDevices()
	for _, u := range m.com {
		u.close(0)
		u.wg.Wait()
	}
}

// nullHost has no interrupts and no doorbells.
type nullHost struct{}

func (nullHost) NewMSI() (pci.MSI, error)                   { return nullMSI{}, nil }
func (nullHost) BindDoorbell(uint64, *virtio.Event) error   { return io.EOF }
func (nullHost) UnbindDoorbell(uint64, *virtio.Event) error { return nil }
func (nullHost) SetINTx(bool)                               {}

type nullWindow struct{}

func (nullWindow) SetInterrupt(bool) {}
func (nullWindow) Close() error      { return nil }

type nullMSI struct{}

func (nullMSI) Program(uint64, uint32) error { return nil }
func (nullMSI) Signal() error                { return nil }
func (nullMSI) Close() error                 { return nil }

// FuzzBuses throws random accesses at the machine's ports, configuration
// space and memory windows: whatever the guest does, nothing panics or hangs,
// and the machine's buses still answer.
func FuzzBuses(f *testing.F) {
	f.Add([]byte{0, 0xf8, 3, 1, 'x', 1, 0, 0, 0xc0, 4, 1, 2, 3, 4})
	f.Add([]byte{0, 0xf8, 0x0c, 4, 0, 8, 0, 0x80, 0, 0xfc, 0x0c, 4, 0, 0, 0, 0})
	f.Add([]byte{11, 0xf8, 3, 0, 1, 0, 'x', 0, 0, 0, 0, 0, 10, 0xf8, 3, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{13, 0x9a, 0, 0, 0, 1, 0xff, 0xff, 0, 0, 0, 0, 5, 0, 0x20, 0, 0, 7, 0, 0, 0xe0, 0xfe, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		m := busMachine(t)
		defer closeBusMachine(m)
		p := make([]byte, 8)
		for len(b) >= 12 {
			kind, addr, n := b[0], binary.LittleEndian.Uint32(b[1:]), int(b[5]&7)+1
			copy(p, b[6:12])
			b = b[12:]
			write := kind&1 != 0
			switch kind >> 1 & 7 {
			case 0:
				m.port(uint16(addr), p[:min(n, 4)], write)
			case 1: // aim at the devices
				ports := [...]uint16{portCOM1, portCOM2, portCMOS, portPCIAddr, portPCIData, portSleep, portPanic, portKeyboardSt}
				m.port(ports[addr%8]+uint16(addr>>8&7), p[:min(n, 4)], write)
			case 2:
				m.mmio(addrPCIWindow+uint64(addr&0xffff), p[:n], write)
			case 3:
				m.mmio(addrECAM+uint64(addr&0x1ffff), p[:n], write)
			case 4:
				m.mmio(addrWindows+uint64(addr&0x1fff), p[:n], write)
			case 5: // a string instruction, of a page at most as KVM has it
				size := 1 << (n % 3)
				count := 1 + int(addr>>16)%(pageSize/size)
				data := bytes.Repeat(p[:size], count)
				m.ports(kvm.IO{Out: write, Size: size, Port: uint16(addr), Count: count, Data: data})
			case 6: // the disk's configuration space: BARs, MSI-X, the access capability
				m.mmio(addrECAM+1<<15+uint64(addr&0xff), p[:n], write)
			case 7: // wherever
				m.mmio(uint64(addr)|uint64(p[0])<<32, p[1:n], write)
			}
		}
		var id [4]byte
		m.mmio(addrECAM, id[:], false)
		if binary.LittleEndian.Uint16(id[:]) != 0x1b36 {
			t.Errorf("the host bridge reads % x", id)
		}
		m.mmio(addrWindows, id[:], false)
		if string(id[:]) != "virt" {
			t.Errorf("the first window reads % x", id)
		}
	})
}
