package main

import (
	"bufio"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// giveMemoryBack is for when the kernel and the initramfs are in the guest's
// memory: what they took here goes back to the system at once, and stays
// there. From now on a collection comes after 2 MiB of garbage, not 4: requests
// for disks make none.
func giveMemoryBack() {
	debug.FreeOSMemory()
	debug.SetGCPercent(50)
	noHugeHeap()
}

// spareProcessor gives Go's scheduler a processor more than the machine's one:
// with a single one, its monitor takes that away from every thread that waits
// in the kernel, a virtual processor above all, and wakes up every 20 µs to do
// so, which costs a 9P request a fifth of its time.
func spareProcessor() {
	if runtime.GOMAXPROCS(0) < 2 {
		runtime.GOMAXPROCS(2)
	}
}

// noHugeHeap keeps khugepaged from filling the holes in Go's heap with pages
// of 2 MiB (madvise(2), MADV_NOHUGEPAGE), which would make it 4 MiB larger.
// The guest's memory is a file and not concerned. It is a matter of a few MiB,
// so errors are none.
func noHugeHeap() {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// Range, permissions, offset, device, inode, and the name if there is one.
		m := strings.Fields(lines.Text())
		if len(m) < 5 || m[1] != "rw-p" || m[4] != "0" || len(m) > 5 && m[5] != "[anon:" {
			continue
		}
		from, to, _ := strings.Cut(m[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(end-start), unix.MADV_NOHUGEPAGE)
		}
	}
}
