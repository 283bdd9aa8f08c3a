//go:build !linux

package virtio

import (
	"os"
	"sync"
)

// Event is a counter to wait for.
type Event struct {
	ch   chan struct{}
	done chan struct{}
	once sync.Once
}

// NewEvent returns an event that nobody has signalled yet.
func NewEvent() (*Event, error) {
	return &Event{ch: make(chan struct{}, 1), done: make(chan struct{})}, nil
}

// Signal wakes Wait, now or when it is called next. Safe for concurrent use.
func (e *Event) Signal() error {
	select {
	case e.ch <- struct{}{}:
	default:
	}
	return nil
}

// Wait blocks until the event is signalled and takes all signals so far. One
// goroutine at a time may wait. After Close it returns os.ErrClosed.
func (e *Event) Wait() error {
	select {
	case <-e.done:
		return os.ErrClosed
	case <-e.ch:
		return nil
	}
}

// FD is -1: there is no eventfd on this system.
func (e *Event) FD() int { return -1 }

// Close releases the event and wakes the waiter. It may be called again.
func (e *Event) Close() error {
	e.once.Do(func() { close(e.done) })
	return nil
}
