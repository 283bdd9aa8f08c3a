package vmm

import (
	"errors"
	"fmt"
	"slices"

	"github.com/moovm/moovm/internal/kvm"
)

// vcpuState is everything about a processor that its guest could notice: plain
// data. The exported fields are what a snapshot's file has.
type vcpuState struct {
	MPState   uint32
	Regs      kvm.Regs
	Sregs     kvm.Sregs
	XSave     []byte    `json:",omitempty"` // as long as System.XSaveSize says
	FPU       *kvm.FPU  `json:",omitempty"` // on hosts without XSAVE
	XCRs      *kvm.XCRs `json:",omitempty"`
	DebugRegs kvm.DebugRegs
	LAPIC     kvm.LAPIC
	TSCKHz    uint32
	TSC       uint64  // the counter when the state was taken
	TSCOffset *uint64 `json:",omitempty"` // nil on hosts before Linux 5.16
	CPUID     []kvm.CPUIDEntry
	MSRs      []kvm.MSREntry
	Events    kvm.Events
}

// Registers with a place of their own in the order of things
// (arch/x86/include/asm/msr-index.h).
const (
	msrTSC         = 0x10
	msrMCGCtl      = 0x17b
	msrTSCDeadline = 0x6e0
)

// featureState is what a host can tell about its vCPUs' state; it is the same
// for all vCPUs of a machine.
type featureState struct {
	xsave int // bytes, 0 without
	xcrs  bool
	msrs  []uint32 // without the TSC
}

// stateFeatures asks the host. v is a vCPU whose CPUID is set.
func stateFeatures(sys *kvm.System, v *kvm.VCPU) (featureState, error) {
	f := featureState{xsave: sys.XSaveSize(), xcrs: sys.CheckExtension(kvm.CapXCRs) > 0}
	list, err := sys.MSRIndexes()
	if err != nil {
		return f, err
	}
	list = slices.DeleteFunc(list, func(i uint32) bool { return i == msrMCGCtl || i == msrTSC })
	f.msrs = v.ReadableMSRs(list)
	return f, nil
}

// state reads the processor's state while no vCPU of the machine runs. The
// order is KVM's: MP_STATE first, as reading it carries out a pending INIT or
// SIPI; the events last.
func (c *vcpu) state(f featureState) (s vcpuState, err error) {
	v := c.v
	fail := func(err error) (vcpuState, error) { return s, fmt.Errorf("state of CPU %d: %w", c.id, err) }
	if s.MPState, err = v.MPState(); err != nil {
		return fail(err)
	}
	regs, err := v.Regs()
	if err != nil {
		return fail(err)
	}
	sregs, err := v.Sregs()
	if err != nil {
		return fail(err)
	}
	s.Regs, s.Sregs = *regs, *sregs
	if f.xsave > 0 {
		s.XSave = make([]byte, f.xsave)
		err = v.XSave(s.XSave)
	} else {
		s.FPU, err = v.FPU()
	}
	if err != nil {
		return fail(err)
	}
	if f.xcrs {
		if s.XCRs, err = v.XCRs(); err != nil {
			return fail(err)
		}
	}
	debug, err := v.DebugRegs()
	if err != nil {
		return fail(err)
	}
	lapic, err := v.LAPIC()
	if err != nil {
		return fail(err)
	}
	s.DebugRegs, s.LAPIC = *debug, *lapic
	s.CPUID = c.cpuid
	if err := c.timeState(&s); err != nil {
		return fail(err)
	}
	s.MSRs = make([]kvm.MSREntry, len(f.msrs))
	for i, x := range f.msrs {
		s.MSRs[i].Index = x
	}
	if err := v.MSRs(s.MSRs); err != nil {
		return fail(err)
	}
	events, err := v.Events()
	if err != nil {
		return fail(err)
	}
	s.Events = *events
	return s, nil
}

// timeState reads the time stamp counter, its frequency and its offset.
func (c *vcpu) timeState(s *vcpuState) (err error) {
	if s.TSCKHz, err = c.v.TSCKHz(); err != nil {
		s.TSCKHz = 0 // unknown
	}
	off, err := c.v.TSCOffset()
	switch {
	case err == nil:
		s.TSCOffset = &off
	case !errors.Is(err, kvm.ErrNoAttr):
		return err
	}
	s.TSC, err = c.tsc()
	return err
}

// tsc reads the guest's time stamp counter.
func (c *vcpu) tsc() (uint64, error) {
	m := []kvm.MSREntry{{Index: msrTSC}}
	err := c.v.MSRs(m)
	return m[0].Data, err
}

// setState puts a state into a processor whose CPUID is set, in the order that
// KVM needs. offset is the machine's TSC offset, nil where the host has none.
func (c *vcpu) setState(s *vcpuState, f featureState, offset *uint64) error {
	v := c.v
	fail := func(err error) error { return fmt.Errorf("restore CPU %d: %w", c.id, err) }
	for _, step := range []func() error{
		func() error { return v.SetMPState(s.MPState) },
		func() error { return v.SetRegs(&s.Regs) },
		func() error { return v.SetSregs(&s.Sregs) },
		func() error { return c.setExtended(s, f) },
		func() error { return v.SetDebugRegs(&s.DebugRegs) },
		func() error { return c.setTime(s, offset) },
		func() error { return v.SetLAPIC(&s.LAPIC) },
		func() error { return v.SetMSRs(s.msrsInOrder()) },
		func() error { return v.SetEvents(&s.Events) },
		v.KVMClockPaused,
	} {
		if err := step(); err != nil {
			return fail(err)
		}
	}
	return nil
}

func (c *vcpu) setExtended(s *vcpuState, f featureState) error {
	switch {
	case len(s.XSave) != f.xsave:
		return fmt.Errorf("%w: its extended state has %d bytes, this host's KVM has %d", ErrSnapshotHost, len(s.XSave), f.xsave)
	case f.xsave > 0:
		if err := c.v.SetXSave(s.XSave); err != nil {
			return err
		}
	case s.FPU == nil:
		return fmt.Errorf("%w: it has no floating point state", ErrSnapshotDamaged)
	default:
		if err := c.v.SetFPU(s.FPU); err != nil {
			return err
		}
	}
	if s.XCRs == nil {
		return nil
	}
	return c.v.SetXCRs(s.XCRs)
}

// setTime continues the guest's time stamp counter. Writing the register
// itself would make KVM guess whether it should equal that of other vCPUs.
func (c *vcpu) setTime(s *vcpuState, offset *uint64) error {
	if s.TSCKHz != 0 {
		if have, err := c.v.TSCKHz(); err == nil && have != s.TSCKHz {
			if err := c.v.SetTSCKHz(s.TSCKHz); err != nil {
				return fmt.Errorf("%w: its time stamp counter runs at %d kHz, this host's at %d and cannot be scaled", ErrSnapshotHost, s.TSCKHz, have)
			}
		}
	}
	if offset == nil {
		return c.v.SetMSRs([]kvm.MSREntry{{Index: msrTSC, Data: s.TSC}})
	}
	return c.v.SetTSCOffset(*offset)
}

// msrsInOrder are the registers with the deadline timer last, as it counts in
// what the others set. A deadline of 0 may mean that the timer has just fired
// and its interrupt is still to come: it fires again, at once.
func (s *vcpuState) msrsInOrder() []kvm.MSREntry {
	out := make([]kvm.MSREntry, 0, len(s.MSRs))
	var last []kvm.MSREntry
	for _, m := range s.MSRs {
		if m.Index != msrTSCDeadline {
			out = append(out, m)
			continue
		}
		if m.Data == 0 {
			m.Data = s.TSC
		}
		last = append(last, m)
	}
	return append(out, last...)
}
