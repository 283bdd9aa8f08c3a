package vmm

import "github.com/moovm/moovm/internal/kvm"

// feature is a bit of CPUID.
type feature struct {
	leaf, index uint32
	reg         func(*kvm.CPUIDEntry) *uint32
	bit         uint
}

func regEAX(e *kvm.CPUIDEntry) *uint32 { return &e.Eax }
func regEBX(e *kvm.CPUIDEntry) *uint32 { return &e.Ebx }
func regECX(e *kvm.CPUIDEntry) *uint32 { return &e.Ecx }
func regEDX(e *kvm.CPUIDEntry) *uint32 { return &e.Edx }

func f1c(bit uint) feature  { return feature{1, 0, regECX, bit} }
func f1d(bit uint) feature  { return feature{1, 0, regEDX, bit} }
func f7b(bit uint) feature  { return feature{7, 0, regEBX, bit} }
func f7c(bit uint) feature  { return feature{7, 0, regECX, bit} }
func f7d(bit uint) feature  { return feature{7, 0, regEDX, bit} }
func f71a(bit uint) feature { return feature{7, 1, regEAX, bit} }
func f71d(bit uint) feature { return feature{7, 1, regEDX, bit} }
func fext(bit uint) feature { return feature{0x8000_0001, 0, regECX, bit} }
func xcr0(bit uint) feature { return feature{leafXSAVE, 0, regEAX, bit} }
func fxs(bit uint) feature  { return feature{leafXSAVE, 1, regEAX, bit} }

// featureDeps says which features are of no use, or fault, without another
// (Intel SDM 1, chapters 13 and 14; Linux, arch/x86/kernel/cpu/cpuid-deps.c).
// What others need comes before what needs it, so that one pass does. A guest
// may look at one bit alone: Linux's raid6 takes AVX2 for usable by its bit.
var featureDeps = []struct {
	needed    feature
	name      string
	dependent []feature
}{
	{f1d(25), "SSE", []feature{f1d(26), fext(7)}},                                                         // SSE2, misaligned SSE
	{f1d(26), "SSE2", []feature{f1c(0), f1c(1), f1c(25), f7b(29), f7c(8), f1c(28), f1c(9)}},               // SSE3, PCLMULQDQ, AES, SHA, GFNI, AVX, SSSE3
	{f1c(0), "SSE3", []feature{f1c(9), fext(6)}},                                                          // SSSE3, SSE4A
	{f1c(9), "SSSE3", []feature{f1c(19)}},                                                                 // SSE4.1
	{f1c(19), "SSE4.1", []feature{f1c(20)}},                                                               // SSE4.2
	{f1c(26), "XSAVE", []feature{f1c(27), f1c(28), f7b(14), f7c(3), f7d(24), f71d(21), fext(15)}},         // OSXSAVE, AVX, MPX, PKU, AMX-TILE, APX, LWP
	{fxs(3), "XSAVES", []feature{f7c(7), f7d(20)}},                                                        // CET: shadow stacks, branch tracking
	{xcr0(1), "SSE state", []feature{f1c(28)}},                                                            // AVX
	{xcr0(2), "AVX state", []feature{f1c(28)}},                                                            // AVX
	{xcr0(3), "bound registers", []feature{f7b(14)}},                                                      // MPX
	{xcr0(4), "bound configuration", []feature{f7b(14)}},                                                  // MPX
	{f1c(28), "AVX", []feature{f1c(12), f1c(29), f7b(5), f7c(9), f7c(10), fext(11), fext(16), f71a(1)}},   // FMA, F16C, AVX2, VAES, VPCLMULQDQ, XOP, FMA4, SM3
	{f7b(5), "AVX2", []feature{f7b(16), f71a(0), f71a(2), f71a(4), f71a(23), f71d(4), f71d(5), f71d(10)}}, // AVX512F, SHA512, SM4, AVX-VNNI, -IFMA, -VNNI-INT8, -NE-CONVERT, -VNNI-INT16
	{xcr0(5), "opmask state", []feature{f7b(16)}},                                                         // AVX512F
	{xcr0(6), "upper ZMM state", []feature{f7b(16)}},                                                      // AVX512F
	{xcr0(7), "high ZMM state", []feature{f7b(16)}},                                                       // AVX512F
	{f7b(16), "AVX512F", []feature{f7b(17), f7b(21), f7b(26), f7b(27), f7b(28), f7b(30), f7b(31), // DQ, IFMA, PF, ER, CD, BW, VL
		f7c(1), f7c(6), f7c(11), f7c(12), f7c(14), // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
		f7d(2), f7d(3), f7d(8), f7d(23), f71a(5), f71d(19)}}, // 4VNNIW, 4FMAPS, VP2INTERSECT, FP16, BF16, AVX10
	{f7b(30), "AVX512BW", []feature{f7c(1), f7c(6), f7c(12), f7d(23)}},    // VBMI, VBMI2, BITALG, FP16
	{xcr0(9), "PKRU state", []feature{f7c(3)}},                            // PKU
	{f7c(3), "PKU", []feature{f7c(4)}},                                    // OSPKE
	{xcr0(17), "tile configuration", []feature{f7d(24)}},                  // AMX-TILE
	{xcr0(18), "tile data", []feature{f7d(24)}},                           // AMX-TILE
	{f7d(24), "AMX-TILE", []feature{f7d(22), f7d(25), f71a(21), f71d(8)}}, // AMX-BF16, -INT8, -FP16, -COMPLEX
	{xcr0(19), "APX state", []feature{f71d(21)}},                          // APX
}

// maskDependent clears the features that depend on one that is missing.
func maskDependent(list []kvm.CPUIDEntry) {
	for _, d := range featureDeps {
		if e := findCPUID(list, d.needed.leaf, d.needed.index); e != nil && *d.needed.reg(e)&(1<<d.needed.bit) != 0 {
			continue
		}
		for _, f := range d.dependent {
			if e := findCPUID(list, f.leaf, f.index); e != nil {
				*f.reg(e) &^= 1 << f.bit
			}
		}
	}
}
