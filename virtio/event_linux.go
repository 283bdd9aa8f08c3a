package virtio

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Event is a counter to wait for: an eventfd. The machine can hand its file
// descriptor to KVM (ioeventfd, irqfd), so that a guest's notification
// reaches the waiting goroutine without an exit to user space.
//
// Wait blocks in the kernel rather than in the runtime's poller: a wake-up
// then does not depend on when the scheduler polls, which takes milliseconds
// while other goroutines keep it busy.
type Event struct {
	mu     sync.RWMutex // held for reading while fd is used, for writing to close it
	fd     int
	closed atomic.Bool
	got    [8]byte // Wait's buffer: it has one caller at a time
}

// NewEvent returns an event that nobody has signalled yet.
func NewEvent() (*Event, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("virtio: eventfd: %w", err)
	}
	return &Event{fd: fd}, nil
}

// NewEventFD takes over an existing eventfd, received from another process
// for example, and makes it non-blocking: a peer that fills the counter must
// not hold up Signal.
func NewEventFD(fd int) (*Event, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("virtio: eventfd %d: %w", fd, err)
	}
	return &Event{fd: fd}, nil
}

// one is what Signal writes: little-endian hosts only, as the guests are.
var one = [8]byte{1}

// Signal wakes Wait, now or when it is called next. Safe for concurrent use.
func (e *Event) Signal() error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.closed.Load() {
		return os.ErrClosed
	}
	return e.signal()
}

func (e *Event) signal() error {
	for {
		switch _, err := unix.Write(e.fd, one[:]); err {
		case nil, unix.EAGAIN: // EAGAIN: the counter is full, so it is signalled
			return nil
		case unix.EINTR:
		default:
			return os.NewSyscallError("eventfd write", err)
		}
	}
}

// Wait blocks until the event is signalled and takes all signals so far. One
// goroutine at a time may wait. After Close it returns os.ErrClosed.
func (e *Event) Wait() error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	for !e.closed.Load() {
		n, err := unix.Read(e.fd, e.got[:])
		switch {
		case e.closed.Load():
		case err == nil && n == len(e.got):
			return nil
		case err == nil:
			return fmt.Errorf("virtio: read %d bytes from an eventfd", n)
		case err == unix.EINTR:
		case err == unix.EAGAIN: // it came from another process
			p := [1]unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(p[:], -1); err != nil && err != unix.EINTR {
				return os.NewSyscallError("poll", err)
			}
		default:
			return os.NewSyscallError("eventfd read", err)
		}
	}
	return os.ErrClosed
}

// FD is the eventfd, valid until Close. It stays property of the Event.
func (e *Event) FD() int { return e.fd }

// Close releases the eventfd, after the waiter has left. It may be called
// again.
func (e *Event) Close() error {
	if e.closed.Swap(true) {
		return nil
	}
	e.signal() // wakes the waiter; without one nobody cares
	e.mu.Lock()
	defer e.mu.Unlock()
	return os.NewSyscallError("close", unix.Close(e.fd))
}
