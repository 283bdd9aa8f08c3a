package vmm

import (
	"fmt"

	"github.com/moovm/moovm/internal/kvm"
)

// featureLeaves are the CPUID registers whose bits are features: a guest that
// has seen a bit set may use what it stands for at any time (AMD64 APM 3,
// appendix E; Intel SDM 2A, CPUID).
var featureLeaves = []struct {
	leaf, index uint32
	name        string
	reg         func(*kvm.CPUIDEntry) uint32
	ignore      uint32 // what depends on the processor's state, or on us
}{
	{1, 0, "ECX", ecx, 1<<21 | 1<<24 | 1<<27 | 1<<31}, // x2APIC, TSC deadline timer, OSXSAVE, hypervisor
	{1, 0, "EDX", edx, 1 << 28},                       // HTT
	{7, 0, "EBX", ebx, 0},
	{7, 0, "ECX", ecx, 1 << 4}, // OSPKE
	{7, 0, "EDX", edx, 0},
	{7, 1, "EAX", eax, 0},
	{0xd, 0, "EAX", eax, 0}, // XCR0
	{0xd, 1, "EAX", eax, 0},
	{0x80000001, 0, "ECX", ecx, 0},
	{0x80000001, 0, "EDX", edx, 0},
	{0x80000008, 0, "EBX", ebx, 0},
}

func eax(e *kvm.CPUIDEntry) uint32 { return e.Eax }
func ebx(e *kvm.CPUIDEntry) uint32 { return e.Ebx }
func ecx(e *kvm.CPUIDEntry) uint32 { return e.Ecx }
func edx(e *kvm.CPUIDEntry) uint32 { return e.Edx }

// fits says whether a host that supports so much can run a processor that was
// told want. The error names the first thing that it cannot.
func fits(want, supported []kvm.CPUIDEntry) error {
	if v := findCPUID(want, 0, 0); v != nil {
		h := findCPUID(supported, 0, 0)
		if h == nil || v.Ebx != h.Ebx || v.Ecx != h.Ecx || v.Edx != h.Edx {
			return fmt.Errorf("%w: it was taken on a processor of another maker", ErrSnapshotHost)
		}
	}
	for _, f := range featureLeaves {
		w := findCPUID(want, f.leaf, f.index)
		if w == nil {
			continue
		}
		var have uint32
		if h := findCPUID(supported, f.leaf, f.index); h != nil {
			have = f.reg(h)
		}
		missing := f.reg(w) &^ have &^ f.ignore
		for bit := range 32 {
			if missing&(1<<bit) != 0 {
				return fmt.Errorf("%w: its processor has the feature of CPUID leaf %#x.%d, %s bit %d, which this host's lacks", ErrSnapshotHost, f.leaf, f.index, f.name, bit)
			}
		}
	}
	return nil
}

func findCPUID(list []kvm.CPUIDEntry, leaf, index uint32) *kvm.CPUIDEntry {
	for i := range list {
		if list[i].Function == leaf && list[i].Index == index {
			return &list[i]
		}
	}
	return nil
}
