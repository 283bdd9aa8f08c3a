package vmm

import (
	"errors"
	"fmt"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
)

// Transport is how virtio devices are attached to a machine.
type Transport int

const (
	// TransportPCI puts every device on the PCI bus, with an MSI-X interrupt
	// for each queue.
	TransportPCI Transport = iota
	// TransportMMIO gives every device a window of registers and one
	// interrupt, announced by ACPI as LNRO0005. The guest needs no PCI, but
	// the driver virtio_mmio.
	TransportMMIO
)

// maxWindows is how many virtio-mmio devices a machine has room for.
const maxWindows = 32

// windowHost is the machine as a virtio-mmio device sees it.
type windowHost interface {
	mmio.Host
	Close() error // after the device's
}

func windowAddr(i int) uint64 { return addrWindows + uint64(i)*mmio.Size }

// windowGSI is the interrupt of window i. These pins belong to PCI's INTx
// otherwise, which a machine with mmio devices has none of. Beyond the eighth
// device they are shared, which does no harm to edges as the driver asks each
// of its devices.
func windowGSI(i int) uint32 { return irqINTx + uint32(i%numINTx) }

// windows is how many virtio-mmio devices the configuration asks for.
func (c *Config) windows() int {
	if c.Transport != TransportMMIO {
		return 0
	}
	return len(c.Devices)
}

// plugWindow puts a virtio device into the next free window.
func (m *Machine) plugWindow(dev virtio.Device) error {
	i := len(m.windows)
	if i == maxWindows {
		return fmt.Errorf("a machine has room for %d virtio-mmio devices", maxWindows)
	}
	host, err := m.window(i)
	if err != nil {
		return err
	}
	d, err := mmio.New(dev, m.ram.mem, host, mmio.Options{Logger: m.log})
	if err != nil {
		return errors.Join(err, host.Close())
	}
	m.windows = append(m.windows, d)
	m.devices = append(m.devices, mmioDevice{d, host})
	return nil
}

// accessWindow serves an access to the windows' addresses; false means that it
// is for somebody else.
func (m *Machine) accessWindow(addr uint64, p []byte, write bool) bool {
	i := (addr - addrWindows) / mmio.Size
	if addr < addrWindows || i >= uint64(len(m.windows)) {
		return false
	}
	if off := addr % mmio.Size; write {
		m.windows[i].Write(off, p)
	} else {
		m.windows[i].Read(off, p)
	}
	return true
}

// irqfdHost is windowHost on KVM: notifications and interrupts are eventfds
// and pass this program by.
type irqfdHost struct {
	m      *Machine
	i      int
	event  *virtio.Event
	closed bool
}

func newIRQFDHost(m *Machine, i int) (windowHost, error) {
	ev, err := virtio.NewEvent()
	if err != nil {
		return nil, err
	}
	if err := m.vm.AssignIRQFD(ev.FD(), windowGSI(i)); err != nil {
		return nil, errors.Join(err, ev.Close())
	}
	return &irqfdHost{m: m, i: i, event: ev}, nil
}

// SetInterrupt implements mmio.Host. The interrupt is an edge: one for every
// new cause is what the driver needs to hear of all.
func (h *irqfdHost) SetInterrupt(level bool) {
	if level {
		h.event.Signal() // fails only when the machine is closed
	}
}

// BindNotify implements mmio.Binder.
func (h *irqfdHost) BindNotify(queue int, ev *virtio.Event) error {
	return h.m.vm.AssignIOEventFDMatch(ev.FD(), windowAddr(h.i)+mmio.QueueNotify, uint32(queue))
}

// UnbindNotify implements mmio.Binder.
func (h *irqfdHost) UnbindNotify(queue int, ev *virtio.Event) error {
	return h.m.vm.DeassignIOEventFDMatch(ev.FD(), windowAddr(h.i)+mmio.QueueNotify, uint32(queue))
}

// Close implements windowHost.
func (h *irqfdHost) Close() error {
	if h.closed {
		return nil
	}
	h.closed = true
	return errors.Join(h.m.vm.DeassignIRQFD(h.event.FD(), windowGSI(h.i)), h.event.Close())
}
