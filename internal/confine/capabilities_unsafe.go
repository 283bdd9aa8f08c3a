//go:build linux && amd64

package confine

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// keepCapabilities drops the capabilities that are not in set, in all threads.
// False says that this program cannot.
func keepCapabilities(set uint64) (bool, error) {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if err := unix.Capget(&h, &d[0]); err != nil {
		return false, fmt.Errorf("capget: %w", err)
	}
	for i := range d {
		keep := d[i].Permitted & uint32(set>>(32*i))
		d[i] = unix.CapUserData{Effective: d[i].Effective & keep, Permitted: keep}
	}
	// Each thread has its own, and the call is about the thread that makes it.
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&d[0])), 0)
	runtime.KeepAlive(&h)
	runtime.KeepAlive(&d)
	if errors.Is(errno, syscall.ENOTSUP) {
		return false, nil // cgo
	}
	if errno != 0 {
		return false, fmt.Errorf("capset: %w", errno)
	}
	return true, nil
}
