package virtioblk

import (
	"io"
	"sync"
)

// RAM is a Backend in memory, for tests and scratch disks. Accesses to
// different ranges run in parallel.
type RAM struct {
	mu sync.RWMutex // only against Resize
	b  []byte
}

// NewRAM returns a RAM disk of size bytes, all zeros.
func NewRAM(size int64) *RAM { return &RAM{b: make([]byte, size)} }

// ReadAt implements Backend.
func (m *RAM) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off < 0 || off > int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements Backend.
func (m *RAM) WriteAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off < 0 || off > int64(len(m.b)) {
		return 0, io.ErrShortWrite
	}
	n := copy(m.b[off:], p)
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// Flush implements Backend.
func (m *RAM) Flush() error { return nil }

// Size implements Backend.
func (m *RAM) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.b))
}

// Discard implements Discarder: the range reads as zeros.
func (m *RAM) Discard(off, n int64) error { return m.WriteZeroes(off, n, true) }

// WriteZeroes implements ZeroWriter.
func (m *RAM) WriteZeroes(off, n int64, _ bool) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off < 0 || n < 0 || off > int64(len(m.b)) || n > int64(len(m.b))-off {
		return io.ErrShortWrite
	}
	clear(m.b[off : off+n])
	return nil
}

// Resize changes the size; tell the device with Device.Resized.
func (m *RAM) Resize(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := make([]byte, size)
	copy(b, m.b)
	m.b = b
}
