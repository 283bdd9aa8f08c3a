package vmm

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
)

// ErrKernel is wrapped by errors about a kernel image that cannot be booted.
var ErrKernel = errors.New("not a bootable kernel")

// loadedKernel is where a kernel lies in guest memory.
type loadedKernel struct {
	entry  uint64 // entry point, guest-physical
	end    uint64 // first byte after the kernel and its bss
	header []byte // a bzImage's setup header, for the zero page at bpHeader
}

// loadKernel puts a kernel into guest memory below the hole.
func loadKernel(k Kernel, mem []byte) (loadedKernel, error) {
	if k.Name == "" {
		k.Name = "kernel"
	}
	if k.Image == nil || k.Size <= 0 {
		return k.refuse("the image is empty; give the path of a vmlinuz or vmlinux file")
	}
	var magic [4]byte
	if n, _ := k.Image.ReadAt(magic[:], bpHdrMagic); n == len(magic) && string(magic[:]) == "HdrS" {
		return loadBzImage(k, mem)
	}
	return loadELF(k, mem)
}

func (k Kernel) refuse(format string, a ...any) (loadedKernel, error) {
	return loadedKernel{}, fmt.Errorf("%s: %w: %s", k.Name, ErrKernel, fmt.Sprintf(format, a...))
}

// loadELF copies an x86-64 vmlinux to the physical addresses its program
// headers ask for. Every address is checked: the file is not trusted.
func loadELF(k Kernel, mem []byte) (loadedKernel, error) {
	var l loadedKernel
	bad := k.refuse
	f, err := elf.NewFile(io.NewSectionReader(k.Image, 0, k.Size))
	if err != nil {
		return bad("not an ELF file (%v)", err)
	}
	switch {
	case f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64:
		return bad("it is for %v %v, this machine is x86-64", f.Class, f.Machine)
	case f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN:
		return bad("ELF type %v is not executable", f.Type)
	}
	l.entry = f.Entry
	inside := false
	for i, p := range f.Progs {
		if p.Type != elf.PT_LOAD || p.Memsz == 0 {
			continue
		}
		if p.Filesz > p.Memsz {
			return bad("segment %d has more bytes in the file than in memory", i)
		}
		if p.Paddr < addrHigh {
			return bad("segment %d wants to be loaded at %#x, below 1 MiB", i, p.Paddr)
		}
		if p.Paddr > uint64(len(mem)) || p.Memsz > uint64(len(mem))-p.Paddr {
			return bad("segment %d ends at %#x, memory at %#x: give the machine more memory", i, p.Paddr+p.Memsz, len(mem))
		}
		dst := mem[p.Paddr : p.Paddr+p.Filesz]
		if _, err := io.ReadFull(io.NewSectionReader(k.Image, int64(p.Off), int64(p.Filesz)), dst); err != nil {
			return bad("segment %d is cut off (%v)", i, err)
		}
		// The rest (bss) is zero already: guest memory starts so.
		l.end = max(l.end, p.Paddr+p.Memsz)
		// vmlinux has a physical entry point; older ones a virtual one.
		if l.entry >= p.Vaddr && l.entry-p.Vaddr < p.Memsz && p.Vaddr >= 1<<63 {
			l.entry = l.entry - p.Vaddr + p.Paddr
		}
		if l.entry >= p.Paddr && l.entry-p.Paddr < p.Filesz {
			inside = true
		}
	}
	if k.Protocol == ProtocolPVH {
		entry, ok := pvhEntry(f)
		switch {
		case !ok:
			return bad("it has no PVH entry (CONFIG_PVH)")
		case entry < addrHigh || entry >= l.end:
			return bad("its PVH entry point %#x lies in no segment", entry)
		}
		l.entry = entry
		return l, nil
	}
	if !inside {
		return bad("its entry point %#x lies in no segment", f.Entry)
	}
	return l, nil
}

// pvhEntry finds the 32-bit entry point among the ELF notes
// (xen/include/public/elfnote.h).
func pvhEntry(f *elf.File) (uint64, bool) {
	const physEntry = 18
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			continue
		}
		for len(b) >= 12 {
			nameLen, descLen := uint64(f.ByteOrder.Uint32(b)), uint64(f.ByteOrder.Uint32(b[4:]))
			typ := f.ByteOrder.Uint32(b[8:])
			desc := 12 + (nameLen+3)&^3
			end := desc + (descLen+3)&^3
			if desc+descLen > uint64(len(b)) {
				break
			}
			if typ == physEntry && string(b[12:12+nameLen]) == "Xen\x00" {
				switch descLen {
				case 4:
					return uint64(f.ByteOrder.Uint32(b[desc:])), true
				case 8:
					return f.ByteOrder.Uint64(b[desc:]), true
				}
			}
			b = b[min(end, uint64(len(b))):]
		}
	}
	return 0, false
}
