package vmm

import (
	"os"

	"golang.org/x/sys/unix"
)

// What a machine needs of Linux and no other system has. host_other.go keeps
// the rest of the package building where there is no KVM.

const (
	mapNoReserve = unix.MAP_NORESERVE
	mayMove      = unix.MREMAP_MAYMOVE
	sysMremap    = unix.SYS_MREMAP
)

// memfd makes an empty memory file that can be sealed, of huge pages if huge.
func memfd(name string, huge bool) (int, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if huge {
		flags |= unix.MFD_HUGETLB | unix.MFD_HUGE_2MB
	}
	return unix.MemfdCreate(name, flags)
}

// sealMemfd makes a memory file immutable.
func sealMemfd(fd int) error {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	return err
}

// advise keeps guests out of core files and lets memory have huge pages where
// the host allows it to memory files (shmem_enabled: advise), which fault 512
// times less. Both are best effort.
func advise(mem []byte) {
	unix.Madvise(mem, unix.MADV_DONTDUMP)
	unix.Madvise(mem, unix.MADV_HUGEPAGE)
}

// threadID is the calling thread's.
func threadID() int { return unix.Gettid() }

// kickThread makes a thread of this process leave its system call. The Go
// runtime has a handler for SIGURG and takes any number of them.
func kickThread(tid int) { unix.Tgkill(os.Getpid(), tid, unix.SIGURG) }
