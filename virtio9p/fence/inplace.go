package fence

import (
	"encoding/binary"
	"errors"
	"io"
	"sync"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
)

// Spans is an Exchange whose bytes can be had as the client's own memory.
type Spans interface {
	Exchange
	// Readable appends the next n bytes of the T-message to dst, without
	// copying them, and consumes them.
	Readable(n int, dst [][]byte) ([][]byte, error)
	// Writable appends the room for the n bytes of the reply that follow the
	// next skip bytes to dst. It consumes nothing.
	Writable(skip, n int, dst [][]byte) ([][]byte, error)
	// Wrote says that the next n bytes of the reply are in their room.
	Wrote(n int)
}

// VectorFile is what a p9.File may have so that its contents go from the file
// into the memory of a Spans exchange, or back, without a copy between. The
// methods are like ReadAt and WriteAt, with the bytes in several pieces; a
// short count is no error.
type VectorFile interface {
	ReadvAt(bufs [][]byte, off int64) (int, error)
	WritevAt(bufs [][]byte, off int64) (int, error)
}

// ResidentFile is what a VectorFile may have so that a read of what is in the
// host's memory anyway costs no change of goroutines.
type ResidentFile interface {
	// ReadvResident fills bufs from off. It does not wait for a disk or a
	// network: it reports false then, or when there are fewer bytes, and may
	// have filled a part.
	ReadvResident(bufs [][]byte, off int64) bool
}

// lists are for the pieces of one message.
var lists = sync.Pool{New: func() any { l := make([][]byte, 0, 136); return &l }}

// asked is the request that the server makes a call for. A Tread or Twrite is
// passed on with its tag in place of the offset (see clamp).
func (s *Session) asked(token int64) *request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inflight[uint16(token)]
}

// ReadAt serves a Tread. If it can, it writes the whole reply, and what the
// server makes of the call is discarded; else it fills p, as the server means it.
func (f exactFile) ReadAt(p []byte, token int64) (int, error) {
	r := f.s.asked(token)
	if r == nil || r.typ != tread {
		return 0, linux.EIO
	}
	if r.readInPlace(f.File) {
		if v, ok := f.File.(ResidentFile); ok {
			f.s.allowed(r.fids[0], v)
		}
		return 0, nil
	}
	n, err := f.File.ReadAt(p, r.off)
	return n, exact(err)
}

// allowed notes that the server lets fid be read. It would again: what it looks
// at does not change before the fid is closed.
func (s *Session) allowed(fid uint32, v ResidentFile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readers[fid] = v
}

// readResident answers a Tread at once if that can be done. No message that
// ends the fid can come in meanwhile, since r itself is still being submitted.
func (s *Session) readResident(r *request) bool {
	s.mu.Lock()
	v, busy := s.readers[r.fids[0]], s.inflight[r.tag] != nil
	s.mu.Unlock()
	x, hasSpans := r.x.(Spans)
	if v == nil || busy || !hasSpans {
		return false
	}
	list := lists.Get().(*[][]byte)
	bufs, err := x.Writable(payloadHdr, r.count, (*list)[:0])
	defer giveBack(list, &bufs)
	if err != nil || !v.ReadvResident(bufs, r.off) {
		return false
	}
	r.wrote(x, r.count)
	x.Done()
	return true
}

// wrote makes an Rread of n bytes that are in their place.
func (r *request) wrote(x Spans, n int) {
	var b [payloadHdr]byte
	putHeader(b[:], payloadHdr+n, rread, r.tag)
	binary.LittleEndian.PutUint32(b[headerLen:], uint32(n))
	x.Write(b[:])
	x.Wrote(n)
}

// giveBack returns a list to the pool, which must not keep what was in it.
func giveBack(list, used *[][]byte) {
	clear(*used)
	*list = (*used)[:0]
	lists.Put(list)
}

func (r *request) readInPlace(file p9.File) bool {
	v, isVector := file.(VectorFile)
	x, hasSpans := r.x.(Spans)
	if !isVector || !hasSpans {
		return false
	}
	list := lists.Get().(*[][]byte)
	bufs, err := x.Writable(payloadHdr, r.count, (*list)[:0])
	defer giveBack(list, &bufs)
	if err != nil {
		return false // clamp has seen to it that this does not happen
	}
	r.answered = true
	n, err := 0, error(linux.EFAULT) // what a panic leaves
	defer func() {
		if n > 0 || err == nil || errors.Is(err, io.EOF) {
			r.wrote(x, n)
		} else {
			r.failed(err)
		}
	}()
	n, err = v.ReadvAt(bufs, r.off)
	n = max(0, min(n, r.count))
	return true
}

// WriteAt serves a Twrite, whose data the server has not been given.
func (f exactFile) WriteAt(_ []byte, token int64) (int, error) {
	r := f.s.asked(token)
	if r == nil || r.typ != twrite {
		return 0, linux.EIO
	}
	v, isVector := f.File.(VectorFile)
	x, hasSpans := r.x.(Spans)
	if !isVector || !hasSpans {
		b := make([]byte, r.count)
		if _, err := io.ReadFull(r.x, b); err != nil {
			return 0, linux.EIO
		}
		n, err := f.File.WriteAt(b, r.off)
		return n, exact(err)
	}
	list := lists.Get().(*[][]byte)
	bufs, err := x.Readable(r.count, (*list)[:0])
	defer giveBack(list, &bufs)
	if err != nil {
		return 0, linux.EIO
	}
	n, err := v.WritevAt(bufs, r.off)
	return max(0, min(n, r.count)), exact(err)
}
