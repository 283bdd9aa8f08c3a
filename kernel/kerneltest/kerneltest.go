// Package kerneltest makes files that pass for kernels, for tests.
package kerneltest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"testing"
)

// Release is the release of the kernels made here.
const Release = "9.8.7-test"

// ELF is a small ELF image that passes for an x86-64 kernel.
func ELF() []byte {
	const banner = "Linux version %s (not this one)\x00Linux version " + Release + " (someone@somewhere) #1 SMP\n\x00"
	body := append(bytes.Repeat([]byte{0x90}, 300<<10), banner...)
	var b bytes.Buffer
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: 0x1000000,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
	}
	p := elf.Prog64{Type: uint32(elf.PT_LOAD), Off: 120, Vaddr: 0x1000000, Paddr: 0x1000000,
		Filesz: uint64(len(body)), Memsz: uint64(len(body)) + 4096}
	_ = binary.Write(&b, binary.LittleEndian, h)
	_ = binary.Write(&b, binary.LittleEndian, p)
	b.Write(body)
	return b.Bytes()
}

// BzImage wraps a payload as the kernel's build does: the unpacked size
// follows it, except with gzip, which has it already.
func BzImage(payload []byte, size int) []byte {
	if !bytes.HasPrefix(payload, []byte{0x1f, 0x8b}) {
		payload = binary.LittleEndian.AppendUint32(bytes.Clone(payload), uint32(size))
	}
	b := make([]byte, 512*(1+3)) // boot sector and 3 sectors of set-up
	b[0x1f1] = 3
	b[0x1fe], b[0x1ff] = 0x55, 0xaa
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x020f)
	binary.LittleEndian.PutUint16(b[0x20e:], 0x300)
	copy(b[0x500:], Release+" (someone@somewhere) #1 SMP\x00")
	const stub = 100 // decompressor in front of the payload
	binary.LittleEndian.PutUint32(b[0x248:], stub)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	b = append(b, make([]byte, stub)...)
	b = append(b, payload...)
	return append(b, "trailer"...)
}

// Path is the real kernel that $MOOVM_KERNEL names; a test that needs one is
// skipped without it.
func Path(t testing.TB) string {
	t.Helper()
	path := os.Getenv("MOOVM_KERNEL")
	if path == "" {
		t.Skip("MOOVM_KERNEL is not set: name the vmlinuz of an unpacked linux-image package")
	}
	return path
}
