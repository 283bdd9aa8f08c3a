package kvm

import (
	"runtime"
	"sync/atomic"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// ioctlInt issues a request whose argument is a number.
func ioctlInt(fd int, req, arg uintptr) (uintptr, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
		if errno == 0 {
			return r, nil
		}
		if errno != unix.EINTR {
			return r, errno
		}
	}
}

// ioctlPtr issues a request whose argument is a pointer. The conversion to
// uintptr happens in the system call expression, where the compiler keeps the
// object in place and alive. EINTR is retried: the Go runtime sends signals to
// its threads at any time.
func ioctlPtr[T any](fd int, req uintptr, p *T) error {
	_, err := ioctlCount(fd, req, p)
	return err
}

// ioctlCount is ioctlPtr for requests that return a number.
func ioctlCount[T any](fd int, req uintptr, p *T) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(p)))
		if errno == 0 {
			return int(r), nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

// ior, iow and iowr encode a request for an argument of type T.
func ior[T any](nr uintptr) uintptr  { var t T; return gokvm.IIOR(nr, unsafe.Sizeof(t)) }
func iow[T any](nr uintptr) uintptr  { var t T; return gokvm.IIOW(nr, unsafe.Sizeof(t)) }
func iowr[T any](nr uintptr) uintptr { var t T; return gokvm.IIOWR(nr, unsafe.Sizeof(t)) }

// run issues KVM_RUN once; the error is the system call's, EINTR included.
func run(fd int) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), kvmRun, 0); errno != 0 {
		return errno
	}
	return nil
}

// attrPtr gets or sets a device attribute whose value is *p. The structure
// holds p's address as a number, so p is pinned while the kernel uses it.
func attrPtr[T any](fd int, nr uintptr, a deviceAttr, p *T) error {
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(p)
	a.addr = uint64(uintptr(unsafe.Pointer(p)))
	return ioctlPtr(fd, iow[deviceAttr](nr), &a)
}

// addressOf is the address of memory that does not move because it is a
// mapping, not a Go object.
func addressOf(mapping []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mapping))))
}

// runState is the head of struct kvm_run; the rest is decoded from bytes.
type runState struct {
	requestInterruptWindow uint8
	immediateExit          uint8
	_                      [6]uint8
	exitReason             uint32
}

func (v *VCPU) state() *runState { return (*runState)(unsafe.Pointer(unsafe.SliceData(v.run))) }

// ImmediateExit sets or clears kvm_run.immediate_exit: while it is set Run
// returns ErrInterrupted at once. It may be called from any goroutine between
// creation and Close.
func (v *VCPU) ImmediateExit(on bool) {
	// The flag is one byte; the word around it holds only
	// request_interrupt_window (unused with an in-kernel irqchip) and padding,
	// so that a 32-bit atomic store, which Go has, can replace the byte store.
	var w uint32
	if on {
		w = 1 << 8
	}
	atomic.StoreUint32((*uint32)(unsafe.Pointer(v.state())), w)
	runtime.KeepAlive(v)
}
