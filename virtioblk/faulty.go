package virtioblk

import "sync/atomic"

// Op names a Backend method for Faulty.
type Op string

// The operations of a Backend.
const (
	OpRead        Op = "read"
	OpWrite       Op = "write"
	OpFlush       Op = "flush"
	OpDiscard     Op = "discard"
	OpWriteZeroes Op = "write zeroes"
)

// Faulty is a Backend for tests that does something else before, or instead
// of, what it is asked for: fail, wait, count.
type Faulty struct {
	Backend
	// Before is called for every operation, from many goroutines; an error
	// is returned instead of doing the operation.
	Before func(op Op, off, n int64) error
	// Calls counts the operations so far.
	Calls atomic.Uint64
}

func (f *Faulty) before(op Op, off, n int64) error {
	f.Calls.Add(1)
	if f.Before == nil {
		return nil
	}
	return f.Before(op, off, n)
}

// ReadAt implements Backend.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) {
	if err := f.before(OpRead, off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.Backend.ReadAt(p, off)
}

// WriteAt implements Backend.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) {
	if err := f.before(OpWrite, off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.Backend.WriteAt(p, off)
}

// Flush implements Backend.
func (f *Faulty) Flush() error {
	if err := f.before(OpFlush, 0, 0); err != nil {
		return err
	}
	return f.Backend.Flush()
}

// Discard implements Discarder; it does nothing where the Backend cannot.
func (f *Faulty) Discard(off, n int64) error {
	if err := f.before(OpDiscard, off, n); err != nil {
		return err
	}
	if d, ok := f.Backend.(Discarder); ok {
		return d.Discard(off, n)
	}
	return nil
}

// WriteZeroes implements ZeroWriter.
func (f *Faulty) WriteZeroes(off, n int64, mayUnmap bool) error {
	if err := f.before(OpWriteZeroes, off, n); err != nil {
		return err
	}
	if z, ok := f.Backend.(ZeroWriter); ok {
		return z.WriteZeroes(off, n, mayUnmap)
	}
	_, err := f.Backend.WriteAt(make([]byte, n), off)
	return err
}
