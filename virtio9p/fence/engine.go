package fence

import (
	"encoding/binary"
	"io"
	"sync"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
)

// engine is one run of the p9 server, from Tversion to Tversion. The server
// reads checked messages from Read and writes replies to Write.
type engine struct {
	s    *Session
	done chan struct{} // closed when the server has returned

	mu     sync.Mutex
	work   sync.Cond // queue or closed has changed
	queue  []*request
	closed bool

	// Used by Read only, which the server calls from one goroutine at a time.
	part []byte // what is left of a message

	// Used by Write only, likewise.
	rhdr  [headerLen]byte
	have  int      // bytes of rhdr
	reply *request // whom the rest of the message is for; nil discards it
	rtype uint8
	left  int // bytes of the message after its header
}

// startEngine starts a server for s, which is locked.
func startEngine(s *Session) *engine {
	e := &engine{s: s, done: make(chan struct{})}
	e.work.L = &e.mu
	server := p9.NewServer(exactAttacher{s.cfg.Attacher, s}, p9.WithServerLogger(&logger{l: s.cfg.Logger}))
	go func() {
		defer close(e.done)
		server.Handle(reader{e}, writer{e}) // always nil
		e.mu.Lock()
		unexpected := !e.closed
		e.closed = true
		e.queue = nil
		e.mu.Unlock()
		if unexpected {
			s.cfg.Logger.Error("9P server: the session ended in an unexpected way")
		}
		s.abandon()
	}()
	return e
}

// send passes r to the server; false means that the server has ended. The
// session is locked, so that abandon sees either r or nothing of it.
func (e *engine) send(r *request) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.s.inflight[r.tag] = r
	e.queue = append(e.queue, r)
	e.work.Signal()
	return true
}

// close ends the server and waits until it has closed every fid.
func (e *engine) close() {
	e.mu.Lock()
	e.closed = true
	e.work.Signal()
	e.mu.Unlock()
	<-e.done
}

// reader and writer are the two ends of the server's connection.
type (
	reader struct{ e *engine }
	writer struct{ e *engine }
)

func (r reader) Close() error { return nil }
func (w writer) Close() error { return nil }

// Read yields the messages in the order they were sent. It never returns
// (0, nil), which the server would take for the end.
func (r reader) Read(p []byte) (int, error) {
	e := r.e
	if len(e.part) == 0 {
		if err := e.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, e.part)
	e.part = e.part[n:] // its request may be answered as soon as this is empty
	return n, nil
}

// next waits for a message.
func (e *engine) next() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.queue) == 0 {
		if e.closed {
			return io.EOF
		}
		e.work.Wait()
	}
	e.part = e.queue[0].wire
	e.queue[0] = nil
	e.queue = e.queue[1:]
	if len(e.queue) == 0 {
		e.queue = nil
	}
	return nil
}

// Write takes replies, each in as many pieces as the server likes, and passes
// them on to the exchange they belong to.
func (w writer) Write(p []byte) (int, error) {
	e := w.e
	total := len(p)
	for len(p) > 0 {
		var n int
		if e.have < headerLen {
			n = copy(e.rhdr[e.have:], p)
			e.have += n
			if e.have == headerLen {
				e.begin()
			}
		} else {
			n = min(e.left, len(p))
			if e.reply != nil {
				e.reply.x.Write(p[:n])
			}
			e.left -= n
		}
		p = p[n:]
		if e.have == headerLen && e.left == 0 {
			e.have = 0
			if r := e.reply; r != nil {
				e.reply = nil
				e.s.finish(r, e.rtype)
			}
		}
	}
	return total, nil
}

// begin starts the reply whose header is complete. One that does not fit, or
// that nobody asked for, is discarded; what was asked is answered all the same.
func (e *engine) begin() {
	size := int(binary.LittleEndian.Uint32(e.rhdr[:]))
	e.left = max(size-headerLen, 0)
	e.rtype = e.rhdr[4]
	tag := binary.LittleEndian.Uint16(e.rhdr[5:])
	e.s.mu.Lock()
	r := e.s.inflight[tag]
	e.s.mu.Unlock()
	switch {
	case r == nil || r.typ == tflush:
	case r.typ == tlock && e.s.waits(r): // no reply yet
	case r.answered:
		e.s.finish(r, e.rtype)
	case size > r.room || size > int(e.s.cfg.MaxMsize):
		r.failed(linux.EMSGSIZE)
		e.s.finish(r, rlerror)
	default:
		r.x.Write(e.rhdr[:])
		e.reply = r
	}
}
