package vmm

import (
	"encoding/binary"
	"io"
)

// loadBzImage puts the self-unpacking part of a bzImage where it prefers to be
// (Documentation/arch/x86/boot.rst, the real-mode kernel header).
func loadBzImage(k Kernel, mem []byte) (loadedKernel, error) {
	const (
		minVersion = 0x20c // xloadflags tell about the 64-bit entry
		kernel64   = 1 << 0
		entry64    = 0x200 // behind the 32-bit entry
		headSize   = 0x1000

		hdrSetupSects  = 0x1f1
		hdrJump        = 0x201 // its operand byte tells where the header ends
		hdrXLoadFlags  = 0x236
		hdrPrefAddress = 0x258
		hdrInitSize    = 0x260
	)
	if k.Protocol != ProtocolLinux {
		return k.refuse("a bzImage has no PVH entry; unpack it to a vmlinux")
	}
	head := make([]byte, headSize)
	if n, _ := k.Image.ReadAt(head, 0); n < headSize {
		return k.refuse("the bzImage is cut off in its header")
	}
	le := binary.LittleEndian
	if v := le.Uint16(head[bpHdrVersion:]); v < minVersion {
		return k.refuse("boot protocol %d.%02d, at least 2.12 (Linux 3.8) is needed", v>>8, v&0xff)
	}
	if le.Uint16(head[hdrXLoadFlags:])&kernel64 == 0 {
		return k.refuse("it has no 64-bit entry point: is it a 32-bit kernel?")
	}
	sectors := int64(head[hdrSetupSects])
	if sectors == 0 {
		sectors = 4
	}
	offset := (sectors + 1) * 512
	if offset >= k.Size {
		return k.refuse("the bzImage is cut off behind its header")
	}
	size := uint64(k.Size - offset)
	at := le.Uint64(head[hdrPrefAddress:])
	room := max(size, uint64(le.Uint32(head[hdrInitSize:])))
	if at < addrHigh || at%pageSize != 0 {
		return k.refuse("it wants to be loaded at %#x", at)
	}
	if at > uint64(len(mem)) || room > uint64(len(mem))-at {
		return k.refuse("it needs memory from %#x to %#x to unpack itself, memory ends at %#x: give the machine more memory", at, at+room, len(mem))
	}
	if size <= entry64 {
		return k.refuse("the bzImage is cut off before its entry point")
	}
	if _, err := io.ReadFull(io.NewSectionReader(k.Image, offset, int64(size)), mem[at:at+size]); err != nil {
		return k.refuse("the bzImage is cut off (%v)", err)
	}
	end := max(bpHdrMagic+int(head[hdrJump]), bpHdrCmdSize+4)
	return loadedKernel{entry: at + entry64, end: at + room, header: head[bpHeader:end]}, nil
}
