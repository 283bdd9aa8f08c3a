package vmm

import (
	"testing"

	"github.com/moovm/moovm/internal/kvm"
)

// everything is a processor with all features.
func everything() []kvm.CPUIDEntry {
	var out []kvm.CPUIDEntry
	for _, at := range [][2]uint32{{1, 0}, {7, 0}, {7, 1}, {0xd, 0}, {0xd, 1}, {0x8000_0001, 0}} {
		out = append(out, kvm.CPUIDEntry{Function: at[0], Index: at[1], Eax: ^uint32(0), Ebx: ^uint32(0), Ecx: ^uint32(0), Edx: ^uint32(0)})
	}
	return out
}

func has(list []kvm.CPUIDEntry, f feature) bool {
	e := findCPUID(list, f.leaf, f.index)
	return e != nil && *f.reg(e)&(1<<f.bit) != 0
}

// Whatever is missing, nothing is left that depends on it, at any remove, and
// nothing else is touched.
func TestFeatureDependencies(t *testing.T) {
	all := everything()
	maskDependent(all)
	for i, e := range everything() {
		if all[i] != e {
			t.Errorf("of a complete processor leaf %#x.%d was changed: %+v", e.Function, e.Index, all[i])
		}
	}
	for _, missing := range featureDeps {
		list := everything()
		e := findCPUID(list, missing.needed.leaf, missing.needed.index)
		*missing.needed.reg(e) &^= 1 << missing.needed.bit
		maskDependent(list)
		for _, d := range featureDeps {
			if has(list, d.needed) {
				continue
			}
			for _, f := range d.dependent {
				if has(list, f) {
					t.Errorf("without %s: leaf %#x.%d bit %d is there, which needs %s", missing.name, f.leaf, f.index, f.bit, d.name)
				}
			}
		}
	}
}

// A host without XSAVE, such as an emulated one, whose CPUID names AVX all the
// same: the guest sees none of what its registers are needed for.
func TestNoXSAVE(t *testing.T) {
	supported := everything()
	supported = append(supported, kvm.CPUIDEntry{Function: 0, Eax: 0xd})
	findCPUID(supported, 1, 0).Ecx &^= 1 << 26
	list := cpuidFor(supported, 0, 1, 0, false)
	for name, f := range map[string]feature{
		"OSXSAVE": f1c(27), "AVX": f1c(28), "FMA": f1c(12), "F16C": f1c(29), "AVX2": f7b(5), "AVX512F": f7b(16), "AVX512BW": f7b(30),
		"VAES": f7c(9), "VPCLMULQDQ": f7c(10), "PKU": f7c(3), "XOP": fext(11), "FMA4": fext(16), "AMX-TILE": f7d(24), "AVX-VNNI": f71a(4),
	} {
		if has(list, f) {
			t.Errorf("%s is there", name)
		}
	}
	for name, f := range map[string]feature{"SSE4.2": f1c(20), "AES": f1c(25), "BMI2": f7b(8), "SHA": f7b(29)} {
		if !has(list, f) {
			t.Errorf("%s is gone", name)
		}
	}
}
