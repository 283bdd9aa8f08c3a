package virtio

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Event is a counter to wait for: an eventfd. The machine can hand its file
// descriptor to KVM (ioeventfd, irqfd), so that a guest's notification
// reaches the waiting goroutine without an exit to user space.
type Event struct {
	f   *os.File
	fd  int
	one [8]byte
	got [8]byte // Wait's buffer: it has one caller at a time
}

// NewEvent returns an event that nobody has signalled yet.
func NewEvent() (*Event, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("virtio: eventfd: %w", err)
	}
	return newEvent(fd), nil
}

// NewEventFD takes over an existing eventfd, received from another process
// for example, and makes it non-blocking.
func NewEventFD(fd int) (*Event, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("virtio: eventfd %d: %w", fd, err)
	}
	return newEvent(fd), nil
}

func newEvent(fd int) *Event {
	e := &Event{f: os.NewFile(uintptr(fd), "eventfd"), fd: fd}
	e.one[0] = 1 // little-endian hosts only, as the guests are
	return e
}

// Signal wakes Wait, now or when it is called next. Safe for concurrent use.
func (e *Event) Signal() error {
	_, err := e.f.Write(e.one[:])
	return err
}

// Wait blocks until the event is signalled and takes all signals so far. One
// goroutine at a time may wait. After Close it returns os.ErrClosed.
func (e *Event) Wait() error {
	_, err := e.f.Read(e.got[:])
	return err
}

// FD is the eventfd, valid until Close. It stays property of the Event.
func (e *Event) FD() int { return e.fd }

// Close releases the eventfd and wakes the waiter. It may be called again.
func (e *Event) Close() error {
	if err := e.f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
