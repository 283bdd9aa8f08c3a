package kvm

import gokvm "github.com/bobuhiro11/gokvm/kvm"

// Requests are the ioctls that this package makes, KVM_RUN, which is nearly
// all of them, first: a filter of system calls needs no others of KVM's.
func Requests() []uint32 {
	var all []uint32
	for _, r := range []uintptr{
		kvmRun,
		// Interrupts and doorbells.
		iow[irqLevel](nrIRQLine), iow[msi](nrSignalMSI), gokvm.IIOW(nrSetGSIRouting, 8), iow[irqfd](nrIRQFD), iow[ioeventfd](nrIOEventFD),
		// The state of a vCPU.
		ior[Regs](nrGetRegs), iow[Regs](nrSetRegs), ior[Sregs](nrGetSregs), iow[Sregs](nrSetSregs), ior[FPU](nrGetFPU), iow[FPU](nrSetFPU),
		ior[LAPIC](nrGetLAPIC), iow[LAPIC](nrSetLAPIC), ior[gokvm.MPState](nrGetMPState), iow[gokvm.MPState](nrSetMPState),
		ior[Events](nrGetEvents), iow[Events](nrSetEvents), gokvm.IIOWR(nrGetMSRs, 8), gokvm.IIOW(nrSetMSRs, 8), gokvm.IIOW(nrSetCPUID2, 8),
		gokvm.IIOR(nrGetXSave, xsaveSize), gokvm.IIOR(nrGetXSave2, xsaveSize), gokvm.IIOW(nrSetXSave, xsaveSize),
		ior[XCRs](nrGetXCRs), iow[XCRs](nrSetXCRs), ior[DebugRegs](nrGetDebugRegs), iow[DebugRegs](nrSetDebugRegs),
		kvmGetTSCKHz, kvmSetTSCKHz, kvmKVMClockCtrl, iow[deviceAttr](nrGetDeviceAttr), iow[deviceAttr](nrSetDeviceAttr),
		iowr[gokvm.Translation](nrTranslate),
		// The state of a machine's chips and clock, and its memory.
		iowr[IRQChip](nrGetIRQChip), ior[IRQChip](nrSetIRQChip), ior[PIT](nrGetPIT2), iow[PIT](nrSetPIT2),
		ior[gokvm.ClockData](nrGetClock), iow[gokvm.ClockData](nrSetClock), iow[userMemoryRegion](nrSetUserMemoryRegion),
		// The making of machines: of forks.
		kvmGetAPIVersion, kvmGetVCPUMmapSize, kvmCheckExtension, gokvm.IIOWR(nrGetMSRIndexList, 4), gokvm.IIOWR(nrGetSupportedCPUID, 8),
		kvmCreateVM, kvmCreateVCPU, kvmCreateIRQChip, iow[pitConfig](nrCreatePIT2), kvmSetTSSAddr, iow[uint64](nrSetIdentityMapAddr),
	} {
		all = append(all, uint32(r))
	}
	return all
}
