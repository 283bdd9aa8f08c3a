package virtioblk

import "io"

// Backend is the disk behind a device. Its methods are called from many
// goroutines at a time, and ReadAt and WriteAt stay inside [0, Size()). The
// buffers are guest memory: they may change under the Backend's hands, and must
// not be kept.
//
// A Backend may also have any of the methods of Discarder, ZeroWriter,
// VectorReader, VectorWriter, Serialer and PendingSharer; the device uses what
// it finds.
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
// Like ReadAt it returns an error when it reads less than all of them hold.
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

// PendingSharer is a Backend that keeps in memory what it must not forget about
// completed writes before a flush has made it durable. It can keep that in
// shared memory that somebody else holds, so that it outlives this process.
type PendingSharer interface {
	// PendingLen is the number of bytes it needs; 0: nothing to share.
	PendingLen() int64
	// SharePending says where: PendingLen bytes, all zero when they are
	// fresh, else those of an earlier process, to be taken over. After
	// SharePending(nil) or an error the old ones are not used any more.
	SharePending(mem []byte) error
}

// capabilities is a Backend with its optional methods looked up once.
type capabilities struct {
	Backend
	discard Discarder
	zeroes  ZeroWriter
	readv   VectorReader
	writev  VectorWriter
	pending PendingSharer
}

func lookup(b Backend) capabilities {
	c := capabilities{Backend: b}
	c.discard, _ = b.(Discarder)
	c.zeroes, _ = b.(ZeroWriter)
	c.readv, _ = b.(VectorReader)
	c.writev, _ = b.(VectorWriter)
	c.pending, _ = b.(PendingSharer)
	return c
}

// read fills all of bufs from off on.
func (c *capabilities) read(bufs [][]byte, off int64, total int) error {
	if c.readv != nil && len(bufs) > 1 {
		n, err := c.readv.ReadvAt(bufs, off)
		return complete(n, total, err)
	}
	for _, b := range bufs {
		n, err := c.ReadAt(b, off)
		if err := complete(n, len(b), err); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// write writes all of bufs from off on.
func (c *capabilities) write(bufs [][]byte, off int64, total int) error {
	if c.writev != nil && len(bufs) > 1 {
		n, err := c.writev.WritevAt(bufs, off)
		return complete(n, total, err)
	}
	for _, b := range bufs {
		n, err := c.WriteAt(b, off)
		if err := complete(n, len(b), err); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// complete judges a transfer: io.EOF together with all bytes is a success.
func complete(n, want int, err error) error {
	switch {
	case n == want:
		return nil
	case err != nil:
		return err
	default:
		return io.ErrUnexpectedEOF
	}
}
