package vmm

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/moovm/moovm/internal/kvm"
)

// The 64-bit boot protocol (Documentation/arch/x86/boot.rst): the kernel is
// entered in long mode with flat segments, an identity mapping, interrupts off
// and RSI pointing at the zero page.

// Offsets in the zero page (arch/x86/include/uapi/asm/bootparam.h and
// Documentation/arch/x86/zero-page.rst).
const (
	bpACPIRSDP     = 0x070
	bpE820Entries  = 0x1e8
	bpE820Table    = 0x2d0
	bpHeader       = 0x1f1 // the setup header of a bzImage
	bpHdrBootFlag  = 0x1fe
	bpHdrMagic     = 0x202
	bpHdrVersion   = 0x206
	bpHdrLoader    = 0x210
	bpHdrLoadFlags = 0x211
	bpHdrInitrd    = 0x218
	bpHdrInitrdLen = 0x21c
	bpHdrCmdline   = 0x228
	bpHdrAlign     = 0x230
	bpHdrCmdSize   = 0x238

	e820RAM      = 1
	e820Reserved = 2
)

type e820Entry struct {
	addr, size uint64
	typ        uint32
}

// memoryMap is what the firmware of a real machine would report.
func memoryMap(size int64) []e820Entry {
	low := uint64(min(size, addrHole))
	m := []e820Entry{
		{0, addrLowEnd, e820RAM},
		{addrLowEnd, addrHigh - addrLowEnd, e820Reserved},
		{addrHigh, low - addrHigh, e820RAM},
		{addrECAM, sizeECAM, e820Reserved},
		{addrIdentity, 4 * pageSize, e820Reserved},
	}
	if uint64(size) > low {
		m = append(m, e820Entry{addrAbove4G, uint64(size) - low, e820RAM})
	}
	return m
}

// resetStub is the machine's whole BIOS. A Linux kernel on hardware-reduced
// ACPI without EFI reboots by jumping to the reset vector in real mode.
var resetStub = []byte{
	0xb0, 0xfe, // mov al, 0xfe
	0xe6, portKeyboardSt, // out 0x64, al
	0xf4,       // hlt
	0xeb, 0xfd, // jmp to the hlt
}

// bootImage is what the boot processor needs to start.
type bootImage struct {
	protocol Protocol
	entry    uint64
}

// registers sets the boot processor's registers; s is the reset state.
func (b bootImage) registers(s *kvm.Sregs) *kvm.Regs {
	if b.protocol == ProtocolPVH {
		enterProtectedMode(s)
		return &kvm.Regs{RIP: b.entry, RBX: addrPVH, RFLAGS: 2}
	}
	enterLongMode(s)
	return &kvm.Regs{RIP: b.entry, RSI: addrZeroPage, RFLAGS: 2}
}

// loadBoot puts the kernel, the initrd, the command line, the zero page, page
// tables and GDT into guest memory.
func loadBoot(cfg *Config, mem []byte) (bootImage, error) {
	k, err := loadKernel(cfg.Kernel, mem)
	if err != nil {
		return bootImage{}, err
	}
	if strings.IndexByte(cfg.Cmdline, 0) >= 0 {
		return bootImage{}, fmt.Errorf("kernel command line contains a NUL byte")
	}
	if len(cfg.Cmdline) >= maxCmdline {
		return bootImage{}, fmt.Errorf("kernel command line has %d bytes, at most %d fit (Linux itself uses the first 2047)", len(cfg.Cmdline), maxCmdline-1)
	}
	copy(mem[addrCmdline:], cfg.Cmdline)
	mem[addrCmdline+len(cfg.Cmdline)] = 0

	initrd, err := placeInitrd(uint64(len(cfg.Initrd)), k.end, uint64(len(mem)))
	if err != nil {
		return bootImage{}, err
	}
	copy(mem[initrd:], cfg.Initrd)

	zp := mem[addrZeroPage : addrZeroPage+pageSize]
	le := binary.LittleEndian
	le.PutUint16(zp[bpHdrBootFlag:], 0xaa55)
	copy(zp[bpHdrMagic:], "HdrS")
	le.PutUint16(zp[bpHdrVersion:], 0x020f)
	le.PutUint32(zp[bpHdrAlign:], 0x100_0000)
	copy(zp[bpHeader:], k.header)
	le.PutUint64(zp[bpACPIRSDP:], addrACPI)
	zp[bpHdrLoader] = 0xff    // a loader without a number
	zp[bpHdrLoadFlags] = 1    // loaded high
	if len(cfg.Initrd) != 0 { // below 4 GiB, so the 32-bit fields do
		le.PutUint32(zp[bpHdrInitrd:], uint32(initrd))
		le.PutUint32(zp[bpHdrInitrdLen:], uint32(len(cfg.Initrd)))
	}
	le.PutUint32(zp[bpHdrCmdline:], addrCmdline)
	le.PutUint32(zp[bpHdrCmdSize:], maxCmdline-1)
	entries := memoryMap(cfg.Memory)
	zp[bpE820Entries] = uint8(len(entries))
	for i, e := range entries {
		p := zp[bpE820Table+20*i:]
		le.PutUint64(p, e.addr)
		le.PutUint64(p[8:], e.size)
		le.PutUint32(p[16:], e.typ)
	}
	if cfg.Kernel.Protocol == ProtocolPVH {
		putPVH(mem, initrd, uint64(len(cfg.Initrd)), entries)
	}
	putPageTables(mem[addrPageTables:])
	putGDT(mem[addrGDT:])
	copy(mem[addrResetVector:], resetStub)
	return bootImage{protocol: cfg.Kernel.Protocol, entry: k.entry}, nil
}

// placeInitrd finds the highest place for n bytes below the end of low memory
// and above the kernel.
func placeInitrd(n, kernelEnd, memEnd uint64) (uint64, error) {
	const slack = 1 << 20 // the kernel's first page tables grow behind its end
	if n == 0 {
		return 0, nil
	}
	if n > memEnd || (memEnd-n)&^(pageSize-1) < kernelEnd+slack {
		return 0, fmt.Errorf("initrd of %d bytes does not fit behind the kernel (which ends at %#x) into memory below %#x: give the machine more memory", n, kernelEnd, memEnd)
	}
	return (memEnd - n) &^ (pageSize - 1), nil
}

// putPageTables writes an identity mapping of the first 4 GiB in 2 MiB pages.
func putPageTables(p []byte) {
	const (
		presentWrite = 0x03
		large        = 0x80
	)
	le := binary.LittleEndian
	le.PutUint64(p, (addrPageTables+pageSize)|presentWrite)
	for i := range uint64(4) {
		le.PutUint64(p[pageSize+8*i:], (addrPageTables+(2+i)*pageSize)|presentWrite)
	}
	for i := range uint64(4 * 512) {
		le.PutUint64(p[2*pageSize+8*i:], i<<21|presentWrite|large)
	}
}

// Selectors of the boot GDT, as the 64-bit boot protocol names them.
const (
	selBootCS = 0x10
	selBootDS = 0x18
	selBootTR = 0x20
)

var bootGDT = [6]uint64{
	selBootCS / 8: 0x00af_9b00_0000_ffff, // 64-bit code, execute/read
	selBootDS / 8: 0x00cf_9300_0000_ffff, // data, read/write
	selBootTR / 8: 0x0080_8b00_0000_ffff, // busy TSS
}

func putGDT(p []byte) {
	for i, d := range bootGDT {
		binary.LittleEndian.PutUint64(p[8*i:], d)
	}
}

// Control register bits.
const (
	cr0PE   = 1 << 0
	cr0ET   = 1 << 4
	cr0PG   = 1 << 31
	cr4PAE  = 1 << 5
	eferLME = 1 << 8
	eferLMA = 1 << 10
)

// enterLongMode turns s, the reset state, into the state the 64-bit boot
// protocol asks for.
func enterLongMode(s *kvm.Sregs) {
	code := kvm.Segment{Limit: 0xffff_ffff, Selector: selBootCS, Typ: 0xb, Present: 1, S: 1, L: 1, G: 1}
	data := kvm.Segment{Limit: 0xffff_ffff, Selector: selBootDS, Typ: 0x3, Present: 1, S: 1, DB: 1, G: 1}
	s.CS = code
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.TR = kvm.Segment{Limit: 0xffff, Selector: selBootTR, Typ: 0xb, Present: 1}
	s.GDT = kvm.Descriptor{Base: addrGDT, Limit: uint16(8*len(bootGDT) - 1)}
	s.IDT = kvm.Descriptor{}
	s.CR0 = cr0PE | cr0ET | cr0PG
	s.CR3 = addrPageTables
	s.CR4 = cr4PAE
	s.EFER = eferLME | eferLMA
}
