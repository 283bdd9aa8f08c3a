package vmm

import (
	"math/bits"
	"slices"

	"github.com/moovm/moovm/internal/kvm"
)

// CPUID leaves that depend on the machine.
const (
	leafVendor     = 0x0
	leafFeatures   = 0x1
	leafCache      = 0x4
	leafTopology   = 0xb
	leafXSAVE      = 0xd
	leafTSC        = 0x15
	leafTopology2  = 0x1f
	leafHypervisor = 0x4000_0000
	leafKVM        = 0x4000_0001
	leafTiming     = 0x4000_0010
	leafAMDCores   = 0x8000_0008
	leafAMDCache   = 0x8000_001d
	leafAMDTopo    = 0x8000_001e

	apicBusKHz = 1_000_000 // KVM's local APIC timer runs at 1 GHz

	cpuidIndexed = 1 // entry flag: the index (ECX) is significant
)

// cpuidFor derives what CPUID tells vCPU id of n from what KVM supports.
// One package of n cores with one thread each; the APIC id is the vCPU's
// number.
func cpuidFor(supported []kvm.CPUIDEntry, id, n int, tscKHz uint32, tscDeadline bool) []kvm.CPUIDEntry {
	intel := false
	topoLeaves := []uint32{leafTopology}
	var maxBasic uint32
	for i := range supported {
		switch e := &supported[i]; e.Function {
		case leafVendor:
			intel = e.Ebx == 0x756e_6547 // "Genu"
			maxBasic = e.Eax
		case leafTopology2:
			topoLeaves = []uint32{leafTopology, leafTopology2}
		}
	}
	coreBits := uint32(bits.Len(uint(n - 1)))
	out := make([]kvm.CPUIDEntry, 0, len(supported)+8)
	for _, e := range supported {
		switch e.Function {
		case leafVendor:
			e.Eax = max(e.Eax, leafTopology)
			if intel && tscKHz != 0 {
				e.Eax = max(e.Eax, leafTSC)
			}
		case leafFeatures:
			e.Ebx = e.Ebx&0xffff | uint32(n)<<16 | uint32(id)<<24
			e.Ecx |= 1 << 31 // runs under a hypervisor
			e.Ecx |= 1 << 21 // x2APIC, which the in-kernel APIC has
			if tscDeadline {
				e.Ecx |= 1 << 24
			}
			e.Edx &^= 1 << 28
			if n > 1 {
				e.Edx |= 1 << 28 // more than one logical processor
			}
		case leafCache:
			// Cores in the package, and how many share this cache: the first
			// two levels are a core's own.
			if e.Eax&0x1f != 0 {
				level := e.Eax >> 5 & 7
				e.Eax &= 0x3fff
				e.Eax |= uint32(1<<coreBits-1) & 0x3f << 26
				if level >= 3 {
					e.Eax |= uint32(1<<coreBits-1) & 0xfff << 14
				}
			}
		case leafTopology, leafTopology2, leafTSC, leafTiming:
			continue // made below
		case leafHypervisor:
			e.Eax = max(e.Eax, leafTiming)
		case leafAMDCores:
			e.Ecx = e.Ecx&^0xf0ff | coreBits<<12 | uint32(n-1)
		case leafAMDCache:
			if e.Eax&0x1f != 0 {
				level := e.Eax >> 5 & 7
				e.Eax &= 0x3fff
				if level >= 3 {
					e.Eax |= uint32(n-1) << 14
				}
			}
		case leafAMDTopo:
			e.Eax, e.Ebx, e.Ecx = uint32(id), uint32(id), 0
		}
		out = append(out, e)
	}
	for _, leaf := range topoLeaves {
		if leaf > max(maxBasic, leafTopology) {
			continue
		}
		out = append(out,
			kvm.CPUIDEntry{Function: leaf, Index: 0, Flags: cpuidIndexed, Eax: 0, Ebx: 1, Ecx: 1 << 8, Edx: uint32(id)},
			kvm.CPUIDEntry{Function: leaf, Index: 1, Flags: cpuidIndexed, Eax: coreBits, Ebx: uint32(n), Ecx: 2<<8 | 1, Edx: uint32(id)},
			kvm.CPUIDEntry{Function: leaf, Index: 2, Flags: cpuidIndexed, Ecx: 2, Edx: uint32(id)})
	}
	if tscKHz != 0 {
		if intel {
			// TSC = crystal * EBX / EAX; the crystal is the APIC timer's.
			out = append(out, kvm.CPUIDEntry{Function: leafTSC, Eax: apicBusKHz, Ebx: tscKHz, Ecx: apicBusKHz * 1000})
		}
		out = append(out, kvm.CPUIDEntry{Function: leafTiming, Eax: tscKHz, Ebx: apicBusKHz})
	}
	out = fixXSAVE(out)
	maskDependent(out)
	return out
}

// fixXSAVE makes leaf 0xD consistent: only the components that both the mask
// and a description of their own name, and no leaf at all without XSAVE. A
// kernel compares the sizes with its own sum and stops if they differ.
func fixXSAVE(in []kvm.CPUIDEntry) []kvm.CPUIDEntry {
	hasXSAVE := slices.ContainsFunc(in, func(e kvm.CPUIDEntry) bool {
		return e.Function == leafFeatures && e.Ecx&(1<<26) != 0
	})
	if !hasXSAVE {
		return slices.DeleteFunc(in, func(e kvm.CPUIDEntry) bool { return e.Function == leafXSAVE })
	}
	described, size := uint64(3), uint32(576) // x87 and SSE lie in the fixed part
	var mask, supervisor uint64
	for _, e := range in {
		if e.Function != leafXSAVE {
			continue
		}
		switch {
		case e.Index == 0:
			mask = uint64(e.Edx)<<32 | uint64(e.Eax)
		case e.Index == 1:
			supervisor = uint64(e.Edx)<<32 | uint64(e.Ecx)
		case e.Index < 64 && e.Eax != 0:
			described |= 1 << e.Index
		}
	}
	mask &= described
	supervisor &= described
	for _, e := range in {
		if e.Function == leafXSAVE && e.Index >= 2 && e.Index < 64 && mask>>e.Index&1 != 0 {
			size = max(size, e.Ebx+e.Eax)
		}
	}
	out := in[:0]
	for _, e := range in {
		if e.Function == leafXSAVE {
			switch {
			case e.Index == 0:
				e.Eax, e.Edx = uint32(mask), uint32(mask>>32)
				e.Ebx, e.Ecx = 576, size // EBX follows XCR0, KVM keeps it up to date
			case e.Index == 1:
				e.Ecx, e.Edx = uint32(supervisor), uint32(supervisor>>32)
			case e.Index < 64 && (mask|supervisor)>>e.Index&1 == 0:
				continue
			}
		}
		out = append(out, e)
	}
	return out
}
