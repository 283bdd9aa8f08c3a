package cowdisk

import "sync"

const bufBytes = 64 << 10

type buffer [bufBytes]byte

var bufPool = sync.Pool{New: func() any { return new(buffer) }}

func getBuf() *buffer  { return bufPool.Get().(*buffer) }
func putBuf(b *buffer) { bufPool.Put(b) }

// zeros is never written to.
var zeros buffer

// vector is what a vectored request needs besides its buffers; pooled, so that requests allocate nothing.
type vector struct {
	bufs [][]byte // slices of the caller's buffers for one run
	one  [1][]byte
	head [unitSize]byte // copied up before and after the caller's data
	tail [unitSize]byte
}

var vectorPool = sync.Pool{New: func() any { return &vector{bufs: make([][]byte, 0, 64)} }}

func getVector() *vector { return vectorPool.Get().(*vector) }

func (v *vector) put() {
	clear(v.bufs[:cap(v.bufs)]) // the pool must not keep the caller's buffers alive
	v.bufs = v.bufs[:0]
	v.one[0] = nil
	if cap(v.bufs) <= 4096 {
		vectorPool.Put(v)
	}
}

// cursor walks over buffers.
type cursor struct {
	bufs [][]byte
	off  int // in bufs[0]
}

// take appends slices that cover the next n bytes.
func (c *cursor) take(dst [][]byte, n int64) [][]byte {
	for n > 0 {
		b := c.bufs[0][c.off:]
		if int64(len(b)) > n {
			b = b[:n]
			c.off += int(n)
		} else {
			c.bufs, c.off = c.bufs[1:], 0
		}
		if len(b) > 0 {
			dst = append(dst, b)
		}
		n -= int64(len(b))
	}
	return dst
}

func totalLen(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// readvFull fills bufs; beyond the end of the file there are zeros. It uses bufs up.
func readvFull(f File, bufs [][]byte, off int64) error {
	for {
		bufs = advance(bufs, 0)
		if len(bufs) == 0 {
			return nil
		}
		if len(bufs) == 1 {
			return readFull(f, bufs[0], off)
		}
		n, err := f.ReadvAt(bufs, off)
		if n == 0 {
			if err != nil && !isEOF(err) {
				return err
			}
			for _, b := range bufs {
				clear(b)
			}
			return nil
		}
		bufs, off = advance(bufs, n), off+int64(n)
	}
}

// writevFull writes all of bufs. It uses bufs up.
func writevFull(f File, bufs [][]byte, off int64) error {
	for {
		bufs = advance(bufs, 0)
		if len(bufs) == 0 {
			return nil
		}
		if len(bufs) == 1 {
			return writeFull(f, bufs[0], off)
		}
		n, err := f.WritevAt(bufs, off)
		if err != nil {
			return err
		}
		if n <= 0 {
			return errShortWrite
		}
		bufs, off = advance(bufs, n), off+int64(n)
	}
}

// advance drops n bytes and empty buffers from the front.
func advance(bufs [][]byte, n int) [][]byte {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n > 0 {
		bufs[0] = bufs[0][n:]
	}
	return bufs
}
