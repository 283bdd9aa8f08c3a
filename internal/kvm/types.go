package kvm

import gokvm "github.com/bobuhiro11/gokvm/kvm"

// Structures that gokvm declares as the kernel does.
type (
	Regs       = gokvm.Regs
	Sregs      = gokvm.Sregs
	Segment    = gokvm.Segment
	Descriptor = gokvm.Descriptor
	CPUIDEntry = gokvm.CPUIDEntry2
	MSREntry   = gokvm.MSREntry
	LAPIC      = gokvm.LAPICState
	Events     = gokvm.VCPUEvents
	Capability = gokvm.Capability
)

// Request numbers (include/uapi/linux/kvm.h).
const (
	nrSetUserMemoryRegion = 0x46
	nrSetIdentityMapAddr  = 0x48
	nrIRQLine             = 0x61
	nrSetGSIRouting       = 0x6a
	nrIRQFD               = 0x76
	nrCreatePIT2          = 0x77
	nrIOEventFD           = 0x79
	nrGetClock            = 0x7c
	nrSetClock            = 0x7b
	nrGetRegs             = 0x81
	nrSetRegs             = 0x82
	nrGetSregs            = 0x83
	nrSetSregs            = 0x84
	nrTranslate           = 0x85
	nrGetMSRs             = 0x88
	nrSetMSRs             = 0x89
	nrGetFPU              = 0x8c
	nrSetFPU              = 0x8d
	nrGetLAPIC            = 0x8e
	nrSetLAPIC            = 0x8f
	nrSetCPUID2           = 0x90
	nrGetMPState          = 0x98
	nrSetMPState          = 0x99
	nrGetEvents           = 0x9f
	nrSetEvents           = 0xa0
	nrSignalMSI           = 0xa5
	nrGetSupportedCPUID   = 0x05
)

// Complete requests without a structure argument.
var (
	kvmGetAPIVersion   = gokvm.IIO(0x00)
	kvmCreateVM        = gokvm.IIO(0x01)
	kvmCheckExtension  = gokvm.IIO(0x03)
	kvmGetVCPUMmapSize = gokvm.IIO(0x04)
	kvmCreateVCPU      = gokvm.IIO(0x41)
	kvmSetTSSAddr      = gokvm.IIO(0x47)
	kvmCreateIRQChip   = gokvm.IIO(0x60)
	kvmRun             = gokvm.IIO(0x80)
	kvmSetTSCKHz       = gokvm.IIO(0xa2)
	kvmGetTSCKHz       = gokvm.IIO(0xa3)
	kvmKVMClockCtrl    = gokvm.IIO(0xad)
)

// Capabilities used here (KVM_CAP_*).
const (
	CapMaxVCPUs    Capability = 66
	CapTSCDeadline Capability = 72
	CapSignalMSI   Capability = 77
	CapGetTSCKHz   Capability = 61
	CapIRQFD       Capability = 32
	CapIOEventFD   Capability = 36
	CapImmediate   Capability = 136
)

// FPU is struct kvm_fpu.
type FPU struct {
	FPR        [8][16]uint8
	FCW        uint16
	FSW        uint16
	FTWX       uint8 // abridged tag word, as FXSAVE has it
	_          uint8
	LastOpcode uint16
	LastIP     uint64
	LastDP     uint64
	XMM        [16][16]uint8
	MXCSR      uint32
	_          uint32
}

type userMemoryRegion struct {
	slot                uint32
	_                   uint32 // flags
	guestPhys, size, va uint64
}

type irqLevel struct{ irq, level uint32 }

type pitConfig struct {
	flags uint32
	_     [15]uint32
}

type irqfd struct {
	fd, gsi, flags uint32
	_              [20]uint8 // resamplefd, padding
}

type ioeventfd struct {
	datamatch uint64
	addr      uint64
	length    uint32
	fd        int32
	flags     uint32
	_         [36]uint8
}

type msi struct {
	addrLo, addrHi, data uint32
	_                    [20]uint8 // flags, devid, padding
}

// Route is one entry of the interrupt routing table: a GSI delivered to a pin
// of an interrupt controller, or as a message.
type Route struct {
	GSI  uint32
	Type RouteType
	Chip uint32 // RouteChip: ChipPICMaster, ChipPICSlave or ChipIOAPIC
	Pin  uint32 // RouteChip
	Addr uint64 // RouteMSI: message address
	Data uint32 // RouteMSI: message data
}

// RouteType is the kind of a Route.
type RouteType uint32

// Kinds of routes, and interrupt controllers (KVM_IRQ_ROUTING_*, KVM_IRQCHIP_*).
const (
	RouteChip RouteType = 1
	RouteMSI  RouteType = 2

	ChipPICMaster = 0
	ChipPICSlave  = 1
	ChipIOAPIC    = 2
)

// MaxRoutes is the size of the largest routing table the kernel takes
// (KVM_MAX_IRQ_ROUTES).
const MaxRoutes = 4096

// routeWords is the size of struct kvm_irq_routing_entry in 64-bit words: GSI
// and type, flags and padding, and a union of four words.
const routeWords = 6

const maxCPUIDEntries = 256

type cpuidTable struct {
	nent    uint32
	_       uint32
	entries [maxCPUIDEntries]CPUIDEntry
}

// maxMSRs is how many registers one call carries; the kernel takes 255.
const maxMSRs = 255

type msrTable struct {
	nmsrs   uint32
	_       uint32
	entries [maxMSRs]MSREntry
}

// Multiprocessing states (KVM_MP_STATE_*).
const (
	MPRunnable      uint32 = 0
	MPUninitialized uint32 = 1
	MPHalted        uint32 = 3
)
