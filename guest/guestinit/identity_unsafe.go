//go:build linux

package guestinit

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of random(4).
const (
	rndAddEntropy = 0x40085203 // RNDADDENTROPY: struct rand_pool_info
	rndReseedCRNG = 0x5207     // RNDRESEEDCRNG
)

// addEntropy gives the kernel bytes that it may count on in full, and has its
// generator seeded anew from them.
func addEntropy(fd int, entropy []byte) error {
	info := binary.NativeEndian.AppendUint32(nil, uint32(8*len(entropy))) // entropy_count, in bits
	info = binary.NativeEndian.AppendUint32(info, uint32(len(entropy)))   // buf_size
	info = append(info, entropy...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return os.NewSyscallError("RNDADDENTROPY", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0); errno != 0 {
		return os.NewSyscallError("RNDRESEEDCRNG", errno)
	}
	return nil
}
