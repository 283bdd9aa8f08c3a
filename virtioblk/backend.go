package virtioblk

import "io"

// Backend is the disk behind a device. Its methods are called from many
// goroutines at a time. ReadAt and WriteAt stay inside [0, Size()).
//
// A Backend may also have any of the methods of Discarder, ZeroWriter,
// VectorReader, VectorWriter and Serialer; the device uses what it finds.
type Backend interface {
	io.ReaderAt
	io.WriterAt
	// Flush returns after everything written before it is on stable storage.
	Flush() error
	// Size is the size in bytes; the device shows whole 512-byte sectors.
	Size() int64
}

// Discarder is a Backend that can forget a range.
type Discarder interface {
	Discard(off, n int64) error
}

// ZeroWriter is a Backend that zeroes a range without being sent zeros.
// mayUnmap allows it to give up the storage behind.
type ZeroWriter interface {
	WriteZeroes(off, n int64, mayUnmap bool) error
}

// VectorReader is a Backend that reads into several buffers at once (preadv).
type VectorReader interface {
	ReadvAt(bufs [][]byte, off int64) (int, error)
}

// VectorWriter is a Backend that writes from several buffers at once (pwritev).
type VectorWriter interface {
	WritevAt(bufs [][]byte, off int64) (int, error)
}

// Serialer is a Backend that knows its serial number (at most 20 bytes).
type Serialer interface {
	Serial() string
}
