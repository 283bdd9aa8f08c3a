package guest

import (
	"io"
	"sync"
)

// pipeLimit is how many bytes a pipe holds before a writer waits.
const pipeLimit = 1 << 20

// pipe is a byte stream in memory with room. The machine's serial port writes
// into it without waiting for the consumer of the command's output, up to
// pipeLimit, and what was written can be read after Close.
type pipe struct {
	mu     sync.Mutex
	change sync.Cond
	buf    []byte
	closed bool
}

func newPipe() *pipe {
	p := &pipe{}
	p.change.L = &p.mu
	return p
}

// Write implements io.Writer. It waits while the pipe is full.
func (p *pipe) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.buf) >= pipeLimit && !p.closed {
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
func (p *pipe) Read(b []byte) (int, error) {
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

// Close ends the stream.
func (p *pipe) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.change.Broadcast()
	return nil
}
