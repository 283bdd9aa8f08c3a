package kvm

import (
	"fmt"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VM is a virtual machine. Its methods are safe for concurrent use, except
// Close.
type VM struct {
	fd       int
	mmapSize int
}

// Close releases the machine's descriptor. KVM keeps the machine until its
// vCPUs are closed too.
func (m *VM) Close() error { return closeFD(&m.fd) }

// SetTSSAddr reserves three pages for KVM below 4 GiB (KVM_SET_TSS_ADDR).
func (m *VM) SetTSSAddr(addr uint64) error {
	_, err := ioctlInt(m.fd, kvmSetTSSAddr, uintptr(addr))
	return wrap("KVM_SET_TSS_ADDR", err)
}

// SetIdentityMapAddr reserves a page for KVM (KVM_SET_IDENTITY_MAP_ADDR).
func (m *VM) SetIdentityMapAddr(addr uint64) error {
	return wrap("KVM_SET_IDENTITY_MAP_ADDR", ioctlPtr(m.fd, iow[uint64](nrSetIdentityMapAddr), &addr))
}

// CreateIRQChip makes the two PICs, the IOAPIC and, in vCPUs created later,
// the local APIC.
func (m *VM) CreateIRQChip() error {
	_, err := ioctlInt(m.fd, kvmCreateIRQChip, 0)
	return wrap("KVM_CREATE_IRQCHIP", err)
}

// CreatePIT makes the 8254 timer, with the speaker port 0x61 that its
// channel 2 is read through.
func (m *VM) CreatePIT() error {
	const speakerDummy = 1
	return wrap("KVM_CREATE_PIT2", ioctlPtr(m.fd, iow[pitConfig](nrCreatePIT2), &pitConfig{flags: speakerDummy}))
}

// SetMemory makes mem guest RAM at guestPhys in the given slot. mem must be a
// mapping (not Go memory), page-aligned, and outlive the slot. Empty mem
// deletes the slot.
func (m *VM) SetMemory(slot int, guestPhys uint64, mem []byte) error {
	r := userMemoryRegion{slot: uint32(slot), guestPhys: guestPhys, size: uint64(len(mem))}
	if len(mem) > 0 {
		r.va = addressOf(mem)
	}
	return wrap("KVM_SET_USER_MEMORY_REGION", ioctlPtr(m.fd, iow[userMemoryRegion](nrSetUserMemoryRegion), &r))
}

// IRQLine sets the level of a GSI (KVM_IRQ_LINE).
func (m *VM) IRQLine(gsi uint32, level bool) error {
	l := irqLevel{irq: gsi}
	if level {
		l.level = 1
	}
	return wrap("KVM_IRQ_LINE", ioctlPtr(m.fd, iow[irqLevel](nrIRQLine), &l))
}

// SignalMSI delivers one message-signalled interrupt (KVM_SIGNAL_MSI).
func (m *VM) SignalMSI(addr uint64, data uint32) error {
	s := msi{addrLo: uint32(addr), addrHi: uint32(addr >> 32), data: data}
	return wrap("KVM_SIGNAL_MSI", ioctlPtr(m.fd, iow[msi](nrSignalMSI), &s))
}

// SetGSIRouting replaces the whole routing table (KVM_SET_GSI_ROUTING).
func (m *VM) SetGSIRouting(routes []Route) error {
	if len(routes) > MaxRoutes {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: %d routes, the kernel takes %d", len(routes), MaxRoutes)
	}
	// struct kvm_irq_routing: a count, flags, and entries of six words.
	t := make([]uint64, 1+routeWords*len(routes))
	t[0] = uint64(len(routes))
	for i, r := range routes {
		e := t[1+routeWords*i:]
		e[0] = uint64(r.GSI) | uint64(r.Type)<<32
		switch r.Type {
		case RouteChip:
			e[2] = uint64(r.Chip) | uint64(r.Pin)<<32
		case RouteMSI:
			e[2], e[3] = r.Addr, uint64(r.Data)
		}
	}
	return wrap("KVM_SET_GSI_ROUTING", ioctlPtr(m.fd, gokvm.IIOW(nrSetGSIRouting, 8), &t[0]))
}

// AssignIRQFD makes a signal of eventfd raise gsi without leaving the kernel;
// DeassignIRQFD undoes it (KVM_IRQFD).
func (m *VM) AssignIRQFD(eventfd int, gsi uint32) error {
	return wrap("KVM_IRQFD", ioctlPtr(m.fd, iow[irqfd](nrIRQFD), &irqfd{fd: uint32(eventfd), gsi: gsi}))
}

// DeassignIRQFD separates eventfd from gsi.
func (m *VM) DeassignIRQFD(eventfd int, gsi uint32) error {
	const deassign = 1
	return wrap("KVM_IRQFD (deassign)", ioctlPtr(m.fd, iow[irqfd](nrIRQFD), &irqfd{fd: uint32(eventfd), gsi: gsi, flags: deassign}))
}

// AssignIOEventFD makes a guest write of any width at the guest-physical
// address addr signal eventfd instead of leaving the kernel; DeassignIOEventFD
// undoes it (KVM_IOEVENTFD).
func (m *VM) AssignIOEventFD(eventfd int, addr uint64) error {
	return wrap("KVM_IOEVENTFD", ioctlPtr(m.fd, iow[ioeventfd](nrIOEventFD), &ioeventfd{addr: addr, fd: int32(eventfd)}))
}

// DeassignIOEventFD separates eventfd from addr.
func (m *VM) DeassignIOEventFD(eventfd int, addr uint64) error {
	const deassign = 1 << 2
	return wrap("KVM_IOEVENTFD (deassign)",
		ioctlPtr(m.fd, iow[ioeventfd](nrIOEventFD), &ioeventfd{addr: addr, fd: int32(eventfd), flags: deassign}))
}

// AssignIOEventFDMatch makes a 32-bit guest write of value at the
// guest-physical address addr signal eventfd instead of leaving the kernel, so
// that one register can have an eventfd for each value;
// DeassignIOEventFDMatch undoes it (KVM_IOEVENTFD_FLAG_DATAMATCH).
func (m *VM) AssignIOEventFDMatch(eventfd int, addr uint64, value uint32) error {
	return m.ioEventFDMatch("KVM_IOEVENTFD", eventfd, addr, value, 0)
}

// DeassignIOEventFDMatch separates eventfd from value at addr.
func (m *VM) DeassignIOEventFDMatch(eventfd int, addr uint64, value uint32) error {
	const deassign = 1 << 2
	return m.ioEventFDMatch("KVM_IOEVENTFD (deassign)", eventfd, addr, value, deassign)
}

func (m *VM) ioEventFDMatch(name string, eventfd int, addr uint64, value, flags uint32) error {
	const datamatch = 1 << 0
	return wrap(name, ioctlPtr(m.fd, iow[ioeventfd](nrIOEventFD),
		&ioeventfd{datamatch: uint64(value), addr: addr, length: 4, fd: int32(eventfd), flags: datamatch | flags}))
}

// Clock is the guest's kvmclock in nanoseconds (KVM_GET_CLOCK); SetClock puts
// it back, so that time does not pass while a machine is paused.
func (m *VM) Clock() (uint64, error) {
	var c gokvm.ClockData
	err := ioctlPtr(m.fd, ior[gokvm.ClockData](nrGetClock), &c)
	return c.Clock, wrap("KVM_GET_CLOCK", err)
}

// SetClock sets the guest's kvmclock in nanoseconds.
func (m *VM) SetClock(ns uint64) error {
	return wrap("KVM_SET_CLOCK", ioctlPtr(m.fd, iow[gokvm.ClockData](nrSetClock), &gokvm.ClockData{Clock: ns}))
}

// CreateVCPU makes virtual processor id (its initial APIC id).
func (m *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, err := ioctlInt(m.fd, kvmCreateVCPU, uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("KVM_CREATE_VCPU %d: %w", id, err)
	}
	v := &VCPU{fd: int(fd)}
	unix.CloseOnExec(v.fd)
	v.run, err = unix.Mmap(v.fd, 0, m.mmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		v.Close()
		return nil, fmt.Errorf("map vCPU %d: %w", id, err)
	}
	return v, nil
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
