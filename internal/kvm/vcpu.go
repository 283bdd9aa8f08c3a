package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VCPU is a virtual processor. Run and the register methods belong to one
// goroutine locked to its thread; ImmediateExit may be called from any.
type VCPU struct {
	fd  int
	run []byte // the shared struct kvm_run and its data pages
}

// Close releases the vCPU. Nothing may use it any more.
func (v *VCPU) Close() error {
	var err error
	if v.run != nil {
		err = unix.Munmap(v.run)
		v.run = nil
	}
	return errors.Join(err, closeFD(&v.fd))
}

// ErrInterrupted is returned by Run when a signal or ImmediateExit ended it.
var ErrInterrupted = errors.New("vCPU interrupted")

// Run runs the guest until the next exit (KVM_RUN). Any error but
// ErrInterrupted is final.
func (v *VCPU) Run() (Exit, error) {
	switch err := run(v.fd); {
	case err == nil:
		return Exit(v.state().exitReason), nil
	case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		return ExitIntr, ErrInterrupted
	default:
		return ExitUnknown, fmt.Errorf("KVM_RUN: %w", err)
	}
}

// Exit is the reason of a vCPU exit (KVM_EXIT_*).
type Exit uint32

// Exits that this package knows.
const (
	ExitUnknown       Exit = 0
	ExitException     Exit = 1
	ExitIO            Exit = 2
	ExitHypercall     Exit = 3
	ExitDebug         Exit = 4
	ExitHLT           Exit = 5
	ExitMMIO          Exit = 6
	ExitIRQWindow     Exit = 7
	ExitShutdown      Exit = 8
	ExitFailEntry     Exit = 9
	ExitIntr          Exit = 10
	ExitNMI           Exit = 16
	ExitInternalError Exit = 17
	ExitSystemEvent   Exit = 24
	ExitIOAPICEOI     Exit = 26
	ExitHyperV        Exit = 27
	ExitRDMSR         Exit = 29
	ExitWRMSR         Exit = 30
)

func (e Exit) String() string {
	switch e {
	case ExitUnknown:
		return "unknown"
	case ExitException:
		return "exception"
	case ExitIO:
		return "io"
	case ExitHypercall:
		return "hypercall"
	case ExitDebug:
		return "debug"
	case ExitHLT:
		return "hlt"
	case ExitMMIO:
		return "mmio"
	case ExitIRQWindow:
		return "irq-window"
	case ExitShutdown:
		return "shutdown"
	case ExitFailEntry:
		return "fail-entry"
	case ExitIntr:
		return "intr"
	case ExitNMI:
		return "nmi"
	case ExitInternalError:
		return "internal-error"
	case ExitSystemEvent:
		return "system-event"
	case ExitIOAPICEOI:
		return "ioapic-eoi"
	}
	return fmt.Sprintf("exit-%d", uint32(e))
}

const runUnion = 32 // offset of the exit data in struct kvm_run

// IO describes an ExitIO: count accesses of size bytes each at port. Data is
// the shared buffer of count*size bytes: what the guest writes, or where to
// put what it reads. It is valid until the next Run.
type IO struct {
	Out   bool
	Size  int
	Port  uint16
	Count int
	Data  []byte
}

// IO decodes an ExitIO.
func (v *VCPU) IO() IO {
	u := v.run[runUnion:]
	io := IO{
		Out:   u[0] == 1,
		Size:  int(u[1]),
		Port:  binary.LittleEndian.Uint16(u[2:]),
		Count: int(binary.LittleEndian.Uint32(u[4:])),
	}
	off := binary.LittleEndian.Uint64(u[8:])
	n := uint64(io.Size) * uint64(io.Count)
	if off <= uint64(len(v.run)) && n <= uint64(len(v.run))-off {
		io.Data = v.run[off : off+n]
	} else {
		io.Count = 0 // cannot happen with a kernel that keeps its contract
	}
	return io
}

// MMIO describes an ExitMMIO. Data (1 to 8 bytes) is what the guest writes or
// where to put what it reads. It is valid until the next Run.
type MMIO struct {
	Write bool
	Addr  uint64
	Data  []byte
}

// MMIO decodes an ExitMMIO.
func (v *VCPU) MMIO() MMIO {
	u := v.run[runUnion:]
	n := min(binary.LittleEndian.Uint32(u[16:]), 8)
	return MMIO{Write: u[20] != 0, Addr: binary.LittleEndian.Uint64(u), Data: u[8 : 8+n]}
}

// FailEntry decodes an ExitFailEntry: the hardware's reason.
func (v *VCPU) FailEntry() uint64 { return binary.LittleEndian.Uint64(v.run[runUnion:]) }

// InternalError describes an ExitInternalError.
type InternalError struct {
	Suberror uint32 // InternalEmulation…
	Data     []uint64
	Insn     []byte // the instruction KVM could not emulate, if it told
}

// InternalEmulation is the suberror of an instruction that KVM had to emulate
// and cannot.
const InternalEmulation = 1

// InternalError decodes an ExitInternalError.
func (v *VCPU) InternalError() InternalError {
	u := v.run[runUnion:]
	e := InternalError{Suberror: binary.LittleEndian.Uint32(u)}
	n := min(binary.LittleEndian.Uint32(u[4:]), 16)
	for i := range n {
		e.Data = append(e.Data, binary.LittleEndian.Uint64(u[8+8*i:]))
	}
	// struct emulation_failure: flags u64, insn_size u8, insn_bytes[15].
	if e.Suberror == InternalEmulation && n >= 3 && e.Data[0]&1 != 0 {
		e.Insn = append(e.Insn, u[17:17+min(int(u[16]), 15)]...)
	}
	return e
}

// SystemEvent decodes an ExitSystemEvent: its type (1 shutdown, 2 reset,
// 3 crash).
func (v *VCPU) SystemEvent() uint32 { return binary.LittleEndian.Uint32(v.run[runUnion:]) }

// Regs reads the general registers.
func (v *VCPU) Regs() (*Regs, error) {
	r := new(Regs)
	return r, wrap("KVM_GET_REGS", ioctlPtr(v.fd, ior[Regs](nrGetRegs), r))
}

// SetRegs writes the general registers.
func (v *VCPU) SetRegs(r *Regs) error {
	return wrap("KVM_SET_REGS", ioctlPtr(v.fd, iow[Regs](nrSetRegs), r))
}

// Sregs reads the segment, control and descriptor table registers.
func (v *VCPU) Sregs() (*Sregs, error) {
	s := new(Sregs)
	return s, wrap("KVM_GET_SREGS", ioctlPtr(v.fd, ior[Sregs](nrGetSregs), s))
}

// SetSregs writes the segment, control and descriptor table registers.
func (v *VCPU) SetSregs(s *Sregs) error {
	return wrap("KVM_SET_SREGS", ioctlPtr(v.fd, iow[Sregs](nrSetSregs), s))
}

// Translate is the guest-physical address of a guest-virtual one; false if it
// is not mapped.
func (v *VCPU) Translate(virtual uint64) (uint64, bool) {
	t := gokvm.Translation{LinearAddress: virtual}
	err := ioctlPtr(v.fd, iowr[gokvm.Translation](nrTranslate), &t)
	return t.PhysicalAddress, err == nil && t.Valid != 0
}

// FPU reads the x87 and SSE registers.
func (v *VCPU) FPU() (*FPU, error) {
	f := new(FPU)
	return f, wrap("KVM_GET_FPU", ioctlPtr(v.fd, ior[FPU](nrGetFPU), f))
}

// SetFPU writes the x87 and SSE registers.
func (v *VCPU) SetFPU(f *FPU) error {
	return wrap("KVM_SET_FPU", ioctlPtr(v.fd, iow[FPU](nrSetFPU), f))
}

// LAPIC reads the local APIC's registers.
func (v *VCPU) LAPIC() (*LAPIC, error) {
	l := new(LAPIC)
	return l, wrap("KVM_GET_LAPIC", ioctlPtr(v.fd, ior[LAPIC](nrGetLAPIC), l))
}

// SetLAPIC writes the local APIC's registers.
func (v *VCPU) SetLAPIC(l *LAPIC) error {
	return wrap("KVM_SET_LAPIC", ioctlPtr(v.fd, iow[LAPIC](nrSetLAPIC), l))
}

// MPState reads the multiprocessing state.
func (v *VCPU) MPState() (uint32, error) {
	var s gokvm.MPState
	err := ioctlPtr(v.fd, ior[gokvm.MPState](nrGetMPState), &s)
	return s.State, wrap("KVM_GET_MP_STATE", err)
}

// SetMPState writes the multiprocessing state.
func (v *VCPU) SetMPState(state uint32) error {
	return wrap("KVM_SET_MP_STATE", ioctlPtr(v.fd, iow[gokvm.MPState](nrSetMPState), &gokvm.MPState{State: state}))
}

// Events reads pending exceptions and interrupts.
func (v *VCPU) Events() (*Events, error) {
	e := new(Events)
	return e, wrap("KVM_GET_VCPU_EVENTS", ioctlPtr(v.fd, ior[Events](nrGetEvents), e))
}

// SetEvents writes pending exceptions and interrupts.
func (v *VCPU) SetEvents(e *Events) error {
	return wrap("KVM_SET_VCPU_EVENTS", ioctlPtr(v.fd, iow[Events](nrSetEvents), e))
}

// SetCPUID sets what the CPUID instruction tells the guest (KVM_SET_CPUID2).
func (v *VCPU) SetCPUID(entries []CPUIDEntry) error {
	if len(entries) > maxCPUIDEntries {
		return fmt.Errorf("KVM_SET_CPUID2: %d entries, at most %d", len(entries), maxCPUIDEntries)
	}
	t := &cpuidTable{nent: uint32(len(entries))}
	copy(t.entries[:], entries)
	return wrap("KVM_SET_CPUID2", ioctlPtr(v.fd, gokvm.IIOW(nrSetCPUID2, 8), t))
}

// SetMSRs writes model-specific registers in order. KVM stops at the first it
// refuses; the error names it.
func (v *VCPU) SetMSRs(msrs []MSREntry) error {
	for part := range slices.Chunk(msrs, maxMSRs) {
		t := &msrTable{nmsrs: uint32(len(part))}
		copy(t.entries[:], part)
		n, err := ioctlCount(v.fd, gokvm.IIOW(nrSetMSRs, 8), t)
		if err == nil && n < len(part) {
			err = fmt.Errorf("register %#x refused", part[n].Index)
		}
		if err != nil {
			return wrap("KVM_SET_MSRS", err)
		}
	}
	return nil
}

// MSRs reads the Data of the model-specific registers named by Index.
func (v *VCPU) MSRs(msrs []MSREntry) error {
	for part := range slices.Chunk(msrs, maxMSRs) {
		t := &msrTable{nmsrs: uint32(len(part))}
		copy(t.entries[:], part)
		n, err := ioctlCount(v.fd, gokvm.IIOWR(nrGetMSRs, 8), t)
		if err == nil && n < len(part) {
			err = fmt.Errorf("register %#x refused", part[n].Index)
		}
		if err != nil {
			return wrap("KVM_GET_MSRS", err)
		}
		copy(part, t.entries[:])
	}
	return nil
}

// TSCKHz is the guest's time stamp counter frequency in kHz.
func (v *VCPU) TSCKHz() (uint32, error) {
	n, err := ioctlInt(v.fd, kvmGetTSCKHz, 0)
	return uint32(n), wrap("KVM_GET_TSC_KHZ", err)
}

// SetTSCKHz sets the guest's time stamp counter frequency in kHz.
func (v *VCPU) SetTSCKHz(khz uint32) error {
	_, err := ioctlInt(v.fd, kvmSetTSCKHz, uintptr(khz))
	return wrap("KVM_SET_TSC_KHZ", err)
}

// KVMClockPaused tells a guest that uses kvmclock that it was paused, so that
// its watchdogs do not take offence. A guest without kvmclock is no error.
func (v *VCPU) KVMClockPaused() error {
	if _, err := ioctlInt(v.fd, kvmKVMClockCtrl, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return wrap("KVM_KVMCLOCK_CTRL", err)
	}
	return nil
}
