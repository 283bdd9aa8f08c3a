package virtio

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"sync/atomic"
)

// Descriptor flags (section 2.7.5).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
)

// What is wrong with a chain. The queue returns such a chain by itself, so
// these are seen only in tests.
var (
	errChainLong     = errors.New("virtio: chain is longer than the queue")
	errChainNext     = errors.New("virtio: descriptor index outside the table")
	errChainOrder    = errors.New("virtio: readable descriptor after a writable one")
	errChainEmpty    = errors.New("virtio: zero-length buffer")
	errChainBytes    = errors.New("virtio: chain holds 4 GiB or more")
	errIndirectFlags = errors.New("virtio: indirect descriptor is not allowed here")
	errIndirectSize  = errors.New("virtio: indirect table size is 0 or no multiple of 16")
)

// ErrShort says that a chain has fewer bytes than were asked for.
var ErrShort = errors.New("virtio: chain is too short")

// DescriptorChain is one request of the driver: device-readable bytes followed
// by device-writable ones. It is read and written as two byte streams, since
// the driver may split its buffers wherever it likes (section 2.7.4.2).
//
// A chain belongs to whoever got it from Queue.Next until it is pushed.
type DescriptorChain struct {
	head     uint16
	inFlight atomic.Bool
	behind   uint16   // the queue's nextAvail once it was taken
	segs     [][]byte // readable, then writable
	r        ChainReader
	w, tail  ChainWriter
}

// Head is the chain's head index, unique among the chains in flight.
func (c *DescriptorChain) Head() uint16 { return c.head }

// Reader reads the device-readable bytes. It is the same one on every call.
func (c *DescriptorChain) Reader() *ChainReader { return &c.r }

// Writer writes the device-writable bytes. It is the same one on every call.
func (c *DescriptorChain) Writer() *ChainWriter { return &c.w }

// Written is the length that goes into the used ring: the bytes written
// without a gap from the first device-writable byte on (section 2.7.8.2).
func (c *DescriptorChain) Written() uint32 {
	n := c.w.done
	if c.w.done == c.w.total {
		n += c.tail.done
	}
	return uint32(n)
}

// clear makes a chain that has nothing to read or write.
func (c *DescriptorChain) clear() {
	c.r = ChainReader{}
	c.w, c.tail = ChainWriter{}, ChainWriter{}
}

// walk collects the buffers of the chain at head. Each descriptor is read
// from guest memory exactly once.
func (q *Queue) walk(c *DescriptorChain, head uint16) error {
	c.head = head
	segs := c.segs[:0]
	table, idx, entries := q.desc, uint32(head), uint32(q.size)
	indirect := false
	readable := 0 // segments before the first writable one
	var readBytes, writeBytes uint64
	var wflag uint16
	// Buffers that lie one behind the other, as those of large pages do,
	// become one segment: the used bytes of run, up to the address end.
	var run []byte
	var used int
	var end uint64
	for count := 0; ; {
		d := table[descSize*idx:][:descSize]
		addr := binary.LittleEndian.Uint64(d)
		rest := binary.LittleEndian.Uint64(d[8:])
		n, flags, next := uint64(uint32(rest)), uint16(rest>>32), uint32(rest>>48)
		if flags&descIndirect != 0 {
			// Direct descriptors may come first, nothing may follow;
			// WRITE means nothing here (section 2.7.5.3).
			if !q.indirect || indirect || flags&descNext != 0 {
				return errIndirectFlags
			}
			if n == 0 || n%descSize != 0 {
				return errIndirectSize
			}
			t, err := q.mem.Slice(addr, n)
			if err != nil {
				return err
			}
			table, idx, entries, indirect = t, 0, uint32(n/descSize), true
			continue
		}
		if count++; count > int(q.size) {
			return errChainLong
		}
		if n == 0 {
			return errChainEmpty
		}
		if flags&descWrite < wflag {
			return errChainOrder
		}
		if wflag != flags&descWrite {
			wflag, run, used = descWrite, nil, 0 // the first writable one
		}
		if addr+n < addr {
			return ErrOutOfRange
		}
		if readBytes+writeBytes+n > math.MaxUint32 {
			return errChainBytes
		}
		if wflag != 0 {
			writeBytes += n
		} else {
			readBytes += n
		}
		for n > 0 { // a buffer may cross into an adjacent region
			if addr != end || used == len(run) {
				if run = q.mem.find(addr); run == nil {
					return ErrOutOfRange
				}
				segs, used = append(segs, nil), 0
			}
			m := min(n, uint64(len(run)-used))
			used += int(m)
			segs[len(segs)-1] = run[:used:used]
			addr, n = addr+m, n-m
			end = addr
		}
		if wflag == 0 {
			readable = len(segs)
		}
		if flags&descNext == 0 {
			break
		}
		if idx = next; idx >= entries {
			return errChainNext
		}
	}
	c.segs = segs
	c.r = ChainReader{stream{segs: segs[:readable], left: int(readBytes)}}
	c.w = ChainWriter{s: stream{segs: segs[readable:], left: int(writeBytes)}, total: int(writeBytes), tail: &c.tail}
	c.tail = ChainWriter{}
	return nil
}

// stream is a position in a list of guest buffers.
type stream struct {
	segs [][]byte
	off  int // into segs[0]
	left int // bytes until the end
}

// front returns the bytes left in the current buffer, at most n.
func (s *stream) front(n int) []byte {
	b := s.segs[0][s.off:]
	if len(b) > n {
		b = b[:n:n]
	}
	return b
}

// skip moves on by n bytes, at most left.
func (s *stream) skip(n int) {
	s.off += n
	s.left -= n
	for len(s.segs) > 0 && s.off >= len(s.segs[0]) {
		s.off -= len(s.segs[0])
		s.segs = s.segs[1:]
	}
}

func (s *stream) buffers(n int, dst [][]byte) ([][]byte, error) {
	if n < 0 || n > s.left {
		return dst, ErrShort
	}
	for n > 0 {
		b := s.front(n)
		dst = append(dst, b)
		s.skip(len(b))
		n -= len(b)
	}
	return dst, nil
}

// ChainReader reads the device-readable bytes of a chain as a stream.
type ChainReader struct{ s stream }

// Len is the number of bytes left.
func (r *ChainReader) Len() int { return r.s.left }

// Read implements io.Reader; it fills p as far as bytes are left.
func (r *ChainReader) Read(p []byte) (int, error) {
	if r.s.left == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	n := 0
	for n < len(p) && r.s.left > 0 {
		m := copy(p[n:], r.s.front(r.s.left))
		r.s.skip(m)
		n += m
	}
	return n, nil
}

// Buffers appends the guest slices of the next n bytes to dst, without
// copying them, and consumes them. With fewer than n bytes left it returns
// ErrShort and consumes nothing.
func (r *ChainReader) Buffers(n int, dst [][]byte) ([][]byte, error) { return r.s.buffers(n, dst) }

// ChainWriter writes the device-writable bytes of a chain as a stream.
type ChainWriter struct {
	s     stream
	done  int          // bytes written
	total int          // bytes there were at first
	tail  *ChainWriter // where SplitLast puts its result; nil when used up
}

// Len is the number of bytes left.
func (w *ChainWriter) Len() int { return w.s.left }

// Written is the number of bytes written so far.
func (w *ChainWriter) Written() uint32 { return uint32(w.done) }

// Write implements io.Writer. When p does not fit, it writes what does and
// returns io.ErrShortWrite.
func (w *ChainWriter) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) && w.s.left > 0 {
		m := copy(w.s.front(w.s.left), p[n:])
		w.s.skip(m)
		n += m
	}
	w.done += n
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// Buffers appends the guest slices of the next n bytes to dst and consumes
// them; they count as written. With fewer than n bytes left it returns
// ErrShort and consumes nothing.
func (w *ChainWriter) Buffers(n int, dst [][]byte) ([][]byte, error) {
	dst, err := w.s.buffers(n, dst)
	if err == nil {
		w.done += n
	}
	return dst, err
}

// Wrote consumes the next n bytes and counts them as written: they are in
// their place, put there through the Buffers of a copy of w. With fewer than n
// bytes left it returns ErrShort and consumes nothing.
func (w *ChainWriter) Wrote(n int) error {
	if n < 0 || n > w.s.left {
		return ErrShort
	}
	w.done += n
	w.s.skip(n)
	return nil
}

// Unwrite takes back the claim that the last n bytes got by Buffers were
// written. They stay consumed, so nothing may be written behind them except
// by the writer SplitLast returned.
func (w *ChainWriter) Unwrite(n int) {
	w.done = max(0, w.done-n)
}

// SplitLast cuts the last n bytes off w and returns a writer for them: a
// device writes a trailing status there before or after the data. At most one
// split is possible per chain. ErrShort if w has fewer bytes left.
func (w *ChainWriter) SplitLast(n int) (*ChainWriter, error) {
	t := w.tail
	if n <= 0 || n > w.s.left || t == nil {
		return nil, ErrShort
	}
	segs, i, need := w.s.segs, len(w.s.segs)-1, n
	for need > len(segs[i]) {
		need -= len(segs[i])
		i--
	}
	*t = ChainWriter{s: stream{segs: segs[i:], off: len(segs[i]) - need, left: n}, total: n}
	w.tail = nil
	w.s.left -= n
	w.total -= n
	return t, nil
}
