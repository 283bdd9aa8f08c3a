package vmm

import (
	"encoding/binary"

	"github.com/moovm/moovm/internal/kvm"
)

// The PVH boot protocol (xen/include/public/arch-x86/hvm/start_info.h): the
// kernel is entered in 32-bit protected mode without paging, EBX pointing at
// the start information.

const (
	pvhMagic   = 0x336e_c578
	pvhModules = addrPVH + 0x40
	pvhMap     = addrPVH + 0x80
)

// putPVH writes the start information.
func putPVH(mem []byte, initrd, initrdLen uint64, memory []e820Entry) {
	le := binary.LittleEndian
	s := mem[addrPVH:]
	le.PutUint32(s, pvhMagic)
	le.PutUint32(s[4:], 1) // version: has a memory map
	if initrdLen != 0 {
		le.PutUint32(s[12:], 1)
		le.PutUint64(s[16:], pvhModules)
		le.PutUint64(mem[pvhModules:], initrd)
		le.PutUint64(mem[pvhModules+8:], initrdLen)
	}
	le.PutUint64(s[24:], addrCmdline)
	le.PutUint64(s[32:], addrACPI)
	le.PutUint64(s[40:], pvhMap)
	le.PutUint32(s[48:], uint32(len(memory)))
	for i, e := range memory {
		p := mem[pvhMap+24*i:]
		le.PutUint64(p, e.addr)
		le.PutUint64(p[8:], e.size)
		le.PutUint32(p[16:], e.typ)
	}
}

// enterProtectedMode turns s, the reset state, into what PVH asks for.
func enterProtectedMode(s *kvm.Sregs) {
	enterLongMode(s)
	s.CS.L, s.CS.DB = 0, 1
	s.CR0 = cr0PE | cr0ET
	s.CR3, s.CR4, s.EFER = 0, 0, 0
}
