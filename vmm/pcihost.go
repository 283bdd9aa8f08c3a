package vmm

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/pci"
)

// maxSlots is how many device numbers the bus has; 0 is the host bridge.
const maxSlots = 32

// pciFunction is what the bus needs of a function; *pci.Function has it.
type pciFunction interface {
	ReadConfig(off uint16, p []byte)
	WriteConfig(off uint16, p []byte)
	ReadMem(addr uint64, p []byte) bool
	WriteMem(addr uint64, p []byte) bool
}

// pciBus is PCI bus 0: configuration space by ports 0xcf8/0xcfc and by memory
// (ECAM), and the functions' memory windows.
type pciBus struct {
	mu      sync.Mutex
	address uint32 // port 0xcf8

	slots [maxSlots]pciFunction // set before the machine runs
	next  uint64                // first free address of the memory window
}

func newPCIBus() *pciBus {
	b := &pciBus{next: addrPCIWindow}
	b.slots[0] = &hostBridge{}
	return b
}

// freeSlot is the lowest free device number.
func (b *pciBus) freeSlot() (int, error) {
	for i, f := range b.slots {
		if f == nil {
			return i, nil
		}
	}
	return 0, fmt.Errorf("the PCI bus is full: a machine has room for %d devices", maxSlots-1)
}

// plug places the function's BARs in the memory window, writes the addresses
// into them as firmware would, and enables memory decoding.
func (b *pciBus) plug(slot int, f pciFunction, bars []pci.BAR) error {
	const (
		regCommand    = 0x04
		regBAR        = 0x10
		regLine       = 0x3c
		commandMemory = 1 << 1
		commandMaster = 1 << 2
	)
	// Largest first wastes nothing to alignment.
	bars = slices.Clone(bars)
	slices.SortStableFunc(bars, func(x, y pci.BAR) int { return -compareUint(x.Size, y.Size) })
	for _, bar := range bars {
		size := max(bar.Size, pageSize)
		if bits.OnesCount64(size) != 1 {
			return fmt.Errorf("BAR %d of PCI device %d has size %#x, which is no power of two", bar.Index, slot, bar.Size)
		}
		at := (b.next + size - 1) &^ (size - 1)
		if at+size > addrPCIWindow+sizePCIWindow {
			return fmt.Errorf("PCI device %d does not fit: the PCI memory window is full", slot)
		}
		b.next = at + size
		var v [4]byte
		binary.LittleEndian.PutUint32(v[:], uint32(at))
		f.WriteConfig(uint16(regBAR+4*bar.Index), v[:])
		if bar.Is64 {
			f.WriteConfig(uint16(regBAR+4*bar.Index+4), make([]byte, 4))
		}
	}
	f.WriteConfig(regCommand, []byte{commandMemory | commandMaster, 0})
	f.WriteConfig(regLine, []byte{byte(intxGSI(slot))})
	b.slots[slot] = f
	return nil
}

func compareUint(x, y uint64) int {
	switch {
	case x < y:
		return -1
	case x > y:
		return 1
	}
	return 0
}

// config accesses configuration space: function devfn, byte offset off. An
// access that is not 1, 2 or 4 bytes, naturally aligned, or that finds no
// function reads all ones.
func (b *pciBus) config(devfn uint8, off uint16, p []byte, write bool) {
	f := b.slots[devfn>>3]
	n := len(p)
	if f == nil || devfn&7 != 0 || off > 0xfff || (n != 1 && n != 2 && n != 4) || int(off)%n != 0 {
		if !write {
			fill(p)
		}
		return
	}
	if write {
		f.WriteConfig(off, p)
	} else {
		f.ReadConfig(off, p)
	}
}

// port serves ports 0xcf8 to 0xcff, except 0xcf9 written as a byte.
func (b *pciBus) port(port uint16, p []byte, write bool) {
	if port < portPCIData {
		if port != portPCIAddr || len(p) != 4 { // only whole
			if !write {
				fill(p)
			}
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if write {
			b.address = binary.LittleEndian.Uint32(p) &^ 0x7f00_0003
		} else {
			binary.LittleEndian.PutUint32(p, b.address)
		}
		return
	}
	b.mu.Lock()
	a := b.address
	b.mu.Unlock()
	off := uint16(a&0xfc) + port - portPCIData
	if a>>31 == 0 || a>>16&0xff != 0 || int(port-portPCIData)+len(p) > 4 {
		if !write {
			fill(p)
		}
		return
	}
	b.config(uint8(a>>8), off, p, write)
}

// mem serves an access to guest-physical memory above the hole's start.
func (b *pciBus) mem(addr uint64, p []byte, write bool) {
	if addr >= addrECAM && addr < addrECAM+sizeECAM {
		off := addr - addrECAM
		if len(p) == 8 { // two halves, as a root complex may do
			b.config(uint8(off>>12), uint16(off&0xfff), p[:4], write)
			b.config(uint8(off>>12), uint16(off&0xfff)+4, p[4:], write)
			return
		}
		b.config(uint8(off>>12), uint16(off&0xfff), p, write)
		return
	}
	for _, f := range b.slots {
		if f == nil {
			continue
		}
		if write && f.WriteMem(addr, p) || !write && f.ReadMem(addr, p) {
			return
		}
	}
	if !write {
		fill(p)
	}
}

// fill answers a read that nobody claims.
func fill(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}

// intxGSI is the interrupt line of a device's INTA pin.
func intxGSI(slot int) uint32 { return irqINTx + uint32(slot)%numINTx }

// hostBridge is device 0: an identity and nothing else.
type hostBridge struct{}

func (*hostBridge) ReadConfig(off uint16, p []byte) {
	var c [64]byte
	binary.LittleEndian.PutUint16(c[0:], 0x1b36) // Red Hat
	binary.LittleEndian.PutUint16(c[2:], 0x0008) // generic PCIe host bridge
	c[0x0b], c[0x0a] = 0x06, 0x00                // bridge, host
	for i := range p {
		p[i] = 0
		if int(off)+i < len(c) {
			p[i] = c[int(off)+i]
		}
	}
}

func (*hostBridge) WriteConfig(uint16, []byte)   {}
func (*hostBridge) ReadMem(uint64, []byte) bool  { return false }
func (*hostBridge) WriteMem(uint64, []byte) bool { return false }

// plugFunction puts a virtio device into the next free slot of the bus.
func (m *Machine) plugFunction(dev virtio.Device) error {
	slot, err := m.bus.freeSlot()
	if err != nil {
		return err
	}
	f, err := pci.New(dev, m.ram.mem, m.host(slot), pci.Options{Logger: m.log})
	if err != nil {
		return err
	}
	m.devices = append(m.devices, pciDevice{f})
	return m.bus.plug(slot, f, f.BARs())
}

// slotHost is the machine as one function sees it (pci.Host).
type slotHost struct {
	m    *Machine
	slot int
}

func (h *slotHost) NewMSI() (pci.MSI, error) { return h.m.irq.newMSI() }

func (h *slotHost) BindDoorbell(addr uint64, ev *virtio.Event) error {
	return h.m.vm.AssignIOEventFD(ev.FD(), addr)
}

func (h *slotHost) UnbindDoorbell(addr uint64, ev *virtio.Event) error {
	return h.m.vm.DeassignIOEventFD(ev.FD(), addr)
}

func (h *slotHost) SetINTx(level bool) { h.m.irq.setINTx(h.slot, level) }

// state is the address register; setState puts it back.
func (b *pciBus) state() uint32 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.address
}

func (b *pciBus) setState(address uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.address = address &^ 0x7f00_0003
}
