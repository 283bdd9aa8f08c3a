// Package pipe is a byte stream in memory, with room, between goroutines that
// must not wait for each other.
package pipe

import (
	"io"
	"sync"
	"time"
)

// Limit is how many bytes a Pipe holds before a writer waits.
const Limit = 1 << 20

// A Pipe is a byte stream in memory with room. The machine's serial port writes
// into it without waiting for the consumer of the command's output, up to
// Limit, and what was written can be read after Close.
type Pipe struct {
	mu     sync.Mutex
	change sync.Cond
	buf    []byte
	closed bool
	free   bool // writers do not wait
	hurry  int  // how often Hurry was called
}

// New returns an empty Pipe.
func New() *Pipe {
	p := &Pipe{}
	p.change.L = &p.mu
	return p
}

// Write implements io.Writer. It waits while the pipe is full.
func (p *Pipe) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.buf) >= Limit && !p.closed && !p.free {
		p.change.Wait()
	}
	if p.closed {
		return 0, io.ErrClosedPipe
	}
	p.buf = append(p.buf, b...)
	p.change.Broadcast()
	return len(b), nil
}

// Read implements io.Reader. After Close it returns what is left, then io.EOF.
func (p *Pipe) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.buf) == 0 {
		if p.closed {
			return 0, io.EOF
		}
		p.change.Wait()
	}
	n := copy(b, p.buf)
	p.buf = p.buf[n:]
	if len(p.buf) == 0 {
		p.buf = nil
	}
	p.change.Broadcast()
	return n, nil
}

// ReadSoon is Read, but after d without data it returns 0 and no error.
func (p *Pipe) ReadSoon(b []byte, d time.Duration) (int, error) {
	p.mu.Lock()
	empty := len(p.buf) == 0 && !p.closed
	if empty {
		late, hurry := false, p.hurry
		t := time.AfterFunc(d, func() {
			p.mu.Lock()
			late = true
			p.mu.Unlock()
			p.change.Broadcast()
		})
		for len(p.buf) == 0 && !p.closed && !late && p.hurry == hurry {
			p.change.Wait()
		}
		t.Stop()
		empty = len(p.buf) == 0 && !p.closed
	}
	p.mu.Unlock()
	if empty {
		return 0, nil
	}
	return p.Read(b)
}

// Hurry ends each ReadSoon that waits.
func (p *Pipe) Hurry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hurry++
	p.change.Broadcast()
}

// NoWait lets writers go beyond the limit: there will not be many more bytes.
func (p *Pipe) NoWait() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = true
	p.change.Broadcast()
}

// Close ends the stream.
func (p *Pipe) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.change.Broadcast()
	return nil
}
