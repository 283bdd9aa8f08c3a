//go:build linux

package cowdisk

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iovecs are pooled: x/sys allocates them anew for every call with more than a few buffers.
type iovecs [256]unix.Iovec

var iovecPool = sync.Pool{New: func() any { return new(iovecs) }}

func preadv(fd int, bufs [][]byte, off int64) (int, error) {
	return vectored(unix.SYS_PREADV, fd, bufs, off)
}

func pwritev(fd int, bufs [][]byte, off int64) (int, error) {
	return vectored(unix.SYS_PWRITEV, fd, bufs, off)
}

// vectored moves at most 256 buffers; the callers of File.ReadvAt and WritevAt go on with the rest.
func vectored(trap uintptr, fd int, bufs [][]byte, off int64) (int, error) {
	v := iovecPool.Get().(*iovecs)
	n := 0
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		if n == len(v) {
			break
		}
		v[n].Base = unsafe.SliceData(b)
		v[n].SetLen(len(b))
		n++
	}
	lo, hi := uintptr(off), uintptr(uint64(off)>>32)
	if unsafe.Sizeof(lo) == 8 {
		hi = 0 // 64-bit kernels take the offset from the low word
	}
	r, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(v)), uintptr(n), lo, hi, 0)
	clear(v[:n]) // the pool must not keep the buffers alive
	iovecPool.Put(v)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
