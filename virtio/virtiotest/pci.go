package virtiotest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/pci"
)

// PCIHost is a machine with nothing but a place to plug a pci.Function in. It
// counts messages by their address and delivers bound doorbells itself.
type PCIHost struct {
	mu        sync.Mutex
	msgs      map[uint64]uint64 // by address<<32 | data
	doorbells map[uint64]*virtio.Event
	intx      bool
	intxEdges uint64
	// OnMessage, if set, is called for every message after it was counted.
	OnMessage func()
	// OnINTx, if set, is called after the line has changed.
	OnINTx func(level bool)
	// NoDoorbells makes BindDoorbell fail, as without ioeventfd.
	NoDoorbells bool
	open        int
}

var _ pci.Host = (*PCIHost)(nil)

type hostMSI struct {
	h    *PCIHost
	key  uint64
	prog bool
}

// NewMSI implements pci.Host.
func (h *PCIHost) NewMSI() (pci.MSI, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open++
	return &hostMSI{h: h}, nil
}

func (m *hostMSI) Program(addr uint64, data uint32) error {
	m.key, m.prog = addr<<32|uint64(data), true
	return nil
}

func (m *hostMSI) Signal() error {
	if !m.prog {
		return errors.New("virtiotest: MSI signalled before it was programmed")
	}
	m.h.mu.Lock()
	if m.h.msgs == nil {
		m.h.msgs = map[uint64]uint64{}
	}
	m.h.msgs[m.key]++
	f := m.h.OnMessage
	m.h.mu.Unlock()
	if f != nil {
		f()
	}
	return nil
}

func (m *hostMSI) Close() error {
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	m.h.open--
	return nil
}

// BindDoorbell implements pci.Host.
func (h *PCIHost) BindDoorbell(addr uint64, ev *virtio.Event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.NoDoorbells {
		return errors.New("virtiotest: no doorbells here")
	}
	if h.doorbells == nil {
		h.doorbells = map[uint64]*virtio.Event{}
	}
	if h.doorbells[addr] != nil {
		return fmt.Errorf("virtiotest: doorbell %#x is bound already", addr)
	}
	h.doorbells[addr] = ev
	return nil
}

// UnbindDoorbell implements pci.Host.
func (h *PCIHost) UnbindDoorbell(addr uint64, ev *virtio.Event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.doorbells[addr] != ev {
		return fmt.Errorf("virtiotest: doorbell %#x is not bound to this event", addr)
	}
	delete(h.doorbells, addr)
	return nil
}

// SetINTx implements pci.Host.
func (h *PCIHost) SetINTx(level bool) {
	h.mu.Lock()
	h.intx = level
	if level {
		h.intxEdges++
	}
	f := h.OnINTx
	h.mu.Unlock()
	if f != nil {
		f(level)
	}
}

// Messages is the number of messages sent to addr with data.
func (h *PCIHost) Messages(addr uint64, data uint32) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.msgs[addr<<32|uint64(data)]
}

// Doorbells lists the bound doorbell addresses, in no order.
func (h *PCIHost) Doorbells() []uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	var a []uint64
	for addr := range h.doorbells {
		a = append(a, addr)
	}
	return a
}

// INTx is the level of the legacy line.
func (h *PCIHost) INTx() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.intx
}

// OpenMSIs is the number of MSIs not closed yet.
func (h *PCIHost) OpenMSIs() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.open
}

// PCI is a driver on a pci.Function: it has placed the BAR, found the
// capabilities and enabled MSI-X with one vector per interrupt source.
type PCI struct {
	F    *pci.Function
	Host *PCIHost
	Base uint64 // where the BAR is

	// Offsets in the BAR of the structures, and of the MSI-X table.
	Common, ISR, Device, NotifyBase, Table, PBA uint64
	// Caps are the configuration space offsets of the virtio capabilities by
	// type, and of MSI-X at 0.
	Caps       map[byte]uint16
	multiplier uint32
	vectors    int
	bells      map[int]uint64 // doorbells of enabled queues
}

var _ Transport = (*PCI)(nil)

// msiAddr is the message address of vector i, whose data is i as well.
func msiAddr(i int) uint64 { return 0xfee00000 + uint64(i)<<12 }

// NewPCI plugs dev into a new machine with g's memory and brings the
// function up to where a virtio driver takes over.
func NewPCI(dev virtio.Device, g *Guest, o pci.Options) (*PCI, error) {
	h := &PCIHost{}
	f, err := pci.New(dev, g.Memory, h, o)
	if err != nil {
		return nil, err
	}
	t := &PCI{F: f, Host: h, Base: 0xc0000000}
	t.BringUp()
	return t, nil
}

// Cfg reads n bytes of the configuration space.
func (t *PCI) Cfg(off uint16, n int) uint32 {
	var b [4]byte
	t.F.ReadConfig(off, b[:n])
	return binary.LittleEndian.Uint32(b[:])
}

// SetCfg writes n bytes of the configuration space.
func (t *PCI) SetCfg(off uint16, n int, v uint32) {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	t.F.WriteConfig(off, b[:n])
}

// Mem reads n bytes at an offset in the BAR.
func (t *PCI) Mem(off uint64, n int) uint64 {
	var b [8]byte
	if !t.F.ReadMem(t.Base+off, b[:n]) {
		return ^uint64(0)
	}
	return binary.LittleEndian.Uint64(b[:])
}

// SetMem writes n bytes at an offset in the BAR: to a doorbell, if one is
// bound there, as the machine would.
func (t *PCI) SetMem(off uint64, n int, v uint64) {
	t.Host.mu.Lock()
	ev := t.Host.doorbells[t.Base+off]
	t.Host.mu.Unlock()
	if ev != nil {
		ev.Signal()
		return
	}
	t.writeMem(off, n, v)
}

// writeMem is a function of its own because its buffer is allocated.
func (t *PCI) writeMem(off uint64, n int, v uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	t.F.WriteMem(t.Base+off, b[:n])
}

// BringUp places the BAR, walks the capabilities and enables MSI-X.
func (t *PCI) BringUp() {
	t.SetCfg(0x10, 4, uint32(t.Base))
	t.SetCfg(0x14, 4, uint32(t.Base>>32))
	t.SetCfg(0x04, 2, 1<<1|1<<2)
	t.Caps, t.bells = map[byte]uint16{}, map[int]uint64{}
	for at := uint16(t.Cfg(0x34, 1)); at != 0 && len(t.Caps) < 48; at = uint16(t.Cfg(at+1, 1)) {
		switch t.Cfg(at, 1) {
		case 0x11:
			t.Caps[0] = at
			t.vectors = int(t.Cfg(at+2, 2)&0x7ff) + 1
			t.Table, t.PBA = uint64(t.Cfg(at+4, 4)&^7), uint64(t.Cfg(at+8, 4)&^7)
		case 0x09:
			typ := byte(t.Cfg(at+3, 1))
			t.Caps[typ] = at
			off := uint64(t.Cfg(at+8, 4))
			switch typ {
			case 1:
				t.Common = off
			case 2:
				t.NotifyBase, t.multiplier = off, t.Cfg(at+16, 4)
			case 3:
				t.ISR = off
			case 4:
				t.Device = off
			}
		}
	}
	for i := range t.vectors {
		e := t.Table + 16*uint64(i)
		t.SetMem(e, 4, msiAddr(i))
		t.SetMem(e+4, 4, 0)
		t.SetMem(e+8, 4, uint64(i))
		t.SetMem(e+12, 4, 0)
	}
	t.SetCfg(t.Caps[0]+2, 2, 1<<15)
}

func (t *PCI) sel(i int) { t.SetMem(t.Common+22, 2, uint64(i)) }

// DeviceID implements Transport.
func (t *PCI) DeviceID() uint32 { return t.Cfg(2, 2) - 0x1040 }

// Status implements Transport.
func (t *PCI) Status() uint8 { return uint8(t.Mem(t.Common+20, 1)) }

// SetStatus implements Transport. Before DRIVER_OK it assigns vector 0 to
// configuration changes.
func (t *PCI) SetStatus(v uint8) {
	if v&virtio.StatusDriverOK != 0 {
		t.SetMem(t.Common+16, 2, 0)
	}
	t.SetMem(t.Common+20, 1, uint64(v))
}

// DeviceFeatures implements Transport.
func (t *PCI) DeviceFeatures(sel uint32) uint32 {
	t.SetMem(t.Common, 4, uint64(sel))
	return uint32(t.Mem(t.Common+4, 4))
}

// DriverFeatures implements Transport.
func (t *PCI) DriverFeatures(sel uint32) uint32 {
	t.SetMem(t.Common+8, 4, uint64(sel))
	return uint32(t.Mem(t.Common+12, 4))
}

// SetDriverFeatures implements Transport.
func (t *PCI) SetDriverFeatures(sel, v uint32) {
	t.SetMem(t.Common+8, 4, uint64(sel))
	t.SetMem(t.Common+12, 4, uint64(v))
}

// Generation implements Transport.
func (t *PCI) Generation() uint32 { return uint32(t.Mem(t.Common+21, 1)) }

// ReadConfig implements Transport.
func (t *PCI) ReadConfig(off uint32, p []byte) { t.F.ReadMem(t.Base+t.Device+uint64(off), p) }

// WriteConfig implements Transport.
func (t *PCI) WriteConfig(off uint32, p []byte) { t.F.WriteMem(t.Base+t.Device+uint64(off), p) }

// QueueMax implements Transport.
func (t *PCI) QueueMax(i int) uint16 {
	t.sel(i)
	return uint16(t.Mem(t.Common+24, 2))
}

// SetQueue implements Transport.
func (t *PCI) SetQueue(i int, size uint16, desc, driver, device uint64) {
	t.sel(i)
	t.SetMem(t.Common+24, 2, uint64(size))
	for j, a := range []uint64{desc, driver, device} {
		t.SetMem(t.Common+32+8*uint64(j), 4, a&0xffffffff)
		t.SetMem(t.Common+36+8*uint64(j), 4, a>>32)
	}
}

// EnableQueue implements Transport. It assigns vector i+1 to queue i.
func (t *PCI) EnableQueue(i int) {
	t.sel(i)
	t.SetMem(t.Common+26, 2, uint64(i+1))
	t.SetMem(t.Common+28, 2, 1)
	t.bells[i] = t.Doorbell(i)
}

// QueueEnabled implements Transport.
func (t *PCI) QueueEnabled(i int) bool {
	t.sel(i)
	return t.Mem(t.Common+28, 2) == 1
}

// ResetQueue implements Transport.
func (t *PCI) ResetQueue(i int) {
	t.sel(i)
	t.SetMem(t.Common+58, 2, 1)
}

// QueueResetting implements Transport.
func (t *PCI) QueueResetting(i int) bool {
	t.sel(i)
	return t.Mem(t.Common+58, 2) == 1
}

// Doorbell is the offset in the BAR of queue i's notification address.
func (t *PCI) Doorbell(i int) uint64 {
	t.sel(i)
	return t.NotifyBase + t.Mem(t.Common+30, 2)*uint64(t.multiplier)
}

// Notify implements Transport.
func (t *PCI) Notify(i int) {
	off, ok := t.bells[i]
	if !ok {
		off = t.Doorbell(i)
	}
	t.SetMem(off, 2, uint64(i))
}

// QueueInterrupts implements Transport.
func (t *PCI) QueueInterrupts(i int) uint64 { return t.Host.Messages(msiAddr(i+1), uint32(i+1)) }

// ConfigInterrupts implements Transport.
func (t *PCI) ConfigInterrupts() uint64 { return t.Host.Messages(msiAddr(0), 0) }
