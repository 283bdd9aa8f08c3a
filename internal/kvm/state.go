package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// State that is only carried from one machine to another is kept as the bytes
// of the kernel's structure (arch/x86/include/uapi/asm/kvm.h): plain data of a
// known length that nobody here interprets.
type (
	// IRQChip is struct kvm_irqchip: one of the interrupt controllers
	// ChipPICMaster, ChipPICSlave, ChipIOAPIC.
	IRQChip [520]byte
	// PIT is struct kvm_pit_state2.
	PIT [112]byte
	// XCRs is struct kvm_xcrs.
	XCRs [392]byte
	// DebugRegs is struct kvm_debugregs.
	DebugRegs [128]byte
)

// Requests for state (include/uapi/linux/kvm.h).
const (
	nrGetMSRIndexList = 0x02
	nrGetIRQChip      = 0x62
	nrSetIRQChip      = 0x63
	nrGetPIT2         = 0x9f
	nrSetPIT2         = 0xa0
	nrGetDebugRegs    = 0xa1
	nrSetDebugRegs    = 0xa2
	nrGetXSave        = 0xa4
	nrSetXSave        = 0xa5
	nrGetXCRs         = 0xa6
	nrSetXCRs         = 0xa7
	nrGetXSave2       = 0xcf
	nrSetDeviceAttr   = 0xe1
	nrGetDeviceAttr   = 0xe2
)

// Capabilities of state (KVM_CAP_*).
const (
	CapXSave  Capability = 55
	CapXCRs   Capability = 56
	CapXSave2 Capability = 208
)

// maxXSave bounds an XSAVE area: AMX, the largest known, ends at 11 KiB.
const maxXSave = 64 << 10

const xsaveSize = 4096 // struct kvm_xsave without its flexible part

// MSRIndexes lists the model-specific registers that make up a guest's state
// on this host (KVM_GET_MSR_INDEX_LIST).
func (s *System) MSRIndexes() ([]uint32, error) {
	const limit = 4096
	t := make([]uint32, 1+limit)
	t[0] = limit
	if err := ioctlPtr(s.fd, gokvm.IIOWR(nrGetMSRIndexList, 4), &t[0]); err != nil {
		return nil, fmt.Errorf("KVM_GET_MSR_INDEX_LIST: %w", err)
	}
	return t[1 : 1+min(t[0], limit)], nil
}

// XSaveSize is the length in bytes of a vCPU's XSAVE area: what
// KVM_CAP_XSAVE2 says, 4096 on hosts without it (before Linux 5.17), and 0 on
// hosts whose guests have no such area.
func (s *System) XSaveSize() int {
	if n := s.CheckExtension(CapXSave2); n > 0 {
		return min(max(n, xsaveSize), maxXSave)
	}
	if s.CheckExtension(CapXSave) > 0 {
		return xsaveSize
	}
	return 0
}

// ChipOf is the controller that c was read from.
func ChipOf(c *IRQChip) uint32 { return binary.LittleEndian.Uint32(c[:]) }

// IRQChip reads an interrupt controller (KVM_GET_IRQCHIP).
func (m *VM) IRQChip(id uint32) (*IRQChip, error) {
	c := new(IRQChip)
	c[0] = byte(id)
	return c, wrap("KVM_GET_IRQCHIP", ioctlPtr(m.fd, iowr[IRQChip](nrGetIRQChip), c))
}

// SetIRQChip writes the interrupt controller that c was read from
// (KVM_SET_IRQCHIP).
func (m *VM) SetIRQChip(c *IRQChip) error {
	// The kernel's macro says "read", though the data goes in.
	return wrap("KVM_SET_IRQCHIP", ioctlPtr(m.fd, ior[IRQChip](nrSetIRQChip), c))
}

// PIT reads the 8254 timer (KVM_GET_PIT2).
func (m *VM) PIT() (*PIT, error) {
	p := new(PIT)
	return p, wrap("KVM_GET_PIT2", ioctlPtr(m.fd, ior[PIT](nrGetPIT2), p))
}

// SetPIT writes the 8254 timer (KVM_SET_PIT2).
func (m *VM) SetPIT(p *PIT) error {
	return wrap("KVM_SET_PIT2", ioctlPtr(m.fd, iow[PIT](nrSetPIT2), p))
}

// XSave reads the extended processor state into p, which has
// System.XSaveSize bytes (KVM_GET_XSAVE, KVM_GET_XSAVE2).
func (v *VCPU) XSave(p []byte) error {
	if len(p) < xsaveSize {
		return fmt.Errorf("KVM_GET_XSAVE: %d bytes, at least %d are needed", len(p), xsaveSize)
	}
	nr := uintptr(nrGetXSave)
	if len(p) > xsaveSize {
		nr = nrGetXSave2
	}
	return wrap("KVM_GET_XSAVE", ioctlPtr(v.fd, gokvm.IIOR(nr, xsaveSize), &p[0]))
}

// SetXSave writes the extended processor state. p has the length that this
// host's System.XSaveSize tells.
func (v *VCPU) SetXSave(p []byte) error {
	if len(p) < xsaveSize {
		return fmt.Errorf("KVM_SET_XSAVE: %d bytes, at least %d are needed", len(p), xsaveSize)
	}
	return wrap("KVM_SET_XSAVE", ioctlPtr(v.fd, gokvm.IIOW(nrSetXSave, xsaveSize), &p[0]))
}

// XCRs reads the extended control registers (KVM_GET_XCRS).
func (v *VCPU) XCRs() (*XCRs, error) {
	x := new(XCRs)
	return x, wrap("KVM_GET_XCRS", ioctlPtr(v.fd, ior[XCRs](nrGetXCRs), x))
}

// SetXCRs writes the extended control registers (KVM_SET_XCRS).
func (v *VCPU) SetXCRs(x *XCRs) error {
	return wrap("KVM_SET_XCRS", ioctlPtr(v.fd, iow[XCRs](nrSetXCRs), x))
}

// DebugRegs reads the debug registers (KVM_GET_DEBUGREGS).
func (v *VCPU) DebugRegs() (*DebugRegs, error) {
	d := new(DebugRegs)
	return d, wrap("KVM_GET_DEBUGREGS", ioctlPtr(v.fd, ior[DebugRegs](nrGetDebugRegs), d))
}

// SetDebugRegs writes the debug registers (KVM_SET_DEBUGREGS).
func (v *VCPU) SetDebugRegs(d *DebugRegs) error {
	return wrap("KVM_SET_DEBUGREGS", ioctlPtr(v.fd, iow[DebugRegs](nrSetDebugRegs), d))
}

// ReadableMSRs are those of the registers that KVM lets this vCPU read: the
// list of a host names some that its guests do not have.
func (v *VCPU) ReadableMSRs(indexes []uint32) []uint32 {
	good := make([]uint32, 0, len(indexes))
	for len(indexes) > 0 {
		t := msrsOf(indexes)
		n, err := ioctlCount(v.fd, gokvm.IIOWR(nrGetMSRs, 8), t)
		if err != nil {
			break
		}
		n = min(n, len(indexes))
		good = append(good, indexes[:n]...)
		if n < int(t.nmsrs) {
			n++ // the one that KVM stopped at
		}
		indexes = indexes[n:]
	}
	return good
}

// msrsOf is a table of the first of these registers, as many as fit.
func msrsOf(indexes []uint32) *msrTable {
	t := &msrTable{nmsrs: uint32(min(len(indexes), maxMSRs))}
	for i, x := range indexes[:t.nmsrs] {
		t.entries[i].Index = x
	}
	return t
}

// ErrNoAttr says that this kernel has no such attribute.
var ErrNoAttr = errors.New("no such attribute in this kernel")

// deviceAttr is struct kvm_device_attr.
type deviceAttr struct {
	flags, group uint32
	attr, addr   uint64
}

// vcpuTSCCtrl is KVM_VCPU_TSC_CTRL, whose only attribute KVM_VCPU_TSC_OFFSET
// is 0 (Documentation/virt/kvm/devices/vcpu.rst).
const vcpuTSCCtrl = 0

// TSCOffset is what KVM adds to the host's time stamp counter, scaled to the
// guest's frequency (KVM_VCPU_TSC_OFFSET, Linux 5.16). The error is ErrNoAttr
// on older kernels.
func (v *VCPU) TSCOffset() (uint64, error) {
	var off uint64
	err := attrPtr(v.fd, nrGetDeviceAttr, deviceAttr{group: vcpuTSCCtrl}, &off)
	return off, attrError("KVM_VCPU_TSC_OFFSET", err)
}

// SetTSCOffset sets it. Equal offsets on all vCPUs keep their counters, and
// kvmclock's master clock, together.
func (v *VCPU) SetTSCOffset(off uint64) error {
	return attrError("KVM_VCPU_TSC_OFFSET", attrPtr(v.fd, nrSetDeviceAttr, deviceAttr{group: vcpuTSCCtrl}, &off))
}

func attrError(what string, err error) error {
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%s: %w", what, ErrNoAttr)
	}
	return wrap(what, err)
}
