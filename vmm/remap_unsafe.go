package vmm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The memory calls in this file keep the addresses that KVM's slots and the
// devices know: what lies there changes, never where. x/sys has them only for
// mappings whose address it has chosen itself.

// remap maps segments, which cover len(mem) bytes from file offset off on,
// privately in the place of mem. There is no moment at which mem's range is
// free for somebody else's mapping.
func remap(mem []byte, off int64, segments []segment) error {
	base := uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	for _, s := range segments {
		flags, fd := uintptr(unix.MAP_PRIVATE|unix.MAP_FIXED|mapNoReserve), -1
		if s.file != nil {
			fd = s.file.fd
		} else {
			flags |= unix.MAP_ANONYMOUS
		}
		at := base + uintptr(s.off-off)
		if _, _, errno := unix.Syscall6(unix.SYS_MMAP, at, uintptr(s.length), unix.PROT_READ|unix.PROT_WRITE, flags, uintptr(fd), uintptr(s.pos)); errno != 0 {
			return errno
		}
	}
	advise(mem)
	return nil
}

// reserve takes n bytes of address space without memory.
func reserve(n int64) ([]byte, error) {
	return unix.Mmap(-1, 0, int(n), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|mapNoReserve)
}

// moveAway moves the pages of mem, a shared mapping of a file, to another
// address, which costs as much as mem has page tables and not as much as it
// has pages; mem's range stays mapped (MREMAP_DONTUNMAP). It returns the
// address, to unmap with unmapAt when there is time; 0 if this kernel cannot (Linux
// before 5.13), and then nothing has moved.
func moveAway(mem []byte) uintptr {
	const dontUnmap = 4
	old := uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	n := uintptr(len(mem))
	at, _, errno := unix.Syscall6(sysMremap, old, n, n, mayMove|dontUnmap, 0, 0)
	if errno != 0 {
		return 0
	}
	return at
}

func unmapAt(addr uintptr, n int) error {
	if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, addr, uintptr(n), 0); errno != 0 {
		return errno
	}
	return nil
}

// pageOf is the number of the page that mem begins with.
func pageOf(mem []byte) int64 {
	return int64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))) / pageSize)
}
