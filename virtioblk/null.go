package virtioblk

// Null is a Backend of the given size in bytes that reads whatever is in the
// buffer already and forgets what is written: the cost of everything else.
type Null int64

// ReadAt implements Backend.
func (Null) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

// WriteAt implements Backend.
func (Null) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// Flush implements Backend.
func (Null) Flush() error { return nil }

// Size implements Backend.
func (n Null) Size() int64 { return int64(n) }
