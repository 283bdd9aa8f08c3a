package virtionet

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// A link can be in another process: Stream is its end here, Plug serves it
// there. Between them goes a length (4 bytes, big-endian) and a packet, or a
// single byte that says whether there is a link.

// wireBuffer is how many bytes wait to be written; packets beyond are lost.
const wireBuffer = 4 << 20

// wire is one end of the stream.
type wire struct {
	rw   io.ReadWriteCloser
	done chan struct{}

	mu     sync.Mutex
	more   *sync.Cond
	buf    []byte
	closed bool
}

func newWire(rw io.ReadWriteCloser) *wire {
	w := &wire{rw: rw, done: make(chan struct{})}
	w.more = sync.NewCond(&w.mu)
	go w.write()
	return w
}

// send queues a record. It never blocks.
func (w *wire) send(p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || len(w.buf)+len(p) > wireBuffer {
		return
	}
	w.buf = be.AppendUint32(w.buf, uint32(len(p)))
	w.buf = append(w.buf, p...)
	w.more.Signal()
}

// write writes what is queued, all at once.
func (w *wire) write() {
	defer close(w.done)
	var spare []byte
	for {
		w.mu.Lock()
		for len(w.buf) == 0 && !w.closed {
			w.more.Wait()
		}
		out := w.buf
		w.buf = spare[:0]
		closed := w.closed
		w.mu.Unlock()
		if closed {
			return
		}
		if _, err := w.rw.Write(out); err != nil {
			w.end()
			return
		}
		spare = out
	}
}

// read calls f for every record until the stream ends.
func (w *wire) read(f func(p []byte)) error {
	p := make([]byte, 256<<10)
	have := 0
	for {
		n, err := w.rw.Read(p[have:])
		have += n
		rest := p[:have]
		for len(rest) >= 4 {
			l := int(be.Uint32(rest))
			if l < 1 || l > HeaderSize+maxFrame {
				return fmt.Errorf("virtionet: a record of %d bytes", l)
			}
			if len(rest) < 4+l {
				break
			}
			f(rest[4 : 4+l])
			rest = rest[4+l:]
		}
		have = copy(p, rest)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (w *wire) end() {
	w.mu.Lock()
	w.closed = true
	w.more.Signal()
	w.mu.Unlock()
	w.rw.Close()
}

// Stream is a Link whose other end is served by Plug, in another process say.
// When that ends, the link is down.
type Stream struct {
	w        *wire
	offloads Offloads
	wg       sync.WaitGroup

	mu       sync.Mutex
	attached bool
	closed   bool
}

// NewStream returns a link over rw, which it closes. Offloads are those of the
// link that is plugged in there.
func NewStream(rw io.ReadWriteCloser, o Offloads) *Stream {
	return &Stream{w: newWire(rw), offloads: o}
}

// Attach implements Link.
func (s *Stream) Attach(r Receiver) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.attached || s.closed {
		return ErrAttached
	}
	s.attached = true
	s.wg.Go(func() {
		_ = s.w.read(func(p []byte) {
			if len(p) == 1 {
				r.SetLink(p[0] == 1)
				return
			}
			r.Receive(p)
		})
		r.SetLink(false)
	})
	return nil
}

// Send implements Link.
func (s *Stream) Send(packet []byte) { s.w.send(packet) }

// Offloads implements Link.
func (s *Stream) Offloads() Offloads { return s.offloads }

// Close implements Link.
func (s *Stream) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.w.end()
	<-s.w.done
	s.wg.Wait()
	return nil
}

// plugged is the device as the link that is plugged in sees it.
type plugged struct{ w *wire }

func (p plugged) Receive(packet []byte) bool {
	if len(packet) < HeaderSize+ethHeader || len(packet) > HeaderSize+maxFrame {
		return false
	}
	p.w.send(packet)
	return true
}

func (p plugged) SetLink(up bool) {
	b := []byte{0}
	if up {
		b[0] = 1
	}
	p.w.send(b)
}

// Plug serves a Stream: it plugs l in at this end of rw and returns when the
// other one ends, after closing both. What comes from there is checked as a
// guest's own packets are.
func Plug(rw io.ReadWriteCloser, l Link) error {
	w := newWire(rw)
	defer func() {
		l.Close()
		w.end()
		<-w.done
	}()
	if err := l.Attach(plugged{w}); err != nil {
		return err
	}
	o := l.Offloads()
	err := w.read(func(p []byte) {
		if len(p) < HeaderSize+ethHeader {
			return
		}
		h, ok := checkHeader(p, o, maxMTU)
		if !ok {
			return
		}
		copy(p, h[:])
		l.Send(p)
	})
	if errors.Is(err, io.ErrClosedPipe) {
		return nil
	}
	return err
}
